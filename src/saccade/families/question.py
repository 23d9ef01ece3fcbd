"""Extract the user's own words from a prompt, without the chat template's words and answer-format instructions.

The template is inferred from its output: a conversation with known words is rendered, and the text that surrounds them
in both the first and the second turn marks a user's turn. A system prompt appears in only one of them, and answers are
not between the marks.
"""

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from typing import Any

from saccade.errors import SaccadeError

logger = logging.getLogger(__name__)

INSTRUCTIONS = (
    "Answer the question using a single word or phrase.",
    "Answer with the option's letter from the given choices directly.",
)
"""Instructions about the form of the answer in LLaVA's prompts, which say nothing about the image."""
ASKED, ANSWERED, ASKED_AGAIN = "FIRST-QUESTION", "FIRST-ANSWER", "SECOND-QUESTION"


@dataclass(frozen=True)
class Reader:
    """Recovers the user's words from the ids of a prompt.

    Args:
        tokenizer: the language model's.
        turn: finds the user's turns in decoded text, with the words as its first group; None without a chat template.
        clutter: matches what a turn may contain besides the user's words.
    """

    tokenizer: Any
    turn: re.Pattern[str] | None
    clutter: re.Pattern[str]

    @classmethod
    def of(cls, processor: Any) -> "Reader":
        """The reader for conversations rendered by a processor or a tokenizer."""
        tokenizer = getattr(processor, "tokenizer", processor)
        specials = {*tokenizer.all_special_tokens, *map(str, tokenizer.added_tokens_decoder.values())}
        atoms = [re.escape(token) for token in sorted(filter(None, specials), key=len, reverse=True)]
        unit = re.compile("|".join([*atoms, "."]), re.DOTALL)

        def pattern(units: Iterable[str]) -> str:
            """Matches template text as it looks after the tokenizer has encoded and decoded it."""
            ids = tokenizer("".join(units).strip(), add_special_tokens=False)["input_ids"]
            return _spaced(tokenizer.decode(ids, skip_special_tokens=False))

        marks = _marks(processor)
        turn, pictures = None, []
        if marks is not None:
            first, again, behind, then, picture = (unit.findall(mark) for mark in marks)
            before = pattern(reversed(_shared(reversed(first), reversed(again))))
            after = pattern(_shared(behind, then))
            pictures = [pattern(picture)]
            if before:
                ends = "|".join(filter(None, (after, before, r"\Z")))
                turn = re.compile(f"{before}(.*?)(?={ends})", re.DOTALL)
        clutter = [*filter(None, pictures), *map(_spaced, INSTRUCTIONS), *atoms]
        return cls(tokenizer, turn, re.compile("|".join(clutter), re.IGNORECASE))

    def questions(self, ids: Sequence[int]) -> list[str]:
        """The words of each user turn in a prompt; those of the whole prompt if it does not follow the template."""
        text = self.tokenizer.decode(list(ids), skip_special_tokens=False)
        turns = self.turn.findall(text) if self.turn is not None else []
        bare = (" ".join(self.clutter.sub(" ", turn).split()) for turn in turns or [text])
        return [words for words in bare if words]

    def ids(self, words: str) -> list[int]:
        """The tokens of a text."""
        return self.tokenizer(words, add_special_tokens=False)["input_ids"]


def _marks(processor: Any) -> tuple[str, str, str, str, str] | None:
    """The text before the first and the second question, after a final and a first question, and for an image."""

    def render(*turns: tuple[str, str], image: bool = False, ask: bool = False) -> str:
        parts = [{"type": "image"}] if image else []
        messages = [
            {"role": role, "content": [*parts, {"type": "text", "text": text}] if in_parts else text}
            for role, text in turns
        ]
        return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)

    question, answer, second = ("user", ASKED), ("assistant", ANSWERED), ("user", ASKED_AGAIN)
    for in_parts in (True, False):
        try:
            alone = render(question, ask=True)
            several = render(question, answer, second)
            pictured = render(question, image=in_parts)
        except Exception:  # a template may be missing, or raise anything on content that it does not support
            continue
        if ASKED not in alone or not re.search(f"{ASKED}.*{ANSWERED}.*{ASKED_AGAIN}", several, re.DOTALL):
            continue
        first, _, behind = alone.partition(ASKED)
        then, _, rest = several.partition(ASKED)[2].partition(ANSWERED)
        picture = pictured.partition(ASKED)[0].removeprefix(first.rstrip())
        return first, rest.partition(ASKED_AGAIN)[0], behind, then, picture
    return None


def _shared(one: Iterable[str], other: Iterable[str]) -> list[str]:
    """The common prefix of both."""
    return [unit for unit, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))]


def _spaced(text: str) -> str:
    """A pattern for `text` that matches any whitespace, or none, where `text` has some."""
    return r"\s*".join(map(re.escape, text.split()))


@lru_cache(maxsize=4)
def load_reader(folder: str) -> Reader:
    """The reader for the processor, or the tokenizer, in `folder`.

    Raises:
        SaccadeError: if there is neither.
    """
    from transformers import AutoProcessor, AutoTokenizer

    failed: Exception | None = None
    for kind in (AutoProcessor, AutoTokenizer):
        try:
            found = kind.from_pretrained(folder)
        except (OSError, ValueError, ImportError, KeyError) as error:
            failed = error
            continue
        if hasattr(getattr(found, "tokenizer", found), "all_special_tokens"):
            return Reader.of(found)
        failed = ValueError(f"{type(found).__name__} reads no text")  # a folder may hold an image processor alone
    raise SaccadeError(f"tokenizer={folder!r}: no tokenizer could be read there: {failed}") from failed


@lru_cache(maxsize=4)
def models_reader(folder: str) -> Reader | None:
    """The reader for the folder that a model was loaded from; None, with one warning, if there is none."""
    try:
        if folder:
            return load_reader(folder)
        why = "the model was not loaded from a folder"
    except SaccadeError as error:
        why = str(error)
    logger.warning(
        "relevance: %s, so that the words of its chat template count as the user's too; give the tokenizer's folder "
        "as the reducer's option 'tokenizer'",
        why,
    )
    return None
