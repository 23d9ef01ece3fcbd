"""One run of a sweep in a separate process: `python -m saccade.sweeps.worker FOLDER STAGES`.

Reads the spec in FOLDER, trains the stages that are missing in STAGES, evaluates, and writes `result.json` last.
Prints a line `progress STAGE DONE TOTAL` at each step. Ends when its standard input closes, so that it never outlives
the sweep that started it.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bars
from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging

from saccade.data import digit_scenes
from saccade.dualspeed.checkpoint import newest_checkpoint, step_of
from saccade.errors import SaccadeError
from saccade.evaluation import Inference, evaluate_inferences
from saccade.files import write_json_atomically
from saccade.report.environment import environment
from saccade.sweeps.inputs import inputs_of
from saccade.sweeps.spec import Evaluation, RunSpec, stage_names
from saccade.training import ModelOptions, load_to_run, make_recipe, train_recipe

SPEC_FILE = "spec.json"
RESULT_FILE = "result.json"
TIMES_FILE = "times.json"
"""In a stage's folder: by the step of each checkpoint, the CPU seconds and the seconds of training up to it."""


def process_clock() -> tuple[float, float]:
    """CPU seconds of this process, and seconds of the clock on the wall."""
    return time.process_time(), time.perf_counter()


class TrainingClock(TrainerCallback):
    """Tells the sweep of each step of a stage, and times its training over all the processes that it takes, without
    what was lost after a checkpoint."""

    def __init__(
        self, folder: Path, now: Callable[[], tuple[float, float]] = process_clock, stage: str = "training"
    ) -> None:
        self._file, self._now, self._stage = folder / TIMES_FILE, now, stage
        self._times: dict[str, list[float]] = {}
        self.spent = (0.0, 0.0)
        """CPU seconds and seconds, when training has ended."""

    def on_train_begin(self, args, state, control, **kwargs):
        self._before = self.spent
        if state.global_step:
            times = read_record(self._file) or {}
            self._before = tuple(times.get(str(state.global_step), self._before))
            self._times = {step: spent for step, spent in times.items() if int(step) <= state.global_step}
        self._started = self._now()

    def on_step_end(self, args, state, control, **kwargs):
        tell(self._stage, state.global_step, state.max_steps)
        if control.should_save:
            # A process that is killed after the checkpoint and before `on_save` has told its times all the same.
            self._note(state)

    def on_save(self, args, state, control, **kwargs):
        self._note(state)

    def _note(self, state) -> None:
        self._times[str(state.global_step)] = list(self._elapsed())
        write_json_atomically(self._file, self._times)

    def on_train_end(self, args, state, control, **kwargs):
        self.spent = self._elapsed()

    def _elapsed(self) -> tuple[float, ...]:
        clocks = zip(self._before, self._now(), self._started, strict=True)
        return tuple(before + now - start for before, now, start in clocks)


def run_one(
    spec: RunSpec,
    stages: Path,
    train: Callable[..., dict[str, Any]] | None = None,
    evaluate: Callable[[Evaluation, Path, dict[str, Any]], list[dict[str, Any]]] | None = None,
) -> dict[str, Any]:
    """Train what is missing of a run, evaluate, and return the result.

    Args:
        stages: the folder of the stages of all runs.
        train: takes the place of `train_stage`.
        evaluate: takes the place of `evaluate_scenes`.

    Raises:
        SaccadeError: if SIGTERM ended the training of a stage.
    """
    results = {}
    for name, values, recipe in zip(stage_names(spec.stages), spec.stages, spec.recipes(stages), strict=True):
        folder = Path(recipe["output_dir"])
        if not (folder / RESULT_FILE).is_file():
            write_json_atomically(folder / RESULT_FILE, (train or train_stage)(name, values, recipe))
        results[name] = json.loads((folder / RESULT_FILE).read_text())
        # These are in the stage's own record; the run keeps only what tables and plots read.
        for key in ("values", "environment"):
            results[name].pop(key, None)
    return {
        "spec": spec.as_json(),
        "environment": environment(),
        "finished": date.today().isoformat(),
        "model": str(folder),
        "stages": results,
        "evaluations": (evaluate or evaluate_scenes)(spec.evaluation, folder, recipe) if spec.evaluation else [],
    }


