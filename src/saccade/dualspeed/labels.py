"""From learned characters to learned tokens, with a check of both before the first step."""

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase, ProcessorMixin

from saccade.data.turns import TrainingText
from saccade.errors import RecordError, SaccadeError
from saccade.tokens import IGNORE_INDEX

_SIDE = 64
_TURNS = ("<image>what is there ?", "a 5 .", "and where ?", "above the 3 .")


def stop_ids(generation_config: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Token ids at which the trained model's `generate` stops.

    The Trainer adds the tokenizer's end token to the model's.
    """
    given = getattr(generation_config, "eos_token_id", None)
    ids = [] if given is None else [given] if isinstance(given, int) else list(given)
    return tuple(dict.fromkeys([token for token in (tokenizer.eos_token_id, *ids) if token is not None]))


def learned_tokens(
    batch: Mapping[str, Any], texts: Sequence[TrainingText], processor: ProcessorMixin, add_start: bool
) -> Tensor:
    """bool `(B, L)`, true on the tokens of the learned parts of each text.

    In the batch, each image has been expanded to many tokens. A learned part contains no image tokens and ends with a
    token that later images do not bring along. The part is located by that token: the k-th occurrence from the end of
    the text is also the k-th from the end in the batch. The line break that ends a caption, which comes after all
    images, may be within them: between the rows of tiles of Idefics3.

    Raises:
        RecordError: if a learned part has other tokens in the batch than in its text, or the tokenizer does not return
            offsets.
    """
    tokenizer = processor.tokenizer
    if not tokenizer.is_fast:
        raise RecordError(f"{type(tokenizer).__name__} does not return offsets of its tokens: use the fast tokenizer")
    encoded = tokenizer(
        [text.text for text in texts], add_special_tokens=add_start, return_offsets_mapping=True, verbose=False
    )
    learned = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    for row, text in enumerate(texts):
        ids, spans = encoded["input_ids"][row], encoded["offset_mapping"][row]
        made, there = batch["input_ids"][row].tolist(), batch["attention_mask"][row].tolist()
        for part in text.learned:
            first, last = _tokens_of(part, text.text, spans)
            places = [place for place, token in enumerate(made) if token == ids[last] and there[place]]
            number = ids[last:].count(ids[last])
            stop = places[-number] + 1 if number <= len(places) else 0
            start = stop - (last + 1 - first)
            if made[max(start, 0) : stop] != ids[first : last + 1]:
                words = text.text[slice(*part)][:40]
                raise RecordError(f"the processor changes the words around {words!r}, so that no answer is found")
            learned[row, start:stop] = True
    return learned


def _tokens_of(part: tuple[int, int], text: str, spans: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The first and the last token of a part of a text.

    A token that overlaps the start belongs to the part, unless it only contributes whitespace to it.
    """
    start, end = part
    first = bisect_right(spans, start, key=lambda span: span[1])
    last = bisect_left(spans, end, key=lambda span: span[0]) - 1
    if spans[first][0] < start and not text[start : spans[first][1]].strip():
        first += 1
    return first, last


def check_turns(collator: Any) -> None:
    """Check on a conversation of two turns that exactly the answers are learned, each with its end token."""
    chat = [{"role": "assistant" if number % 2 else "user", "content": words} for number, words in enumerate(_TURNS)]
    row = {"messages": chat, "images": [Image.new("RGB", (_SIDE, _SIDE))]}
    strict = replace(collator, assistant_only_loss=True, max_length=None, max_bad_records=None)
    try:
        labels = strict([row])["labels"][0].tolist()
    except RecordError as error:
        raise SaccadeError(f"a conversation of two turns cannot be learned: {error}") from error
    decode = collator.processor.tokenizer.decode
    parts = [list(part) for learned, part in groupby(labels, lambda label: label != IGNORE_INDEX) if learned]
    ends = {part[-1] for part in parts}
    found = ["".join(decode(part[:-1]).split()) for part in parts]
    answers = [collator.processor.tokenizer(words, add_special_tokens=False)["input_ids"] for words in _TURNS[1::2]]
    if found != ["".join(decode(answer).split()) for answer in answers] or not ends <= set(collator.stop_ids or ends):
        raise SaccadeError(
            f"of a conversation of two turns {[decode(part) for part in parts]} would be learned, not its answers "
            f"{list(_TURNS[1::2])} with the end of each turn: use a chat template that writes answers as they are, "
            "and a tokenizer that has its end token (chat_template_path takes a template's file)"
        )
