"""Remove skipped tokens from the key-value cache after the prompt, while positions continue from the full length.

A cache then has two lengths: the number of columns that it stores, for which attention masks are made, and the number
of tokens that it has read, from which `generate` continues. `get_seq_length` returns the second, except inside the
language model.

Shapes: B samples, C columns stored, H heads of width d.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer

from saccade.errors import SaccadeError
from saccade.interfaces import changed

STATE = "_saccade_state"
CACHE_NAMES = ("cache", "past_key_values")
"""Argument names of the key-value cache: the first since transformers 5.24, the second before."""


@dataclass
class CacheState:
    """Information about the columns of a cache.

    Args:
        valid: bool `(B, C)`, false on padding.
        skip: bool `(B, C)`, true on skipped tokens that are still stored.
        position: long `(B, C)`, the greatest position of a row's tokens up to each column.
        gap: number of columns that were read but are no longer stored.
        has_skip: whether any column may be true in `skip`.
        dense: whether every column is known to be valid.
        ids: long `(B, T)`, the tokens that were read, where they were given by their ids.
        cut: how many tokens fewer were read than there are in the conversation as given.
        laid_out: number of tokens read up to the end of the last prompt that was rearranged. Later ones are as given.
        inside: whether the language model is running.
    """

    valid: Tensor
    skip: Tensor
    position: Tensor
    gap: int = 0
    has_skip: bool = False
    dense: bool = False
    ids: Tensor | None = None
    cut: int = 0
    laid_out: int = 0
    inside: bool = False

    @property
    def next_position(self) -> Tensor:
        """The position of the next token: long `(B,)`."""
        return self.position[:, -1] + 1

    def crop(self, columns: int) -> None:
        """Drop columns that the cache has since removed from its end, as assisted decoding does.

        Raises:
            SaccadeError: if that cuts into a rearranged prompt, whose tokens are not in the order of the given one.
        """
        if columns + self.gap < self.laid_out:
            raise SaccadeError(
                f"the key-value cache was cropped to {columns} tokens, within a prompt that is laid out for "
                "Skip-Vision: pass the whole conversation without the cache"
            )
        self.valid, self.skip = self.valid[:, :columns], self.skip[:, :columns]
        self.position = self.position[:, :columns]

    def take(self, rows: Tensor) -> None:
        """Follow the rows of the cache, which are now these of its former ones: long `(B',)`, or bool `(B,)`."""
        rows = rows.to(self.valid.device)
        self.valid, self.skip, self.position = self.valid[rows], self.skip[rows], self.position[rows]
        self.ids = None if self.ids is None else self.ids[rows]

    def hide(self, mask: Tensor) -> None:
        """Take tokens after the rearranged prompt for padding where a mask `(B, T)` up to the last column has zeros.

        Such as those that fill a batch after the end of a shorter answer.
        """
        later = self.valid.shape[1] + self.gap - self.laid_out
        if 0 < later <= mask.shape[1]:
            seen = self.valid[:, -later:] & mask[:, -later:].to(self.valid)
            self.valid = torch.cat((self.valid[:, :-later], seen), dim=1)
            self.position = greatest_so_far(self.position, self.valid)
            self.dense = False

    def ids_of(self, read: int) -> Tensor:
        """The first `read` tokens, long `(B, read)`; zeros where their ids are not known."""
        ids = self.position.new_zeros(len(self.position), 0) if self.ids is None else self.ids[:, :read]
        return pad(ids, (0, read - ids.shape[1]))


def greatest_so_far(position: Tensor, valid: Tensor) -> Tensor:
    """The greatest of the `valid` positions up to each column, -1 before the first: long `(B, C)`."""
    return torch.where(valid, position, -1).cummax(dim=1).values


def cache_name(forward: Callable[..., Any]) -> str:
    """The name of a forward's key-value cache argument."""
    known = inspect.signature(forward).parameters
    name = next((name for name in CACHE_NAMES if name in known), None)
    if name is None:
        raise changed(f"{forward.__qualname__} takes no key-value cache named {' or '.join(map(repr, CACHE_NAMES))}")
    return name


