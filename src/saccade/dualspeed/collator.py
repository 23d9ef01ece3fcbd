"""Collate samples into a padded batch: TRL's collator, plus answer labels, images and videos, and validation."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from saccade.data.clips import check_takes_videos, placeholder_ids, with_clips
from saccade.data.conversation import (
    EMPTY_ANSWER,
    NO_ANSWER,
    checked_message,
    images_of,
    place_row_media,
    text_of,
    used_columns,
    videos_of,
    with_system_prompt,
)
from saccade.data.fields import MARKS, ROW_FIELDS, check_row_fields, check_text, marks, system_prompt
from saccade.data.lengths import check_words
from saccade.data.plain import PlainWriter, row_writer
from saccade.data.turns import TrainingText, TurnWriter
from saccade.dualspeed.labels import learned_tokens
from saccade.errors import RecordError, kind_of
from saccade.families.padding import pads_to_square
from saccade.images import MAX_PIXELS, open_image
from saccade.prompt_start import needs_start, start_alone
from saccade.reducers import no_room
from saccade.tokens import IGNORE_INDEX
from saccade.videos import Sampling, open_video

WORDS = ("messages", "prompt", "completion")
STANDS_IN = "saccade_stands_in"
"""Column that is true on rows that merely fill up a batch, which have no labels."""
OWN_COLUMNS = ("index", *MARKS, STANDS_IN)
"""Columns that `saccade.data.mix` adds to a row, for messages about it, and the mark of replacements."""
BAD_RECORDS = "bad_records"
"""The entry of a batch that lists the bad records met while making it; the only entry of an empty batch."""


@dataclass
class DualSpeedCollator(DataCollatorForVisionLanguageModeling):
    """Collates `messages` (or prompt and completion) with `images` and `videos` into processor outputs with `labels`.

    Labels are the answers, each with the token that ends its turn, as `TurnWriter` writes them; without
    `assistant_only_loss` and `completion_only_loss` they are the whole text. They never contain image placeholders or
    padding. Text beyond `max_length` is truncated; image tokens never are.

    Images may be PIL images, paths, or dicts with "bytes" or "path", videos anything that `open_video` takes.
    `<image>` and `<video>` in a message's text mark the position of an image or a video; without any tags, images and
    then videos go before the first user message.

    A record that cannot be used is an error or, if `max_bad_records` is given, is replaced by the next usable one of
    `rows` and listed in the batch's `bad_records`. The replacement depends on the record alone, so that every run,
    rank and worker agrees. Rows without an index, as in streams, are replaced by the next usable row of their batch,
    or by the last row of the previous batch.

    Args:
        fit_length: maximum number of tokens of a row after its visual tokens are reduced to fit. If given,
            `max_length` is ignored, no text is cut, and a row is only refused if it cannot fit with one token per
            image.
        isolator_length: isolator rows before each image, which count towards `fit_length`.
        placeholder_id: token id of a visual token.
        conversation: "chat" writes rows in the model's chat format, "plain" as image, caption and line break, with
            labels on the last two; see `PlainWriter`.
        stop_ids: token ids at which `generate` stops; by default the end tokens of the template and the tokenizer.
        max_image_pixels: size above which an image, or a frame, is refused.
        sampling: which frames of a video are taken.
        max_bad_records: how many bad records a batch may meet before it is given up and returned empty. None makes the
            first one an error.
        rows: the dataset that rows come from, indexed by their `index`.
        learn_stand_ins: whether replacements of bad records have labels. In evaluation they would be counted twice.

    Raises:
        RecordError: if `max_bad_records` is None: on a row with a fault; an image that is missing, truncated or not an
            image, the same of videos; a video for a processor that takes none; a number of `<image>` or `<video>` tags
            that differs from that of images or videos; a row without an answer; a row that the chat template or the
            processor refuses; a `max_length` that would cut visual tokens or every label of a row; and a `fit_length`
            that leaves no room for a row's images.
    """

    placeholder_id: int | None = None
    fit_length: int | None = None
    isolator_length: int = 0
    conversation: str = "chat"
    stop_ids: tuple[int, ...] = ()
    max_image_pixels: int = MAX_PIXELS
    sampling: Sampling = field(default_factory=Sampling)
    max_bad_records: int | None = None
    rows: Dataset | None = None
    learn_stand_ins: bool = True
    # The last sample of the previous batch, for a batch of a stream without any usable row.
    _spare: dict[str, Any] | None = field(default=None, init=False, repr=False)

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        bad: dict[str, dict[str, Any]] = {}
        places = [_Place(example, marks(example).get("index"), self._prepare(example, bad)) for example in examples]
        while self._fill(places, bad):
            batch, faults = self._collate([place.prepared for place in places])
            if not faults:
                self._spare = places[-1].prepared if self.rows is None else None
                return {**batch, BAD_RECORDS: list(bad.values())} if bad else batch
            for row, error in faults.items():
                self._note(places[row].example, error, bad, f"sample {row} of the batch")
                places[row].prepared = None
        return {BAD_RECORDS: list(bad.values())}

    def _prepare(self, example: dict[str, Any], bad: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
        try:
            if videos_of(example):
                check_takes_videos(self.processor)
            prepared = prepare_example(
                example, self.max_image_pixels, pads_to_square(self.processor), sampling=self.sampling
            )
            self._check_columns(prepared)
            if self.assistant_only_loss or "messages" not in prepared:
                _check_learnable(prepared)
            if self.placeholder_id is not None:
                check_words(prepared, self.processor, self.placeholder_id)
            return {
                "text": self._text(prepared),
                "images": prepared["images"],
                "videos": prepared["videos"],
                "part_only": self._learns_part(prepared),
                STANDS_IN: example.get(STANDS_IN) is True,
            }
        except RecordError as error:
            self._note(example, error, bad)
            return None

    def _learns_part(self, example: dict[str, Any]) -> bool:
        """Whether only the answers of a row get labels. A plain text has no answers, and all of it gets labels."""
        if not any(column in example for column in WORDS):
            return False
        chosen = self.assistant_only_loss if "messages" in example else self.completion_only_loss
        return chosen or self.conversation == "plain"

    @cached_property
    def _writer(self) -> TurnWriter | PlainWriter:
        return row_writer(self.processor, self.conversation, self.stop_ids, self.chat_template)

    @cached_property
    def _start(self) -> str:
        return start_alone(self.processor.tokenizer)

    @cached_property
    def _placeholders(self) -> list[int]:
        return placeholder_ids(self.processor, self.placeholder_id)

    def _text(self, example: dict[str, Any]) -> TrainingText:
        if not any(column in example for column in WORDS):
            return TrainingText(example[self.dataset_text_field])
        return self._writer.write(example)

    def _check_columns(self, example: dict[str, Any]) -> None:
        """Refuse a row that has none of the text columns."""
        plain = isinstance(example.get(self.dataset_text_field), str)
        if not plain and not any(name in example for name in WORDS):
            raise RecordError(f"this row has only {sorted(example)}: give 'messages', or 'prompt' and 'completion'")

    def _note(
        self, example: dict[str, Any], error: RecordError, bad: dict[str, dict[str, Any]], name: str | None = None
    ) -> None:
        record = marks(example).get("record")
        if self.max_bad_records is None:
            where = record or name
            raise RecordError(f"{where}: {error}" if where else str(error), error.kind) from error
        # Records without a name are distinguished by what is wrong with them.
        record = record or f"a row without a number ({error})"
        bad[record] = {"record": record, "kind": error.kind, "reason": str(error)}

    def _fill(self, places: list["_Place"], bad: dict[str, dict[str, Any]]) -> bool:
        """Fill the places without a usable row. False if there are too many bad records or no usable row."""
        unlearned = not self.learn_stand_ins
        for number, place in enumerate(places):
            while place.prepared is None:
                if len(bad) > self.max_bad_records:
                    return False
                if self.rows is None or place.start is None:
                    others = (other.prepared for other in (*places[number:], *places[:number]))
                    good = next((other for other in others if other is not None), self._spare)
                    if good is None:
                        return False
                    place.prepared = {**good, STANDS_IN: unlearned or place.example.get(STANDS_IN) is True}
                    continue
                place.tried += 1
                if place.tried > len(self.rows):
                    return False
                place.example = self.rows[(place.start + place.tried) % len(self.rows)]
                found = self._prepare(place.example, bad)
                place.prepared = None if found is None else {**found, STANDS_IN: unlearned}
        return True

    def _collate(self, prepared: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[int, RecordError]]:
        """The batch, and the errors of rows that cannot be used in it."""
        texts, add_start = self._started([row["text"] for row in prepared])
        rows = [
            {self.dataset_text_field: text.text, "images": row["images"]}
            for text, row in zip(texts, prepared, strict=True)
        ]
        stock = replace(self, max_length=None, assistant_only_loss=False, completion_only_loss=False)
        videos = [row["videos"] for row in prepared]
        try:
            batch = _process(stock, rows, videos, add_start)
        except (ValueError, TypeError):
            faults = _processor_faults(stock, rows, videos, add_start)
            if not faults:
                raise
            return {}, faults
        part_only = torch.tensor([row["part_only"] for row in prepared])  # (B,)
        if part_only.any():
            learned = learned_tokens(batch, texts, self.processor, add_start)  # (B, L)
            batch["labels"] = batch["labels"].masked_fill(part_only[:, None] & ~learned, IGNORE_INDEX)
        is_image = torch.isin(batch["input_ids"], torch.tensor(self._placeholders))
        batch["labels"] = batch["labels"].masked_fill(is_image, IGNORE_INDEX)
        images = [len(row["images"]) + len(row["videos"]) for row in prepared]
        faults = (
            self._length_faults(batch, is_image)
            if self.fit_length is None
            else self._fit_faults(batch, is_image, images)
        )
        stands_in = torch.tensor([row[STANDS_IN] for row in prepared])  # (B,)
        batch["labels"] = batch["labels"].masked_fill(stands_in[:, None], IGNORE_INDEX)
        limit = self.max_length
        if self.fit_length is None and limit is not None and batch["input_ids"].shape[1] > limit:
            shape = batch["input_ids"].shape
            for name, value in batch.items():
                if isinstance(value, Tensor) and value.shape == shape:
                    batch[name] = value[:, :limit]
        return batch, faults

    def _started(self, texts: list[TrainingText]) -> tuple[list[TrainingText], bool]:
        """The texts, and whether the tokenizer is to put its start token before them.

        Where only some begin with it, such as plain texts beside a chat template's, it is written before the others.
        """
        needed = [needs_start(self._start, text.text) for text in texts]
        if any(needed) and not all(needed):
            texts = [text.after(self._start) if needs else text for text, needs in zip(texts, needed, strict=True)]
        return texts, all(needed)

    def _fit_faults(self, batch: dict[str, Any], is_image: Tensor, images: Sequence[int]) -> dict[int, RecordError]:
        """Why rows cannot fit under `fit_length`, however few visual tokens they keep."""
        text = (batch["attention_mask"].sum(dim=1) - is_image.sum(dim=1)).tolist()
        reasons = [no_room(*row, self.isolator_length, self.fit_length) for row in zip(text, images, strict=True)]
        return {row: RecordError(reason, "too_long") for row, reason in enumerate(reasons) if reason is not None}

    def _length_faults(self, batch: dict[str, Any], is_image: Tensor) -> dict[int, RecordError]:
        """Why rows of an uncut batch cannot be used at `max_length`."""
        limit = self.max_length
        faults: dict[int, RecordError] = {}
        if limit is None or batch["input_ids"].shape[1] <= limit:
            return faults
        learned = batch["labels"] != IGNORE_INDEX
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        cut = is_image[:, limit:].any(dim=1)
        # The first token is never predicted, so a label on it does not count.
        unlearned = learned.any(dim=1) & ~learned[:, 1:limit].any(dim=1)
        for row in (cut | unlearned).nonzero().flatten().tolist():
            if cut[row]:
                needed = int(is_image[row].nonzero().max()) + 1
                what = f"cuts image tokens: it has {lengths[row]} tokens, its last image token is number {needed}"
            else:
                needed = int(learned[row].nonzero().min()) + 1
                what = f"cuts every answer: it has {lengths[row]} tokens, its first answer begins at number {needed}"
            fix = f"raise max_length to at least {lengths[row]}, or set it to null"
            faults[row] = RecordError(f"max_length={limit} {what}; {fix}", "too_long")
        return faults


@dataclass
class _Place:
    """A place in a batch: the row tried last, the index of the first, what it became, how many others were tried."""

    example: dict[str, Any]
    start: int | None
    prepared: dict[str, Any] | None
    tried: int = 0


_stock_call = DataCollatorForVisionLanguageModeling.torch_call


def _check_learnable(example: dict[str, Any]) -> None:
    """Refuse a row without any answer to learn, or with an empty one: it would be learned as to stop at once."""
    answers = example.get("messages", example.get("completion"))
    if isinstance(answers, list):
        spoken = [message for message in answers if message["role"] == "assistant"]
        said = [bool(text_of(message).strip() or message.get("tool_calls")) for message in spoken]
        if any(said) and not all(said):
            raise RecordError(EMPTY_ANSWER, "empty_answer")
        nothing = not any(said)
    else:
        nothing = isinstance(answers, str) and not answers.strip()
    if nothing:
        raise RecordError(NO_ANSWER, "no_answer")


def _process(
    stock: DualSpeedCollator, rows: list[dict[str, Any]], videos: list[list[Any]], add_start: bool
) -> dict[str, Any]:
    """TRL's batch, whose collator knows no videos and never asks for a start token: the processor is told of them
    beside what it gives."""
    clips = [clip for clips in videos for clip in clips]
    call = with_clips(stock.processor, clips) if clips else stock.processor

    def processor(**options: Any) -> Any:
        return call(**{**options, "add_special_tokens": add_start})

    return _stock_call(replace(stock, processor=processor), rows)


def _processor_faults(
    stock: DualSpeedCollator, rows: list[dict[str, Any]], videos: list[list[Any]], add_start: bool
) -> dict[int, RecordError]:
    """The rows that the processor refuses, such as an image too narrow for it."""
    faults = {}
    for row, (example, clips) in enumerate(zip(rows, videos, strict=True)):
        try:
            _process(stock, [example], [clips], add_start)
        except (ValueError, TypeError) as error:
            faults[row] = RecordError(f"the processor refuses it: {' '.join(str(error).split())}")
    return faults


def prepare_example(
    example: dict[str, Any],
    max_image_pixels: int = MAX_PIXELS,
    padded: bool = False,
    sampling: Sampling | None = None,
) -> dict[str, Any]:
    """The sample with opened images, the clips of its videos, and structured messages, as TRL's collator expects it.

    Raises:
        RecordError: on a row with a fault, a bad image or video, or tags that do not match the images and videos.
    """
    fault = marks(example).get("fault")
    if fault:
        raise RecordError(fault, example["kind"])
    check_row_fields(example)
    beside = {name: value for name, value in example.items() if name not in (*OWN_COLUMNS, *ROW_FIELDS)}
    images = [open_image(image, max_image_pixels, padded) for image in images_of(example)]
    videos = [open_video(video, sampling, max_image_pixels) for video in videos_of(example)]
    prepared = {**beside, **_checked_words(example), "images": images, "videos": videos}
    return place_row_media(prepared, len(images), len(videos))


def _checked_words(example: dict[str, Any]) -> dict[str, Any]:
    """The text columns that the sample uses, with their messages validated."""
    given = {column: example[column] for column in WORDS if column in example}
    used = {column: given[column] for column in used_columns(given) if column in given}
    if given and not used:
        raise RecordError(f"{next(iter(given))!r} is empty: write it, or remove the row")
    for column, value in used.items():
        if value is None or (isinstance(value, list) and not value):
            raise RecordError(f"{column!r} is empty: write it, or remove the row")
        if isinstance(value, list):
            used[column] = [checked_message(message) for message in value]
        elif column == "messages" or not isinstance(value, str):
            raise RecordError(f"{column!r} is {kind_of(value)}: give a list of messages")
        else:
            check_text(value, repr(column))
    first, prompt = next(iter(used), None), system_prompt(example)
    if prompt is not None and first is not None:
        if isinstance(used[first], str):
            raise RecordError(f"a plain {first!r} takes no system prompt: write it into the text", "field")
        used[first] = with_system_prompt(used[first], prompt)
    return used
