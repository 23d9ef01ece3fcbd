"""VisionZip (Yang et al., CVPR 2025): salient tokens are kept, the rest merged into a few evenly spread ones."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from saccade.reducers.common import (
    add_own,
    best_first,
    check_number,
    chosen_mask,
    mask_to_index,
    merge_needs,
    row_budget,
)
from saccade.reducers.registry import register_reducer
from saccade.reducers.similarity import nearest_kept
from saccade.tokens import Reduction, VisualContext


@register_reducer("visionzip")
@dataclass(frozen=True)
class VisionZip:
    """Keeps the most salient tokens and merges the others into a few evenly spread targets.

    Of k tokens, k - c are *dominant*: those with the highest encoder attention (mean over heads; the published sum
    ranks the same). Of the R others, in raster order, every floor(R / c)-th is a *contextual* target, and each
    remaining token is assigned to the target whose head-mean key has the highest cosine with its own. A target becomes
    x_target + mean of the assigned x: it **adds**, as published, so the norm of a contextual token about doubles.

    Three things differ from the published code. It keeps the class token as a dominant one; LLaVA's language model has
    never seen it and it has no place in the raster, so here all dominant tokens are patches. It appends the contextual
    tokens at the end; here every token stays at its own place in raster order. And it merges before the projector, as
    `merge="encoder"` does here.

    Args:
        contextual: share of the kept tokens that are contextual, in [0, 1); at least one token is dominant. 10 of 64,
            as published.
        merge: "projected" merges the features that the language model would receive; "encoder" merges before the
            projector, which is then run on the sums, as published. The latter needs a family that projects tokens one
            by one.
    """

    contextual: float = 10 / 64
    merge: str = "projected"
    needs: ClassVar[frozenset[str]] = frozenset({"saliency", "keys"})

    def __post_init__(self) -> None:
        check_number("visionzip", "contextual", self.contextual, "[0, 1)")
        object.__setattr__(self, "needs", merge_needs("visionzip", self.merge, self.needs))

    @torch.no_grad()
    def __call__(self, context: VisualContext, keep: int | Tensor) -> Reduction:
        """Index `(B, K)` and float32 weight `(B, K, N)`. Time O(C N Dk) per row with C contextual tokens."""
        budget = row_budget(context, keep)
        tokens = context.shape[1]
        contextual = (budget.counts.double() * self.contextual + 0.5).long()
        contextual = torch.minimum(contextual, (budget.counts - 1).clamp(min=0))
        order = best_first(context.saliency.float(), context, budget.width)
        dominant = chosen_mask(order, budget.counts - contextual, tokens)
        rest = context.valid & ~dominant
        target = evenly_spread(rest, contextual)
        index = mask_to_index(dominant | target, budget.width)

        before = self.merge == "encoder"
        most = min(int(budget.width * self.contextual + 0.5), max(budget.width - 1, 0))  # C, contextual tokens
        weight = context.features.new_zeros(*index.shape, tokens, dtype=torch.float32)  # (B, K, N)
        if most == 0:
            return Reduction(index, add_own(weight, index), dense=budget.uniform, before_projector=before)
        places = mask_to_index(target, most)
        best = nearest_kept(context.keys, places, context)  # (B, N), which of the targets
        # A target's place among the kept tokens, which are in raster order.
        slot = (dominant | target).cumsum(dim=1).gather(1, places.clamp(min=0)).gather(1, best) - 1
        merged = rest & ~target & (contextual > 0).unsqueeze(1)
        slot = slot.clamp(min=0)
        size = torch.zeros_like(index).scatter_add_(1, slot, merged.long())
        share = merged / size.gather(1, slot).clamp(min=1)
        weight.scatter_(1, slot.unsqueeze(1), share.unsqueeze(1))
        return Reduction(index, add_own(weight, index), dense=budget.uniform, before_projector=before)


def evenly_spread(candidates: Tensor, counts: Tensor) -> Tensor:
    """Pick `counts` (long `(B,)`) of each row's R candidates `(B, N)`, every floor(R / count)-th: bool `(B, N)`."""
    counts = counts.unsqueeze(1)
    available = candidates.sum(dim=1, keepdim=True)
    stride = (available // counts.clamp(min=1)).clamp(min=1)
    rank = candidates.cumsum(dim=1) - 1
    return candidates & (rank % stride == 0) & (rank // stride < counts)
