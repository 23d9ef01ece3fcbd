"""Flags that experiments of many runs share: their settings, which methods and seeds, and how runs are made."""

import argparse
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from saccade.cli.field_flags import add_field_flags
from saccade.reducers import list_reducers
from saccade.reducers.frames import KNOW_TIME

S = TypeVar("S")


def add_study_arguments(
    parser: argparse.ArgumentParser, settings: type, known: Iterable[str], methods: str, output: str
) -> None:
    """Add a flag for each setting, with its words in the docstring as help, and the flags of the runs.

    Args:
        settings: a dataclass whose fields all have defaults, and words under `Args:`.
        known: the names that `--methods` takes.
        methods: its default.
        output: the default of `--output`.
    """
    parser.add_argument(
        "--methods", default=methods, metavar="A,B", help=f"of {', '.join(known)} (default: %(default)s)"
    )
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="seeds 0 to N-1 (default: %(default)s)")
    add_field_flags(parser, settings)
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default: %(default)s)")
    parser.add_argument("--any-commit", action="store_true", help="accept existing runs of other commits and versions")
    parser.add_argument("--table", action="store_true", help="make nothing, show what is done so far")
    parser.add_argument("--output", type=Path, default=Path(output), metavar="DIR", help="(default: %(default)s)")


def image_reducers() -> list[str]:
    """The reducers to compare on images: all but the one that drops nothing, and those that compare frames."""
    return [name for name in list_reducers() if name not in ("none", *KNOW_TIME)]


def given_settings(args: argparse.Namespace, settings: type[S]) -> S:
    """The settings of a command."""
    values: dict[str, Any] = {entry.name: getattr(args, entry.name) for entry in fields(settings)}
    return settings(**values)
