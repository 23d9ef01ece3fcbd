"""The testbed smol from nothing to a table: data, tower, assembled model, both stages of training, evaluation.

python -m experiments.smol --output out/smol                                 all tokens and DualSpeed, one seed
python -m experiments.smol --methods all_tokens,prune_only,dualspeed --seeds 3 --output out/smol
python -m experiments.smol --tasks easy_vqa --output out/smol                one task alone
python -m experiments.smol --grid 24 --output out/smol                       576 visual tokens
python -m experiments.smol --methods all_tokens --rank all --output out/smol  every reducer, at inference
python -m experiments.smol --methods dualspeed --vary reducer=fastervlm,random --output out/smol  each as plug-in
python -m experiments.smol --checkpoints 5 --output out/smol                 accuracy over the time of training
python -m experiments.smol --output out/smol --table                         what is done so far

The same command goes on after a kill: with the rows, the tower, the stage and the task at which it was.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from datasets import disable_progress_bars
from rich.console import Console
from transformers.utils import logging

from experiments.arguments import add_study_arguments, given_settings, image_reducers
from experiments.smol.study import (
    CANDIDATES,
    WORDS,
    Settings,
    plan_ranking,
    plan_runs,
    plan_variations,
    prepare,
    write_task_table,
)
from saccade.cli.field_flags import listed
from saccade.cli.main import Parser, guarded
from saccade.errors import SaccadeError
from saccade.recipes import parse_grid
from saccade.report.tables import print_table
from saccade.sweeps.digits import METHODS
from saccade.sweeps.plan import Plan, make_plan
from saccade.sweeps.runner import run_sweep
from saccade.sweeps.table import Standing
from saccade.training import make_recipe
from saccade.values import check_counts


def main(argv: Sequence[str] | None = None) -> int:
    """Make what is missing, and show the tables.

    Raises:
        SaccadeError: on bad input, before anything long starts.
    """
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser("experiments.smol", description=__doc__, formatter_class=raw, allow_abbrev=False)
    add_study_arguments(parser, Settings, [*METHODS, *CANDIDATES], "all_tokens,dualspeed", "out/smol")
    parser.add_argument("--only", action="append", default=[], metavar="LABEL=A,B", help="such as method=dualspeed")
    parser.add_argument("--rank", metavar="A,B", help='answer from what these reducers keep; "all" for every one')
    ratios = [0.75, 0.9, 0.95]
    parser.add_argument("--ratios", type=float, nargs="+", default=ratios, metavar="P", help="of --rank")
    kinds = "of --rank: compact, original, or both"
    parser.add_argument("--rank-positions", type=listed, default=(), metavar="A,B", help=kinds)
    values = "train with each of these values of a setting, such as reducer or slow_probability; repeatable"
    parser.add_argument("--vary", action="append", default=[], metavar="FIELD=A,B", help=values)
    args = parser.parse_args(argv)
    settings, grid = given_settings(args, Settings), parse_grid(args.vary, "--vary")
    if grid and args.rank:
        raise SaccadeError("--vary and --rank: give one of them, since --rank asks the models of one setting")
    chosen = "" if settings.tasks == Settings.tasks else f"-{'-'.join(settings.task_names)}"
    kind = "ranking" if args.rank else "-".join(["varied", *grid]) if grid else "runs"
    kind += "-over-time" if settings.checkpoints else ""
    folder, console = args.output / f"{kind}-{settings.grid}{chosen}", Console()
    if args.table:
        _show(Standing(Plan.read(folder), folder, WORDS), folder, console)
        return 0
    check_counts(seeds=args.seeds, jobs=args.jobs)
    methods = args.methods.split(",")
    planned = plan_runs
    if args.rank:
        reducers = image_reducers() if args.rank == "all" else args.rank.split(",")
        planned = partial(plan_ranking, reducers=reducers, ratios=args.ratios, positions=args.rank_positions)
    elif grid:
        planned = partial(plan_variations, grid=grid)
    for run in planned({"data": {"pretrain": [], "sft": []}, "model": ""}, settings, methods, range(args.seeds)):
        for stage in run.stages:
            make_recipe(stage, f"run {run.name}")
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        prepared = prepare(args.output, settings, lambda line: console.print(line, markup=False, highlight=False))
    finally:
        torch.set_num_threads(threads)
    runs = planned(prepared, settings, methods, range(args.seeds))
    command = ("python", "-m", "experiments.smol")
    plan = make_plan(
        f"smol at {settings.grid} x {settings.grid} patches", runs, command, {"settings": asdict(settings)}
    )
    only, worker = parse_grid(args.only, "--only"), "experiments.smol.worker"
    stages = args.output / "stages"
    outcome = run_sweep(plan, folder, stages, only, args.jobs, args.any_commit, console, worker)
    standing = Standing(plan, folder, WORDS)
    standing.report(console)
    _show(standing, folder, console)
    return outcome.tell_failures()


def _show(standing: Standing, folder: Path, console: Console) -> None:
    columns, cells = write_task_table(standing, folder)
    if cells:
        print_table(f"accuracy by task; {standing.progress}", columns, cells, file=console.file)
    else:
        console.print(standing.progress, markup=False, highlight=False)


if __name__ == "__main__":
    disable_progress_bars()
    logging.disable_progress_bar()
    sys.exit(guarded(main))
