"""The demo from start to report: each run in a process of its own, as many at a time as asked for."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from saccade.demo.plan import DemoSettings, RunSpec, plan_runs
from saccade.demo.summary import show, write_pictures, write_report
from saccade.demo.worker import RESULT_FILE, SPEC_FILE
from saccade.errors import SaccadeError
from saccade.files import write_json_atomically
from saccade.report.environment import environment

QUICK = DemoSettings(pretrain_steps=60, sft_steps=320)
FULL = DemoSettings(pretrain_steps=100, sft_steps=800, test_scenes=2000)


def run_demo(
    output: str | Path,
    full: bool = False,
    seeds: int | None = None,
    settings: DemoSettings | None = None,
    jobs: int = 1,
) -> dict[str, Any]:
    """Train, evaluate, print the table, and write `report.json` and the pictures into `output`.

    Runs that `output` already holds with the same settings, commit and versions are taken as they are, so an
    interrupted demo goes on where it stopped.

    Args:
        full: three seeds by default, and the parts of the method added one by one.
        seeds: number of seeds; 1, or 3 with `full`, when left out.
        settings: the shared numbers; those of the quick or the full demo when left out.
        jobs: runs at a time. One leaves a second core to the process that prepares batches; with more, the runs slow
            one another down, all alike.

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
    output.mkdir(parents=True, exist_ok=True)
    console = Console()
    columns = (BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), *columns, console=console) as progress:
        results = _Runner(output / "runs", progress).run(runs, jobs)
    report = write_report(results, output, command=_command(), jobs=jobs)
    write_pictures(report, results, output)
    show(report, console)
    console.print(f"\nWritten to {output}: report.json, table.md, accuracy_over_time.png, kept_tokens.png, loss.png")
    return report


class _Runner:
    """Runs specs in processes of their own, and shows how far they are."""

    def __init__(self, folder: Path, progress: Progress) -> None:
        self.folder = folder
        self.progress = progress
        self.processes: set[subprocess.Popen] = set()
        self.environment = environment()

    def run(self, runs: list[RunSpec], jobs: int) -> list[dict[str, Any]]:
        """The results, in the order of `runs`."""
        self.whole = self.progress.add_task("all runs", total=sum(_weight(spec) for spec in runs))
        with ThreadPoolExecutor(jobs) as pool:
            futures = [pool.submit(self._run_or_reuse, spec) for spec in runs]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(self.processes):
                    process.kill()
                raise

    def _run_or_reuse(self, spec: RunSpec) -> dict[str, Any]:
        folder = self.folder / spec.name
        result = folder / RESULT_FILE
        if result.is_file():
            found = json.loads(result.read_text())
            if found["spec"] == spec.as_json() and same_code(found.get("environment", {}), self.environment):
                self.progress.console.print(f"{spec.name}: found, not trained again")
                self.progress.advance(self.whole, _weight(spec))
                return found
        shutil.rmtree(folder, ignore_errors=True)
        write_json_atomically(folder / SPEC_FILE, spec.as_json())
        task = self.progress.add_task(spec.name, total=_weight(spec))
        try:
            self._run(spec, folder, task)
        finally:
            self.progress.remove_task(task)
        found = json.loads(result.read_text())
        seconds = sum(stage["seconds"] for stage in found["stages"].values())
        accuracy = found["evaluations"]["full"]["accuracy"]
        self.progress.console.print(f"{spec.name}: trained in {seconds:.0f} s, accuracy {100 * accuracy:.1f} %")
        return found

    def _run(self, spec: RunSpec, folder: Path, task: TaskID) -> None:
        log = folder / "log.txt"
        environment = {**os.environ, "OMP_NUM_THREADS": str(spec.settings.threads), "TOKENIZERS_PARALLELISM": "false"}
        weights = _stage_weights(spec)
        done = dict.fromkeys(weights, 0.0)
        with log.open("w") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "saccade.demo.worker", str(folder)],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=environment,
            )
            self.processes.add(process)
            for line in process.stdout:
                words = line.split()
                if len(words) == 4 and words[0] == "progress":
                    stage, step, total = words[1], int(words[2]), int(words[3])
                    before, done[stage] = done[stage], weights[stage] * step / total
                    for bar in (task, self.whole):
                        self.progress.advance(bar, done[stage] - before)
            status = process.wait()
            self.processes.remove(process)
        if status:
            last = [line for line in log.read_text().splitlines() if line.strip()][-1:]
            raise SaccadeError(f"the run {spec.name} ended with status {status}: {' '.join(last)} (see {log})")


def same_code(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether a run made in one environment stands for a run in the other: the same commit and package versions."""
    return all(before.get(name) == now.get(name) for name in ("commit", "packages"))


def _stage_weights(spec: RunSpec) -> dict[str, float]:
    """Rough seconds of each stage in relation to one another, for the time left."""
    full = spec.method == "all_tokens"
    settings = spec.settings
    step = 1.0 if full else 0.35
    return {"pretrain": settings.pretrain_steps * step, "sft": settings.sft_steps * step, "evaluate": 40.0}


def _weight(spec: RunSpec) -> float:
    return sum(_stage_weights(spec).values())


def _command() -> str:
    return " ".join(["saccade", *sys.argv[1:]])
