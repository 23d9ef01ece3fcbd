"""One run on the testbed in a separate process: both stages, and an evaluation task by task."""

import hashlib
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from experiments.smol.rows import asked_file, read_rows
from experiments.smol.tasks import TASKS
from experiments.smol.tasks.base import PATCH
from saccade.evaluation import Inference, evaluate_inferences
from saccade.files import to_json, write_json_atomically
from saccade.sweeps import RunSpec
from saccade.sweeps.spec import Evaluation
from saccade.sweeps.worker import TIMES_FILE, main, read_record, run_one, tell
from saccade.training import ModelOptions, load_to_run

BATCH = 20


def run_smol(spec: RunSpec, stages: Path) -> dict[str, Any]:
    """Train what is missing of a run, evaluate it on every task, with its checkpoints if the run has any to ask, and
    return the result.

    Raises:
        SaccadeError: if SIGTERM ended the training of a stage.
    """
    result = run_one(spec, stages, evaluate=evaluate_tasks)
    return {**result, "checkpoints": ask_checkpoints(spec, stages, result)} if spec.extra else result


def ask_checkpoints(spec: RunSpec, stages: Path, result: dict[str, Any]) -> list[dict[str, Any]]:
    """The checkpoints of a run's last stage in order: `step`, the `cpu_seconds` and `seconds` of the stage up to it,
    and `accuracy` and `accuracy_by_task` from all tokens.

    Args:
        result: of the run, whose model is the last checkpoint.
    """
    recipe = spec.recipes(stages)[-1]
    folder, every = Path(recipe["output_dir"]), recipe["save_steps"]
    times = {int(step): spent for step, spent in (read_record(folder / TIMES_FILE) or {}).items()}
    full = replace(spec.evaluation, inferences=({"name": "full"},))
    found, last = [], max(times)
    for step in sorted(times):
        if step == last:
            entry = next(entry for entry in result["evaluations"] if entry["inference"] == "full")
        elif step % every == 0:
            (entry,) = evaluate_tasks(full, folder / f"{PREFIX_CHECKPOINT_DIR}-{step}", recipe)
        else:
            # Saved because the run was asked to stop.
            continue
        cpu_seconds, seconds = times[step]
        told = {name: entry[name] for name in ("accuracy", "accuracy_by_task")}
        found.append({"step": step, "cpu_seconds": cpu_seconds, "seconds": seconds, **told})
    return found


def evaluate_tasks(evaluation: Evaluation, folder: Path, recipe: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry for each way to run the model, over the tasks that it was trained on alike, as `merge_tasks` makes it.

    The results of a task are kept in the model's folder, so that an interrupted evaluation resumes from the next task.

    Args:
        evaluation: `scenes` is the number of questions of each task.
        folder: of the trained model.
        recipe: of its last stage, whose data lie where the questions are kept.
    """
    inferences = [Inference.of_run(folder=folder, **fields) for fields in evaluation.inferences]
    digest = hashlib.sha256(to_json(evaluation.inferences).encode()).hexdigest()[:12]
    files = [Path(file) for file in recipe["dataset"]]
    data, tasks = files[0].parent, [task for task in TASKS if any(file.name.startswith(f"{task}-") for file in files)]
    found, model, processor = {}, None, None
    for number, task in enumerate(tasks):
        file = folder / "evaluations" / f"{task}-{evaluation.split}-{evaluation.scenes}-{digest}.json"
        if not file.is_file():
            if model is None:
                options = ModelOptions(model=str(folder), dtype="bfloat16" if recipe["bf16"] else "auto")
                model, processor = load_to_run(options, on_cpu=bool(recipe.get("use_cpu")))
            grid = model.config.vision_config.image_size // PATCH
            rows = read_rows([asked_file(data, task, evaluation.split, evaluation.scenes, grid)])
            told = partial(_tell, number, len(tasks))
            entries = evaluate_inferences(model, processor, rows, inferences, BATCH, told)
            write_json_atomically(file, entries)
        found[task] = json.loads(file.read_text())
    return merge_tasks(found)


def merge_tasks(found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The evaluations of all tasks as one for each way to run the model: `accuracy` is the mean over the tasks,
    `accuracy_by_task` has each, and so have `mean_prompt_length` and `prefill_flops` their means.

    Args:
        found: what `evaluate_inferences` returned, by task.
    """
    merged = []
    for entries in zip(*found.values(), strict=True):
        by_task = {task: entry["accuracy"] for task, entry in zip(found, entries, strict=True)}
        merged.append(
            {
                **entries[0],
                "accuracy": mean(by_task.values()),
                "accuracy_by_task": by_task,
                "accuracy_by_kind": {
                    kind: share for entry in entries for kind, share in entry["accuracy_by_kind"].items()
                },
                "samples": sum(entry["samples"] for entry in entries),
                **{name: mean(entry[name] for entry in entries) for name in ("mean_prompt_length", "prefill_flops")},
            }
        )
    return merged


def _tell(number: int, tasks: int, done: int, total: int) -> None:
    tell("evaluate", number * total + done, tasks * total)


if __name__ == "__main__":
    sys.exit(main(run_smol))
