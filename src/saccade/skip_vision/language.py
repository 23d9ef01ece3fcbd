"""The language model's forward with roles: which rows skip, who sees them, and what stays in the cache.

Shapes: B samples, Q tokens of this call, C columns that the cache stores, L tokens that roles are given for.
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from saccade.errors import SaccadeError
from saccade.interfaces import by_name, changed, check_takes
from saccade.pruning.patching import call_original
from saccade.skip_vision.cache import (
    CacheState,
    attach,
    cache_name,
    cache_of,
    check_cache,
    compact,
    read_length,
    state_of,
    stored_length,
    stored_lengths,
)
from saccade.skip_vision.columns import pad_columns
from saccade.skip_vision.config import SkipVisionConfig
from saccade.skip_vision.rows import ROWS_KEYWORD, KeptRows, check_rows_arrived
from saccade.tokens import Role

ROLES_KEYWORD = "skip_roles"
CONFIG = "_saccade_config"
SKIPPING = "_saccade_skipping"
"""The modules that must get the rows of a call, see `patch_layers`."""


def check_language_model(module: nn.Module) -> None:
    """Check that the forward of a language model takes what `language_forward` looks at and changes.

    Raises:
        SaccadeError: if it calls something else than it did.
    """
    forward = type(module).forward
    check_takes(forward, ("input_ids", "inputs_embeds", "attention_mask", "position_ids"))
    cache_name(forward)


def language_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward of a language model, of which `skip_roles` says what each token is.

    Roles are long `(B, L)`, values of `Role`, aligned with the tokens that the cache has read and those of this call;
    tokens beyond them were written by the model.
    """
    roles = kwargs.pop(ROLES_KEYWORD, None)
    kwargs = by_name(MethodType(type(module).forward, module), args, kwargs)
    cache = cache_of(kwargs)
    state = state_of(cache)
    if roles is None and state is None:
        return call_original(module, **kwargs)
    config: SkipVisionConfig = module.__dict__[CONFIG]
    given = kwargs.get("inputs_embeds")
    given = kwargs["input_ids"] if given is None else given
    batch, length = given.shape[:2]
    if state is not None and state.valid.shape[0] != batch:
        raise SaccadeError(
            f"the key-value cache holds {state.valid.shape[0]} rows, the input {batch}: go on with the rows that it "
            "was made for"
        )
    read = read_length(cache)
    now, beyond = _roles_now(roles, read, batch, length, given.device)
    skip = now == Role.SKIPPED
    # Read back to the host once a prompt, not once a token.
    skips = roles is not None and read < roles.shape[1] and bool(skip.any())
    freeing = config.drop_kv and not torch.is_grad_enabled()
    if skips and freeing and cache is not None:
        check_cache(cache)

    mask = kwargs.get("attention_mask")
    valid, skipped = _columns(state, cache, mask, skip)  # (B, C + Q) each
    blind = None
    if skips or (state is not None and state.has_skip):
        blind = _blind(config, now, beyond)
    if blind is not None and bool(blind.any()):
        kwargs["attention_mask"] = _four_dimensional(module, mask, valid, skipped, blind, _dtype(module, given))
    elif state is not None and state.gap:
        _check_plain(mask)
        kwargs["attention_mask"] = None if mask is None and state.dense else valid.long()
    positions = kwargs.get("position_ids")
    if positions is None:
        first = torch.full((batch,), read, device=given.device) if state is None else state.next_position
        positions = first.unsqueeze(1) + torch.arange(length, device=given.device)  # (B, Q)
        if state is not None:
            kwargs["position_ids"] = positions
    rows = KeptRows((~skip).flatten().nonzero().squeeze(1)) if skips else None
    if rows is not None:
        kwargs[ROWS_KEYWORD] = rows
    with stored_lengths(state):
        output = call_original(module, **kwargs)
    if rows is not None:
        check_rows_arrived(rows, module.__dict__[SKIPPING])

    wanted = cache is not None or (kwargs.get("use_cache") is True and not module.training)
    cache = cache_of(output)
    if wanted and cache is None:
        raise changed(f"{type(module).__name__} was to fill a key-value cache, and its output has none")
    if cache is not None:
        state = _advance(cache, state, valid, skipped, positions)
        state.has_skip |= skips
        whole = roles is None or read + length >= roles.shape[1]
        if state.has_skip and freeing and whole:
            compact(cache, state)
    return output


