"""Checkpoints that are uploaded to the hub while training goes on (`push_to_hub`)."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import TrainerCallback
from transformers.trainer_utils import HubStrategy

from saccade.dualspeed.folder import MEASURED, RUN_FILE
from saccade.pruning import ISOLATOR_FILE
from saccade.reducers import PRUNING_FILE
from saccade.skip_vision import SUMMARY_FILE


class CheckpointPushes(TrainerCallback):
    """Prepares the stock trainer's uploads of checkpoints, and knows which of them may be under way.

    The stock trainer copies a checkpoint's weights to `output_dir` and uploads that, and under some strategies the
    checkpoint too. A thread reads both folders, at any time until training ends.
    """

    def __init__(self, trainer) -> None:
        self.trainer = trainer
        self._checkpoint: Path | None = None
        self._begun: set[str] = set()

    @contextmanager
    def of(self, checkpoint: Path) -> Iterator[None]:
        """A push that begins inside the block is of `checkpoint`; one that begins outside is of the final model."""
        self._checkpoint = checkpoint
        try:
            yield
        finally:
            self._checkpoint = None

    def on_push_begin(self, args, state, control, **kwargs):
        """Called only if the strategy wants a push and no earlier one is waited for."""
        if self._checkpoint is None:
            return
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            self._begun = {*self.reading(), self._checkpoint.name}
        folder = self._checkpoint.parent
        # They are of a finished model, whose weights are about to be replaced: its run is being trained for longer.
        for name in (RUN_FILE, *MEASURED):
            (folder / name).unlink(missing_ok=True)
        for name in (ISOLATOR_FILE, SUMMARY_FILE, PRUNING_FILE):
            if (self._checkpoint / name).is_file():
                shutil.copy(self._checkpoint / name, folder / name)

    def reading(self) -> set[str]:
        """Names of the checkpoints that an upload may still read."""
        progress = getattr(self.trainer, "push_in_progress", None)
        return set() if progress is None or progress.is_done() else self._begun
