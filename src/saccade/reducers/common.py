"""What reducers share: budgets per row, ranks among the valid tokens, ascending indices.

Shapes: B rows of N tokens, of which at most K are kept.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from saccade.errors import SaccadeError
from saccade.reducers.registry import PROJECTION
from saccade.tokens import Reduction, VisualContext
from saccade.values import check_choice, is_number

CPU_CACHED_ELEMENTS = 2**20  # about one LLaVA-1.5 image: fits a core's cache, a fifth faster than all at once
GPU_ELEMENTS = 2**27  # a gigabyte of float64
GPU_CONVERTED_ELEMENTS = 2**25
MERGES = ("projected", "encoder")
INTERVALS: dict[str, Callable[[float], bool]] = {
    "[0, 1]": lambda value: 0 <= value <= 1,
    "[0, 1)": lambda value: 0 <= value < 1,
    "(0, 1]": lambda value: 0 < value <= 1,
    "[0, inf)": lambda value: 0 <= value < math.inf,
    "(0, inf)": lambda value: 0 < value < math.inf,
}


@dataclass(frozen=True)
class Budget:
    """How many tokens each row keeps.

    Args:
        width: K, the width of the reduction; no row keeps more.
        counts: long `(B,)`, the number of tokens each row keeps, at most its number of valid tokens.
        available: long `(B,)`, each row's number of valid tokens.
        uniform: whether every row is known to keep exactly K.
    """

    width: int
    counts: Tensor
    available: Tensor
    uniform: bool

    def select_rows(self, rows: slice) -> "Budget":
        """The budget of the given rows, with the same width."""
        return replace(self, counts=self.counts[rows], available=self.available[rows])


def row_budget(context: VisualContext, keep: int | Tensor) -> Budget:
    """Clamp `keep` to at least one token and at most the row's number of valid tokens.

    A tensor of budgets is copied to the host, since the width of the result depends on it; an int needs no copy.

    Raises:
        SaccadeError: if `keep` is neither an int nor a long `(B,)`.
    """
    rows, tokens, _ = context.shape
    device = context.features.device
    if context.dense:
        available = torch.full((rows,), tokens, dtype=torch.long, device=device)
    else:
        available = context.valid.sum(dim=1)
    if isinstance(keep, Tensor):
        if tuple(keep.shape) != (rows,) or keep.is_floating_point() or keep.dtype == torch.bool:
            raise SaccadeError(
                f"keep is {keep.dtype} of shape {tuple(keep.shape)}: expected an int or a long tensor ({rows},)"
            )
        counts = torch.minimum(keep.to(device).long().clamp(min=1), available)
        least, most = torch.stack(counts.aminmax()).tolist() if rows else (0, 0)
        return Budget(most, counts, available, uniform=least == most)
    if isinstance(keep, bool) or not isinstance(keep, int):
        raise SaccadeError(f"keep={keep!r}: expected an int or a long tensor ({rows},)")
    width = min(max(keep, 1), tokens)
    return Budget(width, available.clamp(max=width), available, uniform=context.dense)


def nothing_kept(context: VisualContext, budget: Budget) -> Reduction:
    """The reduction of a batch without rows, or whose rows are all empty."""
    return Reduction(torch.zeros_like(context.valid[:, : budget.width], dtype=torch.long), dense=True)


def merge_needs(name: str, merge: str, needs: frozenset[str]) -> frozenset[str]:
    """`needs`, extended by what merging before the projector (`merge="encoder"`) requires.

    Raises:
        SaccadeError: if `merge` is neither "projected" nor "encoder"; the message names the reducer.
    """
    check_choice(f"reducer {name!r}: merge", merge, MERGES)
    return needs | {"encoder_features", PROJECTION} if merge == "encoder" else needs


def check_number(name: str, field: str, value: Any, interval: str) -> None:
    """Refuse what is not a number in one of `INTERVALS`."""
    if not is_number(value) or not INTERVALS[interval](value):
        raise SaccadeError(f"reducer {name!r}: {field}={value!r} is outside {interval}")


def check_integer(name: str, field: str, value: Any, least: int) -> None:
    """Refuse what is not an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise SaccadeError(f"reducer {name!r}: {field}={value!r} is not an integer of at least {least}")


def float64_home(x: Tensor) -> Tensor:
    """`x` on a device that has float64, which MPS has not."""
    return x.cpu() if x.device.type == "mps" else x


