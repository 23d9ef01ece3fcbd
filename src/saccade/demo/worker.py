"""One run of the demo in a process of its own: `python -m saccade.demo.worker FOLDER`, with the spec in FOLDER.

Prints a line `progress STAGE DONE TOTAL` for each bit of progress, and writes `result.json` last.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bars
from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging

from saccade.data import digit_scenes
from saccade.demo.plan import RunSpec
from saccade.evaluation import Inference, evaluate_digits
from saccade.files import write_json_atomically
from saccade.pruning import ISOLATOR_FILE
from saccade.report.environment import environment
from saccade.training import make_recipe, train_recipe

SPEC_FILE = "spec.json"
RESULT_FILE = "result.json"


class _Progress(TrainerCallback):
    def __init__(self, stage: str) -> None:
        self.stage = stage

    def on_step_end(self, args, state, control, **kwargs):
        _tell(self.stage, state.global_step, state.max_steps)


def run_one(spec: RunSpec, folder: Path) -> dict[str, Any]:
    """Train both stages, evaluate, and return the result."""
    stages = {}
    for stage in ("pretrain", "sft"):
        trainer = train_recipe(make_recipe(spec.recipe(stage, folder)), callbacks=[_Progress(stage)])
        history = trainer.state.log_history
        stages[stage] = {
            "seconds": history[-1]["train_runtime"],
            "tokens": {name: float(value) for name, value in trainer.meter.tokens.items()},
            "step_seconds": trainer.meter.step_seconds,
            "step_speedup": trainer.meter.time_speedup(),
            "log_history": history,
        }
    samples = digit_scenes("sft", spec.settings.split, spec.settings.test_scenes, seed=0)
    return {
        "spec": spec.as_json(),
        "environment": environment(),
        "stages": stages,
        "evaluations": _evaluate(spec, trainer.model, trainer.processing_class, samples, folder),
    }


def _evaluate(spec: RunSpec, model, processor, samples, folder: Path) -> dict[str, Any]:
    settings = spec.settings
    common = {"reducer": settings.reducer, "prune_ratio": settings.prune_ratio, "positions": spec.positions}
    inferences = [Inference(), Inference("pruned", **common)]
    if (folder / "sft" / ISOLATOR_FILE).is_file():
        inferences.append(Inference("pruned_isolator", **common, isolator=folder / "sft"))
    results = {}
    for number, inference in enumerate(inferences, start=1):
        results[inference.name] = evaluate_digits(model, processor, samples, inference)
        _tell("evaluate", number, len(inferences))
    return results


def _tell(stage: str, done: int, total: int) -> None:
    print(f"progress {stage} {done} {total}", flush=True)


def main() -> int:
    """Entry point: the run's folder is the only argument."""
    folder = Path(sys.argv[1])
    spec = RunSpec.from_json(json.loads((folder / SPEC_FILE).read_text()))
    torch.set_num_threads(spec.settings.threads)
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    write_json_atomically(folder / RESULT_FILE, run_one(spec, folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
