"""One DualSpeed micro-batch (arXiv 2602.03815, Sec. 3): fast on kept tokens, slow on all with self-distillation."""

import time
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from saccade.dualspeed.loss import cross_entropy_and_kl_sum, cross_entropy_sum, label_rows
from saccade.dualspeed.schedule import Mode
from saccade.families import Encoded, Family
from saccade.families.collect import encode_for
from saccade.pruning import ModeIsolator, Shortened, reduce, shorten
from saccade.reducers import Reducer, is_low_resolution
from saccade.tokens import IGNORE_INDEX, TokenBudget


@dataclass
class StepOutput:
    """What one micro-batch gives.

    Args:
        loss: scalar with gradient, (CE + weight * KL) summed over label tokens and divided by the normaliser.
        cross_entropy: its first term, without gradient.
        kl: KL summed over label tokens and divided by the normaliser, without gradient; None without distillation.
        tokens_full: long scalar, tokens of the batch as it came, padding not counted.
        tokens_in: long scalar, tokens that the trained pass ran on.
        tokens_teacher: long scalar, tokens that the teacher ran on; None without one.
        samples: rows of the batch.
        teacher_seconds: time of the teacher's pass; 0 without one.
    """

    loss: Tensor
    cross_entropy: Tensor
    kl: Tensor | None
    tokens_full: Tensor
    tokens_in: Tensor
    tokens_teacher: Tensor | None
    samples: int
    teacher_seconds: float


@dataclass
class _Sums:
    """Sums over the label tokens of a micro-batch, with gradient, and what they took."""

    cross_entropy: Tensor
    tokens_in: Tensor
    kl: Tensor | None = None
    tokens_teacher: Tensor | None = None
    teacher_seconds: float = 0.0


