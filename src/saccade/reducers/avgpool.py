"""Average pooling to any number of tokens: the simplest merge."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from saccade.reducers.common import row_budget
from saccade.reducers.partition import partition
from saccade.reducers.registry import register_reducer
from saccade.tokens import Reduction, VisualContext


@register_reducer("avgpool")
@dataclass(frozen=True)
class AveragePool:
    """Averages k regions of nearly equal size that tile the grid, each valid token in exactly one.

    Where k divides the grid evenly, this is ordinary pooling (24 x 24 tokens to 64: 3 x 3 without overlap).
    `saccade.reducers.partition` describes how the regions are cut. A region is represented by the token nearest its
    centroid.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    @torch.no_grad()
    def __call__(self, context: VisualContext, keep: int | Tensor) -> Reduction:
        """Index `(B, K)` of the central tokens and float32 weight `(B, K, N)`, 1 / size within a region."""
        budget = row_budget(context, keep)
        parts = partition(context, budget)
        name = torch.arange(budget.width, device=parts.region.device).unsqueeze(1)
        weight = (parts.region.unsqueeze(1) == name).float() / parts.size.clamp(min=1).unsqueeze(2)
        return Reduction(parts.center, weight, dense=budget.uniform)
