"""One DualSpeed micro-batch (arXiv 2602.03815, Sec. 3): fast on kept tokens, slow on all with self-distillation.

Other modes of a run go through the same code.
"""

import operator
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from saccade.dualspeed.loss import cross_entropy_and_kl_sum, cross_entropy_sum, label_rows, learnable_labels
from saccade.dualspeed.metrics import Span
from saccade.dualspeed.packing import pack, packed_states
from saccade.dualspeed.parts import InParts, MicroBatches, Part
from saccade.families import Family
from saccade.pruning import Method, ModeInputs, ModeIsolator, prune
from saccade.reducers import Needs
from saccade.skip_vision import SummaryHead


@dataclass
class StepOutput:
    """The results of one micro-batch.

    Args:
        loss: scalar with gradient, (CE + weight * KL) summed over label tokens and divided by the normaliser.
        cross_entropy: its first term, without gradient.
        kl: KL summed over label tokens and divided by the normaliser, without gradient; None without distillation.
        tokens_full: long scalar, tokens of the full batch, not counting padding.
        tokens_in: long scalar, tokens that the trained pass ran on.
        tokens_teacher: long scalar, tokens that the teacher ran on; None without one.
        samples: rows of the batch.
        cut: long `(2,)`, the samples that `fit_length` shortened in the trained pass, and the visual tokens that it
            took from them; None where nothing is counted.
        teacher_passes: when the teacher's passes ran, on the device's clock.
    """

    loss: Tensor
    cross_entropy: Tensor
    kl: Tensor | None
    tokens_full: Tensor
    tokens_in: Tensor
    tokens_teacher: Tensor | None
    samples: int
    cut: Tensor | None = None
    teacher_passes: tuple[Span, ...] = ()


@dataclass
class _Sums:
    """Sums over the label tokens of a micro-batch, with gradient, and the cost of computing them."""

    cross_entropy: Tensor
    tokens_in: Tensor
    cut: Tensor
    kl: Tensor | None = None
    tokens_teacher: Tensor | None = None
    teacher_passes: tuple[Span, ...] = ()

    def loss(self, distill_weight: float) -> Tensor:
        """CE + weight * KL."""
        return self.cross_entropy if self.kl is None else self.cross_entropy + distill_weight * self.kl

    def detached(self) -> "_Sums":
        kl = None if self.kl is None else self.kl.detach()
        return replace(self, cross_entropy=self.cross_entropy.detach(), kl=kl)

    def __add__(self, other: "_Sums") -> "_Sums":
        """The sums of two parts."""
        pairs = {entry.name: (getattr(self, entry.name), getattr(other, entry.name)) for entry in fields(self)}
        return _Sums(**{name: one + two for name, (one, two) in pairs.items() if one is not None and two is not None})


@dataclass(frozen=True)
class ModePlan:
    """What a mode trains on: its method, None for all tokens, and the plan of the pass that it learns from, if any."""

    method: Method | None = None
    teacher: "ModePlan | None" = None

    @property
    def needs(self) -> Needs:
        """What the shared encoding has to provide for both passes."""
        plans = [plan for plan in (self, self.teacher) if plan is not None]
        return reduce(operator.or_, (Needs() if plan.method is None else plan.method.needs for plan in plans))


