"""The new batch: each image's placeholders are replaced by the tokens that now represent it, each with a role.

Shapes: B samples of L tokens, S in the new batch; P placeholders, one per visual token of the full batch; T visual
tokens kept or inserted; R feature rows (images, crops, frames) of N visual tokens. Placeholders, read sample by
sample, correspond in order to the valid tokens of the feature rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from saccade.tokens.context import VisualContext

IGNORE_INDEX = -100


class Role(IntEnum):
    """What a token of the new batch is."""

    PADDING = 0
    TEXT = 1
    ANSWER = 2
    """Text that the model is trained to write, or has generated."""
    RETAINED = 3
    SUMMARY = 4
    SKIPPED = 5
    ISOLATOR = 6


@dataclass(frozen=True)
class Places:
    """The position of each visual token's placeholder, all long `(P,)`.

    A block is an unbroken run of placeholders of one image (`VisualContext.group`). Where text separates the crops of
    an image, each crop is a block.

    Args:
        sample: the row of the batch.
        column: the column of the full batch.
        feature_row: the context's row that the visual token belongs to.
        group: the image that the visual token belongs to.
        block: index of the block that the placeholder is in.
        start: index of the block's first placeholder, among the P.
    """

    sample: Tensor
    column: Tensor
    feature_row: Tensor
    group: Tensor
    block: Tensor
    start: Tensor

    @classmethod
    def of(cls, placeholder: Tensor, context: VisualContext | None) -> "Places":
        """The places of a batch with placeholders, bool `(B, L)`; `context` is None where there are no images.

        Raises:
            ValueError: if the number of placeholders differs from the number of visual tokens.
        """
        sample, column = placeholder.nonzero(as_tuple=True)
        if context is None:
            feature_row = group = sample[:0]
        else:
            rows, tokens, _ = context.shape
            feature_row = torch.arange(rows, device=placeholder.device).unsqueeze(1).expand(rows, tokens)
            feature_row = feature_row.reshape(-1) if context.dense else feature_row[context.valid]
            group = context.group[feature_row]
        if sample.numel() != feature_row.numel():
            raise ValueError(f"{sample.numel()} image placeholders stand for {feature_row.numel()} visual tokens")
        begins = torch.ones_like(sample, dtype=torch.bool)
        begins[1:] = (sample.diff() != 0) | (column.diff() != 1) | (group.diff() != 0)
        block = begins.long().cumsum(dim=0) - 1
        number = torch.arange(sample.numel(), device=sample.device)
        start = torch.where(begins, number, 0).cummax(dim=0).values
        return cls(sample, column, feature_row, group, block, start)

    def __len__(self) -> int:
        return self.sample.numel()


@dataclass(frozen=True)
class VisualTokens:
    """The tokens that represent the images of a batch, in the order of the new sequence.

    Args:
        place: long `(T,)`, index of the placeholder, among the P, that a token belongs to. The tokens of a block are
            written consecutively where the block was, in the order given here.
        role: long `(T,)`, values of `Role`.
        features: `(T, D)`.
        counts: how many of the T tokens belong to each of the R feature rows, in order.
        deepstack_features: `(T, D)` for each deeper layer of the language model at which visual features are added.
        lost: long `(B,)`, how many tokens fewer than its budget each sample has so that it fits; None if all fit.
    """

    place: Tensor
    role: Tensor
    features: Tensor
    counts: Sequence[int]
    deepstack_features: tuple[Tensor, ...] = ()
    lost: Tensor | None = None

    def by_row(self) -> list[list[Tensor]]:
        """One `(n_i, D)` per feature row, for the features and then for each DeepStack layer."""
        return [list(values.split(list(self.counts))) for values in (self.features, *self.deepstack_features)]


@dataclass(frozen=True)
class Spliced:
    """The new batch, and where each of its tokens came from.

    Args:
        input_ids: long `(B, S)`, with one placeholder per visual token.
        attention_mask: `(B, S)`.
        position_ids: long `(B, S)`, or `(P, B, S)` where the full batch has several position axes.
        labels: long `(B, S)` or None; -100 on everything but text.
        role: long `(B, S)`, values of `Role`.
        source: long `(B, S)`, the column of the full batch that a token came from or, for inserted tokens, was
            inserted at; -1 on padding.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    labels: Tensor | None
    role: Tensor
    source: Tensor

    def gather(self, values: Tensor, fill: int | float) -> Tensor:
        """Map a per-token tensor `(B, L)` to `(B, S)`; padding, isolator and summary tokens get `fill`."""
        new = (self.role == Role.ISOLATOR) | (self.role == Role.SUMMARY)
        return _take(values, self.source, fill).masked_fill(new, fill)


