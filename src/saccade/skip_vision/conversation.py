"""`generate` on a skipping model: prompts are rearranged, but the output begins with the original prompt.

A second turn continues from the cache of the first: tokens that the cache has already read are left out, and only new
images are encoded.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from saccade.errors import SaccadeError
from saccade.pruning.cache import cache_of
from saccade.pruning.patching import with_given_prompt
from saccade.skip_vision.cache import CacheState, read_length, state_of
from saccade.skip_vision.language import ROLES_KEYWORD
from saccade.tokens import Role


def new_part(given: Mapping[str, Any], cache: Cache, state: CacheState | None) -> dict[str, Any]:
    """The part of a conversation's processor outputs that the cache has not read yet.

    `input_ids` is either the whole conversation, as returned by `generate` with the new tokens appended, or the new
    tokens only, with an `attention_mask` that covers the whole conversation.
    """
    ids, mask = given["input_ids"], given.get("attention_mask")
    known = read_length(cache) + (0 if state is None else state.cut)
    only_new = mask is not None and mask.shape[1] > ids.shape[1]
    new = ids if only_new else ids[:, known:]
    if new.shape[1] == 0:
        raise SaccadeError(
            f"input_ids has {ids.shape[1]} tokens, of which the key-value cache has read {known}: pass the whole "
            "conversation with the new tokens appended"
        )
    per_token = {name: value for name, value in given.items() if _is_per_token(value, ids)}
    part = {name: value[:, -new.shape[1] :] for name, value in per_token.items()}
    part["attention_mask"] = torch.ones_like(new) if mask is None else mask[:, -new.shape[1] :]
    return {**given, **part}


def _is_per_token(value: Any, ids: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == ids.shape


def go_on(prepared: dict[str, Any], cache: Cache, state: CacheState | None, mask: Tensor | None) -> dict[str, Any]:
    """Prepend what the cache has read to the prepared inputs of a new part.

    `mask` is the user's for the whole conversation, for a cache that was filled without images.
    """
    read = read_length(cache)
    ids = prepared["input_ids"]
    batch, length = ids.shape
    if state is not None and state.valid.shape[0] != batch:
        raise SaccadeError(
            f"the key-value cache has {state.valid.shape[0]} rows, input_ids {batch}: continue with the rows that it "
            "was made for"
        )
    if state is None:
        old_mask = ids.new_ones(batch, read) if mask is None else mask[:, :read]
        following = old_mask.sum(dim=1)
    else:
        old_mask, following = ids.new_ones(batch, read), state.next_position
    known = None if state is None else state.sequence
    old_ids = ids.new_zeros(batch, read) if known is None else known[:, :read]
    positions = prepared["position_ids"] + following.unsqueeze(1)
    extras = {
        name: torch.cat((value.new_zeros(batch, read), value), dim=1)
        for name, value in prepared.items()
        if name not in (ROLES_KEYWORD, "labels") and isinstance(value, Tensor) and value.shape == (batch, length)
    }
    return {
        **prepared,
        **extras,
        "input_ids": torch.cat((old_ids, ids), dim=1),
        "attention_mask": torch.cat((old_mask.to(ids), prepared["attention_mask"].to(ids)), dim=1),
        "position_ids": torch.cat((positions.new_zeros(*positions.shape[:-1], read), positions), dim=-1),
        ROLES_KEYWORD: torch.cat((ids.new_full((batch, read), int(Role.TEXT)), prepared[ROLES_KEYWORD]), dim=1),
    }


def as_given(output: Any, given: Tensor, laid_out: Tensor, cache: Cache | None) -> Any:
    """The output of `generate`, with the rearranged prompt replaced by the user's `(B, T)`.

    The cache stores the rearranged conversation, from which the next turn continues.
    """
    sequences = output.sequences if isinstance(output, ModelOutput) else output
    returned = with_given_prompt(sequences, given, laid_out.shape[1])
    returned_cache = cache_of(output) if isinstance(output, ModelOutput) else None
    cache = cache if returned_cache is None else returned_cache
    state = state_of(cache)
    # After beam search the cache contains the beams, not the returned sequences.
    if state is not None and state.valid.shape[0] == sequences.shape[0]:
        state.sequence, state.cut = sequences, given.shape[1] - laid_out.shape[1]
    if not isinstance(output, ModelOutput):
        return returned
    output.sequences = returned
    return output
