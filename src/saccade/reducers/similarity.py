"""Cosine similarities of the tokens of a row, and how ties among them are broken.

Every method that compares tokens uses these functions, so that the choice between equally good tokens never depends on
the other rows of the batch, on padding or on the device's order of summation.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from saccade.errors import SaccadeError
from saccade.reducers.common import float64_home, rows_at_once
from saccade.tokens import VisualContext

TIE = 2.0**-44
"""Handicap per token in raster order that makes the first of equal scores win: above the rounding errors of float64
cosines (about 1e-15), below the resolution of float32 for up to a million tokens (2**20 * TIE)."""
FLOAT32_TIE = 2.0**-18
"""How close two cosines computed in float32 have to be to count as equal: rounding errors are a tenth of that."""
CPU_BLOCKS, CPU_LEAST_BLOCK = 4, 96  # blocks per side of a symmetric product: of 4 x 4, 10 are computed


def check_precision(name: str, precision: str) -> None:
    """Check the `precision` option of a reducer."""
    if precision not in ("float64", "float32"):
        raise SaccadeError(f"reducer {name!r}: precision={precision!r} is neither 'float64' nor 'float32'")


def cosine_similarity(x: Tensor, context: VisualContext, precision: str = "float64") -> Tensor:
    """Cosine similarity of each pair of a row's tokens: `(B, N, N)` in `precision`.

    A zero token, like padding, has similarity 0 with every token, itself included. Non-finite components count as
    zero: an overflow in the tower must not make a reducer keep a token twice.

    The order in which a matrix product sums depends on its shape, so the last digits of a row's result depend on its
    batch, and would decide ties. In float64, equal similarities differ by far less than `TIE`, so a small term per
    token breaks ties and changes nothing else; in float32 they differ by less than `FLOAT32_TIE`.

    Args:
        x: `(B, N, D)`, any dtype; values on padding do not matter.
        context: tells which tokens are padding.
        precision: "float64" or "float32". The latter is raised to float64 if `x` is float64, and if float32 products
            are configured to use TF32 or bfloat16, which are up to a thousand times coarser.
    """
    rows, tokens, width = x.shape
    if not context.dense:
        x = x.masked_fill(~context.valid.unsqueeze(2), 0)
    narrow = precision == "float32" and x.dtype != torch.float64 and products_are_exact(x.device)
    x = x if narrow else float64_home(x)
    dtype = torch.float32 if narrow else torch.float64
    smallest = torch.finfo(dtype).tiny
    products = torch.empty(rows, tokens, tokens, dtype=dtype, device=x.device)
    # A few rows at a time: on a CPU as many as fit a core's cache, so that memory is read and written once.
    step = rows_at_once(rows, tokens * width, x.device)
    buffer = torch.empty(step, tokens, width, dtype=dtype, device=x.device)
    for start in range(0, rows, step):
        chunk = _finite(buffer[: min(step, rows - start)].copy_(x[start : start + step]))
        if narrow and width:  # squares may overflow float32: scale the largest component to 1 first
            low, high = chunk.amin(dim=2, keepdim=True), chunk.amax(dim=2, keepdim=True)
            chunk.div_(torch.maximum(high, -low).clamp_(min=smallest))
        chunk.div_(torch.linalg.vector_norm(chunk, dim=2, keepdim=True).clamp_(min=smallest))
        _multiply(chunk, products[start : start + step])
    return products


def _multiply(x: Tensor, out: Tensor) -> None:
    """`x @ x^T` of `x` `(b, N, D)` into `out` `(b, N, N)`.

    On a CPU this is bound by arithmetic and extra calls are cheap, so only the blocks on and above the diagonal are
    computed, and the others copied.
    """
    tokens = x.shape[1]
    if x.device.type != "cpu" or tokens < CPU_BLOCKS * CPU_LEAST_BLOCK:
        # With `out=`, autocast does not change the dtype of the product.
        torch.bmm(x, x.transpose(1, 2), out=out)
        return
    edge = -(-tokens // CPU_BLOCKS)
    for image, target in zip(x, out, strict=True):
        for start in range(0, tokens, edge):
            stop = start + edge
            torch.mm(image[start:stop], image[start:].T, out=target[start:stop, start:])
            target[stop:, start:stop] = target[start:stop, stop:].T


def products_are_exact(device: torch.device) -> bool:
    """Whether float32 matrix products on `device` are computed in float32, not in TF32 or bfloat16."""
    backend = {"cuda": torch.backends.cuda, "cpu": torch.backends.mkldnn}.get(device.type)
    settings = getattr(backend, "matmul", None)
    precision = getattr(settings, "fp32_precision", None)
    if precision is None:  # before torch 2.9
        return not getattr(settings, "allow_tf32", False)
    if precision == "none":  # falls back to the setting for all operations
        precision = getattr(torch.backends, "fp32_precision", "none")
    return precision in ("ieee", "none")


def cosines_by_rows(x: Tensor, index: Tensor, context: VisualContext, ties: int) -> Iterator[tuple[slice, Tensor]]:
    """The rows `index` (long `(B, K)`, -1 on padding) of `cosine_similarity(x, context)`, for a few images at a time.

    Yields a slice of the images and their values, float64 `(b, K, N)`, which the next iteration overwrites, so use
    them at once; on a CPU they are still in the cache. A value is 2 plus the cosine, minus the tie term: the bits of
    positive floats, read as integers, have the same order and are faster to compare.

    Args:
        ties: the dimension, 1 or 2, along which the first of equals wins by means of the tie term.
    """
    rows, tokens, width = x.shape
    if not context.dense:
        x = x.masked_fill(~context.valid.unsqueeze(2), 0)
    x = float64_home(x)
    index = index.to(x.device)
    step = rows_at_once(rows, tokens * max(width, index.shape[1]), x.device)
    similarity = torch.empty(step, index.shape[1], tokens, dtype=torch.float64, device=x.device)
    terms = tie_terms(index.shape[1] if ties == 1 else tokens, x.device)
    for taken, unit in _unit_vectors(x, step, spare=1):
        picked = unit.gather(1, index[taken].clamp(min=0).unsqueeze(2).expand(-1, -1, width + 1))
        # An extra component of both adds this term within the product, which saves a pass over the result.
        picked[..., width], unit[..., width] = (2 - terms, 1.0) if ties == 1 else (1.0, 2 - terms)
        # With `out=`, autocast does not change the dtype of the product.
        yield taken, torch.bmm(picked, unit.transpose(1, 2), out=similarity[: len(unit)])


def nearest_kept(x: Tensor, index: Tensor, context: VisualContext) -> Tensor:
    """Which token of `index` (long `(B, K)`, -1 on padding) each token has the highest cosine with: long `(B, N)`.

    Ties go to the first.
    """
    nearest = torch.empty(x.shape[:2], dtype=torch.long, device=index.device)
    absent = (index < 0).unsqueeze(2)
    for taken, similarity in cosines_by_rows(x, index, context, ties=1):
        similarity.masked_fill_(absent[taken].to(similarity.device), -torch.inf)
        # `max` also returns the first of equals, in a third of the time of `argmax`.
        nearest[taken] = similarity.max(dim=1).indices.to(nearest.device)
    return nearest


def mean_cosine(x: Tensor, context: VisualContext) -> Tensor:
    """Sum of each token's cosines with the other tokens of its row, divided by N: float64 `(B, N)`.

    With unit vectors u the sum is u_i . (sum_j u_j) - u_i . u_i, so no `(B, N, N)` matrix is needed. Dividing by N
    keeps the order and keeps rounding errors below `TIE`.
    """
    rows, tokens, _ = x.shape
    if not context.dense:
        x = x.masked_fill(~context.valid.unsqueeze(2), 0)
    x = float64_home(x)
    mean = torch.empty(rows, tokens, dtype=torch.float64, device=x.device)
    for taken, unit in _unit_vectors(x, rows_at_once(rows, tokens * x.shape[2], x.device)):
        total = torch.bmm(unit, unit.sum(dim=1).unsqueeze(2)).squeeze(2)
        mean[taken] = (total - torch.linalg.vector_norm(unit, dim=2).square()) / max(tokens, 1)
    return mean


def _unit_vectors(x: Tensor, step: int, spare: int = 0) -> Iterator[tuple[slice, Tensor]]:
    """`step` rows of `x` `(B, N, D)` at a time, and their unit vectors: float64 `(b, N, D)`, zeros where x is zero.

    The vectors are followed by `spare` uninitialised components for the caller: `(b, N, D + spare)`. All iterations
    share one buffer: allocating memory costs a CPU more than the arithmetic.
    """
    rows, tokens, width = x.shape
    buffer = torch.empty(step, tokens, width + spare, dtype=torch.float64, device=x.device)
    for start in range(0, rows, step):
        chunk = buffer[: min(step, rows - start)]
        unit = _finite(chunk[..., :width].copy_(x[start : start + step]))
        length = torch.linalg.vector_norm(unit, dim=2, keepdim=True)
        unit.div_(length.clamp_(min=torch.finfo(torch.float64).tiny))
        yield slice(start, start + step), chunk


def _finite(x: Tensor) -> Tensor:
    return x.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)


def tie_terms(tokens: int, device: torch.device) -> Tensor:
    """`TIE` times the token's index, float64 `(N,)`: subtracted from a score, it makes the first of equals win."""
    return torch.arange(tokens, dtype=torch.float64, device=device) * TIE