def splice(
    input_ids: Tensor,
    attention_mask: Tensor,
    places: Places,
    visual: VisualTokens | None,
    *,
    position_ids: Tensor | None = None,
    labels: Tensor | None = None,
    pad_id: int = 0,
    padding_side: str = "right",
) -> Spliced:
    """Replace the placeholders of each block with its visual tokens.

    Args:
        input_ids: long `(B, L)`.
        attention_mask: `(B, L)`, zero on padding, which may be on either side and is removed.
        places: the positions of the full batch's placeholders.
        visual: the tokens that replace them; None if there are no images.
        position_ids: the full batch's positions, `(B, L)` or `(P, B, L)`: each token takes the position of its
            `source` column. With None, the new sequence is numbered from zero.
        labels: long `(B, L)` or None. Text with a label is an `ANSWER`.
        pad_id: id to pad with.
        padding_side: "right" or "left".

    Raises:
        ValueError: for another `padding_side`.
    """
    if padding_side not in ("right", "left"):
        raise ValueError(f"padding_side={padding_side!r}: expected 'right' or 'left'")
    batch, length = input_ids.shape
    columns = torch.arange(length, device=input_ids.device).expand(batch, length)
    text = attention_mask.bool().index_put((places.sample, places.column), torch.zeros_like(places.sample).bool())
    width = text.long()  # tokens of the new batch that a column turns into, (B, L)
    if visual is not None:
        first = places.start[visual.place]  # (T,)
        sample, anchor = places.sample[first], places.column[first]
        width = width.index_put((sample, anchor), torch.ones_like(sample), accumulate=True)
    lengths = width.sum(dim=1)
    size = int(lengths.max()) if batch else 0
    begin = width.cumsum(dim=1) - width
    if padding_side == "left":
        begin = begin + (size - lengths).unsqueeze(1)

    # One extra column: dropped tokens are scattered into it, then it is cut off.
    spill = torch.where(text, begin, size)
    text_role = torch.full_like(columns, Role.TEXT)
    if labels is not None:
        text_role = text_role.masked_fill(labels != IGNORE_INDEX, Role.ANSWER)
    source = torch.full((batch, size + 1), -1, dtype=torch.long, device=input_ids.device).scatter_(1, spill, columns)
    role = torch.zeros_like(source).scatter_(1, spill, text_role)
    if visual is not None:
        where = (sample, begin[sample, anchor] + _rank(first))
        source.index_put_(where, places.column[visual.place])
        role.index_put_(where, visual.role)
    source, role = source[:, :size], role[:, :size]

    mask = role != Role.PADDING
    if position_ids is None:
        new_positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
    else:
        new_positions = _take(position_ids, source, 0)
    new_labels = None
    if labels is not None:
        new_labels = _take(labels, source, IGNORE_INDEX).masked_fill(role > Role.ANSWER, IGNORE_INDEX)
    new_ids = _take(input_ids, source, pad_id)
    return Spliced(new_ids, mask.to(attention_mask.dtype), new_positions, new_labels, role, source)


def _rank(block: Tensor) -> Tensor:
    """For sorted values `(T,)`, the rank of each among its equals: long `(T,)`."""
    number = torch.arange(block.numel(), device=block.device)
    begins = torch.ones_like(block, dtype=torch.bool)
    begins[1:] = block.diff() != 0
    return number - torch.where(begins, number, 0).cummax(dim=0).values


def _take(values: Tensor, source: Tensor, fill: int | float) -> Tensor:
    """`values` `(..., B, L)` at columns `source` `(B, S)`, `fill` where the source is -1: `(..., B, S)`."""
    index = source.clamp(min=0).expand(*values.shape[:-1], source.shape[-1])
    return values.gather(-1, index).masked_fill(source < 0, fill)
