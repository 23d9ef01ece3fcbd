"""Batches of samples of similar length, the same on every rank and after a resume."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import TrainerCallback
from transformers.trainer_pt_utils import get_length_grouped_indices


class GroupedSampler(Sampler[int]):
    """Shuffles the samples and sorts them by length within groups of up to 50 global batches.

    The order is that of transformers' `LengthGroupedSampler`, but a function of the seed and the epoch alone. The
    stock one draws from the process's own generator, which differs between ranks and after a resume.

    Args:
        lengths: one a sample.
        batch_size: samples of an optimizer step, over all ranks and micro-batches.
        seed: of the shuffling.
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


class EpochStart(TrainerCallback):
    """Tells the sampler which epoch begins.

    The stock trainer does too, but after a resume on several ranks what it tells is not the sampler.
    """

    def on_epoch_begin(self, args, state, control, train_dataloader: Any = None, **kwargs: Any) -> None:
        if hasattr(train_dataloader, "set_epoch"):
            # The epoch is a sum of fractions, which may stay just below the whole number.
            train_dataloader.set_epoch(int((state.epoch or 0) + 1e-6))
