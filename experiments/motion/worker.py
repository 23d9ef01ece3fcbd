"""One run on clips in a separate process: training and an evaluation."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

from saccade.evaluation import Inference, evaluate_inferences
from saccade.evaluation.rows import file_rows, trained_sampling
from saccade.sweeps import RunSpec
from saccade.sweeps.spec import Evaluation
from saccade.sweeps.worker import main, run_one, tell
from saccade.training import ModelOptions, load_model


def run_motion(spec: RunSpec, stages: Path) -> dict[str, Any]:
    """Train what is missing of a run, evaluate it on the clips that its spec names, and return the result.

    Raises:
        SaccadeError: if SIGTERM ended the training.
    """
    return run_one(spec, stages, evaluate=partial(evaluate_clips, spec.extra["evaluated"]))


def evaluate_clips(path: str, evaluation: Evaluation, folder: Path, recipe: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry for each way to run the model.

    Args:
        path: the file of the clips.
        folder: of the trained model.
        recipe: of its training.
    """
    inferences = [Inference.of_run(folder=folder, **fields) for fields in evaluation.inferences]
    model, processor = load_model(ModelOptions(model=str(folder)))
    rows = file_rows(path, sampling=trained_sampling(folder))
    return evaluate_inferences(model, processor, rows, inferences, on_batch=partial(tell, "evaluate"))


if __name__ == "__main__":
    sys.exit(main(run_motion))
