"""One run of a sweep in a process of its own: `python -m saccade.sweeps.worker FOLDER STAGES`.

Reads the spec in FOLDER, trains the stages that STAGES does not hold yet, evaluates, and writes `result.json` last.
Prints a line `progress STAGE DONE TOTAL` for each bit of progress. Ends when its standard input does, so that it never
outlives the sweep that started it.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bars
from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging

from saccade.data import digit_scenes
from saccade.errors import SaccadeError
from saccade.evaluation import Inference, evaluate_inferences
from saccade.files import write_json_atomically
from saccade.report.environment import environment
from saccade.sweeps.checkpoints import CheckpointSaver, evaluate_checkpoints
from saccade.sweeps.spec import STAGES, Evaluation, RunSpec, stage_names
from saccade.training import ModelOptions, load_model, make_recipe, train_recipe

SPEC_FILE = "spec.json"
RESULT_FILE = "result.json"


class _Progress(TrainerCallback):
    def __init__(self, stage: str) -> None:
        self.stage = stage

    def on_step_end(self, args, state, control, **kwargs):
        _tell(self.stage, state.global_step, state.max_steps)


def run_one(spec: RunSpec, stages: Path) -> dict[str, Any]:
    """Train what is missing of a run, evaluate, and return the result.

    Args:
        stages: the folder that holds the stages of all runs.

    Raises:
        SaccadeError: if SIGTERM ended the training of a stage.
    """
    results = {}
    for name, values, recipe in zip(stage_names(spec.stages), spec.stages, spec.recipes(stages), strict=True):
        folder = Path(recipe["output_dir"])
        checkpoints = spec.checkpoints if name == STAGES[-1] else 0
        if not (folder / RESULT_FILE).is_file():
            write_json_atomically(folder / RESULT_FILE, _train(name, values, recipe, checkpoints))
        results[name] = json.loads((folder / RESULT_FILE).read_text())
        # The record of a stage is the stage's own; the run keeps what tables and plots read.
        for key in ("values", "environment", "checkpoints"):
            results[name].pop(key, None)
    return {
        "spec": spec.as_json(),
        "environment": environment(),
        "finished": date.today().isoformat(),
        "model": str(folder),
        "stages": results,
        "evaluations": _evaluate(spec.evaluation, folder, recipe) if spec.evaluation else [],
        **({"checkpoints": _evaluate_checkpoints(spec.evaluation, folder, recipe)} if checkpoints else {}),
    }


def _train(stage: str, values: dict[str, Any], recipe: dict[str, Any], checkpoints: int) -> dict[str, Any]:
    found = environment()
    write_json_atomically(Path(recipe["output_dir"]) / SPEC_FILE, {"values": values, "environment": found})
    saver = CheckpointSaver(checkpoints)
    callbacks: list[TrainerCallback] = [_Progress(stage)]
    if checkpoints:
        callbacks.append(saver)
        # Such a stage never goes on from a checkpoint: the times of what came before are not in it.
        recipe = {**recipe, "save_only_model": True}
    # A stage is trained where it has no result yet: what lies in its folder is of an attempt that was broken off.
    recipe = {**recipe, "overwrite": True}
    started = time.process_time()
    trainer = train_recipe(make_recipe(recipe, source=f"stage {stage}"), callbacks=callbacks)
    cpu_seconds = time.process_time() - started
    if trainer.sigterm.stopped:
        state = trainer.state
        raise SaccadeError(
            f"stage {stage} was asked to stop after step {state.global_step} of {state.max_steps}: "
            "run the same command again"
        )
    args, history = trainer.args, trainer.state.log_history
    rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    saving_cpu, saving = map(float, saver.saving)
    return {
        "values": values,
        "environment": found,
        "seconds": history[-1]["train_runtime"] - saving,
        "cpu_seconds": cpu_seconds - saving_cpu,
        "samples": trainer.state.global_step * rows,
        "tokens": {name: float(value) for name, value in trainer.meter.tokens.items()},
        "step_seconds": trainer.meter.step_seconds,
        "step_speedup": trainer.meter.time_speedup(),
        "log_history": history,
        **({"checkpoints": saver.saved} if checkpoints else {}),
    }


def _evaluate(evaluation: Evaluation, folder: Path, recipe: dict[str, Any]) -> list[dict[str, Any]]:
    inferences = [Inference.of_run(folder=folder, **fields) for fields in evaluation.inferences]
    return _evaluate_model(folder, recipe, inferences, evaluation.split, evaluation.scenes, partial(_tell, "evaluate"))


def _evaluate_checkpoints(evaluation: Evaluation, folder: Path, recipe: dict[str, Any]) -> list[dict[str, Any]]:
    """On all tokens, in the record of the stage, which is returned; then the checkpoints are removed."""
    record = json.loads((folder / RESULT_FILE).read_text())

    def evaluate(checkpoint: Path, number: int) -> dict[str, Any]:
        def tell(done: int, total: int) -> None:
            _tell("checkpoints", number * total + done, evaluation.checkpoints * total)

        scenes = evaluation.checkpoint_scenes
        (entry,) = _evaluate_model(checkpoint, recipe, [Inference("full")], evaluation.split, scenes, tell)
        return {name: entry[name] for name in ("accuracy", "accuracy_by_kind", "samples")}

    evaluate_checkpoints(
        record["checkpoints"], folder, evaluate, keep=lambda: write_json_atomically(folder / RESULT_FILE, record)
    )
    return record["checkpoints"]


def _evaluate_model(
    folder: Path,
    recipe: dict[str, Any],
    inferences: list[Inference],
    split: str,
    number: int,
    on_batch: Callable[[int, int], None],
) -> list[dict[str, Any]]:
    # From its folder, trained just now or long ago: what is evaluated is what was saved.
    model, processor = load_model(ModelOptions(model=str(folder), dtype=recipe.get("dtype", "auto")))
    if torch.cuda.is_available() and not recipe.get("use_cpu"):
        model.to("cuda")
    scenes = digit_scenes("sft", split, number, seed=0, grid=recipe.get("dataset_grid", ModelOptions.dataset_grid))
    return evaluate_inferences(model, processor, scenes, inferences, on_batch=on_batch)


def _tell(stage: str, done: int, total: int) -> None:
    print(f"progress {stage} {done} {total}", flush=True)


def _end_with_parent() -> None:
    # Unbuffered: a thread that waits inside a buffered reader aborts the interpreter when it ends.
    while os.read(0, 1):
        pass
    os._exit(1)


def main() -> int:
    """Entry point: the run's folder and the folder of stages are the arguments."""
    folder, stages = map(Path, sys.argv[1:])
    threading.Thread(target=_end_with_parent, daemon=True).start()
    spec = RunSpec.from_json(json.loads((folder / SPEC_FILE).read_text()))
    torch.set_num_threads(spec.threads)
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    write_json_atomically(folder / RESULT_FILE, run_one(spec, stages))
    return 0


if __name__ == "__main__":
    sys.exit(main())
