"""One run of a study in a separate process, with checkpoints if the study has any."""

import json
import sys
from pathlib import Path
from typing import Any

from experiments.studies.checkpoints import CheckpointSaver, evaluate_checkpoints
from saccade.files import write_json_atomically
from saccade.sweeps import RunSpec
from saccade.sweeps.spec import STAGES, Evaluation
from saccade.sweeps.worker import RESULT_FILE, evaluate_scenes, main, run_one, tell, train_stage


def run_study(spec: RunSpec, stages: Path) -> dict[str, Any]:
    """Train the missing stages of a run, evaluate its checkpoints on all tokens, and return the result.

    Raises:
        SaccadeError: if SIGTERM ended the training of a stage.
    """
    if not spec.extra:
        return run_one(spec, stages)
    saver = CheckpointSaver(spec.extra["checkpoints"])

    def train(stage: str, values: dict[str, Any], recipe: dict[str, Any]) -> dict[str, Any]:
        if stage != STAGES[-1]:
            return train_stage(stage, values, recipe)
        # Such a stage never goes on from a checkpoint: the times of what came before are not in it.
        result = train_stage(stage, values, {**recipe, "save_only_model": True}, [saver])
        cpu_seconds, seconds = map(float, saver.saving)
        result["cpu_seconds"] -= cpu_seconds
        result["seconds"] -= seconds
        return {**result, "checkpoints": saver.saved}

    result = run_one(spec, stages, train)
    del result["stages"][STAGES[-1]]["checkpoints"]
    return {**result, "checkpoints": _evaluate(spec, stages)}


def _evaluate(spec: RunSpec, stages: Path) -> list[dict[str, Any]]:
    """The checkpoints in the record of the last stage, with their accuracies; then they are removed."""
    recipe, extra = spec.recipes(stages)[-1], spec.extra
    folder = Path(recipe["output_dir"])
    record = json.loads((folder / RESULT_FILE).read_text())

    full = Evaluation(({"name": "full"},), extra["split"], extra["scenes"])

    def evaluate(checkpoint: Path, number: int) -> dict[str, Any]:
        def on_batch(done: int, total: int) -> None:
            tell("checkpoints", number * total + done, extra["checkpoints"] * total)

        (entry,) = evaluate_scenes(full, checkpoint, recipe, on_batch)
        return {name: entry[name] for name in ("accuracy", "accuracy_by_kind", "samples")}

    evaluate_checkpoints(
        record["checkpoints"], folder, evaluate, keep=lambda: write_json_atomically(folder / RESULT_FILE, record)
    )
    return record["checkpoints"]


if __name__ == "__main__":
    sys.exit(main(run_study))
