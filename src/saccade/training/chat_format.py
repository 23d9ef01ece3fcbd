"""The chat template of an assembled model: its language model's, extended by images and markers around answers.

A template is a program and cannot be edited mechanically. Instead it is probed: it renders conversations of known
words, and the text between these words gives the pieces of the format. A new template is then written from the pieces,
and must render the same as the language model's own.
"""

from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from saccade.data.chat import apply_chat_template
from saccade.errors import RecordError, SaccadeError
from saccade.prompt_start import start_token

V1_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
"""The system prompt of LLaVA's format v1."""

SYSTEM, QUESTIONS, ANSWERS = "zqsystem", ("zqfirst", "zqsecond"), ("zqone", "zqtwo")
# Qwen3 thinks unless told not to; templates of Llama 3 print today's date unless given one, here their authors'.
_SETTINGS = {"enable_thinking": False, "date_string": "26 Jul 2024"}
_EMPTY_THOUGHT = "<think>\n\n</think>\n\n"

_LABELLED = ("How many?", "7 cats.", "Sure?", "Yes")

Message = dict[str, Any]


@dataclass(frozen=True)
class ChatTemplate:
    """A template that has been checked.

    Args:
        text: the Jinja template.
        end_id: id of the token that ends an answer.
        source: "own", "v1", or the file that it was read from.
    """

    text: str
    end_id: int
    source: str


@dataclass(frozen=True)
class ChatFormat:
    """The text between the words of a conversation.

    Args:
        opening: before the first question of a conversation without a system message.
        system: before and after a system message, up to the first question; None if the format has no system message.
        asked: between a question and its answer, as given to `generate`.
        answered: whitespace at the start of an answer, which `generate` has to write.
        end: the token that ends an answer, with any whitespace that the format puts before it.
        between: between that token and the next question.
        closing: what follows the last answer.
        strips: whether whitespace around messages is stripped.
    """

    opening: str
    system: tuple[str, str] | None
    asked: str
    answered: str
    end: str
    between: str
    closing: str
    strips: bool = False

    def with_system(self, text: str) -> "ChatFormat":
        """The format with a default system message for conversations without one."""
        if self.system is None:
            raise SaccadeError(
                f"system_prompt={text!r}: the language model's chat template has no system message; leave it out, "
                "or give chat_template='v1'"
            )
        return replace(self, opening=text.join(self.system))

    def template(self, image_token: str, answered_inside: bool = True) -> str:
        """A Jinja template that prints `image_token` for image parts and marks answers, including their end tokens.

        A message's only image is printed first, whatever precedes it, as in LLaVA; several images keep their places. A
        line break follows each image.

        Args:
            answered_inside: whether the whitespace at the start of an answer is inside the marker.
        """
        strip = " | trim" if self.strips else ""
        image = _literal(f"{image_token}\n")
        says = f"{{{{ text{strip} }}}}"
        text = (
            "{% set text %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
            "{% set images = message['content'] | selectattr('type', 'equalto', 'image') | list | length %}"
            "{% if images == 1 %}" + image + "{% endif %}"
            "{% for part in message['content'] %}"
            "{% if part['type'] == 'image' and images > 1 %}" + image + "{% elif part['type'] == 'text' %}"
            "{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{% endset %}"
        )
        first, then = (_literal(self.answered), "") if not answered_inside else ("", _literal(self.answered))
        asked = _literal(self.asked)
        answer = f"{asked}{first}{{% generation %}}{then}{says}{_literal(self.end)}{{% endgeneration %}}"
        system = ""
        if self.system is not None:
            before, after = map(_literal, self.system)
            system = (
                "{% elif message['role'] == 'system' and loop.first %}" + before + says + "{% elif "
                "message['role'] == 'user' and loop.previtem['role'] == 'system' %}" + after + says
            )
        refusal = "conversations are an optional system message, then questions and answers in turn"
        if self.system is None:
            refusal = "conversations are questions and answers in turn, without a system message"
        return (
            "{% for message in messages %}" + text + "{% if message['role'] == 'user' and loop.first %}"
            f"{_literal(self.opening)}{says}{system}"
            "{% elif message['role'] == 'user' and loop.previtem['role'] == 'assistant' %}"
            f"{_literal(self.between)}{says}"
            "{% elif message['role'] == 'assistant' and not loop.first and loop.previtem['role'] == 'user' %}"
            f"{answer}{{% if loop.last %}}{_literal(self.closing)}{{% endif %}}"
            f"{{% else %}}{{{{ raise_exception({refusal!r}) }}}}{{% endif %}}{{% endfor %}}"
            f"{{% if add_generation_prompt %}}{asked}{{% endif %}}"
        )


