"""What the key-value cache of a shortened prompt begins with, and where the tokens after it stand.

The model cannot tell: it would count the columns of the cache, of which the prompt has fewer than positions or more,
or continue from its own last call, whichever conversation that was.

Shapes: B samples, P tokens of the prompt as given, S of the shortened one, Q tokens in this call.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from saccade.errors import SaccadeError

TURN = "_saccade_turn"


@dataclass(frozen=True)
class Turn:
    """A prompt that was shortened, as what follows it on its KV cache needs it.

    Args:
        given: the `(B, P)` ids of the prompt before it was shortened.
        shorter: inputs per token of the prompt that the cache holds: ids, mask, positions, and those of the family.
        alike: whether its rows have the same positions and the same padding.
        mark: what tells the rows of the cache apart, see `_mark`; consecutive ones may be of one row of the prompt.
    """

    given: Tensor
    shorter: Mapping[str, Tensor]
    alike: bool
    mark: Tensor | None

    def repeated(self, several: int) -> "Turn":
        """The turn of a cache with `several` consecutive rows for each row of the prompt."""
        if several <= 1:
            return self
        shorter = {name: value.repeat_interleave(several, dim=-2) for name, value in self.shorter.items()}
        return replace(self, given=self.given.repeat_interleave(several, dim=0), shorter=shorter)

    def step(self, given: Mapping[str, Any], cache: Cache) -> dict[str, Any]:
        """The arguments of a `forward` on tokens after the prompt, with their positions and a mask of all columns.

        Args:
            given: the arguments without `position_ids`; the mask, if any, is that of the conversation as given, or as
                the cache holds it.
            cache: the cache of the prompt, and of tokens after it.

        Raises:
            SaccadeError: if the rows or the mask do not belong to this cache.
        """
        new = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
        batch, length = new.shape[:2]
        rows = self._rows(cache, batch)
        positions, known = self.shorter["position_ids"][..., rows, :], self.shorter["attention_mask"][rows]
        mask, count = given.get("attention_mask"), int(cache.get_seq_length()) - known.shape[1] + length
        later = known.new_ones(batch, count)
        arguments, plain = dict(given), isinstance(mask, Tensor) and mask.dim() == 2
        if plain:
            widths = [self.given.shape[1] + count, known.shape[1] + count]
            if mask.shape[1] not in widths:
                raise SaccadeError(
                    f"attention_mask has {mask.shape[1]} columns: after a pruned prompt, give that of the whole "
                    f"conversation, here {widths[0]} columns, or none; or leave the loop to `generate`"
                )
            later = mask[:, -count:].to(known)
        if plain or mask is None:  # any other is made for the columns of the cache
            arguments["attention_mask"] = torch.cat((known, later), dim=1)
        following = next_positions(last_position(positions), later, positions.shape[:-2])
        return {**arguments, "position_ids": following[..., -length:]}

    def _rows(self, cache: Cache, batch: int) -> Tensor:
        """For each of the rows of a call the row of the prompt that it follows: long `(B',)`."""
        rows = torch.arange(len(self.given), device=self.given.device)
        if self.alike:
            return rows[:1].expand(batch)
        now = _mark(cache, self.shorter["input_ids"].shape[1])
        if now is not None and self.mark is not None:
            rows = rows.repeat_interleave(len(self.mark) // len(rows))
            if not torch.equal(now, self.mark):
                # Rows may have been repeated, selected or sorted since, which leaves what they hold as it is.
                same = (now.unsqueeze(1) == self.mark).all(dim=2)
                rows = rows[same.int().argmax(dim=1).to(rows.device)]
                rows = rows if bool(same.any(dim=1).all()) else rows[:0]
        if len(rows) != batch:
            raise SaccadeError(
                f"input_ids has {batch} rows, of which the key-value cache holds {len(rows)} after their pruned "
                "prompts: go on with the rows of the cache, or leave the loop to `generate`"
            )
        return rows


@dataclass(frozen=True)
class Unfinished:
    """In the place of a turn: part of a prompt, or an answer to it, of a call that raised before it was noted.

    Args:
        before: what the cache began with until then, if anything.
        length: the tokens that it held then.
    """

    before: Turn | None
    length: int


def last_position(positions: Tensor) -> Tensor:
    """The greatest position of each sample, `(B, 1)`, of `(B, S)`, or of `(A, B, S)` for several axes."""
    last = positions.amax(dim=-1, keepdim=True)
    return last.amax(dim=0) if positions.dim() == 3 else last


def next_positions(last: Tensor, new: Tensor, axes: tuple[int, ...] = ()) -> Tensor:
    """Positions `(*axes, B, Q)` of text: the last position before it `(B, 1)`, and its mask `(B, Q)`."""
    return (last + new.cumsum(dim=1)).expand(*axes, -1, -1)


def cache_of(values: Any) -> Cache | None:
    """Find the key-value cache among a call's arguments or in a model's output, whatever its name.

    Args:
        values: a mapping, such as keyword arguments or a `ModelOutput`, or a tuple of outputs.
    """
    values = values.values() if isinstance(values, Mapping) else values
    return next((value for value in values if isinstance(value, Cache)), None)


@contextmanager
def noting(cache: Cache | None) -> Iterator[None]:
    """Mark a cache, if there is one, that gained tokens in a block that raised: what it begins with was not noted."""
    length = 0 if cache is None else int(cache.get_seq_length())
    try:
        yield
    except BaseException:
        if cache is not None and int(cache.get_seq_length()) != length:
            setattr(cache, TURN, Unfinished(getattr(cache, TURN, None), length))
        raise


def remember(cache: Cache, given: Tensor, shorter: Mapping[str, Tensor]) -> None:
    """Note what a cache begins with: on the cache, so that the note is copied and ends with it."""
    known = (shorter["position_ids"], shorter["attention_mask"])
    alike = len(given) == 1 or all(bool((values == values[..., :1, :]).all()) for values in known)
    mark = None if alike else _mark(cache, shorter["input_ids"].shape[1])
    setattr(cache, TURN, Turn(given, shorter, alike, mark))


def _mark(cache: Cache, length: int) -> Tensor | None:
    """What the last layer holds of the last token of a prompt of this length, `(B', n)`: it depends on all of its row.

    None if no layer keeps all tokens as they are.
    """
    for layer in reversed(cache.layers):
        keys = getattr(layer, "keys", None)
        whole = isinstance(keys, Tensor) and keys.dim() == 4 and keys.shape[2] >= int(cache.get_seq_length())
        if whole and not getattr(layer, "is_sliding", False):
            return keys[:, :, length - 1].detach().flatten(1).clone()  # not a view, which would keep all keys
    return None


def turn_of(cache: Cache | None) -> Turn | None:
    """What a cache begins with that a pruning model filled, or None.

    Raises:
        SaccadeError: if part of that has since been cut off, or the call that filled it raised.
    """
    turn: Turn | Unfinished | None = getattr(cache, TURN, None)
    if cache is None or turn is None:
        return None
    cached = int(cache.get_seq_length())
    if isinstance(turn, Unfinished) and cached <= turn.length:  # what that call left was cropped
        turn = turn.before
        setattr(cache, TURN, turn)
    if cached == 0:  # it was reset
        delattr(cache, TURN)
        return None
    if turn is None:
        return None
    if isinstance(turn, Unfinished):
        raise SaccadeError(
            "the key-value cache holds part of a call with pruned images that raised: pass the whole conversation to "
            "`generate` without the cache"
        )
    length = turn.shorter["input_ids"].shape[1]
    if cached < length:
        raise SaccadeError(
            f"the key-value cache was cropped to {cached} tokens, within a pruned prompt of {length}: pass the whole "
            "conversation to `generate` without the cache"
        )
    return turn
