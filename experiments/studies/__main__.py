"""The papers' studies on the digit scenes: many runs, tables, pictures, and the page docs/results.md.

python -m experiments.studies parts --jobs 2 --output out/studies
python -m experiments.studies reducers --only prune_ratio=0.9 --only seed=0 --output out/studies
python -m experiments.studies parts --output out/studies --table        the finished runs so far
python -m experiments.studies --output out/studies --write-docs docs    the page of all studies in a folder
python -m experiments.studies --page out/studies/parts                  the page of one study, or of any sweep
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from experiments.studies.methods import FIGURES, WORDS
from experiments.studies.page import study_page
from experiments.studies.results_page import write_docs
from experiments.studies.studies import STUDIES, plan_study
from saccade.cli.main import Parser, guarded
from saccade.cli.sweep import add_run_arguments
from saccade.errors import SaccadeError
from saccade.pages import write_report
from saccade.recipes import parse_grid
from saccade.sweeps import QUICK
from saccade.sweeps.plan import Plan
from saccade.sweeps.runner import run_sweep
from saccade.sweeps.table import Standing
from saccade.values import check_counts


def main(argv: Sequence[str] | None = None) -> int:
    """Run a study, or show its finished runs.

    Raises:
        SaccadeError: on bad input, before anything runs.
    """
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser("experiments.studies", description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("study", nargs="?", help=", ".join(STUDIES))
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N-1 (default: %(default)s)")
    parser.add_argument("--steps", type=int, metavar="N", help="steps of fine-tuning, for a short look")
    add_run_arguments(parser)
    parser.add_argument("--output", type=Path, default="out/studies", metavar="DIR", help="(default: %(default)s)")
    parser.add_argument("--write-docs", type=Path, metavar="DIR", help="write results.md of the studies in --output")
    parser.add_argument("--page", type=Path, metavar="FOLDER", help="write FOLDER/report/report.html, and replace it")
    args = parser.parse_args(argv)
    check_counts(seeds=args.seeds, jobs=args.jobs, threads=args.threads, scenes=args.scenes, steps=args.steps)
    status, console = 0, Console()
    if args.study and args.table:
        folder = args.output / args.study
        Standing(Plan.read(folder), folder, WORDS, FIGURES).report(console)
    elif args.study:
        status = _run(args, console)
    elif not args.write_docs and not args.page:
        raise SaccadeError(f"nothing to run: give one of {', '.join(STUDIES)}, or --write-docs, or --page")
    if args.write_docs:
        print(f"written to {write_docs(args.output, args.write_docs)}")
    if args.page:
        print(f"written to {write_report(args.page, overwrite=True, make=study_page)}")
    return status


def _run(args: argparse.Namespace, console: Console) -> int:
    settings = QUICK if args.steps is None else QUICK.shrink(args.steps)
    settings = replace(settings, test_scenes=args.scenes, split=args.split, threads=args.threads)
    plan, folder, only = (
        plan_study(args.study, settings, args.seeds),
        args.output / args.study,
        parse_grid(args.only, "--only"),
    )
    stages, worker = args.output / "stages", "experiments.studies.worker"
    outcome = run_sweep(plan, folder, stages, only, args.jobs, args.any_commit, console, worker)
    Standing(plan, folder, WORDS, FIGURES).report(console)
    console.print(f"Written to {folder}: sweep.json, table.json, table.md, runs; models in {stages}")
    return outcome.tell_failures()


if __name__ == "__main__":
    sys.exit(guarded(main))
