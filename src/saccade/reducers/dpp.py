"""DPP: the most diverse subset under a determinantal point process; CDPruner without text."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from saccade.reducers.common import row_budget
from saccade.reducers.determinantal import greedy_map
from saccade.reducers.registry import register_reducer
from saccade.reducers.similarity import check_precision
from saccade.tokens import Reduction, VisualContext


@register_reducer("dpp")
@dataclass(frozen=True)
class Determinantal:
    """Keeps the tokens whose unit vectors span the largest volume: greedy max of det S over the kept tokens.

    S is the matrix of cosine similarities (CDPruner's kernel, arXiv 2506.10967, with every relevance equal to 1). Ties
    go to the first token in raster order. The squared length of a unit token outside the span of the kept ones is
    resolved to 2^-17 in float32 and 2^-44 in float64. A token with less than 2^-14 outside (10^-6 in float64) adds
    nothing; if only such tokens remain, as on a blank image or with fewer dimensions than tokens to keep, the rest are
    taken in raster order.

    Args:
        precision: of the similarities and the volumes: "float32", or "float64", which takes twice as long on a CPU and
            far longer on GPUs with slow float64 arithmetic.
    """

    precision: str = "float32"

    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        check_precision("dpp", self.precision)

    @torch.no_grad()
    def __call__(self, context: VisualContext, keep: int | Tensor) -> Reduction:
        """Index `(B, K)` of the selected tokens. Time O(N^2 D + K^2 N) per row."""
        return greedy_map(context, row_budget(context, keep), quality=None, precision=self.precision)
