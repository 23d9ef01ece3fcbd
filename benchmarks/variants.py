"""The variants that a training benchmark compares: ways to compute the loss of the same micro-batch."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer

from benchmarks.batches import label_count
from benchmarks.released import ReleasedProcedure
from saccade.dualspeed.casts import CAST, spare_casts
from saccade.dualspeed.compiling import compile_layers
from saccade.dualspeed.packing import allow_packing
from saccade.dualspeed.parts import InParts
from saccade.dualspeed.step import DualSpeedStep, ModePlan
from saccade.families import Family, get_family
from saccade.pruning import Method, ModeIsolator, Pruner
from saccade.reducers import PruningConfig
from saccade.skip_vision import Skipper, SkipVisionConfig, apply_skip_vision
from saccade.tiny import build_tiny_processor

Loss = Callable[[Mapping[str, Any]], Tensor]
STOCK = "stock TRL, all tokens"
STOCK_COMPILED = "stock TRL, compiled"
LOWER = "stock TRL, lower resolution"
NO_PADDING = "DualSpeed, no padding"
ALL_PACKED = "all tokens, no padding"
PRUNED_PACKED = "pruning only, no padding"
FAST_THEN_SLOW = "fast, then slow"
IN_PARTS = "DualSpeed, slow in parts"
COMPILED = "DualSpeed, compiled"
BOTH = "DualSpeed, no padding, compiled"
PARTS = 4
"""Number of parts that the micro-batch of a slow step is split into."""
WITHOUT_CHECKPOINTING = {
    name: False
    for name in ("gradient_checkpointing", "activation_checkpointing")
    if name in SFTConfig.__dataclass_fields__
}
"""Option of a stock configuration under its original name and under the one that newer transformers use too."""


@dataclass(frozen=True)
class Variant:
    """One way to train.

    Args:
        name: its name in tables.
        active: context that prepares the model, yields the loss of a micro-batch, and restores the model.
    """

    name: str
    active: Callable[[], AbstractContextManager[Loss]]


@dataclass(frozen=True)
class Mix:
    """A run whose steps alternate between two variants, computed from their times.

    Args:
        name: its name in tables.
        parts: shares of steps, by name of variant.
    """

    name: str
    parts: Mapping[str, float]


@dataclass(frozen=True)
class Settings:
    """Settings of the methods.

    Args:
        prune_ratio: share p of visual tokens dropped in fast steps.
        slow_probability: probability r of a slow step.
        isolator_length: length l of the mode isolator.
        reducer: method that selects the kept tokens.
        skip: name of a Skip-Vision preset.
        compiled: measure compiled layers too.
    """

    prune_ratio: float = 0.9
    slow_probability: float = 0.1
    isolator_length: int = 4
    reducer: str = "divprune"
    skip: str = "100/156"
    compiled: bool = False


def training_variants(model: PreTrainedModel, settings: Settings, slow: bool) -> tuple[list[Variant], list[Mix]]:
    """The variants of a stage, the stock one first, and the runs that mix them.

    Args:
        model: a stock model, PEFT-wrapped or not, whose trainable parameters are the stage's.
        slow: whether the stage has slow steps; stage one has none.
    """
    family = get_family(model)
    width = family.model.config.get_text_config().hidden_size
    isolator = ModeIsolator(settings.isolator_length, width).to(family.model.device)
    released = ReleasedProcedure(model, settings.prune_ratio, settings.isolator_length)

    def pruned(reducer: str, with_isolator: bool) -> Pruner:
        config = PruningConfig(reducer, prune_ratio=settings.prune_ratio)
        return Pruner(config, isolator if with_isolator else None)

    def ours(
        method: Method | None,
        teacher: Method | None = None,
        padding_free: bool = False,
        in_parts: bool = False,
        compiled: bool = False,
    ) -> Callable[[], AbstractContextManager[Loss]]:
        plan = ModePlan(method, None if teacher is None else ModePlan(teacher))
        step = DualSpeedStep(family, {"mode": plan}, 1.0, 1.0, padding_free)

        def loss(batch: Mapping[str, Any]) -> Tensor:
            rows = len(batch["labels"])
            parts = InParts(-(-rows // PARTS), backward_of_part) if in_parts else None
            return step("mode", batch, label_count(batch), in_parts=parts).loss

        @contextmanager
        def active() -> Iterator[Loss]:
            with packing(family, padding_free), compiling(family, compiled), sparing(family):
                yield loss

        return active

    def skipping(config: SkipVisionConfig) -> Callable[[], AbstractContextManager[Loss]]:
        @contextmanager
        def active() -> Iterator[Loss]:
            skip = apply_skip_vision(model, config)
            try:
                plan = ModePlan(Skipper(family, config))
                step = DualSpeedStep(family, {"mode": plan}, 1.0, 1.0)
                with sparing(family):
                    yield lambda batch: step("mode", batch, label_count(batch)).loss
            finally:
                skip.remove()

        return active

    fast = pruned(settings.reducer, True)
    variants = [
        Variant(STOCK, lambda: stock(model)),
        Variant("pruning only", ours(pruned(settings.reducer, False))),
        Variant("DualSpeed, fast step", ours(fast)),
        Variant("released procedure, fast step", lambda: releasing(released, released.fast)),
        Variant("Skip-Vision", skipping(SkipVisionConfig.preset(settings.skip))),
        Variant(
            "DualSpeed with a skip, fast step",
            skipping(
                SkipVisionConfig(retained=1 - settings.prune_ratio, skipped=None, split=settings.reducer, merge="none")
            ),
        ),
    ]
    variants += [
        Variant(f"{NO_PADDING}, fast step", ours(fast, padding_free=True)),
        Variant(PRUNED_PACKED, ours(pruned(settings.reducer, False), padding_free=True)),
        Variant(ALL_PACKED, ours(None, padding_free=True)),
    ]
    if family.model.config.model_type == "llava":
        variants.append(Variant(LOWER, lambda: lower_resolution(model, settings.prune_ratio)))
    if settings.compiled:
        variants += [
            Variant(STOCK_COMPILED, lambda: stock(model, compiled=True)),
            Variant(f"{COMPILED}, fast step", ours(fast, compiled=True)),
            Variant(f"{BOTH}, fast step", ours(fast, padding_free=True, compiled=True)),
        ]
    if not slow:
        return [under_autocast(variant, model) for variant in variants], []
    variants += [
        Variant("DualSpeed, slow step", ours(None, fast)),
        Variant("released procedure, slow step", lambda: releasing(released, released.slow)),
        Variant(f"{NO_PADDING}, slow step", ours(None, fast, padding_free=True)),
        Variant(f"{IN_PARTS}, slow step", ours(None, fast, in_parts=True)),
    ]
    pairs = [
        ("DualSpeed", "DualSpeed", "DualSpeed"),
        ("released procedure", "released procedure", "released procedure"),
        ("DualSpeed with a skip", "DualSpeed with a skip", "DualSpeed"),
        (NO_PADDING, NO_PADDING, NO_PADDING),
        (IN_PARTS, "DualSpeed", IN_PARTS),
    ]
    if settings.compiled:
        variants += [
            Variant(f"{COMPILED}, slow step", ours(None, fast, compiled=True)),
            Variant(f"{BOTH}, slow step", ours(None, fast, padding_free=True, compiled=True)),
        ]
        pairs += [(name, name, name) for name in (COMPILED, BOTH)]
    rate = settings.slow_probability
    # The preset: neither isolator nor self-distillation.
    mixes = [Mix(FAST_THEN_SLOW, {PRUNED_PACKED: 1 - rate, ALL_PACKED: rate})]
    mixes += [
        Mix(name, {f"{fast_name}, fast step": 1 - rate, f"{slow_name}, slow step": rate})
        for name, fast_name, slow_name in pairs
    ]
    return [under_autocast(variant, model) for variant in variants], mixes


def under_autocast(variant: Variant, model: PreTrainedModel) -> Variant:
    """The variant as a trainer with `bf16: true` runs it, if the model is in bfloat16."""
    if model.dtype != torch.bfloat16:
        return variant

    @contextmanager
    def active() -> Iterator[Loss]:
        with variant.active() as loss:
            yield torch.autocast(model.device.type, torch.bfloat16)(loss)

    return replace(variant, active=active)


def backward_of_part(loss: Tensor) -> None:
    """The backward pass of a part, without autocast, as the trainer runs it."""
    with torch.autocast(loss.device.type, enabled=False):
        loss.backward()


@contextmanager
def releasing(released: ReleasedProcedure, loss: Loss) -> Iterator[Loss]:
    """A loss of the released procedure. Its hidden states go: they would count in the peaks of other variants."""
    try:
        yield loss
    finally:
        released.held = None


@contextmanager
def packing(family: Family, wanted: bool) -> Iterator[None]:
    """Let the model take sequences packed without padding, inside this context."""
    config = family.language_model.config
    before = config._attn_implementation
    if wanted:
        allow_packing(family)
    try:
        yield
    finally:
        config._attn_implementation = before


@contextmanager
def compiling(family: Family, wanted: bool) -> Iterator[None]:
    """Run the decoder layers compiled inside this context; earlier compilations are reused."""
    if wanted:
        compile_layers(family)
    try:
        yield
    finally:
        for layer in family.language_layers:
            layer._compiled_call_impl = None


@contextmanager
def sparing(family: Family) -> Iterator[None]:
    """Leave out the casts of LoRA layers that autocast undoes, inside this context."""
    spare_casts(family.model)
    try:
        yield
    finally:
        for layer in family.model.modules():
            layer.__dict__.pop(CAST, None)


@contextmanager
def lower_resolution(model: PreTrainedModel, prune_ratio: float) -> Iterator[Loss]:
    """The loss of stock TRL on images so small that they have about as many patches as pruning keeps.

    Args:
        model: a LLaVA with one image in each row, and its placeholders at the same place in all rows.
    """
    family = get_family(model)
    embeddings = family.vision_tower.get_submodule("embeddings")
    whole = embeddings.image_size // embeddings.patch_size
    side = max(1, round(whole * (1 - prune_ratio) ** 0.5))

    def smaller(batch: Mapping[str, Any]) -> dict[str, Any]:
        visual = family.placeholder(batch["input_ids"][0])
        kept = ~visual | (visual.cumsum(0) <= side**2)
        pixels = F.interpolate(batch["pixel_values"], size=side * embeddings.patch_size, mode="area")
        rows = {name: batch[name][:, kept] for name in ("input_ids", "attention_mask", "labels")}
        return {**batch, **rows, "pixel_values": pixels}

    interpolate = {"interpolate_pos_encoding": True}
    hook = embeddings.register_forward_pre_hook(
        lambda module, args, given: (args, {**given, **interpolate}), with_kwargs=True
    )
    with hook, stock(model) as loss:
        yield lambda batch: loss(smaller(batch))


@contextmanager
def stock(model: PreTrainedModel, compiled: bool = False) -> Iterator[Loss]:
    """The loss that TRL's trainer computes for a vision-language model, including its logged metrics."""
    bare = get_family(model).model
    device, forward = bare.device, bare.__dict__.get("forward")
    args = SFTConfig(
        output_dir="unused",
        report_to="none",
        save_strategy="no",
        use_cpu=device.type == "cpu",
        bf16=False,
        max_length=None,
        **WITHOUT_CHECKPOINTING,
    )
    rows = Dataset.from_list([{"messages": [{"role": "user", "content": "a"}], "images": []}])
    trainer = SFTTrainer(
        model, args, train_dataset=rows, data_collator=lambda batch: batch, processing_class=build_tiny_processor()
    )
    try:
        with compiling(get_family(model), compiled):
            yield lambda batch: trainer.compute_loss(model, dict(batch), num_items_in_batch=label_count(batch))
    finally:
        # The trainer has put its own around it, one more in each step.
        bare.__dict__.pop("forward", None)
        if forward is not None:
            bare.forward = forward
