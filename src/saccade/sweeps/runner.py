"""Run specs in separate processes, several at a time and each stage once, and show their progress."""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
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

from saccade.errors import SaccadeError
from saccade.files import file_lock, write_json_atomically
from saccade.report.environment import environment
from saccade.sweeps.spec import RunSpec
from saccade.sweeps.worker import RESULT_FILE, SPEC_FILE

RUNS, STAGES = "runs", "stages"
LOG_FILE = "log.txt"
ERROR_FILE = "error.json"


@dataclass
class Outcome:
    """The outcome of the runs.

    Args:
        results: the content of `result.json` by run name, in the order of the specs.
        failures: one line per failed run, by run name.
    """

    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def raise_failures(self) -> None:
        """Raise an error if there are failures.

        Raises:
            SaccadeError: with the first failure and the number of others.
        """
        if self.failures:
            first, *others = self.failures.values()
            more = f"; {len(others)} more failed: {', '.join(list(self.failures)[1:])}" if others else ""
            raise SaccadeError(f"{first}{more}; the same command continues with what is missing")

    def tell_failures(self) -> int:
        """Print the failures, and return the resulting exit status."""
        for failure in self.failures.values():
            print(f"saccade: {failure}", file=sys.stderr)
        if self.failures:
            print(f"saccade: {len(self.failures)} runs failed; the same command tries them again", file=sys.stderr)
        return 1 if self.failures else 0


