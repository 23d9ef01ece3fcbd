"""DivPrune (Alvar et al., CVPR 2025): the subset whose closest two tokens are farthest apart."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from saccade.errors import SaccadeError
from saccade.reducers.common import ascending, row_budget, unit_vectors
from saccade.reducers.registry import register_reducer
from saccade.tokens import Reduction, VisualContext

TIE = 2.0**-44
"""How much less similar a token counts than the next one in raster order: above the rounding errors of float64 cosines
(about 1e-15), below the resolution of float32 for up to a million tokens (2**20 * TIE)."""
CHUNK_ELEMENTS = 2**25


@register_reducer("divprune")
@dataclass(frozen=True)
class DivPrune:
    """Keeps diverse tokens: greedy farthest-point selection by cosine distance d = 1 - cos.

    Maximises min over kept i != j of d_ij, greedily: first argmax_i min_{j != i} d_ij, then again and again the token
    whose nearest kept token is farthest, argmax_{i not kept} min_{j kept} d_ij. A zero token has cosine 0 with every
    other. Of tokens that tie, the first in raster order is taken.

    The order in which a float32 matrix product sums depends on the shapes, and whether it may round to TF32 on global
    flags; on ties either would let a row's batch mates decide. So similarities are computed in float64 and ties broken
    by a term that is larger than float64's rounding errors and smaller than what float32 resolves.

    Args:
        precision: "float64", or "float32" for devices with slow float64 (most but data-center GPUs, and CPUs): the
            product takes about half the time on a CPU, and near ties may then fall differently from device to device.
    """

    precision: str = "float64"
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        if self.precision not in ("float64", "float32"):
            raise SaccadeError(f"reducer 'divprune': precision={self.precision!r} is neither 'float64' nor 'float32'")

    @torch.no_grad()
    def __call__(self, context: VisualContext, keep: int | Tensor) -> Reduction:
        """Index `(B, K)` of the selected tokens. Time O(N^2 D + K N) a row, memory O(N^2)."""
        budget = row_budget(context, keep)
        rows, tokens, _ = context.shape
        device = context.features.device
        if budget.width == 0 or rows == 0:
            return Reduction(torch.zeros(rows, budget.width, dtype=torch.long, device=device), dense=True)
        similarity = _ranked_similarity(context, self.precision)
        diagonal = similarity.diagonal(dim1=1, dim2=2)

        diagonal.fill_(-torch.inf)
        if not context.dense:
            similarity.masked_fill_(~context.valid.unsqueeze(2), -torch.inf)
        nearest = similarity.amax(dim=1)
        # From here on a token's similarity to itself is infinite: what is kept is never chosen again.
        diagonal.fill_(torch.inf)
        if not context.dense:
            nearest.masked_fill_(~context.valid, torch.inf)
        chosen = [nearest.argmin(dim=1, keepdim=True)]
        padding = None if context.dense else torch.where(context.valid, -torch.inf, torch.inf).to(nearest.dtype)
        for _ in range(budget.width - 1):
            newest = similarity.gather(1, chosen[-1].unsqueeze(2).expand(-1, -1, tokens)).squeeze(1)
            if len(chosen) == 1:
                nearest = newest if padding is None else torch.maximum(newest, padding)
            else:
                torch.maximum(nearest, newest, out=nearest)
            chosen.append(nearest.argmin(dim=1, keepdim=True))
        index = torch.cat(chosen, dim=1).to(device)
        return Reduction(ascending(index, budget, tokens), dense=budget.uniform)


def _ranked_similarity(context: VisualContext, precision: str) -> Tensor:
    """float64 `(B, N, N)`: cosine similarity plus TIE times the column: of equals, the first is smallest."""
    rows, tokens, width = context.shape
    features = context.features if context.dense else context.features.masked_fill(~context.valid.unsqueeze(2), 0)
    if features.device.type == "mps":  # has no float64
        features = features.cpu()
    similarity = torch.empty(rows, tokens, tokens, dtype=torch.float64, device=features.device)
    step = max(1, CHUNK_ELEMENTS // max(1, tokens * width))
    for start in range(0, rows, step):
        chunk = features[start : start + step]
        if precision == "float64":
            chunk = chunk.to(torch.float64)
            torch.bmm(chunk, chunk.transpose(1, 2), out=similarity[start : start + step])
            continue
        with torch.autocast(chunk.device.type, enabled=False):
            chunk = unit_vectors(chunk)
            similarity[start : start + step] = torch.bmm(chunk, chunk.transpose(1, 2))
    # The diagonal holds the squared lengths, so nothing of width D needs a second pass.
    length = similarity.diagonal(dim1=1, dim2=2).sqrt().clamp_(min=torch.finfo(torch.float64).tiny)
    similarity.div_(length.unsqueeze(1)).div_(length.unsqueeze(2))
    return similarity.add_(torch.arange(tokens, dtype=torch.float64, device=features.device) * TIE)