@dataclass
class DualSpeedStep:
    """The loss of one micro-batch in any mode."""

    family: Family
    modes: Mapping[str, ModePlan]
    distill_weight: float
    distill_temperature: float
    padding_free: bool = False

    def __call__(
        self,
        mode: str,
        inputs: Mapping[str, Any],
        normaliser: Tensor | float,
        row_seed: int = 0,
        in_parts: InParts | None = None,
    ) -> StepOutput:
        """Run the micro-batch in `mode`.

        Args:
            inputs: processor outputs with `labels`, of which `learnable_labels` count.
            normaliser: number of label tokens in the global batch.
            row_seed: seed of the first feature row for stochastic reducers; later rows get consecutive seeds.
            in_parts: run the language passes a few samples at a time. The gradients of all parts but the last are then
                already accumulated in the parameters.
        """
        inputs = dict(inputs)
        placeholder = self.family.placeholder(inputs["input_ids"])
        labels = learnable_labels(inputs.pop("labels"), placeholder, inputs["attention_mask"])
        text = self.family.without_vision(inputs)
        # Without images both sequences are the same, and there is nothing to distill.
        plan, encoded = ModePlan(), None
        if self.family.has_images(inputs):
            plan = self.modes[mode]
            encoded = self.family.encode(inputs, plan.needs, labels=labels, seed=row_seed)
        carried: Tensor | float = 0.0
        whole = Part(encoded, text, labels)
        if in_parts is None or in_parts.samples >= labels.shape[0]:
            sums = self._run(plan, whole)
        else:
            micro_batches = MicroBatches(self.family, whole)
            sums = self._run_in_parts(plan, micro_batches, normaliser, in_parts)
            carried = micro_batches.carried(in_parts.scale)
        loss = sums.loss(self.distill_weight)
        # Engines need a gradient for every parameter: DDP waits for it, ZeRO-3 applies the previous step's.
        for module in self._own_modules():
            if plan.method is None or not any(module is other for other in plan.method.trainable_modules):
                loss = loss + module.idle()
        if encoded is None:
            loss = loss + 0 * self._vision_parameters()
        elif encoded.videos and all(encoded.videos):
            loss = loss + 0 * self._vision_parameters(but=(self.family.projector, self.family.vision_tower))
        return StepOutput(
            loss=loss / normaliser + carried,
            cross_entropy=sums.cross_entropy.detach() / normaliser,
            kl=None if sums.kl is None else sums.kl.detach() / normaliser,
            tokens_full=inputs["attention_mask"].sum(),
            tokens_in=sums.tokens_in,
            tokens_teacher=sums.tokens_teacher,
            samples=labels.shape[0],
            cut=sums.cut,
            teacher_passes=sums.teacher_passes,
        )

    def _own_modules(self) -> list[ModeIsolator | SummaryHead]:
        """The modules that the modes add to the model, without duplicates."""
        methods = [plan.method for plan in self.modes.values() if plan.method is not None]
        return list({id(module): module for method in methods for module in method.trainable_modules}.values())

    def _vision_parameters(self, but: Sequence[nn.Module] = ()) -> Tensor | float:
        """The sum of the trainable parameters that are not the language model's, such as the newline of anyres images,
        which videos of LLaVA-NeXT do not use.

        Args:
            but: modules whose parameters are left out.
        """
        model = self.family.model
        without = (self.family.language_model, model.get_output_embeddings(), *but)
        left_out = {id(p) for module in without if module is not None for p in module.parameters()}
        parameters = (p for p in model.parameters() if p.requires_grad and id(p) not in left_out)
        local = (p.to_local() if isinstance(p, DTensor) else p for p in parameters)
        return sum((p.sum() for p in local), start=0.0)

    def _label_rows(self, laid: ModeInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Hidden states `(M, D)` of the rows that predict a label, those labels `(M,)`, the cost of the pass, and what
        `fit_length` removed, as in `StepOutput`."""
        cut = laid.tokens.new_zeros(2)
        if laid.lost is not None:
            cut = torch.stack(((laid.lost > 0).sum(), laid.lost.sum()))
        if self.padding_free:
            packed = pack(laid, self.family)
            return *label_rows(packed_states(packed, self.family), packed.labels), laid.tokens, cut
        return *label_rows(self.family.hidden_states(**laid.inputs), laid.labels), laid.tokens, cut

    def _run(self, plan: ModePlan, part: Part) -> _Sums:
        """The pass of a plan, after that of its teacher, on the same encoding."""
        if plan.teacher is not None:
            teacher_pass = Span(part.labels.device)
            teacher, tokens_teacher = self._teacher_rows(plan.teacher, part)
            teacher_pass.end()
        rows, targets, tokens, cut = self._rows(plan, part)
        if plan.teacher is None:
            return _Sums(cross_entropy_sum(rows, targets, self.family.logits), tokens, cut)
        ce, kl = cross_entropy_and_kl_sum(rows, teacher, targets, self.family.logits, self.distill_temperature)
        return _Sums(ce, tokens, cut, kl, tokens_teacher, (teacher_pass,))

    @torch.no_grad()
    def _teacher_rows(self, teacher: ModePlan, part: Part) -> tuple[Tensor, Tensor]:
        """Hidden states of the teacher's pass, without gradient or dropout, and the cost of the pass."""
        with evaluating(self.family.model):
            rows, _, tokens, _ = self._rows(teacher, part)
        return rows, tokens

    def _rows(self, plan: ModePlan, part: Part) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`_label_rows` of samples shortened according to a plan."""
        given = {"encoded": part.encoded, "labels": part.labels}
        return prune(self.family, part.text, plan.method, self._label_rows, **given)

    def _run_in_parts(
        self, plan: ModePlan, micro_batches: MicroBatches, normaliser: Tensor | float, in_parts: InParts
    ) -> _Sums:
        """The sums over all parts; only the last part's have a gradient."""
        total: _Sums | None = None
        # Without images a teacher differs only in its lack of dropout; it still runs here, as it would in a batch with
        # images.
        all_text = ModePlan(None, None if plan.teacher is None else ModePlan())
        for part, last in micro_batches.parts(in_parts.samples):
            sums = self._run(all_text if part.encoded is None else plan, part)
            if not last:
                in_parts.backward(sums.loss(self.distill_weight) / normaliser * in_parts.scale)
                sums = sums.detached()
            total = sums if total is None else total + sums
        return total


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
