"""The demo from start to report: each run in a separate process, several at a time if requested."""

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from saccade.demo.plan import plan_runs
from saccade.demo.summary import finding, show, write_pictures, write_report
from saccade.errors import SaccadeError
from saccade.sweeps import QUICK, DigitSettings, run_specs

FULL = replace(QUICK, pretrain_steps=100, sft_steps=800, test_scenes=2000)


def run_demo(
    output: str | Path,
    full: bool = False,
    seeds: int | None = None,
    settings: DigitSettings | None = None,
    jobs: int = 1,
) -> dict[str, Any]:
    """Train, evaluate, print the table, and write `report.json` and the pictures into `output`.

    Existing runs in `output` with the same settings, commit and versions are reused, so an interrupted demo continues
    where it stopped.

    Args:
        full: three seeds by default, and the parts of the method added one by one.
        seeds: number of seeds; by default 1, or 3 with `full`.
        settings: the shared settings; by default those of the quick or the full demo.
        jobs: runs at a time. One leaves a second core to the process that prepares batches; with more, all runs slow
            each other down equally.

    Returns:
        The report.

    Raises:
        SaccadeError: on a number of seeds or jobs below 1, or a run that failed.
    """
    output = Path(output)
    for name, value in (("seeds", seeds), ("jobs", jobs)):
        if value is not None and value < 1:
            raise SaccadeError(f"{name}={value}: give at least 1")
    settings = settings or (FULL if full else QUICK)
    runs = plan_runs(settings, seeds or (3 if full else 1), full)
    console = Console()
    outcome = run_specs(runs, output, jobs=jobs, console=console)
    outcome.raise_failures()
    results = list(outcome.results.values())
    report = write_report(results, output, asdict(settings), command=_command(), jobs=jobs)
    write_pictures(report, results, output)
    show(report, console)
    console.print(f"\n{finding(report)}", highlight=False)
    console.print(f"Written to {output}: report.json, table.md, accuracy_over_time.png, kept_tokens.png, loss.png")
    return report


def _command() -> str:
    return " ".join(["saccade", *sys.argv[1:]])
