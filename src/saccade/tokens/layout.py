"""A batch laid out anew: each image's placeholders give way to the rows that now stand for it, with a role a token.

Shapes: B samples, L tokens of the full batch, S of the new one; G blocks of M visual tokens, which become E rows.
"""

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor
from torch.nn.functional import pad

from saccade.tokens.context import VisualContext
from saccade.tokens.splice import IGNORE_INDEX


class Role(IntEnum):
    """What a token of the new batch is."""

    PADDING = 0
    TEXT = 1
    ANSWER = 2
    """Text that the model learns to write, or has written."""
    RETAINED = 3
    SUMMARY = 4
    SKIPPED = 5


@dataclass
class Blocks:
    """The visual tokens of each image, in the order of their placeholders.

    A block is an unbroken run of placeholders of one image. Where text stands between an image's crops, each crop is
    one.

    Args:
        token: long `(G, M)`, numbers of the block's tokens among all valid ones of the context; -1 at the end.
        row: long `(G,)`, the sample that the block stands in.
        column: long `(G, M)`, the column of each token's placeholder in the full batch; -1 at the end.
        feature_row: long `(G, M)`, the context's row that each token belongs to; -1 at the end.
    """

    token: Tensor
    row: Tensor
    column: Tensor
    feature_row: Tensor

    @property
    def valid(self) -> Tensor:
        """bool `(G, M)`, false on padding."""
        return self.token >= 0

    @property
    def counts(self) -> Tensor:
        """long `(G,)`, tokens of each block."""
        return self.valid.sum(dim=1)

    def gather(self, values: Tensor, context: VisualContext) -> Tensor:
        """Values `(R, N, ...)` of the context's tokens as `(G, M, ...)`, zero or false on padding; differentiable."""
        flat = values.flatten(0, 1) if context.dense else values[context.valid]
        if flat.shape[0] == 0:
            return flat.new_zeros(*self.token.shape, *values.shape[2:])
        picked = flat[self.token.clamp(min=0)]
        return picked.masked_fill(~self.valid.reshape(*self.token.shape, *[1] * (values.dim() - 2)), 0)


def find_blocks(placeholder: Tensor, context: VisualContext) -> Blocks:
    """The blocks of a batch with placeholders, bool `(B, L)`, read row by row.

    Raises:
        ValueError: if the placeholders and the visual tokens differ in number.
    """
    rows, tokens, _ = context.shape
    sample, column = placeholder.nonzero(as_tuple=True)  # (P,) each
    feature_row = torch.arange(rows, device=placeholder.device).unsqueeze(1).expand(rows, tokens)[context.valid]
    if sample.numel() != feature_row.numel():
        raise ValueError(f"{sample.numel()} image placeholders stand for {feature_row.numel()} visual tokens")
    if sample.numel() == 0:
        empty = torch.zeros(0, 1, dtype=torch.long, device=placeholder.device)
        return Blocks(empty, empty.squeeze(1), empty, empty)
    group = context.group[feature_row]
    begins = torch.ones_like(sample, dtype=torch.bool)
    begins[1:] = (sample.diff() != 0) | (column.diff() != 1) | (group.diff() != 0)
    block = begins.long().cumsum(dim=0) - 1
    start = begins.nonzero().squeeze(1)  # (G,)
    number = torch.arange(sample.numel(), device=sample.device)
    place = number - start[block]
    shape = (start.numel(), int(place.max()) + 1)

    def spread(values: Tensor) -> Tensor:
        return torch.full(shape, -1, dtype=torch.long, device=sample.device).index_put_((block, place), values)

    return Blocks(spread(number), sample[start], spread(column), spread(feature_row))