def run_specs(
    specs: Sequence[RunSpec],
    output: Path,
    stages: Path | None = None,
    jobs: int = 1,
    any_commit: bool = False,
    console: Console | None = None,
    worker: str = "saccade.sweeps.worker",
) -> Outcome:
    """Make the runs that are missing in `output`, in order, and return all results.

    An existing run with the same spec, commit and package versions is reused, and so is a stage. An interrupted run
    starts again at the stage that was interrupted; a failing run does not stop the others.

    Args:
        output: contains the folder `runs`, with one folder per run.
        stages: the folder of stages, which several sweeps may share; by default `stages` inside `output`.
        jobs: runs at a time.
        any_commit: reuse runs and stages of any commit and version.
        worker: the module that makes one run, given the run's folder and the folder of stages.

    Raises:
        SaccadeError: on a number of jobs below 1, several runs with one name, or another sweep running in the same
            folder.
    """
    if jobs < 1:
        raise SaccadeError(f"jobs={jobs}: give at least 1")
    names = [spec.name for spec in specs]
    repeated = [name for number, name in enumerate(names) if name in names[:number]]
    if repeated:
        raise SaccadeError(f"two runs are called {repeated[0]!r}: a value is given twice")
    console = console or Console()
    stages = stages or output / STAGES
    columns = (BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    taken = f"another sweep is at work in {stages}: wait for it, or give another --output"
    with (
        file_lock(stages / ".lock", taken),
        Progress(TextColumn("{task.description}"), *columns, console=console) as progress,
    ):
        return _Runner(output / RUNS, stages, progress, any_commit, worker).run(list(specs), jobs)


def read_result(output: Path, spec: RunSpec) -> dict[str, Any] | None:
    """The content of a run's `result.json` if it exists and has exactly this spec, from any commit; else None."""
    path = output / RUNS / spec.name / RESULT_FILE
    if not path.is_file():
        return None
    found = json.loads(path.read_text())
    return found if found["spec"] == spec.as_json() else None


def read_failure(output: Path, spec: RunSpec) -> str | None:
    """Why a run failed the last time, or None."""
    path = output / RUNS / spec.name / ERROR_FILE
    return json.loads(path.read_text())["error"] if path.is_file() else None


def same_code(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether two environments have the same commit and package versions, so that runs can be reused."""
    return all(before.get(name) == now.get(name) for name in ("commit", "packages"))


class _Runner:
    def __init__(self, folder: Path, stages: Path, progress: Progress, any_commit: bool, worker: str) -> None:
        self.folder = folder
        self.stages = stages
        self.progress = progress
        self.any_commit = any_commit
        self.worker = worker
        self.environment = environment()
        self.outcome = Outcome()
        self.processes: set[subprocess.Popen] = set()
        self.busy: set[str] = set()
        """Stages that are being trained."""
        self.changed = threading.Condition()

    def run(self, specs: list[RunSpec], jobs: int) -> Outcome:
        """Run what is missing, and return the outcome with the results in the order of `specs`."""
        found = {spec.name: self._found(spec) for spec in specs}
        self.pending = [spec for spec in specs if found[spec.name] is None]
        for name in (name for name, result in found.items() if result is not None):
            self.progress.console.print(f"{name}: found, not trained again")
        self._say_what_is_replaced()
        self.whole = self.progress.add_task("all runs", total=len(specs), completed=len(specs) - len(self.pending))
        with ThreadPoolExecutor(jobs) as pool:
            workers = [pool.submit(self._work) for _ in range(jobs)]
            try:
                for worker in workers:
                    worker.result()
            except BaseException:
                with self.changed:
                    self.pending.clear()
                    self.changed.notify_all()
                for process in list(self.processes):
                    process.kill()
                raise
        results = {name: result for name, result in found.items() if result is not None} | self.outcome.results
        order = [spec.name for spec in specs]
        return Outcome(
            {name: results[name] for name in order if name in results},
            {name: self.outcome.failures[name] for name in order if name in self.outcome.failures},
        )

    def _found(self, spec: RunSpec) -> dict[str, Any] | None:
        result = read_result(self.folder.parent, spec)
        return result if result is not None and self._fits(result) else None

    def _fits(self, record: dict[str, Any]) -> bool:
        return self.any_commit or same_code(record.get("environment", {}), self.environment)

    def _has(self, stage: str) -> bool:
        path = self.stages / stage / RESULT_FILE
        return path.is_file() and self._fits(json.loads(path.read_text()))

    def _say_what_is_replaced(self) -> None:
        others = [spec for spec in self.pending if read_result(self.folder.parent, spec) is not None]
        if others:
            self.progress.console.print(
                f"{len(others)} runs are of another commit or other versions, and are made again: "
                "any_commit reuses them"
            )

    def _work(self) -> None:
        """Body of each thread: make the first run that can start, then the next, until none are left."""
        while (taken := self._take()) is not None:
            spec, missing = taken
            try:
                self._run_and_tell(spec, missing)
            finally:
                with self.changed:
                    self.busy -= missing
                    self.changed.notify_all()

    def _take(self) -> tuple[RunSpec, set[str]] | None:
        """The first pending run whose missing stages are not being trained by another run, and those stages."""
        with self.changed:
            while self.pending:
                for spec in self.pending:
                    missing = {stage for stage in spec.stage_ids if not self._has(stage)}
                    if not missing & self.busy:
                        self.pending.remove(spec)
                        self.busy |= missing
                        return spec, missing
                self.changed.wait()
        return None

    def _run_and_tell(self, spec: RunSpec, missing: set[str]) -> None:
        folder = self.folder / spec.name
        shutil.rmtree(folder, ignore_errors=True)
        for stage in missing:
            self._clear(stage)
        write_json_atomically(folder / SPEC_FILE, spec.as_json())
        task = self.progress.add_task(spec.name, total=None)
        try:
            error = self._run(spec, folder, task)
        finally:
            self.progress.remove_task(task)
            self.progress.advance(self.whole)
        if error is not None:
            self.outcome.failures[spec.name] = error
            self.progress.console.print(error)
            write_json_atomically(folder / ERROR_FILE, {"error": error})
            return
        result = json.loads((folder / RESULT_FILE).read_text())
        self.outcome.results[spec.name] = result
        self.progress.console.print(f"{spec.name}: {_describe(result, missing)}")

    def _clear(self, stage: str) -> None:
        """Remove an unfinished stage made by other code; one made by this code may resume from its checkpoints."""
        path = self.stages / stage / SPEC_FILE
        finished = (self.stages / stage / RESULT_FILE).is_file()
        if finished or not path.is_file() or not self._fits(json.loads(path.read_text())):
            shutil.rmtree(self.stages / stage, ignore_errors=True)

    def _run(self, spec: RunSpec, folder: Path, task: TaskID) -> str | None:
        """Run one spec in a separate process; return None, or one line on why it failed."""
        log = folder / LOG_FILE
        variables = {**os.environ, "OMP_NUM_THREADS": str(spec.threads), "TOKENIZERS_PARALLELISM": "false"}
        # The worker must be importable from the same places as here, whatever the folder.
        variables["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        with log.open("w") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", self.worker, str(folder), str(self.stages)],
                # Never written to: it closes however this process ends, which ends the run.
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=variables,
            )
            self.processes.add(process)
            for line in process.stdout:
                words = line.split()
                if len(words) == 4 and words[0] == "progress":
                    stage, step, total = words[1], int(words[2]), int(words[3])
                    self.progress.update(task, description=f"{spec.name}, {stage}", completed=step, total=total)
            status = process.wait()
            process.stdin.close()
            self.processes.remove(process)
        if status:
            last = [line for line in log.read_text().splitlines() if line.strip()][-1:]
            return f"the run {spec.name} ended with status {status}: {' '.join(last)} (see {log})"
        return None


def _describe(result: dict[str, Any], missing: set[str]) -> str:
    trained = [result["stages"][stage.partition("-")[0]]["seconds"] for stage in missing]
    words = [f"trained in {sum(trained):.0f} s" if trained else "stages found"]
    full = next((entry for entry in result["evaluations"] if entry["inference"] == "full"), None)
    if full:
        words.append(f"accuracy {100 * full['accuracy']:.1f} %")
    return ", ".join(words)
