"""The number of tokens of a row, in full and after pruning, without running a model."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from saccade.data.chat import apply_chat_template
from saccade.data.clips import check_takes_videos, placeholder_ids, with_clips
from saccade.data.conversation import TAGS, checked_message, images_of, text_of, used_columns, videos_of
from saccade.data.fields import marks
from saccade.data.plain import row_writer
from saccade.errors import RecordError
from saccade.images import MAX_PIXELS, image_size
from saccade.prompt_start import needs_start, start_alone
from saccade.reducers import PruningConfig, no_room
from saccade.videos import Clip, Sampling, video_shape

Size = tuple[int, int]
"""Width and height of an image."""


@dataclass(frozen=True)
class ClipShape:
    """What the number of tokens of a clip depends on; see `saccade.videos.Clip`."""

    size: Size
    times: tuple[float, ...]
    rate: float
    duration: float
    wanted: int | None

    @classmethod
    def of(cls, clip: Clip) -> "ClipShape":
        return cls(clip.size, clip.times, clip.rate, clip.duration, clip.wanted)

    def blank(self) -> Clip:
        """A black clip of this shape."""
        frames = np.zeros((len(self.times), self.size[1], self.size[0], 3), dtype=np.uint8)
        return Clip(frames, self.times, self.rate, self.duration, self.wanted)


Shape = Size | ClipShape
"""Of an image or of a clip."""

# So different that a processor giving all of them the same number of tokens can be assumed to do so for any size.
_PROBES: tuple[Size, ...] = ((640, 480), (224, 224), (1500, 500), (300, 1100))
_CALIBRATION_ROWS = 256


class TokenCounter:
    """Counts the tokens of rows as the processor would make them.

    Args:
        processor: the model's processor.
        placeholder_id: token id of a visual token.
        budget: how many visual tokens fast steps keep.
        isolator_length: number of tokens that fast steps put before each image.
        stop_ids: token ids at which `generate` stops, as for the collator.
        conversation: "chat" or "plain", as in training.
        sampling: which frames are taken of a video.
    """

    def __init__(
        self,
        processor: Any,
        placeholder_id: int,
        budget: PruningConfig,
        isolator_length: int = 0,
        stop_ids: tuple[int, ...] = (),
        conversation: str = "chat",
        sampling: Sampling | None = None,
    ) -> None:
        self.sampling = Sampling() if sampling is None else sampling
        self._clips: dict[ClipShape, tuple[int, int, int]] = {}
        self._writer = row_writer(processor, conversation, stop_ids)
        self.processor, self.placeholder_id = processor, placeholder_id
        self.budget, self.isolator_length = budget, isolator_length
        self._start = start_alone(processor.tokenizer)
        self._tokens: dict[Size, tuple[int, int]] = {}
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}
        self._one_image = apply_chat_template(processor, [message], tokenize=False)
        self._bare = len(self._ids(self._one_image))
        measured = [self._measure(size) for size in _PROBES]
        self.fixed = measured[0] if len(set(measured)) == 1 else None
        """(tokens that an image adds, visual tokens among them) if they are the same for all sizes, else None."""
        self._rows: dict[Size, list[int]] = {}
        self._crops = budget.budget == "crop" and any(
            len(_rows_of(self._processed(size), visual, processor)) > 1
            for size, (_, visual) in zip(_PROBES, measured, strict=True)
        )
        self._computes = not self.fixed and all(
            self._compute(size) == tokens for size, tokens in zip(_PROBES, measured, strict=True)
        )

    def tokens(self, shape: Shape) -> tuple[int, int]:
        """Number of tokens that an image or a clip adds to the text, and its number of visual tokens.

        Raises:
            RecordError: if the processor rejects it, or takes no clips.
        """
        if isinstance(shape, ClipShape):
            return self._clip(shape)[:2]
        if self.fixed:
            return self.fixed
        if shape not in self._tokens:
            try:
                computed = self._compute(shape) if self._computes else None
                self._tokens[shape] = computed or self._measure(shape)
            except ValueError as error:
                raise RecordError(
                    f"the processor refuses an image of {shape[0]} x {shape[1]} px: {' '.join(str(error).split())}"
                ) from error
        return self._tokens[shape]

    def _clip(self, shape: ClipShape) -> tuple[int, int, int]:
        """`tokens`, and in how many rows of features, one per frame or pair of frames, the visual ones are."""
        if shape not in self._clips:
            check_takes_videos(self.processor)
            try:
                self._clips[shape] = self._measure_clip(shape)
            except ValueError as error:
                raise RecordError(f"the processor refuses a video: {' '.join(str(error).split())}") from error
        return self._clips[shape]

    def _measure_clip(self, shape: ClipShape) -> tuple[int, int, int]:
        message = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "a"}]}
        text = apply_chat_template(self.processor, [message], tokenize=False)
        clip = shape.blank()
        inputs = with_clips(self.processor, [clip])(text=[text], add_special_tokens=False)
        ids = list(inputs["input_ids"][0])
        visual = sum(ids.count(token) for token in placeholder_ids(self.processor, self.placeholder_id))
        grid = inputs.get("video_grid_thw")
        return len(ids) - len(self._ids(text)), visual, len(clip.filled().times) if grid is None else int(grid[0][0])

    def _kept(self, shape: Shape) -> int:
        """How many visual tokens of an image or a clip the budget keeps."""
        visual = self.tokens(shape)[1]
        if self.budget.budget != "crop":
            return self.budget.count(visual)
        return sum(map(self.budget.count, self._row_tokens(shape, visual)))

    def _row_tokens(self, shape: Shape, visual: int) -> list[int]:
        """The visual tokens of each row of features: a crop, a thumbnail, a frame or a pair of frames."""
        if isinstance(shape, ClipShape):
            rows = self._clip(shape)[2]
            return [visual // rows + (row < visual % rows) for row in range(rows)]
        if not self._crops:
            return [visual]
        key = _PROBES[0] if self.fixed else shape
        if key not in self._rows:
            self._rows[key] = _rows_of(self._processed(key), visual, self.processor)
        return self._rows[key]

    def text_tokens(self, row: Mapping[str, Any]) -> int:
        """Number of tokens of a row's text in the model's chat format, counting each image as a single token.

        Raises:
            RecordError: if training cannot use the text.
        """
        return len(self._row_ids(self._writer.write(row).text))

    def text_and_learned(self, row: Mapping[str, Any]) -> tuple[int, int]:
        """`text_tokens`, and how many of these have labels: answers and their end tokens.

        Raises:
            RecordError: if training cannot use the text.
        """
        written = self._writer.write(row)
        return len(self._row_ids(written.text)), sum(
            len(self._ids(written.text[start:end])) for start, end in written.learned
        )

    def lengths(self, text_tokens: int, sizes: Sequence[Shape]) -> tuple[int, int]:
        """Length of the full sequence, and of the shortened one, which fits where the budget has a bound."""
        full, shortened = self._unbounded(text_tokens, sizes)
        return full, shortened - self.lost(text_tokens, sizes)

    def lost(self, text_tokens: int, sizes: Sequence[Shape]) -> int:
        """How many visual tokens the budget's `fit_length` takes of a row."""
        bound = self.budget.fit_length
        return 0 if bound is None else max(0, self._unbounded(text_tokens, sizes)[1] - bound)

    def _unbounded(self, text_tokens: int, sizes: Sequence[Shape]) -> tuple[int, int]:
        """`lengths` without a bound."""
        counts = [self.tokens(size) for size in sizes]
        full, visual = text_tokens + sum(added for added, _ in counts), sum(visual for _, visual in counts)
        shared = self.budget.budget == "sample"
        kept = self.budget.count(visual) if shared else sum(map(self._kept, sizes))
        return full, full - visual + kept + len(sizes) * self.isolator_length

    def check_fits(self, text_tokens: int, sizes: Sequence[Shape]) -> None:
        """Refuse a row that cannot fit under the budget's `fit_length`."""
        if self.budget.fit_length is None:
            return
        for size in sizes:
            added, visual = self.tokens(size)
            text_tokens += added - visual
        reason = no_room(text_tokens, len(sizes), self.isolator_length, self.budget.fit_length)
        if reason is not None:
            raise RecordError(reason, "too_long")

    def _row_ids(self, text: str) -> list[int]:
        return self.processor.tokenizer(text, add_special_tokens=needs_start(self._start, text))["input_ids"]

    def _ids(self, text: str) -> list[int]:
        return self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _processed(self, size: Size) -> Mapping[str, Any]:
        """What the processor makes of a blank image."""
        # Tensors, as training has them: Ovis 2's processor makes nothing else.
        return self.processor(
            images=[Image.new("RGB", size)], text=[self._one_image], add_special_tokens=False, return_tensors="pt"
        )

    def _measure(self, size: Size) -> tuple[int, int]:
        """`tokens` of an image, measured by processing a blank one."""
        ids = self._processed(size)["input_ids"][0].tolist()
        return len(ids) - self._bare, ids.count(self.placeholder_id)

    def _compute(self, size: Size) -> tuple[int, int] | None:
        """`tokens` of an image by the processor's own formula, as used by servers, which ignores marker tokens."""
        count = getattr(self.processor, "_get_num_multimodal_tokens", None)
        if count is None:
            return None
        visual = int(count(image_sizes=[(size[1], size[0])])["num_image_tokens"][0])
        return visual - 1, visual


