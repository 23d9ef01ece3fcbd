"""`LenientTrainer`: TRL's `SFTTrainer` on rows of which some are bad, and on streams, on any number of ranks."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput, has_length
from trl import SFTTrainer

from saccade.dualspeed.bad_records import BadRecordLog
from saccade.dualspeed.callbacks import surviving
from saccade.dualspeed.collator import BAD_RECORDS, DualSpeedCollator
from saccade.dualspeed.config import DualSpeedConfig
from saccade.dualspeed.engines import BLANK_ROW, DummyImageCollator
from saccade.dualspeed.loss import learnable_labels
from saccade.dualspeed.sampler import WholeBatches
from saccade.errors import SaccadeError
from saccade.families import Family
from saccade.tokens import IGNORE_INDEX


class LenientTrainer(SFTTrainer):
    """Trainer that replaces bad records and counts each row once, in training, evaluation and `predict`."""

    args: DualSpeedConfig
    family: Family
    bad_records: BadRecordLog
    _evaluated: Tensor | None = None
    """Sums of the current evaluation on this rank: losses of rows, number of rows, number of bad records."""
    _train_loader: DataLoader | None = None

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """The sum of a tensor over ranks. Every rank must call it."""
        return self.accelerator.reduce(values.to(self.accelerator.device), reduction="sum")

    def get_train_dataloader(self) -> DataLoader:
        """The stock loader, with a collator that replaces bad records and lists them in the batch."""
        rows = self.train_dataset
        with self._collating(rows):
            if getattr(rows, "num_shards", 1) < self.accelerator.num_processes:
                # There is not a part for each rank: all of them read all of it.
                self.train_dataset = self._in_whole_batches(rows, self.args.train_batch_size)
            try:
                self._train_loader = super().get_train_dataloader()
            finally:
                self.train_dataset = rows
        return self._train_loader

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        """The stock loader, with a collator that lists bad records and does not count their replacements."""
        chosen = self.eval_dataset if eval_dataset is None else eval_dataset
        rows = self.eval_dataset[chosen] if isinstance(chosen, str) else chosen
        size = self.args.eval_batch_size
        with self._collating(rows, learn_stand_ins=False):
            # For a dataset given by name, the stock loader may be reused in the next evaluation.
            given = eval_dataset if has_length(rows) else self._in_whole_batches(rows, size)
            return surviving(super().get_eval_dataloader(given))

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
        """The same for `predict`, where replacements of bad records have no labels, only -100."""
        with self._collating(test_dataset, learn_stand_ins=False):
            rows = self._in_whole_batches(test_dataset, self.args.eval_batch_size)
            return surviving(super().get_test_dataloader(rows))

    def _in_whole_batches(self, rows: Any, size: int) -> Any:
        """A stream, filled up to whole batches on all ranks; other rows, which accelerate splits evenly, unchanged.

        Args:
            size: rows of a batch on each rank.
        """
        if has_length(rows) or self.accelerator.num_processes == 1:
            return rows
        return WholeBatches(rows, size * self.accelerator.num_processes)

    @contextmanager
    def _collating(self, rows: Any, **options: Any) -> Iterator[None]:
        strict, self.data_collator = self.data_collator, self._lenient(rows, **options)
        try:
            yield
        finally:
            self.data_collator = strict

    def end_workers(self) -> None:
        """End the data workers of training; persistent ones would otherwise keep waiting for work.

        The garbage collector would close their queues before telling them to end, and then wait ten seconds for them.
        """
        if self._train_loader is not None:
            self._base_loader()._iterator = None
        self._train_loader = None

    def training_collator(self) -> Any:
        """The collator as training uses it: bad records are replaced, up to `max_bad_records`."""
        return self._lenient(self.train_dataset)

    def _lenient(self, rows: Any, **options: Any) -> Any:
        """The collator with bad records replaced by others of `rows`, or of the batch if rows have no index."""
        outer = self.data_collator
        collate = outer.collate if isinstance(outer, DummyImageCollator) else outer
        if not isinstance(collate, DualSpeedCollator):
            return outer
        rows = rows if isinstance(rows, Dataset) else None
        collate = replace(collate, max_bad_records=self.args.max_bad_records, rows=rows, **options)
        return replace(outer, collate=collate) if isinstance(outer, DummyImageCollator) else collate

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """The micro-batches of the next optimizer step. Every rank must call it.

        Raises:
            SaccadeError: on all ranks, if there are too many bad records.
        """
        batches = []
        for batch in islice(epoch_iterator, num_batches):
            self._ignore_unlearned(batch)
            batches.append(batch)
        if not has_length(self.train_dataset):
            batches = self._fill_up(batches, num_batches)
        if batches:
            for batch in batches:
                batch.pop(BLANK_ROW, None)
            found = [bad for batch in batches for bad in batch.pop(BAD_RECORDS, ())]
            self._note_bad_records(found, given_up=not all(batches))
        return super().get_batch_samples(iter(batches), num_batches, device)

    def _fill_up(self, batches: list[dict[str, Any]], number: int) -> list[dict[str, Any]]:
        """Bring the last step of a stream's epoch to `number` micro-batches on every rank.

        An earlier batch, without labels, takes the place of one that is missing. A rank that ran out of rows would
        otherwise begin the next epoch alone, and the stock loop adds the gradients of too few to the next step.
        """
        device, counts = self.accelerator.device, [len(batches)]
        if self.accelerator.num_processes > 1:
            counts = self.accelerator.gather(torch.tensor(counts, device=device)).tolist()
        if max(counts) == 0 or min(counts) == number:
            return batches
        first = batches[0] if batches else next(iter(self._base_loader()), None)
        if min(counts) == 0:
            empty = self.accelerator.gather(torch.tensor([first is None], device=device)).tolist()
            if any(empty):
                raise SaccadeError(
                    f"the training stream has no rows for rank {empty.index(True)}: it has fewer rows than the "
                    f"{len(empty)} processes and their data workers; use fewer of them"
                )
        stands_in = {name: value for name, value in first.items() if name != BAD_RECORDS}
        if "labels" in stands_in:
            stands_in["labels"] = torch.full_like(stands_in["labels"], IGNORE_INDEX)
        return batches + [dict(stands_in) for _ in range(number - len(batches))]

    def _base_loader(self) -> DataLoader | None:
        """The loader that accelerate's wraps."""
        return getattr(self._train_loader, "base_dataloader", self._train_loader)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The stock step, whose logits and labels are of the rows of the dataset. Every rank must call it.

        Raises:
            SaccadeError: on all ranks, if there are too many bad records.
        """
        found, blank_row = inputs.pop(BAD_RECORDS, ()), inputs.pop(BLANK_ROW, False)
        self._note_bad_records(found, given_up=not inputs)
        self._ignore_unlearned(inputs)
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if loss is not None and "labels" in inputs:
            counted = (inputs["labels"][:, 1:] != IGNORE_INDEX).any(dim=1).sum().float().to(loss.device)
            step = torch.stack([loss.detach().float() * counted, counted, torch.full_like(counted, len(found))])
            self._evaluated = step if self._evaluated is None else self._evaluated + step
        if blank_row:
            inputs["input_ids"] = inputs["input_ids"][:-1]  # which metrics may be given too
            logits, labels = (None if rows is None else rows[:-1] for rows in (logits, labels))
        return loss, logits, labels

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """The stock loop. With bad records, and for streams, the loss is the mean over the rows that count."""
        self._evaluated = None
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix=metric_key_prefix
        )
        if self._evaluated is not None:
            # The stock loss averages over batches, but a batch without a usable row has none, and the last batch of a
            # stream may be shorter than the others.
            total, counted, bad = self.sum_over_ranks(self._evaluated).tolist()
            if bad or not has_length(getattr(dataloader, "dataset", None)):
                output.metrics[f"{metric_key_prefix}_loss"] = total / max(counted, 1)
        return output

    def _ignore_unlearned(self, batch: dict[str, Any]) -> None:
        """Mask the labels that do not count, before anything counts them. A collator of the user's own, TRL's for
        instance, labels image tokens too."""
        if "labels" in batch:
            placeholder = self.family.placeholder(batch["input_ids"])
            batch["labels"] = learnable_labels(batch["labels"], placeholder, batch.get("attention_mask"))
            self._ignore_repeated_rows(batch)

    def _ignore_repeated_rows(self, batch: dict[str, Any]) -> None:
        """With several ranks, mask the labels of rows that merely pad the last batch of an epoch.

        Accelerate repeats rows there so that every rank has a batch of the same size; a single process would run a
        shorter batch, so without the mask these rows would count twice. They still go through the model, since engines
        need the same calls on all ranks.
        """
        state, ranks = self.accelerator.gradient_state, self.accelerator.num_processes
        if ranks == 1 or not state.end_of_dataloader:
            return
        loader = state.active_dataloader
        shard = loader.batch_sampler
        if isinstance(shard, SkipBatchSampler):  # of a resumed epoch; accelerate counts no remainder there
            shard = shard.batch_sampler
        repeats = isinstance(shard, BatchSamplerShard) and shard.even_batches and not shard.drop_last
        if not repeats or shard.batch_size is None:
            return
        size = shard.batch_size // ranks if shard.split_batches else shard.batch_size
        real = len(loader.dataset) % (size * ranks)
        if real:
            batch["labels"][max(real - self.accelerator.process_index * size, 0) :] = IGNORE_INDEX

    def _note_bad_records(self, found: list[dict[str, Any]], given_up: bool) -> None:
        """Record the bad records of all ranks, and stop all of them if there are too many or one has no batch."""
        new = self.bad_records.unknown(found)
        if self.accelerator.num_processes > 1:
            # Two numbers first: the lists are gathered only if they are not all empty.
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
                f"no record of a batch can be used, and there is no replacement: see {self.bad_records.path}"
            )
