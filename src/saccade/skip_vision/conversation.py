"""Further turns on the cache of a skipping model, in `forward` and `generate`.

Tokens that the cache has already read are left out, and only new images are encoded.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from saccade.errors import SaccadeError
from saccade.skip_vision.cache import CacheState, read_length, state_of
from saccade.skip_vision.language import ROLES_KEYWORD
from saccade.tokens import Role


def unread(given: Mapping[str, Any], cache: Cache, state: CacheState | None) -> int:
    """How many tokens at the end of a conversation's processor outputs the cache has not read yet.

    `input_ids` is either the whole conversation, as returned by `generate` with the new tokens appended, or the new
    tokens only, with an `attention_mask` that covers the whole conversation.

    Raises:
        SaccadeError: if there are none.
    """
    ids, mask = given["input_ids"], given.get("attention_mask")
    known = read_length(cache) + (0 if state is None else state.cut)
    only_new = mask is not None and mask.shape[1] > ids.shape[1]
    length = ids.shape[1] if only_new else ids.shape[1] - known
    if length <= 0:
        raise SaccadeError(
            f"input_ids has {ids.shape[1]} tokens, of which the key-value cache has read {known}: pass the whole "
            "conversation with the new tokens appended"
        )
    return length


def last_part(given: Mapping[str, Any], length: int) -> tuple[dict[str, Any], Tensor | None]:
    """The last `length` tokens of a conversation's processor outputs, and the mask of those before, if it is given."""
    ids, mask = given["input_ids"], given.get("attention_mask")
    part = {name: value[:, -length:] for name, value in given.items() if _is_per_token(value, ids)}
    part["attention_mask"] = torch.ones_like(part["input_ids"]) if mask is None else mask[:, -length:]
    return {**given, **part}, None if mask is None else mask[:, :-length]


def _is_per_token(value: Any, ids: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == ids.shape


def go_on(prepared: dict[str, Any], cache: Cache, state: CacheState | None, earlier: Tensor | None) -> dict[str, Any]:
    """Prepend what the cache has read to the prepared inputs of a new part.

    `earlier` is the user's mask of the tokens before that part.
    """
    read = read_length(cache)
    ids = prepared["input_ids"]
    batch, length = ids.shape
    if state is not None and state.valid.shape[0] != batch:
        raise SaccadeError(
            f"the key-value cache has {state.valid.shape[0]} rows, input_ids {batch}: continue with the rows that it "
            "was made for"
        )
    old_mask, old_ids = ids.new_ones(batch, read), ids.new_zeros(batch, read)
    if earlier is not None and earlier.shape[1] == 0:  # it was the mask of the new part only
        earlier = None
    if state is None:
        old_mask = old_mask if earlier is None else earlier[:, :read]
        following = old_mask.sum(dim=1)
    else:
        if earlier is not None:
            state.hide(earlier)
        old_ids, following = state.ids_of(read).to(ids), state.next_position
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


def note_ids(cache: Cache | None, ids: Tensor | None, read: int) -> None:
    """Note the tokens of a call, long `(B, Q)`, before which the cache had read `read`."""
    state = state_of(cache)
    if state is not None and ids is not None:
        state.ids = torch.cat((state.ids_of(read).to(ids), ids), dim=1)


def note_layout(cache: Cache | None, given: int, prepared: int, laid_out: int) -> None:
    """Note that the cache has read `prepared` tokens in place of `given` ones, which end after `laid_out` in all."""
    state = state_of(cache)
    if state is not None:
        state.cut += given - prepared
        state.laid_out = laid_out
