"""Clips of digits that move: training on all tokens, on kept ones alone, and with DualSpeed.

make .venv-video/.installed                                    the stock processors of clips need torchvision
.venv-video/bin/python -m experiments.motion --seeds 3 --output out/motion
.venv-video/bin/python -m experiments.motion --output out/motion --table            what is done so far

The same command resumes after a kill, at the run at which it was.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from datasets import disable_progress_bars
from rich.console import Console
from transformers.utils import logging

from experiments.arguments import add_study_arguments, given_settings
from experiments.motion.clips import motion_clips
from experiments.motion.model import save_motion_model
from experiments.motion.rows import clips_path, write_clips
from saccade.cli.main import Parser, guarded
from saccade.errors import SaccadeError
from saccade.sweeps import RunSpec
from saccade.sweeps.digits import METHODS, method_fields, stage_fields
from saccade.sweeps.plan import Plan, make_plan
from saccade.sweeps.runner import run_sweep
from saccade.sweeps.spec import Evaluation, standard_inferences
from saccade.sweeps.table import Standing
from saccade.values import check_counts


@dataclass(frozen=True)
class Settings:
    """The numbers that all runs share.

    Args:
        frames: frames of a clip, of 9 tokens each.
        steps: steps of training, of projector and language model.
        batch_size: clips per step.
        learning_rate: the highest of the language model.
        pretrain_learning_rate: the highest of the projector, which starts at random.
        reducer: method that chooses the tokens of a clip, with one budget for all its frames.
        prune_ratio: p.
        slow_probability: r.
        isolator_length: l.
        clips: clips in the evaluation.
        split: of the evaluation; settings are tuned on "validation".
        threads: compute threads per run.

    Raises:
        SaccadeError: on an unknown split, or a number that is too small.
    """

    frames: int = 8
    steps: int = 2000
    batch_size: int = 16
    learning_rate: float = 2e-3
    pretrain_learning_rate: float = 3e-3
    reducer: str = "changes"
    prune_ratio: float = 0.9
    slow_probability: float = 0.1
    isolator_length: int = 4
    clips: int = 1000
    split: str = "test"
    threads: int = 1

    def __post_init__(self) -> None:
        # Refuses a number of frames in which digits cannot move.
        motion_clips(self.split, 0, frames=self.frames)
        names = ("steps", "batch_size", "clips", "threads")
        check_counts(**{name: getattr(self, name) for name in names})

    @property
    def files(self) -> tuple[tuple[str, int, int], tuple[str, int, int]]:
        """Split, number and frames of the clips to train on, and of those to evaluate on."""
        return ("train", self.steps * self.batch_size, self.frames), (self.split, self.clips, self.frames)


def plan_runs(output: Path, settings: Settings, methods: Sequence[str], seeds: Sequence[int]) -> list[RunSpec]:
    """The training and the evaluation of each method and seed, seed by seed.

    Args:
        output: where model and clips are.
        methods: keys of `saccade.sweeps.METHODS`.

    Raises:
        SaccadeError: on an unknown method.
    """
    train = str(clips_path(output, *settings.files[0]))
    runs = []
    for seed in seeds:
        for method in methods:
            stage = {
                **stage_fields("sft", settings.steps, seed, settings),
                "model": str(output / "model"),
                "dataset": train,
                "video_frames": settings.frames,
                "projector_learning_rate": settings.pretrain_learning_rate,
                # Which frame a token is of is told by its position alone.
                "positions": "original",
                "budget": "sample",
                "save_strategy": "no",
                "dataloader_num_workers": 0,
                **method_fields(method),
            }
            evaluation = Evaluation(standard_inferences(stage), settings.split, settings.clips)
            labels = {"method": method, "seed": seed}
            runs.append(RunSpec(f"{method}-seed{seed}", labels, (stage,), evaluation, settings.threads))
    return runs


def main(argv: Sequence[str] | None = None) -> int:
    """Make what is missing, and show the table.

    Raises:
        SaccadeError: on bad input, before anything long starts.
    """
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser("experiments.motion", description=__doc__, formatter_class=raw, allow_abbrev=False)
    add_study_arguments(parser, Settings, METHODS, "all_tokens,prune_only,dualspeed", "out/motion")
    args = parser.parse_args(argv)
    # A folder for each split: the models, which do not depend on it, are trained once.
    folder, console = args.output / args.split, Console()
    if args.table:
        Standing(Plan.read(folder), folder).report(console)
        return 0
    check_counts(seeds=args.seeds, jobs=args.jobs)
    settings = given_settings(args, Settings)
    runs = plan_runs(args.output, settings, args.methods.split(","), range(args.seeds))
    if find_spec("torchvision") is None:
        raise SaccadeError(
            "the stock processors of clips need torchvision: run `make .venv-video/.installed`, and this command with "
            ".venv-video/bin/python"
        )
    save_motion_model(args.output / "model")
    for entry in settings.files:
        write_clips(args.output, *entry)
    plan = make_plan("digits that move", runs, ("python", "-m", "experiments.motion"), {"settings": asdict(settings)})
    worker = "experiments.motion.worker"
    outcome = run_sweep(plan, folder, args.output / "stages", {}, args.jobs, args.any_commit, console, worker)
    Standing(plan, folder).report(console)
    return outcome.tell_failures()


if __name__ == "__main__":
    disable_progress_bars()
    logging.disable_progress_bar()
    sys.exit(guarded(main))
