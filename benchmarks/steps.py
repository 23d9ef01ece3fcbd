"""Times of training steps: all variants interleaved in one run, after a warm-up, with FLOP and memory counts."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.batches import make_batch
from benchmarks.counting import HostReads, count_saved_bytes
from benchmarks.released import ReleasedProcedure
from benchmarks.variants import (
    ALL_PACKED,
    BOTH,
    COMPILED,
    FAST_THEN_SLOW,
    IN_PARTS,
    LOWER,
    NO_PADDING,
    PRUNED_PACKED,
    STOCK,
    STOCK_COMPILED,
    Mix,
    Settings,
    Variant,
    training_variants,
)
from saccade.evaluation.counting import count_flops
from saccade.families import Family, get_family
from saccade.interfaces import changed
from saccade.reducers import get_reducer, list_reducers
from saccade.training.length_table import Source, draw_lengths

PARTS = ("tower", "projector", "selection", "language", "other forward", "backward", "optimizer")


@dataclass(frozen=True)
class Stage:
    """One stage of a recipe, as a benchmark runs it.

    Args:
        name: "pretrain" or "sft".
        sources: length distributions of its texts.
        samples: size of the published data in thousands of samples: the stage's weight in the whole schedule.
        batch_size: rows per step.
        language: whether the language model trains; the projector always does.
    """

    name: str
    sources: tuple[Source, ...]
    samples: float
    batch_size: int
    language: bool


@dataclass
class Timing:
    """Measurements of one variant.

    Args:
        stage: name of the stage.
        variant: name of the variant.
        seconds: duration of each timed step; for a mix, its parts' durations in each repeat, weighted by their shares.
        ratios: the stock step's duration divided by this one's, per repeat.
        tokens: tokens of the unpruned batch, per repeat.
        flops: FLOPs of one step on the first batch, forward and backward.
        syncs: how often one step makes the program wait for a GPU, as `HostReads` counts.
        saved_bytes: bytes kept for the backward pass of that step.
        peak_bytes: peak memory of the device during a step; None on the CPU.
        parts: each part's share of a step's time; empty for a mix.
        out_of_memory: whether the device had too little memory for it; then there are no times.
    """

    stage: str
    variant: str
    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    flops: float = 0.0
    syncs: float = 0.0
    saved_bytes: int = 0
    peak_bytes: int | None = None
    parts: dict[str, float] = field(default_factory=dict)
    out_of_memory: bool = False

    def as_json(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)


def seconds_on(device: torch.device) -> float:
    """Clock reading in seconds, after synchronizing with the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def own_seconds_on(device: torch.device) -> float:
    """As `seconds_on`, but on a CPU with one thread the processor's time for this process, in which other programs
    have no part."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time() if alone else seconds_on(device)


def measure_stage(
    model: PreTrainedModel,
    stage: Stage,
    settings: Settings,
    repeats: int = 10,
    warm_up: int = 2,
    timings: dict[str, Timing] | None = None,
    save: Callable[[], None] = lambda: None,
) -> list[Timing]:
    """Time every variant of a stage on the same batches, alternating in a rotating order.

    A variant that runs out of memory is recorded as such, and the others go on.

    Args:
        model: a stock model, PEFT-wrapped or not, on its device. Afterwards its trainable parameters are the stage's.
        repeats: timed steps per variant, each on a different batch.
        warm_up: untimed steps per variant before the first timed one.
        timings: what an interrupted run had measured, by variant; this one adds the rest to it.
        save: called whenever `timings` has more. Steps are added by whole repeats, so that ratios compare those of
            one process.
    """
    family = get_family(model)
    train_stage(model, family, stage)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)
    variants, mixes = training_variants(model, settings, slow=stage.language)
    timings = {} if timings is None else timings
    for variant in variants:
        timings.setdefault(variant.name, Timing(stage.name, variant.name))
    texts = draw_lengths(stage.sources, stage.batch_size * (repeats + 1), seed=0)
    batches = [
        make_batch(family, texts[start : start + stage.batch_size], seed=start)
        for start in range(0, len(texts), stage.batch_size)
    ]
    for variant in variants:
        timing = timings[variant.name]
        if not timing.flops:
            _attempt(timing, optimizer, _count, variant, batches[0], timing, model)
            save()
        for _ in range(0 if timing.parts else warm_up):
            _attempt(timing, optimizer, _step, variant, batches[0])
    done = max(len(timing.seconds) for timing in timings.values())
    for number, batch in enumerate(batches[1 + done :], done):
        for variant in _rotated(variants, number):
            timing = timings[variant.name]
            measured = _attempt(timing, optimizer, _step, variant, batch)
            if measured is not None:
                seconds, peak = measured
                timing.seconds.append(seconds)
                timing.tokens.append(int(batch["attention_mask"].sum()))
                if peak is not None:
                    timing.peak_bytes = max(peak, timing.peak_bytes or 0)
        save()
    for variant in variants:
        timing = timings[variant.name]
        if not timing.parts:
            timing.parts = _attempt(timing, optimizer, _parts, variant, family, batches[1:4]) or {}
            save()
    found = [*timings.values(), *(_mixed(mix, timings) for mix in mixes)]
    stock = timings[STOCK]
    for timing in found:
        if not (stock.out_of_memory or timing.out_of_memory):
            timing.ratios = [one / other for one, other in zip(stock.seconds, timing.seconds, strict=True)]
    return found


def _attempt(timing: Timing, optimizer: torch.optim.Optimizer, work: Callable[..., Any], *args: Any) -> Any:
    """What `work` returns, or None if the variant has run out of memory, before or now."""
    if timing.out_of_memory:
        return None
    try:
        return work(*args, optimizer)
    except torch.OutOfMemoryError:
        timing.out_of_memory = True
    # Only here is the error gone, which holds what the step had computed.
    timing.seconds, timing.tokens, timing.peak_bytes = [], [], None
    optimizer.zero_grad(set_to_none=True)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def train_stage(model: nn.Module, family: Family, stage: Stage) -> None:
    """Freeze or unfreeze parameters as the recipes do: the projector trains, and the language model or its
    adapters."""
    adapters = model is not family.model
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name if adapters else True)
    family.vision_tower.requires_grad_(False)
    family.projector.requires_grad_(True)
    if not (stage.language and adapters):
        family.language_model.requires_grad_(stage.language)
        family.model.get_output_embeddings().requires_grad_(stage.language)
    model.train()


def whole_schedule(stages: Sequence[Stage], timings: Mapping[str, Mapping[str, Timing]]) -> dict[str, float]:
    """Each method's speed-up over both stages together, relative to the stock trainer in both, where all had memory.

    Args:
        timings: measurements by stage and variant.
    """
    methods = {
        "pruning only": ("pruning only", "pruning only"),
        "DualSpeed": ("DualSpeed, fast step", "DualSpeed"),
        "released procedure": ("released procedure, fast step", "released procedure"),
        "DualSpeed with a skip": ("DualSpeed with a skip, fast step", "DualSpeed with a skip"),
        "Skip-Vision": (STOCK, "Skip-Vision"),
        NO_PADDING: (f"{NO_PADDING}, fast step", NO_PADDING),
        IN_PARTS: ("DualSpeed, fast step", IN_PARTS),
        LOWER: (LOWER, LOWER),
        ALL_PACKED: (ALL_PACKED, ALL_PACKED),
        FAST_THEN_SLOW: (PRUNED_PACKED, FAST_THEN_SLOW),
        STOCK_COMPILED: (STOCK_COMPILED, STOCK_COMPILED),
        COMPILED: (f"{COMPILED}, fast step", COMPILED),
        BOTH: (f"{BOTH}, fast step", BOTH),
    }

    def seconds(stage: Stage, variant: str) -> float:
        return stage.samples / stage.batch_size * statistics.median(timings[stage.name][variant].seconds)

    def total(names: Sequence[str]) -> float | None:
        named = list(zip(stages, names, strict=True))
        timed = all(name in timings[stage.name] and timings[stage.name][name].seconds for stage, name in named)
        return sum(seconds(stage, name) for stage, name in named) if timed else None

    stock, totals = total((STOCK, STOCK)), {method: total(names) for method, names in methods.items()}
    return {} if stock is None else {method: stock / found for method, found in totals.items() if found is not None}


def _rotated(variants: Sequence[Variant], number: int) -> list[Variant]:
    start = number % len(variants)
    return [*variants[start:], *variants[:start]]


def _step(variant: Variant, batch: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> tuple[float, int | None]:
    """Seconds of one optimizer step, and the device's peak memory in it."""
    device = batch["input_ids"].device
    with variant.active() as loss:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        started = own_seconds_on(device)
        optimizer.zero_grad(set_to_none=True)
        loss(batch).backward()
        optimizer.step()
        seconds = own_seconds_on(device) - started
    optimizer.zero_grad(set_to_none=True)
    return seconds, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def _count(
    variant: Variant,
    batch: Mapping[str, Any],
    timing: Timing,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    """FLOPs, waits and bytes saved beside the model's weights, frozen or not, of one step."""
    # The counters do not see inside compiled code; eager mode runs the same operations.
    with torch.compiler.set_stance("force_eager"), variant.active() as loss:
        timing.flops = count_flops(lambda: loss(batch).backward())
        optimizer.zero_grad(set_to_none=True)
        with HostReads() as waits:
            loss(batch).backward()
        timing.syncs = waits.count
        optimizer.zero_grad(set_to_none=True)
        with count_saved_bytes(model.parameters()) as saved:
            loss(batch)
        timing.saved_bytes = saved.peak


def _mixed(mix: Mix, timings: Mapping[str, Timing]) -> Timing:
    """Measurements of a run that mixes several kinds of steps, from those of its parts."""
    parts = [(timings[name], share) for name, share in mix.parts.items()]
    first = parts[0][0]
    mixed = Timing(first.stage, mix.name, tokens=first.tokens)
    if any(timing.out_of_memory for timing, _ in parts):
        return replace(mixed, tokens=[], out_of_memory=True)
    mixed.seconds = [
        sum(share * timing.seconds[number] for timing, share in parts) for number in range(len(first.seconds))
    ]
    mixed.flops = sum(share * timing.flops for timing, share in parts)
    mixed.syncs = sum(share * timing.syncs for timing, share in parts)
    # A run needs as much memory as its most demanding step.
    mixed.saved_bytes = max(timing.saved_bytes for timing, _ in parts)
    peaks = [timing.peak_bytes for timing, _ in parts if timing.peak_bytes is not None]
    mixed.peak_bytes = max(peaks) if peaks else None
    return mixed


def _parts(
    variant: Variant, family: Family, batches: Sequence[Mapping[str, Any]], optimizer: torch.optim.Optimizer
) -> dict[str, float]:
    """Where a step's time goes, as shares; measured separately, since synchronizing slows a GPU down."""
    totals = dict.fromkeys(PARTS, 0.0)
    for batch in batches:
        device = batch["input_ids"].device
        with variant.active() as loss, _watched(family, device) as spent:
            started = own_seconds_on(device)
            value = loss(batch)
            forward = own_seconds_on(device) - started
            for name, seconds in spent.items():
                totals[name] += seconds
            totals["other forward"] += forward - sum(spent.values())
            started = own_seconds_on(device)
            value.backward()
            totals["backward"] += own_seconds_on(device) - started
            started = own_seconds_on(device)
            optimizer.step()
            totals["optimizer"] += own_seconds_on(device) - started
        optimizer.zero_grad(set_to_none=True)
    whole = sum(totals.values())
    return {name: seconds / whole for name, seconds in totals.items()}


@contextmanager
def _watched(family: Family, device: torch.device) -> Iterator[dict[str, float]]:
    """Seconds spent inside the tower, the projector, reducers, and the language model during the forward pass.

    This includes the backward passes that some variants run within it, one per part of a batch.

    Raises:
        SaccadeError: if a module's time was attributed elsewhere because it was never called as a module.
    """
    spent = dict.fromkeys((*PARTS[:4], "backward"), 0.0)
    handles = []
    called: dict[str, bool] = {}
    # Modules that run now, with the time that others inside of them took.
    running: list[list[float]] = []

    def watch(module: nn.Module, name: str) -> None:
        called[name] = False
        handles.append(module.register_forward_pre_hook(lambda *_: running.append([own_seconds_on(device), 0.0])))

        def end(*_: Any) -> None:
            called[name] = True
            started, inside = running.pop()
            seconds = own_seconds_on(device) - started
            spent[name] += seconds - inside
            if running:
                running[-1][1] += seconds

        handles.append(module.register_forward_hook(end))

    watch(_called(family.model, family.vision_tower), "tower")
    watch(family.projector_entry, "projector")
    watch(family.language_model, "language")
    selectors = [(type(get_reducer(name)), "__call__") for name in list_reducers()]
    selectors.append((ReleasedProcedure, "select"))
    depth = 0

    def timed(function: Callable[..., Any], part: str = "selection") -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            depth += 1
            started = own_seconds_on(device)
            try:
                return function(*args, **kwargs)
            finally:
                depth -= 1
                # A reducer may call another one; only the outer call counts.
                spent[part] += 0 if depth else own_seconds_on(device) - started

        return call

    with ExitStack() as stack:
        for owner, name in selectors:
            stack.enter_context(patch.object(owner, name, timed(getattr(owner, name))))
        stack.enter_context(patch.object(Tensor, "backward", timed(Tensor.backward, "backward")))
        for handle in handles:
            stack.callback(handle.remove)
        yield spent
    missed = [name for name, seen in called.items() if not seen]
    if missed:
        raise changed(f"the model's forward did not call its {' and its '.join(missed)} as a module")


def _called(model: nn.Module, part: nn.Module) -> nn.Module:
    """The module whose forward runs a part: Qwen-VL's tower is a list of the parts of a module, projector aside."""
    if not isinstance(part, nn.ModuleList):
        return part
    first = part[0]
    return next(module for module in model.modules() if any(child is first for child in module.children()))


def token_rate(timing: Timing) -> float:
    """Throughput in tokens of the unpruned batch per second: the median over the steps."""
    rates = [tokens / seconds for tokens, seconds in zip(timing.tokens, timing.seconds, strict=True)]
    return statistics.median(rates)
