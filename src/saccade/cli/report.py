"""`saccade report`: one page about a run, a sweep or a demo, easy to read on a phone and to share."""

import argparse

OUTPUT_IS_FOLDER = True
EXAMPLES = """
saccade report out/sft                              writes out/sft/report/report.html
saccade report out/sft --overwrite                  again, after `saccade eval out/sft`
saccade report out/studies/reducers --output pages/reducers
saccade report out/demo
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="what saccade train, saccade sweep or saccade demo wrote")
    parser.add_argument(
        "--output", metavar="DIR", help="folder for report.html, its pictures and report.json (default: FOLDER/report)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing report")


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from saccade.files import check_exists

    check_exists(args.folder, "folder", "give the folder of a run, a sweep or a demo")
    from saccade.pages import write_report

    page = write_report(Path(args.folder), Path(args.output) if args.output else None, args.overwrite)
    print(f"written to {page}")
    return 0
