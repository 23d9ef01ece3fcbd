"""The flags of the verbs that prune: one for each field of `PruningConfig` that can be given on a command line."""

import argparse
import json
from collections.abc import Iterable
from typing import Any

from saccade.cli.early import check_values


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f'{text!r} is not JSON, such as \'{{"precision": "float64"}}\'') from error


FLAGS: dict[str, dict[str, Any]] = {
    "reducer": {"metavar": "NAME", "help": "method that chooses the tokens; `saccade reducers` lists them"},
    "reducer_options": {"type": _json, "metavar": "JSON", "help": "options of the reducer"},
    "prune_ratio": {"type": float, "metavar": "P", "help": "share of visual tokens to drop, in [0, 1)"},
    "keep_tokens": {"type": int, "metavar": "K", "help": "number of visual tokens to keep, instead of a ratio"},
    "budget": {"metavar": "UNIT", "help": "what shares a budget: crop, image or sample"},
    "adaptive": {
        "action": argparse.BooleanOptionalAction,
        "help": "distribute each batch's tokens by how varied its images are",
    },
    "fit_length": {"type": int, "metavar": "N", "help": "longest row: visual tokens are dropped until it fits"},
    "patch_tolerance": {
        "type": float,
        "metavar": "T",
        "help": "drop before the vision tower what a predictor reproduces to within this, in units of pixel_values",
    },
    "newlines": {"metavar": "WHAT", "help": "keep or drop the newline tokens of anyres images"},
    "positions": {"metavar": "WHICH", "help": "compact or original"},
}
"""Not read from the fields themselves, since importing the class imports torch, and `--help` has to be instant."""


def add_pruning_flags(parser: argparse.ArgumentParser, default: str, names: Iterable[str] = tuple(FLAGS)) -> None:
    """Declare the flags of some or all pruning options.

    Args:
        default: what holds if a flag is not given, for the help.
        names: fields of [`PruningConfig`].
    """
    for name in names:
        settings = {**FLAGS[name], "help": f"{FLAGS[name]['help']} (default: {default})"}
        parser.add_argument(f"--{name.replace('_', '-')}", default=None, **settings)


def given_pruning(args: argparse.Namespace) -> dict[str, Any]:
    """The pruning options that were given, by their field.

    Raises:
        SaccadeError: on one that is certainly wrong, before anything slow is imported.
    """
    given = {name: getattr(args, name) for name in FLAGS if getattr(args, name, None) is not None}
    check_values(given)
    return given
