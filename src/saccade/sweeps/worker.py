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
from datetime import date
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bars
from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging

from saccade.data import digit_scenes
from saccade.evaluation import Inference, evaluate_inferences
from saccade.files import write_json_atomically
from saccade.report.environment import environment
from saccade.sweeps.spec import Evaluation, RunSpec, stage_names
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
    """
    results = {}
    for name, values, recipe in zip(stage_names(spec.stages), spec.stages, spec.recipes(stages), strict=True):
        folder = Path(recipe["output_dir"])
        if not (folder / RESULT_FILE).is_file():
            write_json_atomically(folder / RESULT_FILE, _train(name, values, recipe))
        results[name] = json.loads((folder / RESULT_FILE).read_text())
        # The record of a stage is the stage's own; the run keeps what tables and plots read.
        del results[name]["values"], results[name]["environment"]
    return {
        "spec": spec.as_json(),
        "environment": environment(),
        "finished": date.today().isoformat(),
        "model": str(folder),
        "stages": results,
        "evaluations": _evaluate(spec.evaluation, folder, recipe) if spec.evaluation else [],
    }


def _train(stage: str, values: dict[str, Any], recipe: dict[str, Any]) -> dict[str, Any]:
    found = environment()
    write_json_atomically(Path(recipe["output_dir"]) / SPEC_FILE, {"values": values, "environment": found})
    started = time.process_time()
    trainer = train_recipe(make_recipe(recipe, source=f"stage {stage}"), callbacks=[_Progress(stage)])
    cpu_seconds = time.process_time() - started
    args, history = trainer.args, trainer.state.log_history
    rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return {
        "values": values,
        "environment": found,
        "seconds": history[-1]["train_runtime"],
        "cpu_seconds": cpu_seconds,
        "samples": trainer.state.global_step * rows,
        "tokens": {name: float(value) for name, value in trainer.meter.tokens.items()},
        "step_seconds": trainer.meter.step_seconds,
        "step_speedup": trainer.meter.time_speedup(),
        "log_history": history,
    }


def _evaluate(evaluation: Evaluation, folder: Path, recipe: dict[str, Any]) -> list[dict[str, Any]]:
    # From its folder, trained just now or long ago: what is evaluated is what was saved.
    model, processor = load_model(ModelOptions(model=str(folder), dtype=recipe.get("dtype", "auto")))
    if torch.cuda.is_available() and not recipe.get("use_cpu"):
        model.to("cuda")
    inferences = [Inference.of_run(folder=folder, **fields) for fields in evaluation.inferences]
    scenes = digit_scenes(
        "sft", evaluation.split, evaluation.scenes, seed=0, grid=recipe.get("dataset_grid", ModelOptions.dataset_grid)
    )
    return evaluate_inferences(
        model, processor, scenes, inferences, on_batch=lambda done, total: _tell("evaluate", done, total)
    )


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
