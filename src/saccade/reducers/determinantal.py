"""Greedy MAP inference of a determinantal point process over the tokens of each row (Chen et al., NeurIPS 2018).

The kernel is L = diag(q) S diag(q), with S the cosine similarities and q a quality a token. Since
det L_A = (prod over A of q_i^2) det S_A, the greedy step maximises q_i^2 r_i, where r_i is what is left of token i's
squared length outside the span of the chosen ones: the d_i^2 of the fast Cholesky recursion on S alone. On S, whose
diagonal is one, the recursion does not care how small the qualities are.
"""

import torch
from torch import Tensor

from saccade.reducers.common import Budget, ascending
from saccade.reducers.similarity import TIE, cosine_similarity, tie_terms
from saccade.tokens import Reduction, VisualContext

RANK_TOLERANCE = 1e-6
"""Squared share of a token outside the span of the chosen ones below which it counts as inside: float32's resolution,
where the recursion divides rounding errors by rounding errors and, unguarded, chooses tokens twice."""


def greedy_map(context: VisualContext, budget: Budget, quality: Tensor | None) -> Reduction:
    """The greedy maximum of det L_A over A of `budget.counts` tokens.

    When no token is left that adds volume (fewer dimensions than tokens to keep, or zero quality), the rest are the
    best by quality, then the first in raster order.

    Args:
        quality: `(B, N)` in [0, 1], or None for 1 everywhere.

    Time O(N^2 D + K^2 N) a row, memory O(N^2 + K N).
    """
    rows, tokens, _ = context.shape
    if budget.width == 0 or rows == 0:
        empty = torch.zeros(rows, budget.width, dtype=torch.long, device=context.features.device)
        return Reduction(empty, dense=True)
    similarity = cosine_similarity(context.features, context)
    device = similarity.device
    residual = similarity.diagonal(dim1=1, dim2=2).clone()  # 1, or 0 for zero tokens and padding
    if quality is None:
        quality = torch.ones((), dtype=torch.float64, device=device)
    quality = quality.to(device, torch.float64)
    square, ties = quality.square(), tie_terms(tokens, device)
    # Quality ranks what has no volume left; 0.5 keeps it below any token that has.
    leftover = 0.5 * quality - ties
    barred = torch.zeros(rows, tokens, dtype=torch.float64, device=device)
    if not context.dense:
        barred.masked_fill_(~context.valid.to(device), -torch.inf)
    factor = torch.zeros(rows, budget.width, tokens, dtype=torch.float64, device=device)
    chosen = []
    for step in range(budget.width):
        gain = residual * square
        adds = (residual > RANK_TOLERANCE) & (gain > TIE * tokens)
        newest = (torch.where(adds, 1 + gain - ties, leftover) + barred).argmax(dim=1, keepdim=True)
        chosen.append(newest)
        if step == budget.width - 1:
            break
        barred.scatter_(1, newest, -torch.inf)
        column = newest.unsqueeze(2)
        row = similarity.gather(1, column.expand(-1, -1, tokens)).squeeze(1)
        if step:
            past = factor[:, :step]
            own = past.gather(2, column.expand(-1, step, 1))  # (B, t, 1)
            row = torch.baddbmm(row.unsqueeze(1), own.transpose(1, 2), past, alpha=-1).squeeze(1)
        left = residual.gather(1, newest)
        # A token inside the span adds no direction of its own: rounding errors must not be scaled up into one.
        row = torch.where(left > RANK_TOLERANCE, row / left.clamp(min=RANK_TOLERANCE).sqrt(), 0)
        factor[:, step] = row
        residual = (residual - row.square()).clamp_(min=0)
    index = torch.cat(chosen, dim=1).to(context.features.device)
    return Reduction(ascending(index, budget, tokens), dense=budget.uniform)
