"""One run on clips in a separate process: training and an evaluation."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

from experiments.motion.rows import clips_path
from saccade.evaluation import Inference, evaluate_inferences
from saccade.evaluation.rows import file_rows, trained_sampling
from saccade.sweeps import RunSpec
from saccade.sweeps.spec import Evaluation
from saccade.sweeps.worker import main, run_one, tell
from saccade.training import ModelOptions, load_to_run


def run_motion(spec: RunSpec, stages: Path) -> dict[str, Any]:
    """Train what is missing of a run, evaluate it on the clips beside `stages`, and return the result.

    Raises:
        SaccadeError: if SIGTERM ended the training.
    """
    return run_one(spec, stages, evaluate=partial(evaluate_clips, stages.parent))


def evaluate_clips(output: Path, evaluation: Evaluation, folder: Path, recipe: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry for each way to run the model.

    Args:
        output: where the clips are.
        folder: of the trained model.
        recipe: of its training.
    """
    inferences = [Inference.of_run(folder=folder, **fields) for fields in evaluation.inferences]
    model, processor = load_to_run(ModelOptions(model=str(folder)))
    path = clips_path(output, evaluation.split, evaluation.scenes, recipe["video_frames"])
    rows = file_rows(str(path), sampling=trained_sampling(folder))
    return evaluate_inferences(model, processor, rows, inferences, on_batch=partial(tell, "evaluate"))


if __name__ == "__main__":
    sys.exit(main(run_motion))
