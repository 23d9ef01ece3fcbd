"""FasterVLM (Zhang et al., arXiv 2412.01818): the tokens that the vision encoder itself attends to most."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from saccade.reducers.common import ascending, best_first, row_budget
from saccade.reducers.registry import register_reducer
from saccade.tokens import Reduction, VisualContext


@register_reducer("fastervlm")
@dataclass(frozen=True)
class FasterVLM:
    """Keeps the tokens with the highest encoder attention.

    The score of token i is the mean over heads of softmax(q_cls k^T / sqrt(d))_i in the block that the features come
    from; for an encoder without a class token it is the attention that token i receives, averaged over heads and
    queries. `saccade.families.vision_attention` computes both. Ties go to the first token in raster order.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"saliency"})

    @torch.no_grad()
    def __call__(self, context: VisualContext, keep: int | Tensor) -> Reduction:
        """Index `(B, K)` of the most salient tokens. Time O(N log N) per row."""
        budget = row_budget(context, keep)
        order = best_first(context.saliency.float(), context, budget.width)
        return Reduction(ascending(order, budget, context.shape[1]), dense=budget.uniform)
