"""How a trainer loads its rows: batches of similar length, and bad records skipped up to a limit."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from saccade.data.lengths import TokenCounter, estimate_lengths
from saccade.dualspeed.bad_records import BadRecordLog
from saccade.dualspeed.collator import BAD_RECORDS, DualSpeedCollator
from saccade.dualspeed.labels import stop_ids
from saccade.dualspeed.modes import Mode
from saccade.dualspeed.optimizing import OptimizingTrainer
from saccade.dualspeed.sampler import GroupedSampler
from saccade.dualspeed.schedule import ModeSchedule
from saccade.dualspeed.sharding import WithBlankImage
from saccade.errors import SaccadeError
from saccade.tokens import IGNORE_INDEX, TokenBudget


class LoadingTrainer(OptimizingTrainer):
    """TRL's trainer with the options `group_by` and `max_bad_records`."""

    modes: Sequence[Mode]
    schedule: ModeSchedule
    bad_records: BadRecordLog
    _train_loader: DataLoader | None = None

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """The sum of a tensor over ranks. Every rank must call it."""
        return self.accelerator.reduce(values.to(self.accelerator.device), reduction="sum")

    def get_train_dataloader(self) -> DataLoader:
        """The stock loader, with a collator that replaces bad records and lists them in the batch."""
        strict = self.data_collator
        self.data_collator = self.training_collator()
        try:
            self._train_loader = super().get_train_dataloader()
        finally:
            self.data_collator = strict
        return self._train_loader

    def end_workers(self) -> None:
        """End the processes that prepare training batches, which persistent ones would go on waiting for more.

        The garbage collector takes their queues away before it tells them to end, and then waits ten seconds for them.
        """
        base = getattr(self._train_loader, "base_dataloader", self._train_loader)
        if base is not None:
            base._iterator = None
        self._train_loader = None

    def training_collator(self) -> Any:
        """The collator as training uses it: bad records are replaced, up to `max_bad_records`."""
        if isinstance(self.data_collator, WithBlankImage):
            return replace(self.data_collator, collate=self._lenient(self.data_collator.collate))
        return self._lenient(self.data_collator)

    def _lenient(self, collate: Any) -> Any:
        if not isinstance(collate, DualSpeedCollator):
            return collate
        rows = self.train_dataset if isinstance(self.train_dataset, Dataset) else None
        return replace(collate, max_bad_records=self.args.max_bad_records, rows=rows)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.group_by == "none":
            return super()._get_train_sampler(train_dataset)
        usual = max(self.modes, key=lambda mode: self.schedule.shares[mode.name])
        counter = TokenCounter(
            self.processing_class,
            self.family.placeholder_id,
            usual.budget if usual.action == "drop" else TokenBudget(0.0),
            self.isolator.length if self.isolator is not None and usual.isolator else 0,
            stop_ids(self.family.model.generation_config, self._tokenizer),
            self.args.conversation,
        )
        lengths = estimate_lengths(dataset, counter, shortened=self.args.group_by == "shortened")
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return GroupedSampler(lengths, step, seed)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """The micro-batches of the next optimizer step. Every rank must call it.

        Raises:
            SaccadeError: on all ranks alike, if more records are bad than may be.
        """
        batches = []
        for batch in islice(epoch_iterator, num_batches):
            self._ignore_repeated_rows(batch)
            batches.append(batch)
        if batches:
            found = [bad for batch in batches for bad in batch.pop(BAD_RECORDS, ())]
            self._note_bad_records(found, given_up=not all(batches))
        return super().get_batch_samples(iter(batches), num_batches, device)

    def _ignore_repeated_rows(self, batch: dict[str, Any]) -> None:
        """Mask the labels of rows that only fill the last batch of an epoch up, on several ranks.

        Accelerate repeats rows there so that every rank has a batch of the same size; one process would run a shorter
        batch, and these rows would count twice. They still go through the model: engines need the same calls on all
        ranks.
        """
        state = self.accelerator.gradient_state
        if self.accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return
        if "labels" in batch:
            before = self.accelerator.process_index * self.args.train_batch_size
            batch["labels"][max(state.remainder - before, 0) :] = IGNORE_INDEX

    def _note_bad_records(self, found: list[dict[str, Any]], given_up: bool) -> None:
        """Take up what any rank has met, and stop all ranks if it is too much or leaves one without a batch."""
        new = self.bad_records.unknown(found)
        if self.accelerator.num_processes > 1:
            # Two numbers first: the lists themselves are gathered only where there is something to gather.
            count, given_up = self.sum_over_ranks(torch.tensor([len(new), given_up])).tolist()
            new = gather_object(new) if count else []
        if new:
            self.bad_records.add(new)
            if self.args.should_save:
                self.bad_records.write()
            self.bad_records.check()
        if given_up:
            raise SaccadeError(
                f"no record of a batch can be used, nor one to stand in for them: see {self.bad_records.path}"
            )