def state_of(cache: Cache | None) -> CacheState | None:
    """The state of a cache that was filled by a skipping model, or None."""
    state = getattr(cache, STATE, None)
    if state is None:
        return None
    stored = stored_length(cache)
    if stored == 0:  # it was reset
        forget(cache)
        return None
    if stored < state.valid.shape[1]:
        state.crop(stored)
    return state


def attach(cache: Cache, state: CacheState) -> None:
    """Attach `state` to the cache, whose `get_seq_length` from now on counts the tokens that it has read, and whose
    rows move together with those of the state.
    """
    setattr(cache, STATE, state)
    for name, method in METHODS.items():
        setattr(cache, name, MethodType(method, cache))


def forget(cache: Cache) -> None:
    """Undo `attach`."""
    for name in (STATE, *METHODS):
        cache.__dict__.pop(name, None)


def _length(cache: Cache, *args: Any, **kwargs: Any) -> int:
    stored = type(cache).get_seq_length(cache, *args, **kwargs)
    state = getattr(cache, STATE)
    return stored + (state.gap if stored and not state.inside else 0)


def _reorder(cache: Cache, beam_idx: Tensor) -> None:
    type(cache).reorder_cache(cache, beam_idx)
    getattr(cache, STATE).take(beam_idx)


def _select(cache: Cache, indices: Tensor) -> None:
    type(cache).batch_select_indices(cache, indices)
    getattr(cache, STATE).take(indices)


def _repeat(cache: Cache, repeats: int) -> None:
    type(cache).batch_repeat_interleave(cache, repeats)
    state = getattr(cache, STATE)
    state.take(torch.arange(len(state.valid)).repeat_interleave(repeats))


METHODS = {
    "get_seq_length": _length,
    "reorder_cache": _reorder,
    "batch_select_indices": _select,
    "batch_repeat_interleave": _repeat,
}
"""What replaces methods of a cache that has a state."""


def stored_length(cache: Cache | None) -> int:
    """C, the number of columns that the cache stores."""
    return 0 if cache is None else type(cache).get_seq_length(cache)


def read_length(cache: Cache | None) -> int:
    """Number of tokens that the cache has read, including those it no longer stores."""
    return 0 if cache is None else cache.get_seq_length()


@contextmanager
def stored_lengths(state: CacheState | None) -> Iterator[None]:
    """Make `get_seq_length` return the stored length, for the masks that the language model creates."""
    if state is None:
        yield
        return
    state.inside = True
    try:
        yield
    finally:
        state.inside = False


def compact(cache: Cache, state: CacheState) -> None:
    """Remove skipped tokens and padding from every layer; shorter rows are padded on the left."""
    keep = state.valid & ~state.skip
    width = int(keep.sum(dim=1).max())
    # Stable: kept columns keep their order, after the dropped ones.
    order = keep.long().sort(dim=1, stable=True).indices[:, keep.shape[1] - width :]
    for layer in cache.layers:
        if not layer.is_initialized:
            continue
        index = order.to(layer.keys.device)[:, None, :, None]
        layer.keys = layer.keys.gather(2, index.expand(-1, layer.keys.shape[1], -1, layer.keys.shape[3]))
        layer.values = layer.values.gather(2, index.expand(-1, layer.values.shape[1], -1, layer.values.shape[3]))
    state.gap += keep.shape[1] - width
    state.valid, last = keep.gather(1, order), state.position[:, -1]
    state.position = greatest_so_far(state.position.gather(1, order), state.valid)
    state.position[:, -1] = last  # which may be that of a skipped token
    state.skip = torch.zeros_like(state.valid)
    state.has_skip, state.dense = False, bool(state.valid.all())


def other_layers(config: PreTrainedConfig) -> str:
    """The kinds of layers in the caches of such a language model that do not keep all tokens as they are, in words."""
    kinds = {type(layer).__name__ for layer in DynamicCache(config=config).layers if type(layer) is not DynamicLayer}
    return ", ".join(sorted(kinds))


def check_cache(cache: Cache) -> None:
    """Check that skipped tokens can be removed from this cache."""
    other = [type(layer).__name__ for layer in cache.layers if type(layer) is not DynamicLayer]
    if type(cache) is not DynamicCache or other:
        name = other[0] if other else type(cache).__name__
        raise SaccadeError(
            f"the key-value cache has a {name}: skipped tokens can only be removed from a DynamicCache; leave "
            "cache_implementation out, or set drop_kv=False"
        )
