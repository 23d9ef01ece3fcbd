"""Rows as in LLaVA's stage one: image or video, caption, line break; no roles, instruction or end-of-turn token."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from saccade.data.chat import apply_chat_template
from saccade.data.conversation import images_of, text_of, used_columns, videos_of
from saccade.data.turns import TrainingText, TurnWriter, common_start
from saccade.errors import RecordError
from saccade.prompt_start import start_token
from saccade.values import check_choice

CONVERSATIONS = ("chat", "plain")
_WORD = "zq"


def row_writer(
    processor: Any, conversation: str = "chat", stop_ids: tuple[int, ...] = (), chat_template: str | None = None
) -> "TurnWriter | PlainWriter":
    """The writer of rows as training text, as chat or plain; see `TurnWriter` and `PlainWriter`.

    Raises:
        SaccadeError: on an unknown `conversation`.
    """
    check_choice("conversation", conversation, CONVERSATIONS)
    return PlainWriter(processor) if conversation == "plain" else TurnWriter(processor, stop_ids, chat_template)


@dataclass(frozen=True)
class PlainWriter:
    """Writes rows with images or videos and one answer, the caption. The user's text is left out.

    The caption and one line break are learned.
    """

    processor: Any

    def write(self, row: Mapping[str, Any]) -> TrainingText:
        """The text of a row with `messages`, or with `prompt` and `completion`.

        Raises:
            RecordError: if it has neither an image nor a video, or not one answer.
        """
        columns = [row.get(name) or [] for name in used_columns(row)]
        if any(isinstance(column, str) for column in columns):
            raise RecordError("conversation='plain' needs messages, but this is plain text already: use 'chat'")
        answers = [message for column in columns for message in column if message["role"] == "assistant"]
        images, videos = len(images_of(row)), len(videos_of(row))
        if len(answers) != 1 or not images + videos:
            raise RecordError(
                f"conversation='plain' takes rows of images or videos and one answer, the caption, but this has "
                f"{images} image(s), {videos} video(s) and {len(answers)} answers: remove it, or use "
                "conversation='chat'"
            )
        before = self._start + self._image * images
        if videos:
            before += self._video * videos
        # More line breaks than one may be another token.
        caption = text_of(answers[0]).rstrip("\r\n") + "\n"
        return TrainingText(before + caption, ((len(before), len(before + caption)),))

    @cached_property
    def _start(self) -> str:
        return start_token(self.processor.tokenizer)

    @cached_property
    def _image(self) -> str:
        return self._place("image")

    @cached_property
    def _video(self) -> str:
        return self._place("video")

    def _place(self, kind: str) -> str:
        """What the chat template prints for an image or a video, without surrounding whitespace.

        Raises:
            RecordError: if that has no token of the tokenizer's for one.
        """
        text = {"type": "text", "text": _WORD}
        without, shown = (
            apply_chat_template(self.processor, [{"role": "user", "content": content}], tokenize=False)
            for content in ([text], [{"type": kind}, text])
        )
        # What is before a text may differ too: Idefics3 leaves out the space before an image.
        start = common_start(without, shown)
        end = common_start(without[start:][::-1], shown[start:][::-1])
        place = shown[start : len(shown) - end].strip()
        known = {token.content for token in self.processor.tokenizer.added_tokens_decoder.values()}
        known |= {getattr(self.processor, f"{kind}_token", None)} - {None}
        if not any(word in place for word in known):
            raise RecordError(
                f"conversation='plain': the chat template prints {place[:40]!r} for {kind}s, which is no token: use "
                "conversation='chat'"
            )
        return place
