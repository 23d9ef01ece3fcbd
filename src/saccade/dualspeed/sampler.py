"""Which samples make a batch: those of similar length, the same on every rank and after a resume; streams in whole
batches."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import cycle, islice
from typing import Any

import torch
from torch.utils.data import IterableDataset, Sampler
from transformers import TrainerCallback
from transformers.trainer_pt_utils import get_length_grouped_indices

from saccade.dualspeed.collator import STANDS_IN


class GroupedSampler(Sampler[int]):
    """Shuffles the samples and sorts them by length within groups of up to 50 global batches.

    The order is that of transformers' `LengthGroupedSampler`, but depends only on the seed and the epoch. The stock
    sampler draws from the process's own generator, which differs between ranks and after a resume.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch."""
        self.epoch = epoch


class WholeBatches(IterableDataset):
    """A stream whose last batch is filled up with rows from its start that do not count.

    Every rank reads the whole stream and takes its share of each global batch. Ranks that each read a different part
    may reach the end after different numbers of batches, and in an evaluation the others would wait for the first.
    """

    def __init__(self, rows: Iterable[dict[str, Any]], size: int) -> None:
        self.rows, self.size = rows, size

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch."""
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        first: list[dict[str, Any]] = []
        count = 0
        for row in self.rows:
            count += 1
            if len(first) < self.size:
                first.append(row)
            yield row
        for row in islice(cycle(first), -count % self.size):
            yield {**row, STANDS_IN: True}


class EpochStart(TrainerCallback):
    """Tells the sampler which epoch begins.

    The stock trainer does so too, but after a resume on several ranks it no longer reaches the sampler.
    """

    def on_epoch_begin(self, args, state, control, train_dataloader: Any = None, **kwargs: Any) -> None:
        if hasattr(train_dataloader, "set_epoch"):
            # The epoch is a sum of fractions, which may end just below the integer.
            train_dataloader.set_epoch(int((state.epoch or 0) + 1e-6))