def train_stage(
    stage: str, values: dict[str, Any], recipe: dict[str, Any], callbacks: Sequence[TrainerCallback] = ()
) -> dict[str, Any]:
    """Train a stage, and return the content of its `result.json`.

    Args:
        values: its fields, for the record.
        recipe: the whole recipe.

    Raises:
        SaccadeError: if SIGTERM ended it.
    """
    record = {"values": values, "environment": environment(), "inputs": inputs_of(values)}
    write_json_atomically(Path(recipe["output_dir"]) / SPEC_FILE, record)
    clock = TrainingClock(Path(recipe["output_dir"]), stage=stage)
    made = make_recipe(_resuming(recipe), source=f"stage {stage}")
    trainer = train_recipe(made, callbacks=[clock, *callbacks])
    cpu_seconds, seconds = clock.spent
    if trainer.sigterm.stopped:
        state = trainer.state
        raise SaccadeError(
            f"stage {stage} was asked to stop after step {state.global_step} of {state.max_steps}: "
            "run the same command again"
        )
    return {
        **record,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "samples": trainer.meter.samples,
        "tokens": {name: float(value) for name, value in trainer.meter.tokens.items()},
        "step_seconds": trainer.meter.step_seconds,
        "step_speedup": trainer.meter.time_speedup(),
        "log_history": trainer.state.log_history,
    }


def read_record(path: Path) -> dict[str, Any] | None:
    """What a run or a stage left in a JSON file; a damaged one counts as missing, and what it was of is made again."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _resuming(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe of a stage that has no result yet: it resumes from its newest checkpoint if its recipe asks for that,
    there is a complete one, and what it took is known; otherwise it replaces what an interrupted attempt left in its
    folder."""
    newest = newest_checkpoint(recipe["output_dir"]) if recipe.get("resume") else None
    times = read_record(Path(recipe["output_dir"]) / TIMES_FILE) or {}
    if newest is not None and str(step_of(newest)) in times:
        return recipe
    return {**{name: value for name, value in recipe.items() if name != "resume"}, "overwrite": True}


def evaluate_scenes(
    evaluation: Evaluation, folder: Path, recipe: dict[str, Any], on_batch: Callable[[int, int], None] | None = None
) -> list[dict[str, Any]]:
    """What `evaluate_inferences` finds for the model in a folder on digit scenes.

    Args:
        recipe: of its last stage.
        on_batch: called with the number of batches done and their total; by default it tells the sweep.
    """
    inferences = [Inference.of_run(folder=folder, **fields) for fields in evaluation.inferences]
    # Loaded from its folder even if just trained, so that what was saved is evaluated.
    options = ModelOptions(model=str(folder), dtype=recipe.get("dtype", "auto"))
    model, processor = load_to_run(options, on_cpu=bool(recipe.get("use_cpu")))
    scenes = digit_scenes("sft", evaluation.split, evaluation.scenes, seed=0)
    told = on_batch or partial(tell, "evaluate")
    return evaluate_inferences(model, processor, scenes, inferences, on_batch=told)


def tell(stage: str, done: int, total: int) -> None:
    """Print a line of progress, for the sweep that started this process."""
    print(f"progress {stage} {done} {total}", flush=True)


def _end_with_parent() -> None:
    # Unbuffered: a thread that waits inside a buffered reader aborts the interpreter when it ends.
    while os.read(0, 1):
        pass
    os._exit(1)


def main(run: Callable[[RunSpec, Path], dict[str, Any]] = run_one) -> int:
    """Entry point: the run's folder and the folder of stages are the arguments; `run` makes the result."""
    folder, stages = map(Path, sys.argv[1:])
    threading.Thread(target=_end_with_parent, daemon=True).start()
    spec = RunSpec.from_json(json.loads((folder / SPEC_FILE).read_text()))
    torch.set_num_threads(spec.threads)
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    write_json_atomically(folder / RESULT_FILE, run(spec, stages))
    return 0


if __name__ == "__main__":
    sys.exit(main())
