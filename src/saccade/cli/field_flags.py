"""Flags: one for each field of a dataclass, with its words in the docstring as help, and lists as values."""

import argparse
import inspect
import re
from dataclasses import fields
from types import NoneType
from typing import get_args, get_type_hints


def add_field_flags(parser: argparse.ArgumentParser, settings: type) -> None:
    """Add a flag for each field.

    Args:
        settings: a dataclass whose fields all have defaults and words in its docstring, under `Args:`. One that is
            true or false defaults to false.
    """
    words = dict(re.findall(r"^    (\w+): (.+(?:\n     .+)*)", inspect.getdoc(settings) or "", re.MULTILINE))
    types = get_type_hints(settings)
    for entry in fields(settings):
        (kind,) = set(get_args(types[entry.name]) or [types[entry.name]]) - {NoneType}
        default = "" if entry.default is None or kind is bool else " (default: %(default)s)"
        text = " ".join(words[entry.name].split()).rstrip(".").replace("%", "%%") + default
        metavar = "TEXT" if kind is str else kind.__name__.upper()
        flag = f"--{entry.name.replace('_', '-')}"
        if kind is bool:
            parser.add_argument(flag, action="store_true", default=entry.default, help=text)
            continue
        parser.add_argument(flag, type=kind, default=entry.default, metavar=metavar, help=text)


def listed(text: str) -> list[str]:
    """The type of a flag whose value is words separated by commas."""
    return [word.strip() for word in text.split(",")]
