"""The training text of a row, and which parts of it are learned: each answer, with its end-of-turn token."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from saccade.data.chat import apply_chat_template
from saccade.data.conversation import (
    TAGS,
    Message,
    as_parts,
    check_no_media,
    checked_message,
    images_of,
    media_count,
    used_columns,
    videos_of,
)
from saccade.data.fields import marks
from saccade.errors import RecordError

_FIX = "use a chat template that writes answers right after its generation prompt (chat_template_path takes a file)"


@dataclass(frozen=True)
class TrainingText:
    """The training text of a row, before its images become tokens.

    Args:
        text: the text in the model's chat format.
        learned: start and end of each learned answer in it, in characters, including the end-of-turn token.
    """

    text: str
    learned: tuple[tuple[int, int], ...] = ()

    def after(self, start: str) -> "TrainingText":
        """The text with another before it."""
        return TrainingText(start + self.text, tuple((len(start) + a, len(start) + b) for a, b in self.learned))


@dataclass(frozen=True)
class TurnWriter:
    """Writes rows as the text that `generate` sees: each answer follows the generation prompt of the model's own chat
    template, and ends with the token at which `generate` stops.

    An answer and what follows it is located as the difference between the conversation up to the answer, with the
    generation prompt, and the conversation including the answer, so `{% generation %}` markers are not needed. If the
    template has no end token after an answer (LLaVA-1.5, LLaVA-1.6 with Vicuna), one is inserted, replacing the space
    before the next turn.

    Args:
        processor: the model's processor.
        stop_ids: token ids at which `generate` stops. If empty, the template's own end token, or else the tokenizer's,
            is assumed to be one.
        chat_template: replaces the processor's.
    """

    processor: Any
    stop_ids: tuple[int, ...] = ()
    chat_template: str | None = None

    def write(self, row: Mapping[str, Any]) -> TrainingText:
        """The text of a row with `messages`, or with `prompt` and `completion` as messages or as plain text.

        Surrounding whitespace is stripped from answers, since tokenizers would join it to the prompt or the end token.

        Raises:
            RecordError: if the learned part would not be exactly an answer and its end token, or if the chat template
                rejects the row.
        """
        columns = {name: row.get(name) for name in used_columns(row)}
        if "messages" in columns:
            return self._conversation(columns["messages"] or [], row, learned_from=0)
        prompt, completion = columns["prompt"], columns["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            self._check_words(completion)
            end = self._own_end
            return TrainingText(prompt + completion + end, ((len(prompt), len(prompt + completion + end)),))
        if not isinstance(prompt, list) or not isinstance(completion, list):
            raise RecordError("'prompt' and 'completion' differ in kind: give two texts, or two lists of messages")
        return self._conversation([*prompt, *completion], row, learned_from=len(prompt))

    def _conversation(self, given: Sequence[Message], row: Mapping[str, Any], learned_from: int) -> TrainingText:
        messages = with_places(given, len(images_of(row)), len(videos_of(row)))
        turns = [number for number in range(learned_from, len(messages)) if messages[number]["role"] == "assistant"]
        for number in turns:
            messages[number] = _stripped(messages[number])
        options = row.get("chat_template_kwargs") or {}
        *before, whole = self._render([messages[:number] for number in turns], [messages], options)
        after = self._render([], [messages[: number + 1] for number in turns], options)
        text, seen = "", ""
        learned = []
        for number, asked, answered in zip(turns, before, after, strict=True):
            text += _rest(asked, seen)
            answer, rest = self._answer(messages[number], asked, answered)
            learned.append((len(text), len(text + answer)))
            text += answer
            # The text after the end token may depend on whether another turn follows.
            seen = answered[: len(answered) - len(rest)]
        return TrainingText(text + _rest(whole, seen), tuple(learned))

    def _render(
        self, asking: list[list[Message]], plain: list[list[Message]], options: Mapping[str, Any]
    ) -> list[str]:
        """Render conversations as text, those of `asking` with the generation prompt."""
        texts = []
        for conversations, prompt in ((asking, True), (plain, False)):
            if conversations:
                texts += apply_chat_template(
                    self.processor,
                    conversations,
                    chat_template=self.chat_template,
                    tokenize=False,
                    add_generation_prompt=prompt,
                    **options,
                )
        return texts

    def _answer(self, message: Message, asked: str, answered: str) -> tuple[str, str]:
        """An answer with its end token, and what the template writes after it."""
        written = _after(asked, answered)
        position = 0
        for part in message["content"]:
            words = str(part.get("text", "")).strip()
            self._check_words(words)
            start = len(written) - len(written[position:].lstrip())
            if not written.startswith(words, start):
                raise RecordError(
                    f"the chat template writes {written[start : start + 40]!r} where the answer {words[:40]!r} should "
                    f"begin: {_FIX}"
                )
            position = start + len(words)
        if message.get("tool_calls"):
            found = [written.rfind(token) + len(token) for token in self._ends if token in written]
            position = max(found, default=len(written.rstrip()))
            if found:
                return written[:position], written[position:]
        tail = written[position:]
        start = len(tail) - len(tail.lstrip())
        token = max((token for token in self._added if tail.startswith(token, start)), key=len, default="")
        if not tail.strip():
            return written[:position] + self._own_end, tail.lstrip(" ")
        if token not in self._ends:
            raise RecordError(
                f"after an answer the chat template writes {tail[start : start + 40]!r}, but generate stops only at "
                f"{', '.join(map(repr, self._ends)) or 'nothing'}: add the token that ends a turn to eos_token_id of "
                "the model's generation_config, or give the processor a chat template that ends turns with one of "
                "these"
            )
        end = position + start + len(token)
        return written[:end], written[end:]

    def _check_words(self, words: str) -> None:
        ends = self._ends if self.stop_ids else {self.processor.tokenizer.eos_token} - {None}
        for token in ends:
            if token in words:
                raise RecordError(
                    f"{token!r} is in an answer, and generate would stop there: remove it; training adds the end "
                    "token itself",
                    "end_token",
                )

    @cached_property
    def _added(self) -> dict[str, bool]:
        """The tokenizer's added tokens, and whether they are special."""
        return {token.content: token.special for token in self.processor.tokenizer.added_tokens_decoder.values()}

    @cached_property
    def _ends(self) -> tuple[str, ...]:
        """The tokens that may end a turn."""
        tokenizer = self.processor.tokenizer
        if self.stop_ids:
            return tuple(tokenizer.convert_ids_to_tokens([token for token in self.stop_ids if token < len(tokenizer)]))
        return tuple(token for token, special in self._added.items() if special)

    @cached_property
    def _own_end(self) -> str:
        """The token that ends a turn if the template has none."""
        own = self.processor.tokenizer.eos_token
        if self.stop_ids and own not in self._ends:
            own = next(iter(self._ends), None)
        if own is None:
            raise RecordError("the tokenizer has no eos_token, so no answer can end: set one")
        return own


