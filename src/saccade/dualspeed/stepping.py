"""How a trainer gets the loss of a micro-batch: its mode, its normaliser, and the model as the engine wrapped it."""

import random
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from saccade.dualspeed.caching import CachingTrainer
from saccade.dualspeed.config import DualSpeedConfig
from saccade.dualspeed.metrics import ModeMeter
from saccade.dualspeed.parts import InParts
from saccade.dualspeed.redirect import redirect_forward
from saccade.dualspeed.step import DualSpeedStep, StepOutput
from saccade.dualspeed.watch import RunWatch
from saccade.skip_vision import SkipVision


class SteppingTrainer(CachingTrainer):
    """TRL's trainer with the loss of the step's mode in the place of its own."""

    args: DualSpeedConfig
    is_ordinary: bool
    skip: SkipVision | None
    meter: ModeMeter
    watch: RunWatch
    _step: DualSpeedStep
    _micro_batch: int

    def mode_of(self, step: int) -> str:
        """The mode of optimizer step `step`, counted from 0."""
        return self.schedule.mode(step)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.skip is not None and not self.model.training:
            return self._evaluation_loss(model, inputs, return_outputs)
        if self.is_ordinary or return_outputs or not self.model.training:
            with warnings.catch_warnings():
                # TRL announces that it will return no logits one day; until then `predict` and `evaluate` give them.
                warnings.filterwarnings("ignore", "`return_outputs=True`", FutureWarning)
                loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            if self.is_ordinary and self.model.training:
                self.watch.see(loss, inputs)
                self._count_ordinary(inputs, loss, num_items_in_batch)
            return loss
        normaliser = num_items_in_batch
        if normaliser is None:
            normaliser = (inputs["labels"][:, 1:] != -100).sum()
        # An all-text batch of masked samples has no label at all and contributes a plain zero.
        normaliser = torch.as_tensor(normaliser, device=inputs["input_ids"].device).clamp(min=1)
        mode = self.mode_of(self.state.global_step)
        self._micro_batch += 1
        with self.watch.computing(inputs):
            in_parts = self._in_parts(mode, num_items_in_batch)
            output = self._run_step(model, mode, inputs, normaliser, self._row_seed(), in_parts)
        self.watch.see(output.loss, inputs)
        averaged = self._is_averaged(num_items_in_batch)
        self.meter.add(mode, output, share=1.0 if averaged else self._mean_share(num_items_in_batch))
        return output.loss * self._loss_factor(num_items_in_batch)

    def _is_averaged(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Whether the normaliser counts every rank's tokens."""
        return self.args.average_tokens_across_devices and num_items_in_batch is not None

    def _loss_factor(self, num_items_in_batch: Tensor | int | None) -> int:
        # The engines average gradients over ranks.
        return self.accelerator.num_processes if self._is_averaged(num_items_in_batch) else 1

    def _in_parts(self, mode: str, num_items_in_batch: Tensor | int | None) -> InParts | None:
        """How a micro-batch in `mode` is cut, or None where it runs at once."""
        size = self.args.slow_micro_batch_size
        if size is None or not next(one for one in self.modes if one.name == mode).keeps_all:
            return None
        # What the stock training step does to the loss that it gets.
        accumulated = self.current_gradient_accumulation_steps if num_items_in_batch is None else 1
        return InParts(size, self._backward_of_part, self._loss_factor(num_items_in_batch) / accumulated)

    def _backward_of_part(self, loss: Tensor) -> None:
        with torch.autocast(loss.device.type, enabled=False):
            self.accelerator.backward(loss)

    def _evaluation_loss(self, model, inputs: dict[str, Any], return_outputs: bool):
        """The mean cross-entropy of a batch in the mode that inference is in: on all tokens where one mode is."""
        mode = self.meter.full or self.modes[-1].name
        count = (inputs["labels"][:, 1:] != -100).sum().clamp(min=1)
        output = self._run_step(model, mode, inputs, count)
        return (output.cross_entropy, {"loss": output.cross_entropy}) if return_outputs else output.cross_entropy

    def _run_step(
        self,
        model: nn.Module,
        mode: str,
        inputs: dict[str, Any],
        normaliser: Tensor,
        row_seed: int = 0,
        in_parts: InParts | None = None,
    ) -> StepOutput:
        """One micro-batch in `mode`, inside the forward of the model as the engine wrapped it."""

        def run(batch: dict[str, Any]) -> StepOutput:
            # The engine's own autocast wraps the forward that is replaced here.
            with self.accelerator.autocast():
                return self._step(mode, batch, normaliser, row_seed, in_parts)

        return redirect_forward(model, self.accelerator.unwrap_model(model), run, batch=inputs)

    def begin_step(self) -> None:
        """Called before the first micro-batch of each optimizer step."""
        self._micro_batch = 0

    def _mean_share(self, num_items_in_batch: Tensor | int | None) -> float:
        """What turns losses that are means on each rank, or in each micro-batch, into summands of a global mean."""
        parts = 1 if num_items_in_batch is not None else self.current_gradient_accumulation_steps
        return 1 / (self.accelerator.num_processes * parts)

    def _row_seed(self) -> int:
        key = f"{self.args.seed} {self.state.global_step} {self._micro_batch} {self.args.process_index}"
        return random.Random(key).getrandbits(60)

    def _count_ordinary(self, inputs: dict[str, Any], loss: Tensor, num_items_in_batch: Tensor | int | None) -> None:
        tokens = inputs["attention_mask"].sum()
        output = StepOutput(loss, loss.detach(), None, tokens, tokens, None, len(inputs["labels"]))
        self.meter.add("slow", output, share=self._mean_share(num_items_in_batch))
