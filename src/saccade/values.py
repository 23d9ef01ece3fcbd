"""Check values of options: against the types in their dataclass, and those that are light enough to be refused before
torch is imported."""

import errno
import math
import socket
import sys
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING
from typing import Any, Union, get_args, get_origin

from saccade.errors import SaccadeError, kind_of, one_of

BUDGETS = ("crop", "image", "sample")
NEWLINES = ("keep", "drop")
POSITIONS = ("compact", "original")
DTYPES = ("auto", "float32", "bfloat16", "float16")
CROPS = ("none", "anyres", "hd", "hd_pad")
PROJECTORS = ("mlp", "resampler")
INFERENCES = ("full", "pruned", "pruned_isolator", "skip")
ENGINES = ("vllm", "transformers")
SPLITS = ("train", "validation", "test")
JSON_SUFFIXES = (".json", ".jsonl")
DATA_SUFFIXES = (*JSON_SUFFIXES, ".parquet")
"""The single files of rows that are read."""
STAGES = ("pretrain", "sft")
ENTRY_POINT_GROUP = "saccade.reducers"
"""The entry points of other packages' reducers."""
BOUNDS = frozenset({"feature_cache_gib"})
"""Options for which infinity means no limit."""
PLAIN = {bool: bool, int: int, float: float, str: str, list: (list, tuple), dict: Mapping}
"""The types that annotations of options consist of, and what counts as one."""


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
    plain = PLAIN.keys() & allowed
    if value is None and allowed and plain == allowed and type(None) not in get_args(annotation):
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
    if isinstance(value, bool) and bool not in allowed and plain:
        raise SaccadeError(f"{name}={value!r} is a bool, expected {_names(plain)}")
    if plain == allowed and not _is_one_of(value, plain):
        # A name may be a number. Where a list may stand instead, a number is more likely a mistake.
        if str in plain and isinstance(value, (int, float)) and not plain & {list, dict}:
            if isinstance(value, float):
                raise SaccadeError(f"{name}={value!r} is read as a number: put it into quotes, as in '\"{value!r}\"'")
            return str(value)
        raise SaccadeError(f"{name}={value!r} is {kind_of(value)}, expected {_names(plain)}")
    if isinstance(value, (list, tuple)):
        inside = _types_inside(annotation)
        for one in value:
            if inside and inside <= PLAIN.keys() and not _is_one_of(one, inside):
                raise SaccadeError(f"{name}={value!r}: {one!r} is {kind_of(one)}, expected {_names(inside)}")
    return value


def check_finite(name: str, value: Any) -> None:
    """Refuse NaN and infinity, also inside lists and mappings: they pass most comparisons and poison whatever they are
    multiplied with.
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


def _types_inside(annotation: Any) -> set[type]:
    """The plain types of the elements of an annotation's list; empty if it has none, or they may be anything."""
    members = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    return set().union(*(_types(one) for member in members if get_origin(member) is list for one in get_args(member)))


def _is_one_of(value: Any, kinds: Iterable[type]) -> bool:
    return any(isinstance(value, PLAIN[kind]) for kind in kinds)


def _names(kinds: Iterable[type]) -> str:
    return " or ".join(sorted(kind.__name__ for kind in kinds))


def is_number(value: Any) -> bool:
    """Whether a value is an int or a float, which a bool is not here."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_counts(**counts: int | None) -> None:
    """Check that counts are at least 1, where they are given."""
    for name, value in counts.items():
        if value is not None and value < 1:
            raise SaccadeError(f"{name}={value}: give at least 1")


def check_choice(name: str, value: Any, known: Sequence[str]) -> None:
    """Check that a value is one of the known ones."""
    if value not in known:
        raise SaccadeError(f"{name}={value!r} is unknown: {one_of(value, known)}")


def check_port(host: str, port: int) -> None:
    """Refuse an address that cannot be listened at.

    Raises:
        SaccadeError: naming the port, or the host if the port is not to blame.
    """
    if not 0 < port < 65536:
        raise SaccadeError(f"port={port}: it cannot be listened at (it is outside 1 to 65535); give another --port")
    try:
        places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        for family, *_, place in places:
            try:
                socket.create_server(place, family=family).close()
            except OSError as error:
                # Servers pass over one of several, such as that of localhost in IPv6 on a machine without it.
                if error.errno != errno.EADDRNOTAVAIL or len(places) == 1:
                    raise
    except (OSError, UnicodeError) as error:
        of_port = getattr(error, "errno", None) in (errno.EADDRINUSE, errno.EACCES)
        name, value = ("port", port) if of_port else ("host", host)
        raise SaccadeError(f"{name}={value}: it cannot be listened at ({error}); give another --{name}") from error


def check_prune_ratio(prune_ratio: float) -> float:
    """Return `prune_ratio` if it lies in [0, 1)."""
    if not is_number(prune_ratio) or not 0 <= prune_ratio < 1:
        raise SaccadeError(
            f"prune_ratio={prune_ratio!r} is outside [0, 1): it is the share of visual tokens to drop, "
            "0.9 keeps a tenth, 0 keeps all"
        )
    return float(prune_ratio)


def check_pruning(values: Mapping[str, Any]) -> None:
    """Check those options of `saccade.reducers.PruningConfig` that are given and not None, as far as that needs no
    reducer.
    """
    given = {name: value for name, value in values.items() if value is not None}
    if "prune_ratio" in given and "keep_tokens" in given:
        raise SaccadeError(
            f"prune_ratio={given['prune_ratio']!r} and keep_tokens={given['keep_tokens']!r} both say how many visual "
            "tokens to keep: leave one of them out"
        )
    if "prune_ratio" in given:
        check_prune_ratio(given["prune_ratio"])
    if "keep_tokens" in given:
        _check_positive("keep_tokens", given["keep_tokens"], "omit it to use prune_ratio")
    for name, known in (("budget", BUDGETS), ("newlines", NEWLINES), ("positions", POSITIONS)):
        if name in values:
            check_choice(name, values[name], known)
    if "fit_length" in given:
        _check_positive("fit_length", given["fit_length"], "omit it for no maximum")
        if given.get("reducer") == "none":
            raise SaccadeError(
                f"fit_length={given['fit_length']} with reducer='none', which drops no token: use another reducer; "
                "prune_ratio=0 keeps all tokens of samples that fit"
            )
    if "patch_tolerance" in given:
        value = given["patch_tolerance"]
        if not is_number(value) or not 0 <= value <= sys.float_info.max:
            raise SaccadeError(
                f"patch_tolerance={value!r}: expected a number of at least 0, by how much a pixel may differ; omit it "
                "to drop no patches before the tower"
            )


def _check_positive(name: str, value: Any, otherwise: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise SaccadeError(f"{name}={value!r}: expected an integer of at least 1; {otherwise}")