def rows_at_once(rows: int, elements: int, device: torch.device, on_gpu: int = GPU_CONVERTED_ELEMENTS) -> int:
    """How many of `rows`, each of `elements` numbers, to work on at a time; at least one.

    Args:
        on_gpu: how many elements a GPU may be given at once; a CPU gets as many as fit a core's cache.
    """
    limit = CPU_CACHED_ELEMENTS if device.type == "cpu" else on_gpu
    return max(1, min(rows, limit // max(1, elements)))


def by_rows(
    reduce: Callable[[VisualContext, Budget], Reduction], context: VisualContext, budget: Budget, elements: int
) -> Reduction:
    """`reduce(context, budget)`; on a CPU a few rows at a time, so that the working set stays in a core's cache.

    A GPU gets as many rows as fit a fixed share of memory, since there the number of kernel launches dominates.

    Args:
        elements: how many numbers `reduce` works on per row.
    """
    rows = context.shape[0]
    if budget.width == 0 or rows == 0:
        return nothing_kept(context, budget)
    step = rows_at_once(rows, elements, context.features.device, GPU_ELEMENTS)
    if step >= rows:
        return reduce(context, budget)
    index, weight, dense, before = None, None, True, False
    for start in range(0, rows, step):
        taken = slice(start, start + step)
        part = reduce(context.select_rows(taken), budget.select_rows(taken))
        # Copied and released at once, so that the next part reuses memory that is still in the cache.
        if index is None:
            index = part.index.new_empty(rows, *part.index.shape[1:])
            weight = None if part.weight is None else part.weight.new_empty(rows, *part.weight.shape[1:])
        index[taken] = part.index
        if weight is not None:
            weight[taken] = part.weight
        dense, before = dense and part.dense, part.before_projector
    return Reduction(index, weight, dense=dense, before_projector=before)


def valid_rank(context: VisualContext) -> Tensor:
    """Each token's rank among its row's valid tokens, counted from 0: long `(B, N)`, meaningless on padding."""
    rows, tokens, _ = context.shape
    if context.dense:
        return torch.arange(tokens, device=context.features.device).expand(rows, tokens)
    return context.valid.cumsum(dim=1) - 1


def ascending(candidates: Tensor, budget: Budget, tokens: int) -> Tensor:
    """Each row's first `budget.counts` candidates `(B, K)` in raster order, then -1: long `(B, K)`."""
    if budget.uniform:
        return candidates.sort(dim=1).values
    place = torch.arange(candidates.shape[1], device=candidates.device)
    chosen = torch.where(place < budget.counts.unsqueeze(1), candidates, tokens).sort(dim=1).values
    return chosen.masked_fill(chosen == tokens, -1)


def best_first(score: Tensor, context: VisualContext, count: int) -> Tensor:
    """The `count` tokens with the highest `score` `(B, N)`, best first: long `(B, min(count, N))`.

    Equal scores come in raster order, wherever the padding is, and padding comes last.
    """
    # A score of -inf on a real token must still come before padding, and a sort would put NaN first.
    score = score if score.dtype == torch.float64 else score.float()
    lowest = torch.finfo(score.dtype).min
    score = score.nan_to_num(nan=lowest, neginf=lowest)
    if not context.dense:
        score = score.masked_fill(~context.valid, -torch.inf)
    if score.dtype == torch.float64:
        return score.sort(dim=1, descending=True, stable=True).indices[:, :count]
    # Read as an integer, the bits of a float are ordered as the floats are, once those of negative floats are flipped
    # (and -0 is made 0). With the position in the low bits no two keys are equal, so `topk` has no ties to break: a
    # quarter of a stable sort's time.
    bits = (score + 0.0).view(torch.int32)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    place = torch.arange(score.shape[1], device=score.device)
    return ((key.long() << 32) - place).topk(min(count, score.shape[1]), dim=1).indices


def leftover_scores(context: VisualContext, quality: Tensor | None) -> Tensor:
    """A score below 1 for tokens that add nothing: by `quality`, then raster order. `(B, N)`, -inf on padding."""
    rows, tokens, _ = context.shape
    place = torch.arange(tokens, device=context.features.device).expand(rows, tokens)
    if quality is not None:
        place = quality.sort(dim=1, descending=True, stable=True).indices.argsort(dim=1)
    score = -place.float()
    return score if context.dense else score.masked_fill(~context.valid, -torch.inf)


def chosen_mask(candidates: Tensor, counts: Tensor | int, tokens: int) -> Tensor:
    """bool `(B, N)`, true on the first `counts` (an int or long `(B,)`) of each row's `candidates` `(B, K)`."""
    place = torch.arange(candidates.shape[1], device=candidates.device)
    first = place < (counts.unsqueeze(1) if isinstance(counts, Tensor) else counts)
    mask = torch.zeros(candidates.shape[0], tokens, dtype=torch.bool, device=candidates.device)
    return mask.scatter(1, candidates, first.expand_as(candidates))


def mask_to_index(mask: Tensor, width: int) -> Tensor:
    """The true columns of `mask` `(B, N)`, at most `width` per row, ascending, then -1: long `(B, width)`."""
    rows, tokens = mask.shape
    slot = torch.where(mask, mask.cumsum(dim=1) - 1, width)
    columns = torch.arange(tokens, device=mask.device).expand(rows, tokens)
    index = torch.full((rows, width + 1), -1, dtype=torch.long, device=mask.device)
    return index.scatter_(1, slot, columns)[:, :width].contiguous()


def add_own(weight: Tensor, index: Tensor) -> Tensor:
    """Set each kept token's weight for itself in `weight` `(B, K, N)` to 1, in place; padding is unchanged."""
    if weight.shape[2] == 0:
        return weight
    own = index.clamp(min=0).unsqueeze(2)
    return weight.scatter_(2, own, torch.where(index.unsqueeze(2) < 0, weight.gather(2, own), 1.0))


def scale_per_row(values: Tensor, context: VisualContext) -> Tensor:
    """`values` `(B, N)` scaled to [0, 1] over each row's valid tokens; 1 where they are all equal, and on padding."""
    if values.numel() == 0:
        return values
    low, high = values, values
    if not context.dense:
        low = values.masked_fill(~context.valid, torch.inf)
        high = values.masked_fill(~context.valid, -torch.inf)
    low, high = low.amin(dim=1, keepdim=True), high.amax(dim=1, keepdim=True)
    span = high - low
    scaled = torch.where(span > 0, (values - low) / span, 1.0)
    return scaled if context.dense else scaled.masked_fill(~context.valid, 1.0)
