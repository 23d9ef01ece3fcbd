"""Run a sweep in separate processes, several at a time and each stage once, and show its progress."""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
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

from saccade.errors import SaccadeError, counted
from saccade.files import file_lock, write_json_atomically
from saccade.report.environment import environment
from saccade.sweeps.inputs import same_inputs, stage_inputs_are_as_before
from saccade.sweeps.plan import PLAN_FILE, Plan, check_runs, choose
from saccade.sweeps.spec import RunSpec
from saccade.sweeps.worker import RESULT_FILE, SPEC_FILE, read_record
from saccade.values import check_counts

RUNS, STAGES = "runs", "stages"
LOG_FILE, ERROR_FILE = "log.txt", "error.json"
WORKER = "saccade.sweeps.worker"


@dataclass
class Outcome:
    """The content of `result.json` of each run, and one line per failed run, by name in the order of the plan."""

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
            failed, again = counted(len(self.failures), "run"), "it" if len(self.failures) == 1 else "them"
            print(f"saccade: {failed} failed; the same command tries {again} again", file=sys.stderr)
        return 1 if self.failures else 0


def run_sweep(
    plan: Plan,
    output: Path,
    stages: Path | None = None,
    only: Mapping[str, Sequence[Any]] | None = None,
    jobs: int = 1,
    any_commit: bool = False,
    console: Console | None = None,
    worker: str = WORKER,
) -> Outcome:
    """Check every run, write the plan, and make the runs that are missing.

    Args:
        stages: folder of stages that several sweeps share; by default inside `output`.
        only: labels and their values to make now; the plan still contains all runs.
        any_commit: reuse runs and stages of any commit and version.
        worker: the module that makes one run.

    Raises:
        SaccadeError: on bad values, or a folder with finished runs of another sweep, before any run starts.
    """
    chosen = choose(plan.runs, only or {})
    check_counts(jobs=jobs)
    check_runs(chosen)
    check_folder(plan, output)
    plan.write(output)
    return run_specs(chosen, output, stages, jobs, any_commit, console, worker)


def check_folder(plan: Plan, output: Path) -> None:
    """Refuse a folder with finished runs that the plan does not contain: its table would lose them. A plan may grow.

    Raises:
        SaccadeError: naming the first such run and their number.
    """
    if not (output / PLAN_FILE).is_file():
        return
    before = Plan.read(output)
    planned = {spec.name: spec.as_json() for spec in plan.runs}
    changed = [spec for spec in before.runs if planned.get(spec.name) != spec.as_json()]
    lost = [spec.name for spec in changed if read_result(output, spec) is not None]
    if lost:
        raise SaccadeError(
            f"output={str(output)!r} contains finished runs of another sweep ({before.command}), "
            f"such as {lost[0]}: give another output, or --only for a part of that sweep"
        )


def run_specs(
    specs: Sequence[RunSpec],
    output: Path,
    stages: Path | None = None,
    jobs: int = 1,
    any_commit: bool = False,
    console: Console | None = None,
    worker: str = WORKER,
) -> Outcome:
    """Make the runs that are missing in `output`, in order, and return all results.

    An existing run with the same spec, commit and package versions is reused, and so is a stage. An interrupted run
    starts again at the stage that was interrupted; a failing run does not stop the others. Ctrl-C raises a
    `KeyboardInterrupt` that says what is kept.

    Raises:
        SaccadeError: on several runs with one name, or another sweep running in the same folder.
    """
    names = [spec.name for spec in specs]
    repeated = [name for number, name in enumerate(names) if name in names[:number]]
    if repeated:
        raise SaccadeError(f"two runs are called {repeated[0]!r}: a value is given twice")
    stages = stages or output / STAGES
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    columns += (TextColumn("left"), TimeRemainingColumn())
    taken = f"another sweep is at work in {stages}: wait for it, or give another --output"
    with file_lock(stages / ".lock", taken), Progress(*columns, console=console or Console()) as progress:
        return _Runner(output / RUNS, stages, progress, any_commit, worker).run(list(specs), jobs)


def read_result(output: Path, spec: RunSpec) -> dict[str, Any] | None:
    """The content of a run's `result.json` if it exists and has exactly this spec, from any commit; else None."""
    found = read_record(output / RUNS / spec.name / RESULT_FILE)
    return found if found is not None and found.get("spec") == spec.as_json() else None


def read_failure(output: Path, spec: RunSpec) -> str | None:
    """Why a run failed the last time, or None."""
    return (read_record(output / RUNS / spec.name / ERROR_FILE) or {}).get("error")


