"""Checks of what hooks and patches rely on in other packages, and the error if an installed version lacks it.

A hook that looks for an argument by name and does nothing without it would fail silently once a release renames the
argument. Each hook therefore checks what it relies on, when it is installed or called, and raises `changed`.
"""

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from saccade.errors import SaccadeError

TESTED: dict[str, tuple[str, str]] = {
    "torch": ("2.13", "2.13"),
    "transformers": ("5.19", "5.24"),
    "trl": ("1.16", "1.16"),
    "peft": ("0.18", "0.21"),
    "accelerate": ("1.12", "1.15"),
    "datasets": ("4.7", "5.2"),
}
"""The oldest and newest minor release of each package that the tests run with."""


def installed(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def known_range(package: str) -> str:
    """The tested releases of a package in words: `5.19 to 5.24`, or `1.16` if there is only one."""
    oldest, newest = TESTED[package]
    return oldest if oldest == newest else f"{oldest} to {newest}"


def is_tested(package: str, found: str) -> bool:
    """Whether version `found` belongs to the tested minor releases of a package."""
    oldest, newest = (tuple(map(int, end.split("."))) for end in TESTED[package])
    numbers = re.match(r"(\d+)\.(\d+)", found)  # also matches "2.13.0+cpu" and "5.24rc1"
    return numbers is not None and oldest <= tuple(map(int, numbers.groups())) <= newest


def changed(what: str, package: str = "transformers") -> SaccadeError:
    """The error for a hook or patch that does not find what it relies on.

    Args:
        what: what is missing, and where.
        package: the package that it is missing from.
    """
    return SaccadeError(
        f"{package} {installed(package)}: {what}. This version of saccade does not know that interface; install "
        f"{package} {known_range(package)}, with which it is tested"
    )


def check_takes(function: Callable[..., Any], names: Iterable[str]) -> None:
    """Check that a function has these parameters by name."""
    missing = [name for name in names if name not in inspect.signature(function).parameters]
    if missing:
        raise changed(f"{function.__qualname__} takes no {' and no '.join(map(repr, missing))}")


def check_methods(owner: type, names: Iterable[str], package: str) -> None:
    """Check that a class still has the methods that Saccade's subclass overrides."""
    missing = [name for name in names if not callable(getattr(owner, name, None))]
    if missing:
        raise changed(f"{owner.__name__} has no method {' and no method '.join(map(repr, missing))}", package)


def by_name(method: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a call of a bound method, by name."""
    return {**dict(zip(inspect.signature(method).parameters, args, strict=False)), **kwargs}


@contextmanager
def replaced_forward(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Run `forward` in place of a module's own inside the block."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
