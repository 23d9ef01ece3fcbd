"""Run a sweep, from the first checks to the table."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from saccade.errors import SaccadeError
from saccade.sweeps.digits import LABELS
from saccade.sweeps.grid import choose
from saccade.sweeps.plan import PLAN_FILE, Plan, check_runs
from saccade.sweeps.runner import Outcome, read_result, run_specs
from saccade.sweeps.table import Standing


def run_sweep(
    plan: Plan,
    output: Path,
    stages: Path | None = None,
    only: Mapping[str, Sequence[Any]] | None = None,
    jobs: int = 1,
    any_commit: bool = False,
    console: Console | None = None,
    worker: str = "saccade.sweeps.worker",
    words: Mapping[str, str] = LABELS,
) -> Outcome:
    """Check every run, make those that are missing, and write and print the table.

    Args:
        output: the sweep's folder.
        stages: folder of stages that several sweeps share; by default inside `output`.
        only: labels and their values to make now; the plan still contains all runs.
        jobs: runs at a time.
        any_commit: reuse runs and stages of any commit and version.
        worker: the module that makes one run.
        words: names of label values in the table.

    Raises:
        SaccadeError: on bad values, or a folder with finished runs of another sweep, before any run starts.
    """
    console = console or Console()
    chosen = choose(plan.runs, only or {})
    check_runs(chosen)
    check_folder(plan, output)
    plan.write(output)
    outcome = run_specs(chosen, output, stages, jobs, any_commit, console, worker)
    Standing(plan, output, words).report(console)
    return outcome


def check_folder(plan: Plan, output: Path) -> None:
    """Refuse a folder with finished runs that the plan does not contain: its table would lose them. A plan may grow.

    Raises:
        SaccadeError: naming the first such run and their number.
    """
    if not (output / PLAN_FILE).is_file():
        return
    before = Plan.read(output)
    planned = {spec.name: spec.as_json() for spec in plan.runs}
    lost = [
        spec.name
        for spec in before.runs
        if planned.get(spec.name) != spec.as_json() and read_result(output, spec) is not None
    ]
    if lost:
        raise SaccadeError(
            f"output={str(output)!r} contains {len(lost)} finished runs of another sweep ({before.command}), "
            f"such as {lost[0]}: give another output, or --only for a part of that sweep"
        )
