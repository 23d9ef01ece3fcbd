"""Tokens spread evenly over the image, regardless of content."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from saccade.reducers.common import row_budget
from saccade.reducers.partition import partition
from saccade.reducers.registry import register_reducer
from saccade.tokens import Reduction, VisualContext


@register_reducer("uniform")
@dataclass(frozen=True)
class UniformGrid:
    """Keeps the central tokens of k regions of nearly equal size that tile the grid.

    A lattice where k divides the grid evenly (24 x 24 tokens to 64: the centres of 3 x 3 blocks), an even spread for
    any other k. `saccade.reducers.partition` describes how the regions are cut.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    @torch.no_grad()
    def __call__(self, context: VisualContext, keep: int | Tensor) -> Reduction:
        """Index `(B, K)` of exactly min(keep, valid tokens) evenly spread tokens per row."""
        budget = row_budget(context, keep)
        return Reduction(partition(context, budget).center, dense=budget.uniform)
