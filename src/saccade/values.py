"""Check values of options against the types in their dataclass."""

import math
import types
from collections.abc import Mapping
from dataclasses import MISSING
from typing import Any, Union, get_args, get_origin

from saccade.errors import SaccadeError

BOUNDS = frozenset({"feature_cache_gib"})
"""Options for which infinity means no limit."""


def coerce(name: str, value: Any, annotation: Any) -> Any:
    """Convert `value` to the field's type if YAML reads it as another, such as 1e-3, which YAML takes for a string.

    Args:
        name: name of the field, for the message.
        annotation: the field's type; one that does not consist of plain types accepts any value.

    Raises:
        SaccadeError: if it has another type, or is not finite.
    """
    check_finite(name, value)
    allowed = _types(annotation)
    if value is None and allowed and allowed <= {bool, int, float} and type(None) not in get_args(annotation):
        raise SaccadeError(f"{name}=None, expected {_names(allowed)}")
    if value is None or not allowed:
        return value
    if float in allowed and not isinstance(value, bool):
        if isinstance(value, (int, float)):
            return value if int in allowed else float(value)
        if isinstance(value, str) and str not in allowed:
            try:
                number = float(value)
            except ValueError:
                pass
            else:
                check_finite(name, number)
                return number
    if value is False and str in allowed and bool not in allowed:
        return "no"  # YAML reads a bare `no`, as in `save_strategy: no`, as false
    basic = {bool, int, float, str} & allowed
    if isinstance(value, bool) and bool not in allowed and basic:
        raise SaccadeError(f"{name}={value!r} is a bool, expected {_names(basic)}")
    if len(basic) == len(allowed) and not isinstance(value, tuple(basic)):
        if str in basic and isinstance(value, (int, float)):
            return str(value)
        raise SaccadeError(f"{name}={value!r} is a {type(value).__name__}, expected {_names(basic)}")
    return value


def check_finite(name: str, value: Any) -> None:
    """Refuse NaN and infinity, also inside lists and mappings: they pass most comparisons and poison whatever they are
    multiplied with.

    Raises:
        SaccadeError: naming the field.
    """
    if isinstance(value, float) and not math.isfinite(value) and not (name in BOUNDS and value > 0):
        raise SaccadeError(f"{name}={value!r} is not a finite number: give one, or leave the field out")
    if isinstance(value, Mapping):
        for key, one in value.items():
            check_finite(f"{name}: {key}", one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            check_finite(name, one)


def _types(annotation: Any) -> set[type]:
    """The plain types of an annotation; empty if it does not consist of plain types."""
    if get_origin(annotation) in (Union, types.UnionType):
        members = [_types(member) for member in get_args(annotation) if member is not type(None)]
        return set().union(*members) if all(members) else set()
    origin = get_origin(annotation) or annotation
    return {origin} if isinstance(origin, type) and origin is not MISSING else set()


def _names(kinds: set[type]) -> str:
    return " or ".join(sorted(kind.__name__ for kind in kinds))


def check_counts(**counts: int | None) -> None:
    """Check that counts are at least 1, where they are given.

    Raises:
        SaccadeError: naming the first that is not.
    """
    for name, value in counts.items():
        if value is not None and value < 1:
            raise SaccadeError(f"{name}={value}: give at least 1")
