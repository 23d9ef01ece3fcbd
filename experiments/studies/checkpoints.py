"""Checkpoints during a run's last stage: when they are saved, at which training time, and their accuracy."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from saccade.sweeps.worker import process_clock

Clock = Callable[[], tuple[float, float]]


def checkpoint_steps(total: int, count: int) -> list[int]:
    """`count` steps spread evenly over `total`, in order, the last being `total` itself."""
    return [-(-number * total // count) for number in range(1, count + 1)]


class CheckpointSaver(TrainerCallback):
    """Make the trainer save at evenly spread steps, and exclude the time of saving from that of training.

    Args:
        count: number of checkpoints.
        clock: returns CPU seconds and wall-clock seconds.
    """

    def __init__(self, count: int, clock: Clock = process_clock) -> None:
        self.count = count
        self._clock = clock
        self.saved: list[dict[str, Any]] = []
        """Per checkpoint, its `step`, and the `cpu_seconds` and `seconds` of training up to it, without saving."""
        self.saving = np.zeros(2)
        """CPU seconds and wall-clock seconds spent on saving."""

    def on_train_begin(self, args, state, control, **kwargs):
        self._started = self._now()
        self._steps = set(checkpoint_steps(state.max_steps, self.count))

    def on_step_end(self, args, state, control, **kwargs):
        self._step_ended = self._now()
        if state.global_step in self._steps:
            cpu, wall = map(float, self._step_ended - self._started - self.saving)
            self.saved.append({"step": state.global_step, "cpu_seconds": cpu, "seconds": wall})
            control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        self.saving += self._now() - self._step_ended

    def _now(self) -> np.ndarray:
        return np.array(self._clock())


def evaluate_checkpoints(
    saved: list[dict[str, Any]],
    folder: Path,
    evaluate: Callable[[Path, int], dict[str, Any]],
    keep: Callable[[], None],
) -> None:
    """Add the evaluation's result to each entry of `saved`, and remove the checkpoint once the result is stored.

    Checkpoints that were evaluated before are skipped, so that an interrupted evaluation can be resumed.

    Args:
        folder: the stage's folder, which contains the checkpoints.
        evaluate: takes a checkpoint's folder and number, and returns its results.
        keep: stores `saved` on disk.
    """
    for number, entry in enumerate(saved):
        checkpoint = folder / f"{PREFIX_CHECKPOINT_DIR}-{entry['step']}"
        if "accuracy" not in entry:
            entry.update(evaluate(checkpoint, number))
            keep()
        shutil.rmtree(checkpoint, ignore_errors=True)
