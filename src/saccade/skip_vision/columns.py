"""Operations on the columns of `(B, N)` tensors: packing, gathering, padding."""

from torch import Tensor
from torch.nn.functional import pad


def pack_left(valid: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """Move each row's valid entries to its front, in order, and cut off columns that are padding in every row.

    Args:
        valid: bool `(B, N)`.
        values: `(B, N, ...)` each.

    Returns:
        `valid` and the values, `(B, K, ...)` where K is the largest number of valid entries in a row. Values on
        padding are arbitrary.
    """
    order = valid.long().sort(dim=1, descending=True, stable=True).indices
    width = int(valid.sum(dim=1).max()) if valid.numel() else 0
    return tuple(take_columns(value, order[:, :width]) for value in (valid, *values))


def take_columns(values: Tensor, index: Tensor) -> Tensor:
    """`values` `(B, N, ...)` at columns `index` `(B, K)`: `(B, K, ...)`."""
    tail = values.shape[2:]
    return values.gather(1, index.reshape(*index.shape, *[1] * len(tail)).expand(*index.shape, *tail))


def pad_columns(values: Tensor, width: int, fill: int | float = 0) -> Tensor:
    """`values` `(B, N)`, padded on the right with `fill` up to `width` columns."""
    return pad(values, (0, width - values.shape[1]), value=fill)
