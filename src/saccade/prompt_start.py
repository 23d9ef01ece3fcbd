"""The token that starts a text: who puts it there."""

from typing import Any


def start_token(tokenizer: Any) -> str:
    """The token that a tokenizer puts before a text; empty without one, or if it puts an end token behind as well."""
    ids = tokenizer("a")["input_ids"]
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    alone = start is not None and ids[0] == start and (end is None or ids[-1] != end)
    return tokenizer.bos_token if alone else ""


def needs_start(start: str, text: str) -> bool:
    """Whether a tokenizer is to put its start token before a rendered text: what to give as `add_special_tokens`.

    Some chat templates write it (Gemma), some leave it to the tokenizer (LLaVA-1.5 and 1.6). Either way a model has
    seen it once, and a processor's `apply_chat_template` with `tokenize=True` sees to that as well.
    """
    return bool(start) and not text.startswith(start)
