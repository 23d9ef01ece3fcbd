"""Greedy maximum coverage: the tokens that together stand best for rows of things, as SCOPE and MMTok choose.

With C_ir how well token i covers row r and m_r the best cover of r so far, zero at first, each step adds the token of
the largest q_i * sum_r max(0, C_ir - m_r), for a quality q. As (|x| + x) / 2 = max(0, x), the sum is half of
sum_r |C_ir - m_r| + sum_r C_ir - sum_r m_r, and the first of these is a distance, which one operation computes without
an intermediate as large as C.

Shapes: B rows of N tokens of which K are kept; R rows to cover for each of the B.
"""

import torch
from torch import Tensor

from saccade.reducers.common import Budget, ascending, leftover_scores
from saccade.tokens import Reduction, VisualContext

COVER_TIE = 2.0**-34
"""How close two gains have to be to count as equal, and how close to zero to count as none: sums of thousands of
float64 covers of at most 1 are off by some 1e-12."""


def greedy_cover(cover: Tensor, context: VisualContext, budget: Budget, quality: Tensor | None = None) -> Reduction:
    """The greedy choice of `budget.counts` tokens; of tokens that tie, the first in raster order.

    When no token is left that covers anything better, the rest are the best by quality, then the first in raster
    order.

    Args:
        cover: float64 `(B, N, R)`, C, at most 1; zero on padding. Negative values cover nothing.
        quality: float64 `(B, N)` in [0, 1], or None for 1 everywhere.

    Time O(K N R) a row.
    """
    rows, tokens, covered = cover.shape
    chosen: list[Tensor] = []
    total = cover.sum(dim=2)
    if not context.dense:
        total = total.masked_fill(~context.valid.to(cover.device), -torch.inf)
    leftover = leftover_scores(context, quality).to(cover.device)
    quality = None if quality is None else quality.to(cover.device)
    best = cover.new_zeros(rows, 1, covered)
    for _ in range(budget.width):
        gain = (torch.cdist(cover, best, p=1.0).squeeze(2) + total - best.sum(dim=2)) / 2
        gain = torch.where(gain > COVER_TIE, gain, 0)
        nearly = gain - COVER_TIE
        score, nearly = (gain, nearly) if quality is None else (gain * quality, nearly * quality)
        first = (score >= nearly.amax(dim=1, keepdim=True)) & (score > 0)
        # `argmax` gives the first of equal maxima; what covers more ranks above what does not.
        newest = leftover.masked_fill(first, 1).argmax(dim=1, keepdim=True)
        chosen.append(newest)
        best = torch.maximum(best, cover.gather(1, newest.unsqueeze(2).expand(-1, -1, covered)))
        total.scatter_(1, newest, -torch.inf)
        leftover.scatter_(1, newest, -torch.inf)
    index = torch.cat(chosen, dim=1).to(context.features.device)
    return Reduction(ascending(index, budget, tokens), dense=budget.uniform)
