"""Key-value caches, and the positions of the tokens after them.

Shapes: B samples, Q tokens in this call.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache


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
