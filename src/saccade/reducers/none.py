"""Keep everything: the baseline for every reducer."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from saccade.reducers.common import ascending, row_budget
from saccade.reducers.registry import register_reducer
from saccade.tokens import Reduction, VisualContext


@register_reducer("none")
@dataclass(frozen=True)
class KeepAll:
    """Keeps every valid token, whatever the budget says."""

    needs: ClassVar[frozenset[str]] = frozenset()

    @torch.no_grad()
    def __call__(self, context: VisualContext, keep: int | Tensor) -> Reduction:
        """Index `(B, N)` of the valid tokens; `keep` is ignored."""
        rows, tokens, _ = context.shape
        budget = row_budget(context, tokens)
        every = torch.arange(tokens, device=context.features.device).expand(rows, tokens)
        if budget.uniform:
            return Reduction(every.contiguous(), dense=True)
        # Valid positions first, so that the budget counts only them.
        first = torch.where(context.valid, every, every + tokens).sort(dim=1).values % max(tokens, 1)
        return Reduction(ascending(first, budget, tokens))
