"""SCOPE (arXiv 2510.24214): salient tokens that together cover the image."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from saccade.reducers.common import Budget, by_rows, check_number, row_budget
from saccade.reducers.coverage import greedy_cover
from saccade.reducers.registry import register_reducer
from saccade.reducers.similarity import cosine_similarity
from saccade.tokens import Reduction, VisualContext


@register_reducer("scope")
@dataclass(frozen=True)
class Scope:
    """Keeps salient tokens that cover the others: greedy max of a_i^alpha * sum_j max(0, S_ij - m_j).

    S are the cosine similarities of the features, a is the saliency, and m_j, initially zero, is the highest
    similarity of token j to any kept one. The sum is over the tokens that are not kept yet, including token i; a
    negative similarity covers nothing. Gains within 2^-34 tie; ties go to the first in raster order. If no remaining
    token improves the cover (all duplicate kept ones, or have no saliency), the most salient are kept, a case that the
    paper does not specify.

    Args:
        alpha: exponent of the saliency, at least 0; 1 as published for LLaVA. With 0 this is plain facility location,
            and no saliency is needed.
    """

    alpha: float = 1.0
    needs: ClassVar[frozenset[str]] = frozenset({"saliency"})

    def __post_init__(self) -> None:
        check_number("scope", "alpha", self.alpha, "[0, inf)")
        if self.alpha == 0:
            object.__setattr__(self, "needs", frozenset())

    @torch.no_grad()
    def __call__(self, context: VisualContext, keep: int | Tensor) -> Reduction:
        """Index `(B, K)` of the selected tokens. Time O(N^2 D + K N^2) per row, memory O(N^2)."""
        return by_rows(self._reduce, context, row_budget(context, keep), elements=context.shape[1] ** 2)

    def _reduce(self, context: VisualContext, budget: Budget) -> Reduction:
        quality = self._quality(context) if self.alpha else None
        return greedy_cover(cosine_similarity(context.features, context), context, budget, quality)

    def _quality(self, context: VisualContext) -> Tensor:
        """a^alpha divided by the row's maximum, which changes no choice: float64 `(B, N)`, 0 on padding."""
        salient = context.saliency.double().nan_to_num(nan=0.0, posinf=0.0).clamp(min=0)
        if not context.dense:
            salient = salient.masked_fill(~context.valid, 0)
        most = salient.amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        return (salient / most) ** self.alpha
