"""Budgets that follow the images: the same total, more for images of varied tokens. Ours, of no paper."""

from collections.abc import Sequence

import torch
from torch import Tensor

from saccade.reducers.budget import share_out
from saccade.tokens import VisualContext

DECIMALS = 6
"""Places of a need that count: above what the order of summation changes, far below what images differ by."""


def token_need(context: VisualContext) -> Tensor:
    """How varied the tokens of each row are: the mean of 1 - cos over all pairs of them, float64 `(B,)` on the CPU.

    0 where all tokens point the same way, about 1 where they have nothing in common; 0 for fewer than two tokens. A
    zero token has cosine 0 with every other. With unit vectors u_i of n tokens the mean is
    1 - (|sum u_i|^2 - sum |u_i|^2) / (n (n - 1)), in float32, so that no N x N matrix is needed. Padding and protected
    tokens do not count.
    """
    x = context.features
    if x.device.type == "mps":  # has no float64
        x = x.cpu()
    counted = context.valid if context.protected is None else context.valid & ~context.protected
    counted = counted.to(x.device)
    unit = torch.nn.functional.normalize(x.float(), dim=2).masked_fill(~counted.unsqueeze(2), 0)
    total = unit.sum(dim=1, dtype=torch.float64)  # (B, D)
    lengths = unit.square().sum(dim=(1, 2), dtype=torch.float64)
    count = counted.sum(dim=1).double()
    need = 1 - (total.square().sum(dim=1) - lengths) / (count * (count - 1)).clamp(min=1)
    return need.masked_fill(count < 2, 0).clamp(min=0).round(decimals=DECIMALS).cpu()


def adaptive_counts(context: VisualContext, counts: Sequence[int], limits: Sequence[int]) -> list[int]:
    """`counts` tokens of each row, shared out anew over the batch by `counts * token_need`, with the same sum.

    By largest remainder; each row gets at least one token and at most its limit. Where all rows need as much, they
    keep their counts. What a row gets depends on the rows beside it, by intent: this is the one place where it does.
    It does not depend on padding, and rows in another order get the same, but for equal remainders, of which the
    first row's is served first.

    Args:
        counts: what each row would keep by itself.
        limits: tokens that each row has.
    """
    needs = token_need(context).tolist()
    return share_out(sum(counts), [need * count for need, count in zip(needs, counts, strict=True)], limits)
