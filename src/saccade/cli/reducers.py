"""`saccade reducers`: list the token reducers, what they need and which options they take."""

import argparse
import inspect
from typing import Any

from saccade.files import to_json, write_json_atomically

NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)

EXAMPLES = """
saccade reducers
saccade reducers --json
saccade reducers --output reducers.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--output", metavar="FILE", help="also write JSON to FILE")


def run(args: argparse.Namespace) -> int:
    # Imported here because it imports torch, which `saccade reducers --help` should not wait for.
    from saccade.reducers import list_reducers

    entries = [describe(name) for name in list_reducers()]
    if args.output:
        write_json_atomically(args.output, entries)
    if args.json:
        print(to_json(entries))
        return 0
    from saccade.report.tables import print_table

    rows = []
    for entry in entries:
        needs, options = ", ".join(entry["needs"]), ", ".join(f"{k}={v}" for k, v in entry["options"].items())
        rows.append((entry["name"], needs or None, options or None, entry["description"]))
    print_table("", ["name", "needs", "options", "description"], rows)
    return 0


def describe(name: str) -> dict[str, Any]:
    """A description of a reducer, ready for JSON: `name`; `needs`; `options`, each with its default or None;
    `description`, the first sentence of its class.

    Raises:
        SaccadeError: if no reducer has this name.
    """
    from saccade.reducers import get_reducer

    try:
        reducer = get_reducer(name)
    except TypeError:  # a plug-in's option without a default
        return {"name": name, "needs": [], "options": {}, "description": ""}
    cls = type(reducer)
    options = [entry for entry in inspect.signature(cls).parameters.values() if entry.kind in NAMED]
    first, stop, _ = " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split()).partition(". ")
    return {
        "name": name,
        "needs": sorted(reducer.needs),
        "options": {entry.name: None if entry.default is entry.empty else _plain(entry.default) for entry in options},
        "description": (first + stop).rstrip(". "),
    }


def _plain(value: Any) -> Any:
    return value if isinstance(value, (str, int, float, type(None))) else str(value)
