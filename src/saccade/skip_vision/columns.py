"""Operations on the columns of `(B, N)` tensors: gathering and padding."""

from torch import Tensor
from torch.nn.functional import pad


def take_columns(values: Tensor, index: Tensor) -> Tensor:
    """`values` `(B, N, ...)` at columns `index` `(B, K)`: `(B, K, ...)`."""
    tail = values.shape[2:]
    return values.gather(1, index.reshape(*index.shape, *[1] * len(tail)).expand(*index.shape, *tail))


def pad_columns(values: Tensor, width: int, fill: int | float = 0) -> Tensor:
    """`values` `(B, N)`, padded on the right with `fill` up to `width` columns."""
    return pad(values, (0, width - values.shape[1]), value=fill)