def is_plain_text(row: Mapping[str, Any]) -> bool:
    """Whether a row is plain text, already in the model's chat format or in none."""
    return not marks(row).get("fault") and not any(isinstance(row.get(name), list) for name in used_columns(row))


def with_places(messages: Sequence[Message], images: int, videos: int = 0) -> list[Message]:
    """The messages as parts, with a part per image and video: before the first question, images first, unless tags say
    otherwise."""
    placed = [as_parts(checked_message(message)) for message in messages]
    counts = {"image": images, "video": videos}
    missing = [
        {"type": kind} for kind in TAGS for _ in range(counts[kind] - sum(media_count(each, kind) for each in placed))
    ]
    for number, message in enumerate(placed):
        if missing and message["role"] == "user":
            placed[number] = {**message, "content": missing + list(message["content"])}
            break
    return placed


def _stripped(answer: Message) -> Message:
    """An answer without surrounding whitespace."""
    check_no_media(answer)
    content = [dict(part) for part in answer["content"]]
    for place, strip in ((0, str.lstrip), (-1, str.rstrip)):
        if content and isinstance(content[place].get("text"), str):
            content[place]["text"] = strip(content[place]["text"])
    return {**answer, "content": content}


def _rest(text: str, seen: str) -> str:
    if not text.startswith(seen):
        change = seen[common_start(text, seen) :]
        raise RecordError(
            f"the chat template no longer writes {change[:40]!r} once other turns follow: use one that writes a turn "
            "the same way in every position (chat_template_path takes a file), or rows with one answer each"
        )
    return text[len(seen) :]


def _after(asked: str, answered: str) -> str:
    """What follows the generation prompt. Whitespace at its end may differ (LLaVA-OneVision's has less)."""
    if answered.startswith(asked):
        return answered[len(asked) :]
    common = common_start(asked, answered)
    if asked[common:].strip():
        raise RecordError(
            f"the chat template asks for an answer with {asked[common:][:40]!r}, but writes "
            f"{answered[common:][:40]!r} once the answer is given: {_FIX}"
        )
    return answered[common:].lstrip()


def common_start(one: str, other: str) -> int:
    """The length of the common prefix of two texts."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (first, second) in pairs if first != second), min(len(one), len(other)))
