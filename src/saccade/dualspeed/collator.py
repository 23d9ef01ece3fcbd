"""Samples to a padded batch: TRL's collator, with image labels masked, images opened and everything checked."""

import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from trl import prepare_multimodal_messages
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from saccade.errors import SaccadeError
from saccade.tokens import IGNORE_INDEX

IMAGE_TAG = "<image>"


@dataclass
class DualSpeedCollator(DataCollatorForVisionLanguageModeling):
    """Collates `messages` (or prompt and completion) with `images` into processor outputs with `labels`.

    Labels never contain image placeholders or padding. Text beyond `max_length` is cut, image tokens never are.
    Images may be PIL images, paths, or dicts with "bytes" or "path"; `<image>` in a message's text says where one
    stands, and without any they stand before the first user message.

    Args:
        placeholder_id: token id of a visual token.

    Raises:
        SaccadeError: on an image that is missing, truncated or no image, on `<image>` tags that differ in number from
            the images, and on a `max_length` that would cut image tokens.
    """

    placeholder_id: int | None = None

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        examples = [prepare_example(example) for example in examples]
        stock = replace(self, max_length=None)
        if self.assistant_only_loss and "messages" in examples[0]:
            batch = _stock_call(replace(stock, assistant_only_loss=False), examples)
            spoken = self._assistant_tokens(batch, examples)
            if spoken is None:
                # transformers 5.23 fails in this mode if the first sample has no image and another one has.
                batch = _stock_call(stock, sorted(examples, key=lambda example: not example["images"]))
            else:
                batch["labels"] = batch["labels"].masked_fill(~spoken, IGNORE_INDEX)
        else:
            batch = _stock_call(stock, examples)
        is_image = batch["input_ids"] == self.placeholder_id
        batch["labels"] = batch["labels"].masked_fill(is_image, IGNORE_INDEX)
        if self.max_length is not None and batch["input_ids"].shape[1] > self.max_length:
            self._check_cut(is_image, batch["attention_mask"], self.max_length)
            shape = batch["input_ids"].shape
            for name, value in batch.items():
                if isinstance(value, Tensor) and value.shape == shape:
                    batch[name] = value[:, : self.max_length]
        return batch

    def _assistant_tokens(self, batch: dict[str, Any], examples: list[dict[str, Any]]) -> Tensor | None:
        """bool `(B, L)`, true on the assistant's tokens, or None where only the processor can tell.

        The processor finds them by walking over every character of every expanded placeholder, which takes longer
        than a pruned training step. The tokenizer finds them in the text before expansion; the tokens other than
        placeholders must then be the same in both, or the processor added some of its own.
        """
        chats = self.processor.tokenizer.apply_chat_template(
            [prepare_multimodal_messages(example["messages"], images=example["images"]) for example in examples],
            chat_template=self.chat_template or self.processor.chat_template,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        spoken = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
        words = (batch["input_ids"] != self.placeholder_id) & batch["attention_mask"].bool()
        for row, (ids, mask) in enumerate(zip(chats["input_ids"], chats["assistant_masks"], strict=True)):
            pairs = [(token, flag) for token, flag in zip(ids, mask, strict=True) if token != self.placeholder_id]
            if batch["input_ids"][row][words[row]].tolist() != [token for token, _ in pairs]:
                return None
            spoken[row, words[row]] = torch.tensor([bool(flag) for _, flag in pairs], dtype=torch.bool)
        return spoken

    def _check_cut(self, is_image: Tensor, attention_mask: Tensor, limit: int) -> None:
        cut = is_image[:, limit:].any(dim=1).nonzero()
        if cut.numel():
            row = int(cut[0])
            needed = int(is_image[row].nonzero().max()) + 1
            length = int(attention_mask[row].sum())
            raise SaccadeError(
                f"max_length={limit} cuts image tokens: sample {row} of the batch has {length} tokens, "
                f"its last image token is number {needed}; raise max_length to at least {length}, or set it to null"
            )


_stock_call = DataCollatorForVisionLanguageModeling.torch_call


def prepare_example(example: dict[str, Any]) -> dict[str, Any]:
    """The sample with opened images and structured messages, as TRL's collator takes it.

    Raises:
        SaccadeError: on a bad image, or `<image>` tags that do not match the images.
    """
    example = dict(example)
    given = example.pop("image", None)
    images = example.get("images")
    images = ([] if given is None else [given]) if images is None else images
    example["images"] = [open_image(image) for image in images]
    for column in ("messages", "prompt", "completion"):
        if isinstance(example.get(column), list):
            example[column] = [_without_none(message) for message in example[column]]
    for column in ("messages", "prompt"):
        if isinstance(example.get(column), list):
            example[column] = place_images(example[column], len(images))
    return example


def _without_none(message: dict[str, Any]) -> dict[str, Any]:
    """The message without the empty fields that `datasets` adds to make all parts of a column alike."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    parts = [{name: value for name, value in part.items() if value is not None} for part in content]
    return {**message, "content": parts}


def open_image(image: Any) -> Image.Image:
    """A decoded image in RGB.

    Raises:
        SaccadeError: if it is missing, truncated, or no image.
    """
    name = "image"
    try:
        if isinstance(image, dict):
            name = f"image {str(image.get('path') or 'without a path')!r}"
            content = image.get("bytes")
            image = Image.open(io.BytesIO(content) if content is not None else image["path"])
        elif isinstance(image, (str, Path)):
            name = f"image {str(image)!r}"
            image = Image.open(image)
        elif not isinstance(image, Image.Image):
            raise SaccadeError(f"image is a {type(image).__name__}: give a PIL image, a path, or a dict with 'bytes'")
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")
    except FileNotFoundError as error:
        raise SaccadeError(f"{name} does not exist: correct the path in the dataset, or remove the sample") from error
    except UnidentifiedImageError as error:
        raise SaccadeError(f"{name} is no image that Pillow can read: replace it, or remove the sample") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise SaccadeError(f"{name} cannot be decoded ({error}): replace it, or remove the sample") from error


def place_images(messages: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Turn `<image>` tags in the messages' text into image parts; messages without any come back as they were.

    Raises:
        SaccadeError: if there are tags, or structured image parts, and they differ in number from the images.
    """
    tags = sum(_image_parts(message) for message in messages)
    structured = any(isinstance(message.get("content"), list) for message in messages)
    tagged = any(isinstance(message.get("content"), str) and IMAGE_TAG in message["content"] for message in messages)
    if not tagged and not structured:
        if count and not any(message["role"] == "user" for message in messages):
            raise SaccadeError(f"messages has {count} image(s) but no user message to put them before: add one")
        return messages
    if tags != count:
        raise SaccadeError(
            f"messages has {tags} {IMAGE_TAG} placeholder(s) but images has {count}: give one image for each"
        )
    return [as_parts(message) for message in messages]


def _image_parts(message: dict[str, Any]) -> int:
    content = message.get("content")
    if isinstance(content, str):
        return content.count(IMAGE_TAG)
    return sum(part.get("type") == "image" for part in content or [])


def as_parts(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its text as a list of parts, an image part for each `<image>` tag."""
    if not isinstance(message.get("content"), str):
        return message
    parts: list[dict[str, str]] = []
    for position, text in enumerate(message["content"].split(IMAGE_TAG)):
        if position:
            parts.append({"type": "image"})
        if text.strip():
            parts.append({"type": "text", "text": text.strip("\n") if position else text})
    return {**message, "content": parts}
