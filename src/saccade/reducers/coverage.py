"""Greedy maximum coverage, as used by SCOPE and MMTok: the tokens that together best represent a set of rows.

C_ir says how well token i covers row r, and m_r, initially zero, is the best cover of r so far. Each step adds the
token with the largest q_i * sum_r max(0, C_ir - m_r), for a quality q. The sum is sum_r max(C_ir, m_r) - sum_r m_r, so
with max(C, m) stored in place of C, a step reads it twice and writes it once, without an intermediate of that size.

Shapes: B samples of N tokens, of which K are kept; R rows to cover for each of the B.
"""

import torch
from torch import Tensor

from saccade.reducers.common import Budget, ascending, leftover_scores
from saccade.tokens import Reduction, VisualContext

COVER_TIE = 2.0**-34
"""How close two gains have to be to count as equal, and how close to zero to count as none: sums of thousands of
float64 covers of at most 1 are off by some 1e-12."""


def greedy_cover(cover: Tensor, context: VisualContext, budget: Budget, quality: Tensor | None = None) -> Reduction:
    """The greedy choice of `budget.counts` tokens; ties go to the first in raster order.

    If no remaining token improves the cover, the rest are chosen by quality, then by raster order.

    Args:
        cover: float64 `(B, N, R)`, C, at most 1, zero on padding. Negative values cover nothing. Overwritten.
        quality: float64 `(B, N)` in [0, 1], or None for 1 everywhere.

    Time O(K N R) per sample.
    """
    _, tokens, covered = cover.shape
    leftover = leftover_scores(context, quality).to(cover.device)
    quality = None if quality is None else quality.to(cover.device)
    # Kept tokens and padding must not be chosen, whatever rounding says: their gain is minus infinity.
    open_to = torch.zeros_like(leftover, dtype=cover.dtype).masked_fill_(leftover == -torch.inf, -torch.inf)
    chosen: list[Tensor] = []
    best = cover.new_zeros(cover.shape[0], 1, covered)
    for _ in range(budget.width):
        torch.maximum(cover, best, out=cover)
        gain = cover.sum(dim=2) - best.sum(dim=2) + open_to
        gain = torch.where(gain > COVER_TIE, gain, 0)
        nearly = gain - COVER_TIE
        score, nearly = (gain, nearly) if quality is None else (gain * quality, nearly * quality)
        first = (score >= nearly.amax(dim=1, keepdim=True)) & (score > 0)
        # `argmax` returns the first of equal maxima; tokens with a gain rank above tokens without.
        newest = leftover.masked_fill(first, 1).argmax(dim=1, keepdim=True)
        chosen.append(newest)
        best = cover.gather(1, newest.unsqueeze(2).expand(-1, -1, covered))
        open_to.scatter_(1, newest, -torch.inf)
        leftover.scatter_(1, newest, -torch.inf)
    index = torch.cat(chosen, dim=1).to(context.features.device)
    return Reduction(ascending(index, budget, tokens), dense=budget.uniform)
