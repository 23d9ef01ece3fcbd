"""Convert records to chat messages with images and videos: LLaVA conversations, messages, prompt and completion."""

import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from saccade.data.fields import check_message_fields, check_row_fields, check_text, is_given, system_prompt
from saccade.errors import RecordError, kind_of

IMAGE_TAG = "<image>"
VIDEO_TAG = "<video>"
TAGS = {"image": IMAGE_TAG, "video": VIDEO_TAG}
"""Where an image or a video stands in a text."""
FORMATS = ("auto", "llava", "chat")
LLAVA_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
CHAT_ROLES = ("system", "user", "assistant", "tool")
NO_ANSWER = "there is no answer to learn: add a turn of the assistant, or remove the row"
EMPTY_ANSWER = "an answer is empty: write one, or remove the row"

Message = dict[str, Any]


def convert(record: Mapping[str, Any], form: str = "auto") -> dict[str, Any]:
    """Convert a record to chat messages and lists of its images and videos. The same record always gives the same
    result.

    LLaVA's records may mark a video by `<image>`, as LLaVA-Video's do: if a record has videos and no images, these
    tags stand for its videos.

    Args:
        record: with `conversations` and optionally `image` or `video` (LLaVA), or with `messages`, or `prompt` and
            `completion`, and optionally `images` and `videos`. A part of a message of type "video" may contain the
            video itself, as its "video".
        form: "llava", "chat", or "auto" to infer it from the record's fields.

    Returns:
        `messages`, or `prompt` and `completion`: lists of {"role", "content"}; and `images` and `videos`, lists.

    Raises:
        RecordError: if the record has none of these forms, or cannot be trained on.
    """
    check_row_fields(record)
    if is_given(record.get("chat_template_kwargs")):
        raise RecordError(
            "a row has the field 'chat_template_kwargs', which is only read from datasets passed in Python: remove it",
            "field",
        )
    videos, inside = videos_of(record), []
    column = _column_of(record, form)
    if column == "conversations":
        row: dict[str, Any] = {"messages": _llava_messages(record.get("conversations"))}
        if videos and not images_of(record):
            row["messages"] = [_with_video_tags(message) for message in row["messages"]]
    elif column == "messages":
        row = {"messages": _chat_messages(record["messages"], "messages", inside)}
    elif column == "prompt":
        row = {name: _chat_messages(record.get(name), name, inside) for name in ("prompt", "completion")}
    else:
        raise RecordError(
            f"this has no 'messages' list, only {sorted(record)}: each row needs 'conversations', or 'messages', or "
            "'prompt' and 'completion'"
        )
    first = next(iter(row))
    row[first] = _after_first_question(row[first])
    row[first] = with_system_prompt(row[first], system_prompt(record))
    if videos and inside:
        raise RecordError("a row has videos both in 'videos' and in its messages: keep one of them", "content_part")
    row["images"], row["videos"] = images_of(record), videos or inside
    _check_answers(row["messages"] if "messages" in row else row["completion"])
    place_row_media(row, len(row["images"]), len(row["videos"]))  # as training will
    return row


def _column_of(record: Mapping[str, Any], form: str) -> str | None:
    """The field with a record's text, None if it has none: the first that is not empty. Tables fill those that a row
    lacks."""
    if form == "llava":
        return "conversations"
    known = ("messages", "prompt") if form == "chat" else ("conversations", "messages", "prompt")
    there = [name for name in known if record.get(name) is not None]
    return next((name for name in there if is_given(record[name])), there[0] if there else None)


def _after_first_question(messages: list[Message]) -> list[Message]:
    """The messages without answers before the first question, which LLaVA leaves out."""
    early = len(list(takewhile(lambda message: message["role"] in ("system", "assistant"), messages)))
    return [message for place, message in enumerate(messages) if place >= early or message["role"] == "system"]


def _with_video_tags(message: Message) -> Message:
    """A message of a row without images: an image tag can only stand for a video."""
    content = message["content"]
    return message if VIDEO_TAG in content else {**message, "content": content.replace(IMAGE_TAG, VIDEO_TAG)}


def _llava_messages(turns: Any) -> list[Message]:
    """Messages of LLaVA's `conversations`."""
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        raise RecordError("this has no 'conversations' list: LLaVA's rows need one")
    messages = []
    for turn in turns:
        if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str):
            raise RecordError(f"each turn needs a 'from' and a 'value', found {str(turn)[:80]}")
        role = LLAVA_ROLES.get(str(turn.get("from")))
        if role is None:
            raise RecordError(f"role {turn.get('from')!r} is unknown: use human, gpt or system", "unknown_role")
        check_message_fields(turn)
        check_text(turn["value"], "a turn")
        messages.append({"role": role, "content": turn["value"]})
    return messages


