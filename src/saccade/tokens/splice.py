"""The shorter batch: drop the placeholders of removed visual tokens, make room for the isolator, pad again.

Shapes: B samples, L tokens of the full batch, S tokens of the spliced one, R feature rows (images, crops, frames) of N
tokens each. Placeholders of the full batch, read row by row, belong to the feature rows in order.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.tokens.context import VisualContext
from saccade.tokens.reduction import Reduction

IGNORE_INDEX = -100


@dataclass
class Spliced:
    """A spliced batch, and where each of its tokens came from.

    Args:
        input_ids: long `(B, S)`, with a placeholder for each kept visual token and each isolator row.
        attention_mask: long `(B, S)`.
        position_ids: long `(B, S)`, or `(P, B, S)` where the full batch had several position axes.
        labels: long `(B, S)` or None; -100 on placeholders and padding.
        source: long `(B, S)`, the column of the full batch that a token came from; -1 on isolator rows and padding.
        isolator: bool `(B, S)`, true on isolator rows.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    labels: Tensor | None
    source: Tensor
    isolator: Tensor

    def gather(self, values: Tensor, fill: int | float) -> Tensor:
        """Carry a per-token tensor `(B, L)` of the full batch over to `(B, S)`; new tokens get `fill`."""
        return _take(values, self.source, fill)


def splice(
    input_ids: Tensor,
    attention_mask: Tensor,
    placeholder: Tensor,
    context: VisualContext,
    reduction: Reduction,
    *,
    isolator_length: int = 0,
    position_ids: Tensor | None = None,
    labels: Tensor | None = None,
    pad_id: int = 0,
    padding_side: str = "right",
) -> Spliced:
    """Shorten a batch to the visual tokens that `reduction` kept.

    Args:
        input_ids: long `(B, L)`.
        attention_mask: `(B, L)`, zero on padding, which may be on either side and is dropped.
        placeholder: bool `(B, L)`, true on the placeholders of visual tokens.
        context: the R feature rows that the placeholders stand for.
        reduction: which tokens of each row stay.
        isolator_length: rows to insert before each image. The rows of one `context.group` are one image.
        position_ids: the full batch's positions, `(B, L)` or `(P, B, L)`: kept tokens take theirs along, and the
            isolator's rows take those that the image starts with. None counts the shorter sequence from zero.
        labels: long `(B, L)` or None.
        pad_id: id to pad with.
        padding_side: "right" or "left".

    Raises:
        ValueError: if the placeholders and the visual tokens differ in number.
    """
    if padding_side not in ("right", "left"):
        raise ValueError(f"padding_side={padding_side!r}: expected 'right' or 'left'")
    device = input_ids.device
    batch, length = input_ids.shape
    columns = torch.arange(length, device=device).expand(batch, length)
    kept, first = _spread(context, reduction, placeholder)  # (B, L) each
    stays = torch.where(placeholder, kept, attention_mask.bool())
    width = stays.long() + first.long() * isolator_length  # output tokens that a token of the full batch turns into
    lengths = width.sum(dim=1)
    size = int(lengths.max()) if batch else 0

    start = width.cumsum(dim=1) - width
    if padding_side == "left":
        start = start + (size - lengths).unsqueeze(1)
    # One column more than needed: what is dropped is written there, then cut off.
    spill = torch.full_like(columns, size)
    source = torch.full((batch, size + 1), -1, dtype=torch.long, device=device)
    source.scatter_(1, torch.where(stays, start + first.long() * isolator_length, spill), columns)
    anchor = torch.full_like(source, -1)
    for offset in range(isolator_length):
        anchor.scatter_(1, torch.where(first, start + offset, spill), columns)
    source, anchor = source[:, :size], anchor[:, :size]
    isolator = anchor >= 0
    mask = isolator | (source >= 0)

    image_ids = _take(input_ids, anchor, pad_id)
    new_ids = torch.where(isolator, image_ids, _take(input_ids, source, pad_id))
    if position_ids is None:
        new_positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
    else:
        new_positions = _take(position_ids, torch.where(isolator, anchor, source), 0)
        if isolator_length and position_ids.dim() == 2:
            new_positions = new_positions + _isolator_offsets(isolator, anchor, placeholder, first)
    new_labels = None
    if labels is not None:
        new_labels = _take(labels.masked_fill(placeholder, IGNORE_INDEX), source, IGNORE_INDEX)
    return Spliced(new_ids, mask.to(attention_mask.dtype), new_positions, new_labels, source, isolator)


def _spread(context: VisualContext, reduction: Reduction, placeholder: Tensor) -> tuple[Tensor, Tensor]:
    """Which placeholders are kept, and which one starts an image: two bool `(B, L)`."""
    rows, tokens, _ = context.shape
    kept = torch.zeros(rows, tokens + 1, dtype=torch.bool, device=placeholder.device)
    kept.scatter_(1, torch.where(reduction.valid, reduction.index, tokens), True)
    kept = kept[:, :tokens]
    image = context.group.unsqueeze(1).expand(rows, tokens)
    if context.dense:
        kept, image = kept.reshape(-1), image.reshape(-1)
    else:
        kept, image = kept[context.valid], image[context.valid]
    first = torch.ones_like(image, dtype=torch.bool)
    first[1:] = image[1:] != image[:-1]
    available = kept.numel()
    # `masked_scatter` reads past the end without a word when there are fewer visual tokens than placeholders.
    wanted = int(placeholder.sum())
    if wanted != available:
        raise ValueError(f"{wanted} image placeholders stand for {available} visual tokens")
    empty = torch.zeros_like(placeholder)
    return empty.masked_scatter(placeholder, kept), empty.masked_scatter(placeholder, first)


def _isolator_offsets(isolator: Tensor, anchor: Tensor, placeholder: Tensor, first: Tensor) -> Tensor:
    """0, 1, 2, ... within each image's isolator rows, but never past the image's last position: long `(B, S)`."""
    count = isolator.long().cumsum(dim=1)
    begins = isolator & (anchor != torch.nn.functional.pad(anchor, (1, 0), value=-1)[:, :-1])
    before = torch.where(begins, count, 0).cummax(dim=1).values
    offset = count - before
    # An image may be shorter than the isolator: its placeholders run up to the next token that is none of them.
    length = placeholder.shape[1]
    columns = torch.arange(length, device=placeholder.device)
    stop = torch.where(first | ~placeholder, columns, length)
    following = torch.nn.functional.pad(stop[:, 1:], (0, 1), value=length)
    end = following.flip(1).cummin(dim=1).values.flip(1)
    limit = _take(end - columns, anchor, 1) - 1
    return torch.where(isolator, torch.minimum(offset, limit), 0)


def _take(values: Tensor, source: Tensor, fill: int | float) -> Tensor:
    """`values` `(..., B, L)` at columns `source` `(B, S)`, `fill` where the source is -1: `(..., B, S)`."""
    index = source.clamp(min=0).expand(*values.shape[:-1], source.shape[-1])
    return values.gather(-1, index).masked_fill(source < 0, fill)