def _rows_of(inputs: Mapping[str, Any], visual: int, processor: Any) -> list[int]:
    """How many of an image's visual tokens are in each row of features, as its processor's output shows. Of
    Chain-of-Sight, whose rows are made by the model, they count as one."""
    pixels = inputs["pixel_values"]
    if pixels.ndim == 5 and "image_sizes" in inputs:
        # LLaVA-NeXT and LLaVA-OneVision: the crops become one large picture beside the thumbnail.
        small = getattr(processor, "num_image_tokens", None)
        if small is None:
            small = pixels.shape[-2] // processor.patch_size * (pixels.shape[-1] // processor.patch_size)
        return [small, visual - small] if small < visual else [visual]
    if "spatial_shapes" in inputs:
        sizes = inputs["spatial_shapes"].prod(dim=1).tolist()  # LFM2-VL's crops and thumbnail
    else:
        sizes = [1] * (pixels.shape[1] if pixels.ndim == 5 else pixels.shape[0] if pixels.ndim == 4 else 1)
    return [visual * size // sum(sizes) for size in sizes]


def estimate_lengths(
    rows: Sequence[Mapping[str, Any]], counter: TokenCounter, shortened: bool, max_pixels: int = MAX_PIXELS
) -> list[int]:
    """Estimate the number of tokens of each row: its text by a cost per character and per message, plus its images.

    The costs are fitted to the exact counts of a few hundred rows. Unusable rows count as one token. Image files are
    opened, for their headers, only if the number of visual tokens depends on the size of an image; videos always are.

    Args:
        max_pixels: size above which an image, or a frame, makes its row unusable.
    """
    found: list[tuple[tuple[int, int, int], int]] = []
    exact: dict[int, int] = {}
    usable, step = 0, max(1, len(rows) // _CALIBRATION_ROWS)
    for number, row in enumerate(rows):
        found.append(_measure_row(row, counter, shortened, max_pixels))
        if not found[-1][0][2]:
            continue
        if usable % step == 0:
            with suppress(RecordError):
                exact[number] = counter.text_tokens(row_text(row))
        usable += 1
    measured = np.array([text for text, _ in found], dtype=np.float64).reshape(-1, 3)
    images = np.array([visual for _, visual in found], dtype=int)
    cost = np.linalg.lstsq(measured[list(exact)], np.array(list(exact.values()), dtype=np.float64), rcond=None)[0]
    lengths = np.rint(measured @ cost).astype(int) + images
    if shortened and counter.budget.fit_length is not None:
        lengths = np.minimum(lengths, counter.budget.fit_length)
    return np.maximum(lengths, 1).tolist()


def check_words(row: Mapping[str, Any], processor: Any, placeholder_id: int) -> None:
    """Refuse text that the model would take for another image, the end of a turn or another speaker.

    Plain texts contain their own placeholders and control tokens, and are not checked.
    """
    tokenizer = processor.tokenizer
    places = {tokenizer.convert_ids_to_tokens(placeholder_id)}
    places |= {getattr(processor, name, None) for name in ("image_token", "video_token")}
    # `<image>` and `<video>` mark images and videos in records, and are counted elsewhere.
    places -= {None, *TAGS.values()}
    control = _special_tokens(tokenizer) - places - set(TAGS.values())
    for message in _messages(row):
        text = text_of(message)
        for word in sorted(places):
            if word in text:
                raise RecordError(
                    f"{word!r} is in a text, where the model would look for an image or a video: remove it",
                    "placeholder_count",
                )
        for word in sorted(control):
            if word in text:
                raise RecordError(
                    f"{word!r} is in a text, and is a control token of the model: rephrase it, or remove the row",
                    "control_token",
                )


@lru_cache(maxsize=8)
def _special_tokens(tokenizer: Any) -> frozenset[str]:
    """The special tokens of a tokenizer, which it recognises anywhere in a text."""
    added = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    return frozenset(filter(None, (*tokenizer.all_special_tokens, *added)))


def row_text(row: Mapping[str, Any]) -> dict[str, Any]:
    """The conversation of a row, without its pixels."""
    texts = {name: row[name] for name in used_columns(row) if row.get(name)}
    return {**texts, "images": [None] * len(images_of(row)), "videos": [None] * len(videos_of(row))}


def _measure_row(
    row: Mapping[str, Any], counter: TokenCounter, shortened: bool, max_pixels: int
) -> tuple[tuple[int, int, int], int]:
    """Characters and messages of a row's text, and 1, or zeros for an unusable row; and tokens of its images."""
    if marks(row).get("fault"):
        return (0, 0, 0), 0
    try:
        sizes: list[Shape] = [
            _PROBES[0] if counter.fixed else image_size(image, max_pixels) for image in images_of(row)
        ]
        for video in videos_of(row):
            count, size = video_shape(video, counter.sampling, max_pixels)
            # Their number is the same, whenever they are shown.
            sizes.append(ClipShape(size, tuple(map(float, range(count))), 1.0, float(count), counter.sampling.frames))
        visual = counter.lengths(0, sizes)[int(shortened)]
        messages = [checked_message(message) for message in _messages(row)]
    except RecordError:
        return (0, 0, 0), 0
    characters = sum(map(len, (*map(text_of, messages), *_plain_texts(row))))
    return (characters, len(messages), 1), visual


def _messages(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    lists = [row.get(name) or [] for name in used_columns(row)]
    return [message for messages in lists if not isinstance(messages, str) for message in messages]


def _plain_texts(row: Mapping[str, Any]) -> list[str]:
    """A prompt and a completion that are plain texts."""
    return [row[name] for name in used_columns(row) if isinstance(row.get(name), str)]