def same_code(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether two environments have the same commit and package versions, so that runs can be reused."""
    return all(before.get(name) == now.get(name) for name in ("commit", "packages"))


def visible_gpus() -> list[str]:
    """The GPUs that this process sees, as `CUDA_VISIBLE_DEVICES` names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else list(map(str, range(torch.cuda.device_count())))


class _Runner:
    def __init__(self, folder: Path, stages: Path, progress: Progress, any_commit: bool, worker: str) -> None:
        self.folder, self.stages, self.progress = folder, stages, progress
        self.any_commit, self.worker = any_commit, worker
        self.gpus = visible_gpus()
        self.environment = environment()
        self.results: dict[str, dict[str, Any]] = {}
        self.failures: dict[str, str] = {}
        self.processes: set[subprocess.Popen] = set()
        self.stale: set[str] = set()
        """Stages that have read what has changed since, and were not trained again yet."""
        self.busy: set[str] = set()
        """Stages that are being trained."""
        self.stopped = False
        """Whether the runs under way were ended from here, and so did not fail."""
        self.changed = threading.Condition()

    def run(self, specs: list[RunSpec], jobs: int) -> Outcome:
        """Run what is missing, and return the outcome in the order of `specs`."""
        others = changed = 0
        self.pending = []
        # Once, since looking at the files of a large folder takes long.
        self.stale = {stage for spec in specs for stage in spec.stage_ids if self._has_read_other(stage)}
        for spec in specs:
            result = read_result(self.folder.parent, spec)
            if result is not None and not same_inputs(result):
                changed += 1
                self.pending.append(spec)
            elif result is not None and self._fits(result):
                self.results[spec.name] = result
                self.progress.console.print(f"{spec.name}: found, not trained again")
            else:
                self.pending.append(spec)
                others += result is not None
        if changed:
            self.progress.console.print(
                f"{changed} runs have read a data file or a model that has changed since, and are made again"
            )
        if others:
            self.progress.console.print(
                f"{others} runs are of another commit or other versions, and are made again: any_commit reuses them"
            )
        self.whole = self.progress.add_task("all runs", total=len(specs), completed=len(self.results))
        with ThreadPoolExecutor(jobs) as pool:
            try:
                for worker in as_completed([pool.submit(self._work, job) for job in range(jobs)]):
                    worker.result()
            except BaseException as error:
                with self.changed:
                    self.stopped = True
                    self.pending.clear()
                    self.changed.notify_all()
                for process in list(self.processes):
                    process.kill()
                if isinstance(error, KeyboardInterrupt):
                    raise KeyboardInterrupt(self._kept(specs)) from error
                raise
        order = [spec.name for spec in specs]
        return Outcome(
            {name: self.results[name] for name in order if name in self.results},
            {name: self.failures[name] for name in order if name in self.failures},
        )

    def _kept(self, specs: list[RunSpec]) -> str:
        """What an interruption leaves."""
        planned = list(dict.fromkeys(stage for spec in specs for stage in spec.stage_ids))
        stages = sum(self._has(stage) for stage in planned)
        return (
            f"{len(self.results)} of {len(specs)} runs and {stages} of their {len(planned)} trained stages are kept "
            f"in {self.folder.parent}; the same command makes the rest"
        )

    def _fits(self, record: dict[str, Any]) -> bool:
        return self.any_commit or same_code(record.get("environment", {}), self.environment)

    def _has(self, stage: str, file: str = RESULT_FILE) -> bool:
        found = read_record(self.stages / stage / file)
        return stage not in self.stale and found is not None and self._fits(found)

    def _has_read_other(self, stage: str) -> bool:
        """Whether a stage that is there has read a data file or a model that has changed since."""
        found = read_record(self.stages / stage / RESULT_FILE) or read_record(self.stages / stage / SPEC_FILE)
        return found is not None and not stage_inputs_are_as_before(found.get("values", {}), found)

    def _work(self, job: int) -> None:
        """Body of each thread: make the first run that can start, then the next, until none are left."""
        # A run is one process, which trains on one GPU.
        gpu = self.gpus[job % len(self.gpus)] if len(self.gpus) > 1 else None
        while (taken := self._take()) is not None:
            try:
                self._make(*taken, gpu)
            finally:
                with self.changed:
                    self.busy -= taken[1]
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

    def _make(self, spec: RunSpec, missing: set[str], gpu: str | None) -> None:
        folder = self.folder / spec.name
        shutil.rmtree(folder, ignore_errors=True)
        for stage in missing:
            # An unfinished stage made by this code may resume from its checkpoints; one made by other code goes.
            if (self.stages / stage / RESULT_FILE).is_file() or not self._has(stage, SPEC_FILE):
                shutil.rmtree(self.stages / stage, ignore_errors=True)
        with self.changed:
            self.stale -= missing
        write_json_atomically(folder / SPEC_FILE, spec.as_json())
        task = self.progress.add_task(spec.name, total=None)
        try:
            said = self._run(spec, folder, task, gpu)
        finally:
            self.progress.remove_task(task)
            self.progress.advance(self.whole)
        if said is not None:
            if self.stopped:
                return
            self.failures[spec.name] = said
            write_json_atomically(folder / ERROR_FILE, {"error": said})
        else:
            result = self.results[spec.name] = json.loads((folder / RESULT_FILE).read_text())
            seconds = [result["stages"][stage.partition("-")[0]]["seconds"] for stage in missing]
            said = f"{spec.name}: " + (f"trained in {sum(seconds):.0f} s" if seconds else "stages found")
            full = [entry["accuracy"] for entry in result["evaluations"] if entry["inference"] == "full"]
            said += f", accuracy {100 * full[0]:.1f} %" if full else ""
        self.progress.console.print(said)

    def _run(self, spec: RunSpec, folder: Path, task: TaskID, gpu: str | None) -> str | None:
        """Run one spec in a separate process; return None, or one line on why it failed."""
        log = folder / LOG_FILE
        variables = {**os.environ, "OMP_NUM_THREADS": str(spec.threads), "TOKENIZERS_PARALLELISM": "false"}
        if gpu is not None:
            variables["CUDA_VISIBLE_DEVICES"] = gpu
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
                # A Ctrl-C in the terminal is for the sweep, which then ends its runs.
                process_group=0,
            )
            self.processes.add(process)
            if self.stopped:
                # It began while the others were being ended.
                process.kill()
            for line in process.stdout:
                words = line.split()
                if len(words) == 4 and words[0] == "progress":
                    done = {"completed": int(words[2]), "total": int(words[3])}
                    self.progress.update(task, description=f"{spec.name}, {words[1]}", **done)
            status = process.wait()
            process.stdin.close()
            self.processes.remove(process)
        if status:
            last = [line for line in log.read_text().splitlines() if line.strip()][-1:]
            return f"the run {spec.name} ended with status {status}: {' '.join(last)} (see {log})"
        return None