@dataclass
class DualSpeedStep:
    """The loss of one micro-batch in either mode.

    Args:
        family: the model's family, over the stock model.
        reducer: chooses the tokens of the fast sequence.
        budget: how many tokens it keeps.
        isolator: rows before each image in the fast sequence, or None.
        distill_weight: weight of the KL term of slow steps; 0 runs no teacher.
        distill_temperature: temperature of both distributions in the KL.
        positions: "compact" or "original".
        pad_id: id to pad shortened batches with.
        newlines: "keep" or "drop", for the newline tokens of anyres images.
    """

    family: Family
    reducer: Reducer
    budget: TokenBudget
    isolator: ModeIsolator | None
    distill_weight: float
    distill_temperature: float
    positions: str
    pad_id: int
    newlines: str = "keep"

    def __call__(
        self, mode: Mode, inputs: Mapping[str, Any], normaliser: Tensor | float, row_seed: int = 0
    ) -> StepOutput:
        """Run the micro-batch in `mode`.

        Args:
            inputs: processor outputs with `labels`; the labels of image placeholders are ignored.
            normaliser: number of label tokens in the global batch.
            row_seed: seed of the first feature row for stochastic reducers; the next rows count on from it.
        """
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        labels = labels.masked_fill(self.family.placeholder(inputs["input_ids"]), IGNORE_INDEX)
        text = self.family.without_vision(inputs)
        if self.family.has_images(inputs):
            encoded, teacher = self._encode(mode, inputs, labels)
            teacher.context.seed = torch.arange(teacher.context.shape[0], device=labels.device) + row_seed
            sums = self._fast(encoded, text, labels) if mode == "fast" else self._slow(encoded, teacher, text, labels)
        else:
            # Without images the two sequences are the same, and a teacher would have nothing to teach.
            encoded, sums = None, self._plain(text, labels)
        loss = sums.cross_entropy if sums.kl is None else sums.cross_entropy + self.distill_weight * sums.kl
        # Engines need a gradient for every parameter: DDP waits for it, ZeRO-3 applies the previous step's.
        if self.isolator is not None and (encoded is None or mode == "slow"):
            loss = loss + 0 * self.isolator().sum()
        if encoded is None:
            loss = loss + 0 * self._vision_parameters()
        return StepOutput(
            loss=loss / normaliser,
            cross_entropy=sums.cross_entropy.detach() / normaliser,
            kl=None if sums.kl is None else sums.kl.detach() / normaliser,
            tokens_full=inputs["attention_mask"].sum(),
            tokens_in=sums.tokens_in,
            tokens_teacher=sums.tokens_teacher,
            samples=labels.shape[0],
            teacher_seconds=sums.teacher_seconds,
        )

    def _encode(self, mode: Mode, inputs: Mapping[str, Any], labels: Tensor) -> tuple[Encoded, Encoded]:
        """The images' features for the trained pass and for the teacher, with what the reducer needs if it is used.

        One encoding serves both, but where the fast sequence is of smaller images.
        """
        if mode == "slow" and not self.distill_weight:
            encoded = self.family.encode(inputs)
            return encoded, encoded
        if mode == "slow" and is_low_resolution(self.reducer) and not self.budget.keeps_all:
            with torch.no_grad(), evaluating(self.family.model):
                teacher = encode_for(self.family, self.reducer, inputs, self.budget, labels)
            return self.family.encode(inputs), teacher
        encoded = encode_for(self.family, self.reducer, inputs, self.budget, labels)
        return encoded, encoded

    def _vision_parameters(self) -> Tensor | float:
        """The sum of the parameters that train on images only."""
        parameters = (*self.family.projector.parameters(), *self.family.vision_tower.parameters())
        local = (p.to_local() if isinstance(p, DTensor) else p for p in parameters if p.requires_grad)
        return sum((p.sum() for p in local), start=0.0)

    def _plain(self, inputs: Mapping[str, Any], labels: Tensor) -> _Sums:
        """Cross-entropy of one pass over `inputs`, whatever sequence they hold."""
        rows, targets = label_rows(self.family.hidden_states(**inputs), labels)
        return _Sums(cross_entropy_sum(rows, targets, self.family.logits), inputs["attention_mask"].sum())

    def _fast(self, encoded: Encoded, text: Mapping[str, Any], labels: Tensor) -> _Sums:
        short = self._shorten(encoded, text, labels)
        return self._plain(short.inputs, short.labels)

    def _slow(self, encoded: Encoded, teacher: Encoded, text: Mapping[str, Any], labels: Tensor) -> _Sums:
        full = {**text, "mm_encoder_outputs": encoded.outputs}
        if not self.distill_weight:
            return self._plain(full, labels)
        started = _now(labels.device)
        teacher_rows, tokens_teacher = self._teacher_rows(teacher, text, labels)
        teacher_seconds = _now(labels.device) - started
        rows, targets = label_rows(self.family.hidden_states(**full), labels)
        ce, kl = cross_entropy_and_kl_sum(rows, teacher_rows, targets, self.family.logits, self.distill_temperature)
        return _Sums(ce, text["attention_mask"].sum(), kl, tokens_teacher, teacher_seconds)

    def _shorten(self, encoded: Encoded, text: Mapping[str, Any], labels: Tensor) -> Shortened:
        return shorten(
            self.family,
            encoded,
            {**text, "labels": labels},
            reduce(encoded.context, self.reducer, self.budget, self.newlines),
            isolator=None if self.isolator is None else self.isolator(),
            positions=self.positions,
            pad_id=self.pad_id,
        )

    @torch.no_grad()
    def _teacher_rows(self, encoded: Encoded, text: Mapping[str, Any], labels: Tensor) -> tuple[Tensor, Tensor]:
        """Label rows `(M, D)` of the fast sequence, without gradient and without dropout, and its token count."""
        with evaluating(self.family.model):
            short = self._shorten(encoded, text, labels)
            rows, _ = label_rows(self.family.hidden_states(**short.inputs), short.labels)
        return rows, short.inputs["attention_mask"].sum()


@contextmanager
def evaluating(module: nn.Module):
    """Switch every submodule to evaluation mode, and each back to its own mode afterwards."""
    training = [submodule for submodule in module.modules() if submodule.training]
    module.eval()
    try:
        yield
    finally:
        for submodule in training:
            submodule.training = True


def _now(device: torch.device) -> float:
    """Seconds on a clock that waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