def v1_format(tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
    """LLaVA's format v1, for language models without a chat template, such as Vicuna."""
    if tokenizer.eos_token is None:
        raise SaccadeError(
            f"language_model: its {type(tokenizer).__name__} has no eos_token, so no answer could end: set one"
        )
    start = start_token(tokenizer)
    bare = ChatFormat(
        opening=f"{start}USER: ",
        system=(start, " USER: "),
        asked=" ASSISTANT:",
        answered=" ",
        end=tokenizer.eos_token,
        between="USER: ",
        closing="",
    )
    return bare.with_system(V1_SYSTEM)


def own_format(tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
    """The format of a tokenizer's own chat template."""

    def render(*words: str, system: str | None = None, prompt: bool = False) -> str:
        return _render(tokenizer, _conversation(words, system), prompt)

    question, answer = QUESTIONS[0], ANSWERS[0]
    try:
        opening, middle, tail = _between(render(question, answer), question, answer)
        asked = _between(render(question, prompt=True), question)[1]
        second = _between(render(question, answer, QUESTIONS[1], ANSWERS[1]), question, answer, QUESTIONS[1])
        # Padded words show whether the template strips them.
        strips = f" {question} " not in render(f" {question} ", answer)
    except ValueError as error:
        raise _refusal(" ".join(str(error).split())[:200]) from error
    if not middle.startswith(asked) or (middle[len(asked) :] and not middle[len(asked) :].isspace()):
        raise _refusal(f"it begins an answer with {middle!r}, but asks for one with {asked!r}")
    end = _end_of_turn(tokenizer, tail)
    if not second[2].startswith(end):
        raise _refusal(f"it ends the last answer with {tail!r}, but an earlier one with {second[2]!r}")
    try:
        # Rendered with the generation prompt, since Mistral puts the system message before the last question only.
        told = _between(render(question, system=SYSTEM, prompt=True), SYSTEM, question)
        system = (told[0], told[1])
    except ValueError:
        system = None
    found = ChatFormat(
        opening=opening,
        system=system,
        asked=asked,
        answered=middle[len(asked) :],
        end=end,
        between=second[2][len(end) :],
        closing=tail[len(end) :],
        strips=strips,
    )
    _check_same(tokenizer, found)
    return found


def make_template(
    tokenizer: PreTrainedTokenizerBase, kind: str, image_token: str, system_prompt: str | None = None
) -> ChatTemplate:
    """The chat template of an assembled model.

    Args:
        tokenizer: the language model's tokenizer, including the image token.
        kind: "own" adapts the tokenizer's template, or uses v1 if it has none; "v1"; or a file's path.
        image_token: what is printed for an image.
        system_prompt: for conversations without one.

    Raises:
        SaccadeError: if there is no such template, or it does not mark exactly the answers and their end tokens.
    """
    if kind not in ("own", "v1"):
        if system_prompt is not None:
            raise SaccadeError(f"system_prompt={system_prompt!r} and chat_template={kind!r}: write it into the file")
        return _from_file(tokenizer, kind)
    kind = kind if tokenizer.chat_template else "v1"
    found = own_format(tokenizer) if kind == "own" else v1_format(tokenizer)
    if system_prompt is not None:
        found = found.with_system(system_prompt)
    wanted = [_ids(tokenizer, answer + found.end) for answer in _LABELLED[1::2]]
    # If a tokenizer excludes whitespace from token offsets, no token is found at a marker that starts with whitespace.
    for inside in (True, False):
        template = found.template(image_token, inside)
        learned = _learned(tokenizer, template)
        if [tokenizer.decode(ids).strip() for ids in learned] == [tokenizer.decode(ids).strip() for ids in wanted]:
            return ChatTemplate(template, learned[0][-1], kind)
    raise SaccadeError(
        f"chat_template={kind!r}: of the answers {list(_LABELLED[1::2])} it marks "
        f"{[tokenizer.decode(ids) for ids in learned]}; give a file with your own template"
    )


def _from_file(tokenizer: PreTrainedTokenizerBase, path: str) -> ChatTemplate:
    try:
        template = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SaccadeError(f"chat_template={path!r} cannot be read: use 'own', 'v1', or a text file") from error
    learned = _learned(tokenizer, template)
    said = [tokenizer.decode(ids) for ids in learned]
    whole = len(said) == 2 and all(answer in text for answer, text in zip(_LABELLED[1::2], said, strict=True))
    if not whole or any(ids[-1] not in _specials(tokenizer) for ids in learned):
        raise SaccadeError(
            f"chat_template={path!r}: of the answers {list(_LABELLED[1::2])} it marks {said}; put the answer and the "
            "special token that ends it between {% generation %} and {% endgeneration %}"
        )
    return ChatTemplate(template, learned[0][-1], path)


def _learned(tokenizer: PreTrainedTokenizerBase, template: str) -> list[list[int]]:
    """The runs of tokens that a template marks as answers in a conversation of two turns."""
    try:
        encoded = apply_chat_template(
            tokenizer,
            _conversation(_LABELLED, None),
            chat_template=template,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
    except RecordError as error:
        raise SaccadeError(f"chat_template does not render: {error}") from error
    pairs = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    return [[token for token, _ in run] for marked, run in groupby(pairs, lambda pair: pair[1]) if marked]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _specials(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """The special tokens of a tokenizer, among them the one that ends a text."""
    added = {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {**added, tokenizer.eos_token_id: tokenizer.eos_token}


def _conversation(words: tuple[str, ...], system: str | None) -> list[Message]:
    spoken = [{"role": "assistant" if number % 2 else "user", "content": text} for number, text in enumerate(words)]
    return ([] if system is None else [{"role": "system", "content": system}]) + spoken


def _render(
    tokenizer: PreTrainedTokenizerBase, chat: list[Message], prompt: bool = False, template: str | None = None
) -> str:
    return apply_chat_template(
        tokenizer, chat, chat_template=template, tokenize=False, add_generation_prompt=prompt, **_SETTINGS
    )


def _between(text: str, *words: str) -> list[str]:
    """The text before, between and after the given words, each of which must occur exactly once, in this order."""
    pieces = []
    for word in words:
        before, found, text = text.partition(word)
        if not found or word in text:
            raise ValueError(f"{word!r} should be rendered once")
        pieces.append(before)
    return [*pieces, text]


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, tail: str) -> str:
    """The token at the start of what follows an answer, including whitespace before it."""
    space = tail[: len(tail) - len(tail.lstrip())]
    ends = [token for token in _specials(tokenizer).values() if token and tail[len(space) :].startswith(token)]
    if not ends:
        raise _refusal(f"it ends an answer with {tail!r}, which is not a special token")
    return space + max(ends, key=len)


def _check_same(tokenizer: PreTrainedTokenizerBase, found: ChatFormat) -> None:
    """Check that the new template renders the same as the tokenizer's own.

    Two differences are allowed, since earlier text must not change when the conversation continues: Qwen3 omits the
    empty thought from earlier answers, and Mistral moves the system message to the last question.
    """
    words = (QUESTIONS[0], ANSWERS[0], QUESTIONS[1], ANSWERS[1])
    cases = [(words[:1], None, True), (words[:2], None, False), (words[:3], None, True), (words, None, False)]
    cases += [((f" {QUESTIONS[0]} ", f" {ANSWERS[0]} "), None, False)]
    if found.system is not None:
        cases += [(words[:1], SYSTEM, True), (words[:2], SYSTEM, False)]
    for spoken, system, prompt in cases:
        chat = _conversation(spoken, system)
        own = _render(tokenizer, chat, prompt)
        new = _render(tokenizer, chat, prompt, found.template("<image>"))
        if system is not None and system not in own:
            continue
        if own.replace(_EMPTY_THOUGHT, "") != new.replace(_EMPTY_THOUGHT, ""):
            raise _refusal(f"it renders {own!r} but its pieces give {new!r}")


def _refusal(reason: str) -> SaccadeError:
    return SaccadeError(
        f"language_model: its chat template cannot be adapted to images: {reason}; "
        "give chat_template='v1', or a file with your own template"
    )


def _literal(text: str) -> str:
    """A Jinja expression that prints `text` verbatim; empty for an empty text."""
    return f"{{{{ {text!r} }}}}" if text else ""
