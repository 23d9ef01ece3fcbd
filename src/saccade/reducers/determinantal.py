"""Greedy MAP inference of a determinantal point process over the tokens of each row (Chen et al., NeurIPS 2018).

The kernel is L = diag(q) S diag(q), with S the cosine similarities and q a quality per token. Since det L_A = (prod
over A of q_i^2) det S_A, the greedy step maximises q_i^2 r_i, where r_i is token i's squared length outside the span
of the chosen tokens: the d_i^2 of the fast Cholesky recursion on S alone. Since the diagonal of S is one, small
qualities cost the recursion no precision.
"""

import torch
from torch import Tensor

from saccade.reducers.common import Budget, ascending, leftover_scores, nothing_kept
from saccade.reducers.similarity import TIE, cosine_similarity
from saccade.tokens import Reduction, VisualContext

RANK_TOLERANCE = {torch.float32: 2.0**-14, torch.float64: 1e-6}
"""Squared length outside the span of the chosen tokens below which a token counts as inside it. Without this bound the
recursion would divide rounding errors by rounding errors and choose tokens twice."""
GAIN_TIE = {torch.float32: 2.0**-17, torch.float64: TIE}
"""How close two residuals have to be to count as equal. The recursion accumulates the errors of the cosines: in
float32 up to 3e-6 over 288 choices among 576 tokens, also if they have low rank."""


def greedy_map(context: VisualContext, budget: Budget, quality: Tensor | None, precision: str) -> Reduction:
    """Greedily maximise det L_A over subsets A of `budget.counts` tokens; ties go to the first in raster order.

    When no remaining token adds volume (fewer dimensions than tokens to keep, or zero quality), the rest are chosen by
    quality, then raster order.

    Args:
        quality: `(B, N)` in [0, 1], or None for 1 everywhere.
        precision: "float32" or "float64", for the similarities and the recursion; see `cosine_similarity`.

    Time O(N^2 D + K^2 N) per row, memory O(N^2 + K N).
    """
    rows, tokens, _ = context.shape
    if budget.width == 0 or rows == 0:
        return nothing_kept(context, budget)
    similarity = cosine_similarity(context.features, context, precision)
    device, dtype = similarity.device, similarity.dtype
    tolerance, tie = RANK_TOLERANCE[dtype], GAIN_TIE[dtype]
    residual = similarity.diagonal(dim1=1, dim2=2).clone()  # 1, or 0 for zero tokens and padding
    square = None if quality is None else quality.square().to(device, dtype)
    leftover = leftover_scores(context, quality).to(device)
    factor = torch.zeros(rows, budget.width, tokens, dtype=dtype, device=device)
    chosen = []
    for step in range(budget.width):
        gain = residual if square is None else residual * square
        gain = torch.where(residual > tolerance, gain, 0)
        best = (gain - (tie if square is None else tie * square)).amax(dim=1, keepdim=True)
        # `argmax` returns the first of equal maxima; tokens that add volume rank above those that do not.
        newest = leftover.masked_fill((gain >= best) & (gain > 0), 1).argmax(dim=1, keepdim=True)
        chosen.append(newest)
        if step == budget.width - 1:
            break
        column = newest.unsqueeze(2)
        row = similarity.gather(1, column.expand(-1, -1, tokens)).squeeze(1)
        if step:
            past = factor[:, :step]
            own = past.gather(2, column.expand(-1, step, 1))  # (B, t, 1)
            # In place, since autocast would round the products of the out-of-place form to bfloat16.
            row.unsqueeze(1).baddbmm_(own.transpose(1, 2), past, alpha=-1)
        left = residual.gather(1, newest)
        # A token inside the span adds no direction; its rounding errors must not be scaled up into one.
        row = torch.where(left > tolerance, row / left.clamp(min=tolerance).sqrt(), 0)
        factor[:, step] = row
        residual = torch.addcmul(residual, row, row, value=-1).scatter_(1, newest, -torch.inf)
        leftover.scatter_(1, newest, -torch.inf)
    index = torch.cat(chosen, dim=1).to(context.features.device)
    return Reduction(ascending(index, budget, tokens), dense=budget.uniform)