def _chat_messages(messages: Any, name: str, videos: list[Any]) -> list[Message]:
    """The messages of a column; the videos that their parts contain are appended to `videos`."""
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise RecordError(f"{name!r} is {kind_of(messages)}: give a list of messages")
    checked = []
    for message in messages:
        whole = checked_message(_without_videos(message, videos))
        if whole.get("tool_calls"):
            # Tool calls get no labels, so such an answer would only teach its end token.
            raise RecordError("'tool_calls' are not learned: write the call into the content, or remove the row")
        checked.append({name: whole[name] for name in ("role", "content")})
    return checked


def _without_videos(message: Any, videos: list[Any]) -> Any:
    """The message with its videos moved from its parts to `videos`, in order."""
    if not isinstance(message, Mapping) or not isinstance(message.get("content"), list):
        return message
    parts = []
    for part in message["content"]:
        if isinstance(part, Mapping) and part.get("type") == "video" and part.get("video") is not None:
            videos.append(part["video"])
            part = {name: value for name, value in part.items() if name != "video"}
        parts.append(part)
    return {**message, "content": parts}


def checked_message(message: Any) -> Message:
    """The message, without the empty fields that `datasets` adds to parts to give a column uniform parts.

    Raises:
        RecordError: if it is not a message.
    """
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise RecordError(f"each message needs a 'role' and a 'content', found {str(message)[:80]}")
    if message["role"] not in CHAT_ROLES:
        raise RecordError(f"role {message['role']!r} is unknown: use {', '.join(CHAT_ROLES)}", "unknown_role")
    check_message_fields(message)
    content = "" if message.get("content") is None and message.get("tool_calls") else message.get("content")
    if not isinstance(content, (str, list)):
        raise RecordError(f"each message needs a 'role' and a 'content', found {str(message)[:80]}")
    return {**message, "content": _content(content)}


def with_system_prompt(messages: list[Message], prompt: str | None) -> list[Message]:
    """Prepend a row's own system prompt to its messages.

    Raises:
        RecordError: if they begin with a different one.
    """
    if prompt is None:
        return messages
    if messages and messages[0]["role"] == "system":
        if text_of(messages[0]).strip() == prompt.strip():
            return messages
        raise RecordError("a row has a system prompt and a system message that say different things: remove one")
    return [{"role": "system", "content": prompt}, *messages]


