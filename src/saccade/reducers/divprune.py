"""DivPrune (Alvar et al., CVPR 2025): the subset whose two closest tokens are as far apart as possible."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from saccade.reducers.common import ascending, nothing_kept, row_budget
from saccade.reducers.registry import register_reducer
from saccade.reducers.similarity import FLOAT32_TIE, TIE, check_precision, cosine_similarity
from saccade.tokens import Reduction, VisualContext


@register_reducer("divprune")
@dataclass(frozen=True)
class DivPrune:
    """Keeps diverse tokens: greedy farthest-point selection by cosine distance d = 1 - cos.

    Greedily maximises the minimum of d_ij over kept i != j: first argmax_i min_{j != i} d_ij, then repeatedly the
    token whose nearest kept token is farthest away, argmax_{i not kept} min_{j kept} d_ij. A zero token has cosine 0
    with every other. Ties go to the first token in raster order.

    Distances that differ by no more than a bound above rounding error count as equal: 2^-18 in float32, 2^-44 in
    float64. So raster order decides among equals, not the device's order of summation, which depends on the batch.

    Args:
        precision: of the similarities: "float32", or "float64", which takes about half as long again on a CPU and far
            longer on GPUs with slow float64 arithmetic.
    """

    precision: str = "float32"
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        check_precision("divprune", self.precision)

    @torch.no_grad()
    def __call__(self, context: VisualContext, keep: int | Tensor) -> Reduction:
        """Index `(B, K)` of the selected tokens. Time O(N^2 D + K N) per row, memory O(N^2)."""
        budget = row_budget(context, keep)
        rows, tokens, _ = context.shape
        device = context.features.device
        if budget.width == 0 or rows == 0:
            return nothing_kept(context, budget)
        similarity = cosine_similarity(context.features, context, self.precision)
        window = FLOAT32_TIE if similarity.dtype == torch.float32 else TIE
        valid = context.valid.to(similarity.device)
        diagonal = similarity.diagonal(dim1=1, dim2=2)

        diagonal.fill_(-torch.inf)
        if not context.dense:
            similarity.masked_fill_(~valid.unsqueeze(2), -torch.inf)
        nearest = similarity.amax(dim=1)
        # Infinite similarity to itself, so that a kept token is never chosen again.
        diagonal.fill_(torch.inf)
        if not context.dense:
            nearest.masked_fill_(~valid, torch.inf)
        chosen = [_first_smallest(nearest, window)]
        padding = None if context.dense else torch.where(valid, -torch.inf, torch.inf).to(nearest.dtype)
        for _ in range(budget.width - 1):
            newest = similarity.gather(1, chosen[-1].unsqueeze(2).expand(-1, -1, tokens)).squeeze(1)
            if len(chosen) == 1:
                nearest = newest if padding is None else torch.maximum(newest, padding)
            else:
                torch.maximum(nearest, newest, out=nearest)
            chosen.append(_first_smallest(nearest, window))
        index = torch.cat(chosen, dim=1).to(device)
        return Reduction(ascending(index, budget, tokens), dense=budget.uniform)


def _first_smallest(values: Tensor, window: float) -> Tensor:
    """The first column of each row of `values` `(B, N)` within `window` of its smallest: long `(B, 1)`."""
    smallest = values.amin(dim=1, keepdim=True)
    # `argmax` returns the first of equal maxima.
    return (values <= smallest + window).to(torch.uint8).argmax(dim=1, keepdim=True)
