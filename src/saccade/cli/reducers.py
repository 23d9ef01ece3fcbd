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
        rows.append((entry["name"], entry["kind"], needs or None, options or None, entry["description"]))
    print_table("", ["name", "kind", "needs", "options", "description"], rows)
    return 0


def describe(name: str) -> dict[str, Any]:
    """A description of a reducer, ready for JSON.

    Keys: `name`; `kind`, "select" or "merge", None if it cannot be determined; `needs`; `options`, each with its
    default or None; `description`, the first sentence of its class.

    Raises:
        SaccadeError: if no reducer has this name.
    """
    from saccade.reducers import get_reducer

    try:
        reducer = get_reducer(name)
    except TypeError:  # a plug-in's option without a default
        return {"name": name, "kind": None, "needs": [], "options": {}, "description": ""}
    cls = type(reducer)
    parameters = inspect.signature(cls).parameters.values()
    return {
        "name": name,
        "kind": _kind(reducer),
        "needs": sorted(reducer.needs),
        "options": {entry.name: _default(entry) for entry in parameters if entry.kind in NAMED},
        "description": _first_sentence(inspect.getdoc(cls) or ""),
    }


def _kind(reducer: Any) -> str | None:
    """Whether a reducer merges, determined by running it on a synthetic image of 4 x 4 tokens."""
    import torch

    from saccade.tokens import VisualContext

    ramp = torch.arange(16.0)
    features = torch.stack([ramp.sin(), ramp.cos(), (ramp * 3).sin(), (ramp * 5).cos()], dim=-1).unsqueeze(0)
    extras = {"encoder_features": features, "saliency": features[..., 0].exp(), "keys": features}
    extras |= {"relevance": features[..., 1].exp(), "word_relevance": features}
    context = VisualContext(features=features, **{field: extras[field] for field in reducer.needs})
    try:
        return "select" if reducer(context, 4).weight is None else "merge"
    except Exception:  # a plug-in that fails must not keep the others from being listed
        return None


def _default(parameter: inspect.Parameter) -> Any:
    default = parameter.default
    if default is inspect.Parameter.empty:
        return None
    return default if isinstance(default, (str, int, float, type(None))) else str(default)


def _first_sentence(text: str) -> str:
    paragraph = " ".join(text.split("\n\n")[0].split())
    sentence, stop, _ = paragraph.partition(". ")
    return (sentence + stop).rstrip(". ")