def used_columns(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Which columns contain a row's text. A table joined from several may have other columns too."""
    if row.get("messages") is not None or row.get("prompt") is None:
        return ("messages",)
    return ("prompt", "completion")


def _content(content: str | list) -> str | list:
    if isinstance(content, str):
        check_text(content, "a content")
        return content
    return [_part(part) for part in content]


def _part(part: Any) -> dict[str, Any]:
    """A part without the empty fields that it only has because other parts of its column have them.

    A processor might open whatever else a part contains, such as a path, a URL or bytes, so nothing else is let
    through.
    """
    if not isinstance(part, Mapping):
        raise RecordError(f"a content is a text or a list of parts with a 'type', found {str(part)[:80]}")
    part = {name: value for name, value in part.items() if value is not None}
    kind = part.get("type")
    if kind not in ("text", *TAGS):
        raise RecordError(f"a part of a content has the type {kind!r}: use 'text', 'image' or 'video'", "content_part")
    allowed = {"type", "text"} if kind == "text" else {"type"}
    others = sorted(str(name) for name in part if name not in allowed)
    if others:
        fix = f"give {kind}s in the row's '{kind}s', by path or as bytes" if kind in TAGS else "remove it"
        raise RecordError(f"a part of type {kind!r} has the field {others[0]!r}: {fix}", "content_part")
    if kind == "text":
        text = part.get("text")
        if not isinstance(text, str):
            raise RecordError(f"a part of type 'text' has the text {str(text)[:80]!r}: give a string", "content_part")
        check_text(text, "a part")
    return part


def images_of(record: Mapping[str, Any]) -> list[Any]:
    """A record's `images`, or its single `image`, as a list.

    Raises:
        RecordError: if it has both.
    """
    return _media_of(record, "image")


def videos_of(record: Mapping[str, Any]) -> list[Any]:
    """A record's `videos`, or its single `video`, as a list. A video may be a list itself, of its frames.

    Raises:
        RecordError: if it has both.
    """
    return _media_of(record, "video")


def _media_of(record: Mapping[str, Any], kind: str) -> list[Any]:
    given = [name for name in (f"{kind}s", kind) if is_given(record.get(name))]
    if len(given) > 1:
        raise RecordError(f"a row has both '{kind}s' and '{kind}': keep one of them")
    if not given:
        return []
    media = record[given[0]]
    return list(media) if isinstance(media, (list, tuple)) else [media]


def _check_answers(messages: list[Message]) -> None:
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise RecordError(NO_ANSWER, "no_answer")
    for answer in answers:
        if not text_of(answer).strip():
            raise RecordError(EMPTY_ANSWER, "empty_answer")
        check_no_media(answer)


def check_no_media(answer: Message) -> None:
    """Refuse an answer with a placeholder."""
    for kind, tag in TAGS.items():
        if media_count(answer, kind):
            raise RecordError(f"{tag} is in an answer: move it to a question", "placeholder_count")


def text_of(message: Message) -> str:
    """The text of a message, including placeholders: its parts one after the other, as chat templates write them."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(str(part.get("text", "")) for part in content)


def media_count(message: Message, kind: str) -> int:
    """The number of placeholders of images, or of videos, in a message: tags in its text, and parts of that type."""
    parts = [] if isinstance(message["content"], str) else message["content"] or []
    return text_of(message).count(TAGS[kind]) + sum(part.get("type") == kind for part in parts)


def place_media(messages: list[Message], images: int, videos: int = 0) -> list[Message]:
    """Turn `<image>` and `<video>` tags in the messages' text into parts; messages without any are returned unchanged.

    Raises:
        RecordError: if there are tags or parts of images or of videos, or a question in parts, and their number
            differs from that of the images or videos; or if there are none, and no question to put these before.
    """
    # A question in parts says where its images are; an answer or a system message in parts says nothing of them.
    structured = any(
        message.get("role") == "user" and isinstance(message.get("content"), list) for message in messages
    )
    counts = {"image": images, "video": videos}
    tags = {kind: sum(media_count(message, kind) for message in messages) for kind in counts}
    if not any(tags.values()) and not structured:
        if any(counts.values()) and not any(message["role"] == "user" for message in messages):
            what = " and ".join(f"{count} {kind}(s)" for kind, count in counts.items() if count)
            raise RecordError(
                f"messages has {what} but no user message to put them before: add one", "placeholder_count"
            )
        return messages
    for kind, count in counts.items():
        if tags[kind] != count:
            raise RecordError(
                f"messages has {tags[kind]} {TAGS[kind]} placeholder(s) but {kind}s has {count}: give one {kind} for "
                "each",
                "placeholder_count",
            )
    return [as_parts(message) for message in messages]


def place_row_media(row: Mapping[str, Any], images: int, videos: int = 0) -> dict[str, Any]:
    """The row after `place_media` in its messages, those of prompt and completion together, which are one
    conversation. Plain text is left as it is."""
    columns = [name for name in ("messages", "prompt", "completion") if name in row]
    if not columns or not all(isinstance(row[name], list) for name in columns):
        return dict(row)
    messages = [message for name in columns for message in row[name]]
    placed = iter(place_media(messages, images, videos))
    return {**row, **{name: [next(placed) for _ in row[name]] for name in columns}}


def as_parts(message: Message) -> Message:
    """The message with its text as a list of parts, with a separate part for each `<image>` and `<video>` tag.

    Line breaks next to a tag are removed, since the model's chat template adds its own.
    """
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": _split(content)}
    if not content or not _TAG.search(text_of(message)):
        return message
    split = [_split(part["text"]) if _TAG.search(str(part.get("text"))) else [part] for part in content]
    return {**message, "content": [part for parts in split for part in parts]}


_TAG = re.compile(f"({'|'.join(map(re.escape, TAGS.values()))})")
_KINDS = {tag: kind for kind, tag in TAGS.items()}


def _split(content: str) -> list[dict[str, str]]:
    parts: list[dict[str, str]] = []
    # Texts at even places, tags at odd ones.
    texts = _TAG.split(content)
    for position, text in enumerate(texts):
        if position % 2:
            parts.append({"type": _KINDS[text]})
            continue
        if position:
            text = text.lstrip("\r\n")
        if position < len(texts) - 1:
            text = text.rstrip("\r\n")
        if text.strip():
            parts.append({"type": "text", "text": text})
    return parts
