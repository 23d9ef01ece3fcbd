"""The token that starts a text: who puts it there."""

from typing import Any


def start_token(tokenizer: Any) -> str:
    """The token that a tokenizer puts before a text, or nothing."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token if tokenizer.bos_token is not None and ids[0] == tokenizer.bos_token_id else ""


def needs_start(tokenizer: Any, text: str) -> bool:
    """Whether a tokenizer is to put its start token before a rendered text: what to give as `add_special_tokens`.

    Some chat templates write it (Gemma), some leave it to the tokenizer (LLaVA-1.5 and 1.6). Either way a model has
    seen it once, and a processor's `apply_chat_template` with `tokenize=True` sees to that as well.
    """
    start = start_token(tokenizer)
    return bool(start) and not text.startswith(start)
