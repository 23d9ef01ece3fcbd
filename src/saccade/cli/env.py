"""`saccade env`: what to paste into a bug report."""

import argparse
import sys

from saccade.files import to_json, write_json_atomically
from saccade.report.environment import environment

EXAMPLES = """
saccade env
saccade env --json
saccade env --output env.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's flags."""
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--output", metavar="FILE", help="also write JSON to FILE")


def run(args: argparse.Namespace) -> int:
    """Print the environment as lines or as JSON, with its warnings on the standard error."""
    found = environment()
    if args.output:
        write_json_atomically(args.output, found)
    if args.json:
        print(to_json(found))
        return 0
    for name, value in _lines(found):
        print(f"{name:<20} {value}")
    for warning in found["warnings"]:
        print(f"saccade: warning: {warning}", file=sys.stderr)
    return 0


def _lines(found: dict) -> list[tuple[str, str]]:
    packages = {name: version or "not installed" for name, version in found["packages"].items()}
    gpus = ", ".join(f"{gpu['name']} ({gpu['memory_gib']} GiB)" for gpu in found["gpus"])
    return [
        ("saccade", packages.pop("saccade") + (f" at {found['commit']}" if found["commit"] else "")),
        ("python", found["python"]),
        *packages.items(),
        ("mm_encoder_outputs", "yes" if found["mm_encoder_outputs"] else "no"),
        ("platform", found["platform"]),
        ("cpu", f"{found['cpu']}, {found['cores']} cores, {found['threads']} torch threads"),
        ("memory", f"{found['memory_gib']} GiB"),
        ("gpu", gpus or "none"),
        ("cuda", found["cuda"] or "none"),
    ]
