"""The token that starts a text: who puts it there."""

from typing import Any


def start_token(tokenizer: Any) -> str:
    """The token that a tokenizer puts before a text, or nothing."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token if tokenizer.bos_token is not None and ids[0] == tokenizer.bos_token_id else ""


def start_alone(tokenizer: Any) -> str:
    """`start_token`, or nothing if the tokenizer puts an end token behind the text as well, which no prompt has."""
    last = tokenizer("a")["input_ids"][-1]
    return "" if last == tokenizer.eos_token_id else start_token(tokenizer)


def needs_start(start: str, text: str) -> bool:
    """Whether a tokenizer is to put its start token before a rendered text: what to give as `add_special_tokens`.

    Some chat templates write it (Gemma), some leave it to the tokenizer (LLaVA-1.5 and 1.6). Either way a model has
    seen it once, and a processor's `apply_chat_template` with `tokenize=True` sees to that as well.

    Args:
        start: what `start_alone` says of the tokenizer, which is the same for all texts.
        text: the rendered text.
    """
    return bool(start) and not text.startswith(start)
