"""Combine feature rows of images and videos, of different lengths, in the order of their placeholders."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from saccade.families.base import pad_rows
from saccade.families.encoded import Encoded
from saccade.tokens import VisualContext


@dataclass(frozen=True)
class FeatureRow:
    """The visual tokens of a picture, a crop or a frame.

    Args:
        features: `(n, D)`.
        grid: frames, rows and columns of the tokens that are not newlines.
        source: index of the image or video that the row belongs to, within its kind.
        newlines: indices of the newlines among the n tokens.
        deepstack_features: `(n, D)` for each deeper layer of the language model at which features are added.
        absent: bool `(n,)`, tokens that were dropped before the tower; None for none.
    """

    features: Tensor
    grid: tuple[int, int, int]
    source: int
    newlines: Sequence[int] = ()
    deepstack_features: Sequence[Tensor] = ()
    absent: Tensor | None = None


def assemble(
    images: Sequence[FeatureRow],
    outputs: dict[str, ModelOutput],
    videos: Sequence[FeatureRow] = (),
    is_video: Any = None,
) -> Encoded:
    """Order rows by their placeholders, of videos where bool `(P,)` `is_video` is true, and pad them.

    The rows of one image or video form a group. `outputs` are those of [`Encoded`].

    Raises:
        ValueError: if the number of image or video placeholders differs from the number of their tokens.
    """
    order = _order(images, videos, is_video)
    queues = {False: iter(images), True: iter(videos)}
    rows = [next(queues[video]) for video in order]
    features, valid = pad_rows([row.features for row in rows])
    device = features.device
    group: list[int] = []
    for number, (row, video) in enumerate(zip(rows, order, strict=True)):
        same = number > 0 and (row.source, video) == (rows[number - 1].source, order[number - 1])
        group.append(group[-1] + (not same) if group else 0)
    protected = None
    if any(row.newlines for row in rows):
        places = torch.zeros(features.shape[:2], dtype=torch.bool)
        for number, row in enumerate(rows):
            places[number, list(row.newlines)] = True
        protected = places.to(device)
    absent = None
    if any(row.absent is not None for row in rows):
        lacking = [
            row.features.new_zeros(len(row.features), dtype=torch.bool) if row.absent is None else row.absent
            for row in rows
        ]
        absent = pad_rows(lacking)[0]
    context = VisualContext(
        features=features,
        valid=valid,
        grid=torch.tensor([row.grid for row in rows], device=device),
        group=torch.tensor(group, device=device),
        video=torch.tensor(order, device=device),
        protected=protected,
        absent=absent,
    )
    layers = zip(*(row.deepstack_features for row in rows), strict=True)
    return Encoded(context, outputs, tuple(pad_rows(layer)[0] for layer in layers), order)


def split_kinds(values: Sequence[Tensor], videos: Sequence[bool]) -> dict[str, list[Tensor]]:
    """The values of rows by kind, "image" and "video"; a kind that no row has is left out."""
    kinds: dict[str, list[Tensor]] = {}
    for value, video in zip(values, videos, strict=True):
        kinds.setdefault("video" if video else "image", []).append(value)
    return kinds


def tokens_to_rows(tokens: Mapping[str, Tensor], encoded: Encoded) -> Tensor:
    """Values of tokens as `(R, N, C)`, zeros on padding.

    Args:
        tokens: `(S, C)` for each kind, all its images or videos concatenated.
        encoded: the encoding, whose context has R rows of N tokens.
    """
    videos = encoded.videos or (False,) * encoded.context.shape[0]
    lengths = encoded.context.valid.sum(dim=1).tolist()
    counts = {
        kind: [n for n, video in zip(lengths, videos, strict=True) if video == (kind == "video")] for kind in tokens
    }
    pieces = {kind: iter(values.split(counts[kind])) for kind, values in tokens.items()}
    return pad_rows([next(pieces["video" if video else "image"]) for video in videos])[0]


def _order(images: Sequence[FeatureRow], videos: Sequence[FeatureRow], is_video: Tensor) -> tuple[bool, ...]:
    """Whether each row belongs to a video, in the order of the placeholders."""
    if not videos or not images:
        # With one kind only, the splice checks their number.
        return (bool(videos),) * (len(images) + len(videos))
    kinds = is_video.tolist()
    for name, rows, count in (("image", images, kinds.count(False)), ("video", videos, kinds.count(True))):
        tokens = sum(row.features.shape[0] for row in rows)
        if tokens != count:
            raise ValueError(f"{count} {name} placeholders stand for {tokens} visual tokens")
    lengths = {False: iter(images), True: iter(videos)}
    order, place = [], 0
    while place < len(kinds):
        order.append(kinds[place])
        place += next(lengths[kinds[place]]).features.shape[0]
    return tuple(order)
