"""A sweep from its first check to its table."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from saccade.sweeps.grid import choose
from saccade.sweeps.plan import Plan, check_runs
from saccade.sweeps.runner import Outcome, run_specs
from saccade.sweeps.table import Standing


def run_sweep(
    plan: Plan,
    output: Path,
    stages: Path | None = None,
    only: Mapping[str, Sequence[Any]] | None = None,
    jobs: int = 1,
    any_commit: bool = False,
    console: Console | None = None,
) -> Outcome:
    """Check every run, make those that are missing, and write and print the table.

    Args:
        output: the sweep's folder.
        stages: folder of stages that several sweeps share; inside `output` when left out.
        only: labels and the values to make now; the plan stays whole.
        jobs: runs at a time.
        any_commit: take runs and stages of any commit and version as they are.

    Raises:
        SaccadeError: on bad values, before any run starts.
    """
    console = console or Console()
    chosen = choose(plan.runs, only or {})
    check_runs(chosen)
    plan.write(output)
    outcome = run_specs(chosen, output, stages, jobs, any_commit, console)
    standing = Standing(plan, output)
    standing.write()
    standing.show(console)
    return outcome