def _roles_now(
    roles: Tensor | None, read: int, batch: int, length: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Roles of this call's tokens, and which of them the model wrote itself: `(B, Q)` each."""
    if roles is None:
        roles = torch.zeros(batch, 0, dtype=torch.long, device=device)
    now = roles[:, read : read + length].to(device)
    beyond = torch.arange(length, device=device) >= now.shape[1]
    return pad_columns(now, length, int(Role.ANSWER)), beyond.expand(batch, length)


def _columns(state: CacheState | None, cache: Cache | None, mask: Any, skip: Tensor) -> tuple[Tensor, Tensor]:
    """Of the columns stored and those of this call, which are real and which skipped: bool `(B, C + Q)` each."""
    batch, length = skip.shape
    stored = stored_length(cache)
    ones = torch.ones(batch, stored + length, dtype=torch.bool, device=skip.device)
    two = isinstance(mask, Tensor) and mask.dim() == 2
    new = mask[:, -length:].bool() if two else ones[:, :length]
    if state is not None:
        return torch.cat((state.valid, new), dim=1), torch.cat((state.skip, skip), dim=1)
    old = mask[:, :stored].bool() if two and mask.shape[1] == stored + length else ones[:, :stored]
    return torch.cat((old, new), dim=1), torch.cat((torch.zeros_like(old), skip), dim=1)


def _blind(config: SkipVisionConfig, now: Tensor, beyond: Tensor) -> Tensor:
    """Which tokens must not attend to skipped ones: bool `(B, Q)`."""
    blind = beyond if config.drop_kv else torch.zeros_like(beyond)
    if config.text_visibility != "all":
        blind = blind | (now == Role.ANSWER)
    if config.text_visibility == "none":
        blind = blind | (now == Role.TEXT)
    return blind


def _four_dimensional(
    module: nn.Module, mask: Any, valid: Tensor, skipped: Tensor, blind: Tensor, dtype: torch.dtype
) -> Tensor:
    """Causal attention in which `blind` rows do not see `skipped` columns: `(B, 1, Q, C + Q)`.

    Raises:
        SaccadeError: if attention takes no such mask.
    """
    _check_plain(mask)
    kind = module.config._attn_implementation
    if kind not in ("sdpa", "eager"):
        raise SaccadeError(
            f"attn_implementation={kind!r} takes no mask that hides skipped tokens from some text: load the model "
            "with 'sdpa' or 'eager', or use text_visibility='all' and the cache"
        )
    length, width = blind.shape[1], valid.shape[1]
    columns = torch.arange(width, device=valid.device)
    causal = columns <= columns[width - length :].unsqueeze(1)  # (Q, C + Q)
    seen = causal & valid.unsqueeze(1) & ~(blind.unsqueeze(2) & skipped.unsqueeze(1))  # (B, Q, C + Q)
    # Rows of padding see nothing, of which softmax would make NaN.
    seen = (seen | ~seen.any(dim=2, keepdim=True)).unsqueeze(1)
    if kind == "sdpa":
        return seen
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


def _check_plain(mask: Any) -> None:
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        raise SaccadeError(
            "attention_mask: this model makes masks of its own before its language model, which cannot hide skipped "
            "tokens; use text_visibility='all' and drop_kv=False"
        )


def _dtype(module: nn.Module, given: Tensor) -> torch.dtype:
    return given.dtype if given.is_floating_point() else module.dtype


def _advance(cache: Cache, state: CacheState | None, valid: Tensor, skipped: Tensor, positions: Tensor) -> CacheState:
    """The state of the cache after this call."""
    last = positions[..., -1]  # of every axis, or (B,)
    last = last.amax(dim=0) if positions.dim() == 3 else last
    last = last.expand(valid.shape[0]) + 1
    if state is None:
        state = CacheState(valid, skipped, last)
        attach(cache, state)
    state.valid, state.skip, state.next_position = valid, skipped, last
    return state
