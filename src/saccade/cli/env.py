"""`saccade env`: what to paste into a bug report."""

import argparse
import sys

from saccade.files import to_json, write_json_atomically
from saccade.report.environment import environment, environment_lines

EXAMPLES = """
saccade env
saccade env --json
saccade env --output env.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--output", metavar="FILE", help="also write JSON to FILE")


def run(args: argparse.Namespace) -> int:
    found = environment()
    if args.output:
        write_json_atomically(args.output, found)
    if args.json:
        print(to_json(found))
        return 0
    for name, value in environment_lines(found):
        print(f"{name:<20} {value}")
    for warning in found["warnings"]:
        print(f"saccade: warning: {warning}", file=sys.stderr)
    return 0
