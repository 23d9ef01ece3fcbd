"""How a trainer loads its rows: batches of similar length, and bad records skipped up to a limit."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from transformers.trainer_utils import EvalLoopOutput

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
from saccade.reducers import PruningConfig
from saccade.tokens import IGNORE_INDEX


class LoadingTrainer(OptimizingTrainer):
    """TRL's trainer with the options `group_by` and `max_bad_records`, the latter in evaluation and `predict` too."""

    modes: Sequence[Mode]
    schedule: ModeSchedule
    bad_records: BadRecordLog
    _train_loader: DataLoader | None = None
    _evaluated: Tensor | None = None
    """Of an evaluation so far, on this rank: the rows' losses in sum, the rows, and the bad records met."""

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """The sum of a tensor over ranks. Every rank must call it."""
        return self.accelerator.reduce(values.to(self.accelerator.device), reduction="sum")

    def get_train_dataloader(self) -> DataLoader:
        """The stock loader, with a collator that replaces bad records and lists them in the batch."""
        with self._collating(self.training_collator()):
            self._train_loader = super().get_train_dataloader()
        return self._train_loader

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        """The stock loader, with a collator that lists bad records and does not count what stands in for them."""
        chosen = self.eval_dataset if eval_dataset is None else eval_dataset
        rows = self.eval_dataset[chosen] if isinstance(chosen, str) else chosen
        with self._collating(self._evaluation_collator(rows)):
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
        """The same for `predict`, where what stands in for a bad record has no labels, only -100."""
        with self._collating(self._evaluation_collator(test_dataset)):
            return super().get_test_dataloader(test_dataset)

    @contextmanager
    def _collating(self, collator: Any) -> Iterator[None]:
        strict, self.data_collator = self.data_collator, collator
        try:
            yield
        finally:
            self.data_collator = strict

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
        return self._lenient(self.train_dataset)

    def _evaluation_collator(self, rows: Any) -> Any:
        return self._lenient(rows, learn_stand_ins=False)

    def _lenient(self, rows: Any, **options: Any) -> Any:
        """The collator with bad records replaced by others of `rows`, or of the batch where these have no numbers."""
        outer = self.data_collator
        collate = outer.collate if isinstance(outer, WithBlankImage) else outer
        if not isinstance(collate, DualSpeedCollator):
            return outer
        rows = rows if isinstance(rows, Dataset) else None
        collate = replace(collate, max_bad_records=self.args.max_bad_records, rows=rows, **options)
        return replace(outer, collate=collate) if isinstance(outer, WithBlankImage) else collate

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.group_by == "none":
            return super()._get_train_sampler(train_dataset)
        usual = max(self.modes, key=lambda mode: self.schedule.shares[mode.name])
        counter = TokenCounter(
            self.processing_class,
            self.family.placeholder_id,
            usual.pruning if usual.action == "drop" else PruningConfig(prune_ratio=0.0),
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
            self._ignore_repeated_rows(batch, self.args.train_batch_size)
            batches.append(batch)
        if batches:
            found = [bad for batch in batches for bad in batch.pop(BAD_RECORDS, ())]
            self._note_bad_records(found, given_up=not all(batches))
        return super().get_batch_samples(iter(batches), num_batches, device)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The stock step. Every rank must call it.

        Raises:
            SaccadeError: on all ranks alike, if more records are bad than may be.
        """
        found = inputs.pop(BAD_RECORDS, ())
        self._note_bad_records(found, given_up=not inputs)
        self._ignore_repeated_rows(inputs, self.args.eval_batch_size)
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if loss is not None and "labels" in inputs:
            counted = (inputs["labels"][:, 1:] != IGNORE_INDEX).any(dim=1).sum().float().to(loss.device)
            step = torch.stack([loss.detach().float() * counted, counted, torch.full_like(counted, len(found))])
            self._evaluated = step if self._evaluated is None else self._evaluated + step
        return loss, logits, labels

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """The stock loop. Where records were bad, the loss is the mean over the rows that are not."""
        self._evaluated = None
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix=metric_key_prefix
        )
        if self._evaluated is not None:
            # The stock mean is over batches, and one of which every row is bad has none to give.
            total, counted, bad = self.sum_over_ranks(self._evaluated).tolist()
            if bad:
                output.metrics[f"{metric_key_prefix}_loss"] = total / max(counted, 1)
        return output

    def _ignore_repeated_rows(self, batch: dict[str, Any], size: int) -> None:
        """Mask the labels of rows that only fill the last batch of a pass up, on several ranks.

        Accelerate repeats rows there so that every rank has a batch of the same size; one process would run a shorter
        batch, and these rows would count twice. They still go through the model: engines need the same calls on all
        ranks.

        Args:
            size: rows of a whole batch on each rank.
        """
        state = self.accelerator.gradient_state
        if self.accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return
        if "labels" in batch:
            before = self.accelerator.process_index * size
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
        if new or given_up:
            self.bad_records.check()
        if given_up:
            raise SaccadeError(
                f"no record of a batch can be used, nor one to stand in for them: see {self.bad_records.path}"
            )
