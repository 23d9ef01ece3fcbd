"""Content-adaptive budgets: the same total, more for images with varied tokens. Our own; not from a paper."""

from collections.abc import Sequence

import torch
from torch import Tensor

from saccade.reducers.budget import share_out
from saccade.reducers.common import float64_home
from saccade.tokens import VisualContext

DECIMALS = 6
"""Decimals that a need is rounded to: coarse enough to hide summation order, far finer than images differ."""


def token_need(context: VisualContext) -> Tensor:
    """How varied the tokens of each row are: the mean of 1 - cos over all pairs, float64 `(B,)` on the CPU.

    0 where all tokens point the same way, about 1 where they have nothing in common; 0 for fewer than two tokens. A
    zero token has cosine 0 with every other. For n tokens with unit vectors u_i the mean is 1 - (|sum u_i|^2 - sum
    |u_i|^2) / (n (n - 1)), in float32, so that no N x N matrix is needed. Padding and protected tokens do not count.
    """
    x = float64_home(context.features)
    counted = context.valid if context.protected is None else context.valid & ~context.protected
    counted = counted.to(x.device)
    unit = torch.nn.functional.normalize(x.float(), dim=2).masked_fill(~counted.unsqueeze(2), 0)
    total = unit.sum(dim=1, dtype=torch.float64)  # (B, D)
    lengths = unit.square().sum(dim=(1, 2), dtype=torch.float64)
    count = counted.sum(dim=1).double()
    need = 1 - (total.square().sum(dim=1) - lengths) / (count * (count - 1)).clamp(min=1)
    return need.masked_fill(count < 2, 0).clamp(min=0).round(decimals=DECIMALS).cpu()


def adaptive_counts(context: VisualContext, counts: Sequence[int], limits: Sequence[int]) -> list[int]:
    """Redistribute the sum of `counts` over the rows of the batch, in proportion to `counts * token_need`.

    The total is apportioned by largest remainder; each row gets at least one token and at most its limit. If all rows
    have the same need, they keep their counts. A row's result depends on the other rows of the batch by design; this
    is the only place where it does. It depends neither on padding nor on the order of the rows, except that the first
    of equal remainders is served first.

    Args:
        counts: tokens that each row would keep on its own.
        limits: tokens available in each row.
    """
    needs = token_need(context).tolist()
    return share_out(sum(counts), [need * count for need, count in zip(needs, counts, strict=True)], limits)