@dataclass
class Layout:
    """A batch laid out anew, and where each of its tokens came from.

    Args:
        input_ids: long `(B, S)`, with a placeholder for each row that stands for an image.
        attention_mask: `(B, S)`.
        position_ids: long `(B, S)`, counted from 0, or `(P, B, S)` taken from the full batch.
        labels: long `(B, S)` or None; -100 on everything but text.
        role: long `(B, S)`, values of `Role`.
        source: long `(B, S)`, the column of the full batch that a token came from or, of those that were merged or
            pooled, stands at; -1 on padding.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    labels: Tensor | None
    role: Tensor
    source: Tensor

    def gather(self, values: Tensor, fill: int | float, summary: int | float | None = None) -> Tensor:
        """Carry a per-token tensor `(..., B, L)` to `(..., B, S)`: `fill` on padding, `summary` on summary rows."""
        taken = _take(values, self.source, fill)
        return taken if summary is None else taken.masked_fill(self.role == Role.SUMMARY, summary)


def lay_out(
    input_ids: Tensor,
    attention_mask: Tensor,
    placeholder: Tensor,
    blocks: Blocks,
    role: Tensor,
    source: Tensor,
    *,
    position_ids: Tensor | None = None,
    labels: Tensor | None = None,
    pad_id: int = 0,
    padding_side: str = "right",
) -> Layout:
    """Put the rows of each block in the place of its placeholders.

    Args:
        input_ids: long `(B, L)`.
        attention_mask: `(B, L)`, zero on padding, which may be on either side and is dropped.
        placeholder: bool `(B, L)`, true on the placeholders of visual tokens.
        blocks: which of them belong together.
        role: long `(G, E)`, of the rows that each block becomes; `Role.PADDING` behind the last one.
        source: long `(G, E)`, the column of the full batch that each row stands at.
        position_ids: the full batch's, `(P, B, L)`, for models with several position axes: each token takes those of
            its source. None counts the new sequence from zero.
        labels: long `(B, L)` or None. Text with a label is an `ANSWER`.
        pad_id: id to pad with.
        padding_side: "right" or "left".

    Raises:
        ValueError: for another `padding_side`.
    """
    if padding_side not in ("right", "left"):
        raise ValueError(f"padding_side={padding_side!r}: expected 'right' or 'left'")
    device = input_ids.device
    batch, length = input_ids.shape
    columns = torch.arange(length, device=device).expand(batch, length)
    text = attention_mask.bool() & ~placeholder
    real = role != Role.PADDING  # (G, E)
    first = blocks.column[:, 0]  # (G,)
    width = text.long().index_put((blocks.row, first), real.sum(dim=1))  # tokens that a column turns into
    lengths = width.sum(dim=1)
    size = int(lengths.max()) if batch else 0
    start = width.cumsum(dim=1) - width
    if padding_side == "left":
        start = start + (size - lengths).unsqueeze(1)

    # One column more than needed: what is dropped is written there, then cut off.
    text_role = torch.full_like(columns, Role.TEXT)
    if labels is not None:
        text_role = text_role.masked_fill(labels != IGNORE_INDEX, Role.ANSWER)
    spill = torch.where(text, start, size)
    new_source = torch.full((batch, size + 1), -1, dtype=torch.long, device=device).scatter_(1, spill, columns)
    new_role = torch.zeros_like(new_source).scatter_(1, spill, text_role)
    target = start[blocks.row, first].unsqueeze(1) + torch.arange(role.shape[1], device=device)  # (G, E)
    sample = blocks.row.unsqueeze(1).expand_as(target)
    where = (sample[real], target[real])
    new_source.index_put_(where, source[real])
    new_role.index_put_(where, role[real])
    new_source, new_role = new_source[:, :size], new_role[:, :size]

    mask = new_role != Role.PADDING
    if position_ids is None:
        new_positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
    else:
        new_positions = _take(position_ids, new_source, 0)
    new_labels = None
    if labels is not None:
        new_labels = _take(labels, new_source, IGNORE_INDEX).masked_fill(new_role > Role.ANSWER, IGNORE_INDEX)
    return Layout(
        _take(input_ids, new_source, pad_id),
        mask.to(attention_mask.dtype),
        new_positions,
        new_labels,
        new_role,
        new_source,
    )


def pack_left(valid: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """Move each row's valid entries to its front, in order, and cut off columns that are padding in every row.

    Args:
        valid: bool `(B, N)`.
        values: `(B, N, ...)` each.

    Returns:
        `valid` and the values, `(B, K, ...)` with K the most valid entries of a row. Values of padding are arbitrary.
    """
    order = valid.long().sort(dim=1, descending=True, stable=True).indices
    width = int(valid.sum(dim=1).max()) if valid.numel() else 0
    return tuple(take_columns(value, order[:, :width]) for value in (valid, *values))


def take_columns(values: Tensor, index: Tensor) -> Tensor:
    """`values` `(B, N, ...)` at columns `index` `(B, K)`: `(B, K, ...)`."""
    tail = values.shape[2:]
    return values.gather(1, index.reshape(*index.shape, *[1] * len(tail)).expand(*index.shape, *tail))


def pad_columns(values: Tensor, width: int, fill: int | float = 0) -> Tensor:
    """`values` `(B, N)` with columns of `fill` behind them up to `width`."""
    return pad(values, (0, width - values.shape[1]), value=fill)


def _take(values: Tensor, source: Tensor, fill: int | float) -> Tensor:
    """`values` `(..., B, L)` at columns `source` `(B, S)`, `fill` where the source is -1: `(..., B, S)`."""
    index = source.clamp(min=0).expand(*values.shape[:-1], source.shape[-1])
    return values.gather(-1, index).masked_fill(source < 0, fill)
