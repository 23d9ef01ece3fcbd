"""Fields of a record beyond its text and images: which change what is learned, and which are ignored.

A field that changes what is learned is honoured or refused. Any other field, such as an id, is ignored, and the check
of a dataset counts it.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from saccade.errors import RecordError, kind_of

MEDIA_FIELDS = ("images", "image", "videos", "video")
ROW_FIELDS = ("conversations", "messages", "prompt", "completion", *MEDIA_FIELDS, "system", "system_prompt")
"""The fields of a row that are read."""
MARKS = ("record", "fault", "kind")
"""Columns that `saccade.data.mix` and `stream` add to every row, for messages about it; `mix` adds its `index` too."""
MESSAGE_FIELDS = ("role", "content", "from", "value")

REFUSED_IN_ROWS = {
    **dict.fromkeys(("audio", "audios"), "audio is not trained on: remove the row"),
    **dict.fromkeys(
        ("bbox", "bboxes", "boxes", "objects"), "boxes are not read: write them into the text, or remove the field"
    ),
    "tools": "write them into the system prompt, or remove the row",
    **dict.fromkeys(
        ("chosen", "rejected"), "preferences are not trained on: give 'messages', or 'prompt' and 'completion'"
    ),
}
"""Fields of a row that would change what it teaches but are not supported, with what to do about them."""
REFUSED_IN_MESSAGES = {
    "function_call": "is not learned: write the call into the content, or remove the row",
    **dict.fromkeys(
        ("reasoning_content", "reasoning", "thinking"),
        "is not learned: write it into the content, or remove the field",
    ),
    **dict.fromkeys(
        ("image", "images", "video", "videos", "audio", "audios"),
        "is not read in a message: name images in the row's 'images', and videos in its 'videos'",
    ),
    "prefix": "is not read: remove the field",
}
"""The same for fields of a message or a turn."""
WEIGHTS = ("weight", "loss_weight", "loss", "train", "trainable", "loss_mask", "mask")
"""Fields that say whether, or how strongly, a row or a message is learned."""

_VIDEO_NAME = re.compile(r"\S.*\.(mp4|m4v|mov|webm|mkv|avi|mpe?g|ogv|flv|wmv)", re.IGNORECASE | re.DOTALL)
_IMAGE_NAME = re.compile(r"(data:image/.*)|(\S.*\.(jpe?g|png|webp|gif|bmp|tiff?))", re.IGNORECASE | re.DOTALL)


def marks(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row if `mix` or `stream` marked it, otherwise nothing: other data has columns of these names too."""
    return row if all(name in row for name in MARKS) else {}


def is_given(value: Any) -> bool:
    """Whether a field has a value. Tables fill missing fields with None or with something empty."""
    return value is not None and not (isinstance(value, (str, bytes, list, tuple, Mapping)) and len(value) == 0)


def check_row_fields(record: Mapping[str, Any]) -> None:
    """Refuse a row with an unsupported field that would change what it teaches."""
    for name, value in record.items():
        if not is_given(value):
            continue
        if name in REFUSED_IN_ROWS:
            raise RecordError(f"a row has the field {name!r}: {REFUSED_IN_ROWS[name]}", "field")
        _check_weight(name, value)
        if _is_source(name, value) and any(is_given(record.get(media)) for media in MEDIA_FIELDS):
            continue
        if name not in ROW_FIELDS and any(map(_looks_like_an_image, _entries(value))):
            raise RecordError(
                f"a row has the field {name!r}, which looks like an image: call it 'images' or 'image', or remove it",
                "field",
            )
        if name not in ROW_FIELDS and any(map(_looks_like_a_video, _entries(value))):
            raise RecordError(
                f"a row has the field {name!r}, which looks like a video: call it 'videos' or 'video', or remove it",
                "field",
            )


def check_message_fields(message: Mapping[str, Any]) -> None:
    """The same for a message, or a turn of a LLaVA conversation."""
    for name, value in message.items():
        if is_given(value):
            if name in REFUSED_IN_MESSAGES:
                raise RecordError(f"{name!r} {REFUSED_IN_MESSAGES[name]}", "field")
            _check_weight(name, value)


def check_text(text: str, name: str) -> None:
    """Refuse unpaired surrogates, which can be neither tokenized nor written to a file."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RecordError(
            f"{name} contains {text[error.start]!a}, half a character: write the whole one, or remove it", "malformed"
        ) from error


def system_prompt(record: Mapping[str, Any]) -> str | None:
    """The system prompt that a row has in a separate field, or None.

    Raises:
        RecordError: if it is not a text, or there are two different ones.
    """
    given = {name: record[name] for name in ("system", "system_prompt") if is_given(record.get(name))}
    for name, value in given.items():
        if not isinstance(value, str):
            raise RecordError(f"{name!r} is {kind_of(value)}: give a text", "field")
        check_text(value, repr(name))
    if len({value.strip() for value in given.values()}) > 1:
        raise RecordError("a row has 'system' and 'system_prompt', which say different things: remove one", "field")
    return next(iter(given.values()), None)


def fields_left_aside(record: Mapping[str, Any]) -> Iterator[str]:
    """Names of a row's ignored fields, and of its messages' as `messages.name`, each once per row."""
    names = {name for name, value in record.items() if name not in ROW_FIELDS and is_given(value)}
    for column in ("conversations", "messages", "prompt", "completion"):
        messages = record.get(column)
        for message in messages if isinstance(messages, (list, tuple)) else ():
            if isinstance(message, Mapping):
                names |= {
                    f"{column}.{name}" for name in message if name not in MESSAGE_FIELDS and is_given(message[name])
                }
    return iter(sorted(map(str, names)))


def _check_weight(name: str, value: Any) -> None:
    """Refuse weights other than 1, which are not supported."""
    if name not in WEIGHTS:
        return
    values = value if isinstance(value, (list, tuple)) else [value]
    if not all(entry == 1 for entry in values):
        raise RecordError(
            f"{name}={str(value)[:80]} is not read, every answer is learned alike: remove what is not to be learned, "
            f"or the field {name!r}",
            "field",
        )


def _entries(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _is_source(name: Any, value: Any) -> bool:
    """Whether a field says where an image or a video was found, as ALLaVA's `url` does."""
    named = isinstance(name, str) and (name == "url" or name.endswith("_url"))
    return named and isinstance(value, str) and value.strip().startswith(("http://", "https://"))


def _looks_like_an_image(value: Any) -> bool:
    """Whether a value is an image's file name or data URI, stored bytes, or an image object."""
    if isinstance(value, Mapping):
        return isinstance(value.get("bytes"), (bytes, bytearray)) or _looks_like_an_image(value.get("path"))
    if isinstance(value, str):
        return _IMAGE_NAME.fullmatch(value.strip()) is not None
    return hasattr(value, "getexif")


def _looks_like_a_video(value: Any) -> bool:
    """Whether a value is a video's file name."""
    value = value.get("path") if isinstance(value, Mapping) else value
    return isinstance(value, str) and _VIDEO_NAME.fullmatch(value.strip()) is not None
