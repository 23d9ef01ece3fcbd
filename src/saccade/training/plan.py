"""What a recipe would take, counted before anything is loaded: weights, tokens, operations, memory.

The model is built on the meta device, so neither its weights nor an accelerator need be there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from saccade.benchmark.flops import (
    TextShape,
    VisualRows,
    head_flops,
    projector_flops,
    skip_rows,
    tower_flops,
    training_flops,
)
from saccade.benchmark.shapes import SHAPES, Shape, shape_of
from saccade.dualspeed.masters import HALF
from saccade.dualspeed.modes import Mode
from saccade.dualspeed.packing import check_packing
from saccade.dualspeed.start import freeze_parts
from saccade.errors import SaccadeError
from saccade.families import family_class, get_family
from saccade.families.cache import check_cacheable
from saccade.families.padding import check_aspect_ratio
from saccade.tokens import TokenBudget
from saccade.training.checks import check_chat_here
from saccade.training.quantization import NF4_BYTES, quantized_weights
from saccade.training.recipe import Recipe, find_recipe, load_recipe, read_recipe
from saccade.training.run import check_lora, lora_config
from saccade.training.sources import DTYPES

TEXT_TOKENS = 124
"""Text of a sample, a guess: samples of LLaVA-1.5's fine-tuning then have 700 tokens, 576 of them visual."""


@dataclass(frozen=True)
class ModeCost:
    """What one sample costs in one mode.

    Args:
        name: of the mode.
        probability: its share of steps.
        rows: visual rows of the trained pass.
        isolator: rows of the isolator beside them.
        length: rows of the whole sequence.
        flops: of the trained pass and the teacher's, tower and projector with them.
        language_flops: of these, the language model's.
        samples: of a micro-batch that run at a time.
    """

    name: str
    probability: float
    rows: VisualRows
    isolator: int
    length: int
    flops: int
    language_flops: int
    samples: int


def plan_recipe(
    path: str | Path,
    overrides: Sequence[str] = (),
    text_tokens: int = TEXT_TOKENS,
    label_rows: int | None = None,
    devices: int = 8,
    shards: int = 1,
) -> dict[str, Any]:
    """Count what training a recipe would take, of samples with one image each.

    Args:
        path: of the recipe, or its name.
        overrides: fields, as `load_recipe` takes them.
        text_tokens: of a sample.
        label_rows: of these, how many are learned; half when left out.
        devices: that train side by side.
        shards: devices that share weights, gradients and optimizer states (FSDP, ZeRO-3); 1 where each has all.

    Returns:
        `model`, `parameters`, `visual_tokens`, `modes`, `expected`, `memory` in bytes a device, `batch`, `assumed`,
        `chat_checked`: false where the model's processor is not at hand.

    Raises:
        SaccadeError: on bad input, a model whose configuration is not at hand, or a chat template of which answers and
            their ends cannot be learned.
    """
    label_rows = text_tokens // 2 if label_rows is None else label_rows
    for name, value in (("devices", devices), ("shards", shards), ("text_tokens", text_tokens)):
        if value < 1:
            raise SaccadeError(f"{name}={value!r}: give 1 or more")
    if not 1 <= label_rows <= text_tokens:
        raise SaccadeError(f"label_rows={label_rows!r}: give from 1 to the {text_tokens} text tokens")
    if devices % shards:
        raise SaccadeError(f"shards={shards!r}: give a number that divides the {devices} devices")
    # The plan is the same on a machine without a GPU.
    recipe = load_recipe(path, [*overrides, "--use_cpu", "true"])
    args = recipe.trainer
    check_lora(recipe)
    shape, config = find_shape(recipe, path)
    check_aspect_ratio(family_class(config), args.image_aspect_ratio)
    if args.max_length is not None and shape.visual_tokens >= args.max_length:
        raise SaccadeError(
            f"max_length={args.max_length} cuts image tokens: an image of {shape.name} has {shape.visual_tokens}, "
            "give more, and room for text"
        )
    model = meta_model(recipe, config)
    if args.feature_cache is not None:
        check_cacheable(get_family(model), args.feature_cache)
    if args.padding_free:
        check_packing(get_family(model))
    cost = _Costs(recipe, model, shape, config, text_tokens, label_rows)
    modes = cost.modes()
    baseline = cost.of(Mode("all_tokens", 1.0, "keep"))
    expected = sum(mode.probability * mode.flops for mode in modes)
    language = sum(mode.probability * mode.language_flops for mode in modes)
    own = cost.own_parameters()
    micro, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    return {
        "recipe": str(find_recipe(path)),
        "model": recipe.options.model,
        "shape": shape.name,
        "parameters": {**cost.parameters(), "own": own},
        "visual_tokens": shape.visual_tokens,
        "modes": [_mode_row(mode) for mode in modes],
        "baseline": _mode_row(baseline),
        "expected": {
            "visual_rows": sum(mode.probability * mode.rows.total for mode in modes),
            "length": sum(mode.probability * mode.length for mode in modes),
            "flops": expected,
            "speedup": baseline.flops / expected,
            "speedup_language": baseline.language_flops / language,
        },
        "memory": cost.memory([mode for mode in modes if mode.probability], shards, own),
        "batch": {
            "per_device": micro,
            "accumulation": accumulation,
            "devices": devices,
            "shards": shards,
            "global": micro * accumulation * devices,
        },
        "assumed": {"text_tokens": text_tokens, "label_rows": label_rows, "images": 1},
        "chat_checked": check_chat_here(recipe),
    }


def find_shape(recipe: Recipe, path: str | Path) -> tuple[Shape, PreTrainedConfig]:
    """Shape and configuration of a recipe's model, without the network.

    Raises:
        SaccadeError: if the model is no known one, no folder, nothing that another recipe beside this one writes, and
            not in the hub's cache.
    """
    model = recipe.options.model
    for shape in SHAPES.values():
        if model in shape.hub_ids or (model in shape.folders and not Path(model).is_dir()):
            if model == "tiny" and recipe.options.dataset_grid != shape.grid[0]:
                grid = recipe.options.dataset_grid
                shape = replace(shape, grid=(grid, grid), visual_tokens=grid * grid)
            return shape, shape.config()
    if not Path(model).is_dir():
        for beside in sorted(find_recipe(path).parent.glob("*.yaml")):
            earlier = read_recipe(beside)
            before = earlier.get("model")
            if earlier.get("output_dir") == model and isinstance(before, str) and before != model:
                options = replace(recipe.options, model=before)
                return find_shape(replace(recipe, options=options), beside)
    try:
        place = model
        if (Path(model) / "adapter_config.json").is_file():
            place = PeftConfig.from_pretrained(model).base_model_name_or_path
            options = replace(recipe.options, model=place)
            return find_shape(replace(recipe, options=options), path)
        config = AutoConfig.from_pretrained(
            place, local_files_only=True, trust_remote_code=recipe.trainer.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        known = ", ".join(name for shape in SHAPES.values() for name in shape.hub_ids)
        raise SaccadeError(
            f"model={model!r} is no folder with a readable config.json, not in the hub's cache, and none of {known}: "
            "put its config.json into a folder and give that"
        ) from error
    family_class(config)
    return shape_of(model, config), config


def meta_model(recipe: Recipe, config: PreTrainedConfig) -> nn.Module:
    """The model without weights, with adapters and frozen parts as training has them."""
    options, args = recipe.options, recipe.trainer
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=_dtype(options.dtype, config))
        if options.load_in_4bit:
            _as_prepared(model)
        if options.lora:
            return get_peft_model(model, lora_config(model, recipe))
    freeze_parts(get_family(model), args)
    return model


def _as_prepared(model: PreTrainedModel) -> None:
    """The dtypes that `peft.prepare_model_for_kbit_training` leaves: float32 for all that is not in four bits."""
    quantized = {id(weight) for weight in quantized_weights(model)}
    for parameter in model.parameters():
        if id(parameter) not in quantized:
            parameter.data = parameter.data.float()


class _Costs:
    """Counts of one recipe on one model."""

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        shape: Shape,
        config: PreTrainedConfig,
        text_tokens: int,
        label_rows: int,
    ) -> None:
        self.recipe, self.model, self.shape, self.config = recipe, model, shape, config
        self.family = get_family(model)
        self.text, self.text_tokens, self.label_rows = TextShape.of(config), text_tokens, label_rows
        layers = list(self.family.language_layers.named_parameters())
        self.trains_language = any(p.requires_grad for _, p in layers)
        adapters = [(name, p.numel()) for name, p in layers if "lora_" in name]
        self.adapters_feed_forward = sum(count for name, count in adapters if "mlp" in name)
        self.adapters_attention = sum(count for _, count in adapters) - self.adapters_feed_forward

    def parameters(self) -> dict[str, int]:
        """Weights of the stock model, those that train, and those of adapters."""
        every = dict(self.model.named_parameters())
        adapters = sum(p.numel() for name, p in every.items() if "lora_" in name)
        copies = sum(p.numel() for name, p in every.items() if "modules_to_save" in name)
        total = sum(p.numel() for p in every.values())
        trained = sum(p.numel() for p in every.values() if p.requires_grad)
        return {"total": total - adapters - copies, "trainable": trained, "adapters": adapters}

    def own_parameters(self) -> int:
        """Weights of isolator and summary head, in float32."""
        args, width = self.recipe.trainer, self.text.width
        if args.is_ordinary:
            return 0
        modes = args.all_modes()
        isolator = args.isolator_length * width if any(mode.isolator for mode in modes) else 0
        head = 3 * width if any(mode.skip_vision and mode.skip_vision.summary for mode in modes) else 0
        return isolator + head

    def modes(self) -> list[ModeCost]:
        """Each mode of the run, with the teacher it learns from; a stage that trains no decoder layer has one."""
        args = self.recipe.trainer
        if args.is_ordinary:
            return [self.of(Mode("all_tokens", 1.0, "keep"))]
        modes = args.all_modes()
        if not self.trains_language:
            return [self.of(replace(modes[0], probability=1.0, teacher=None))]
        named = {mode.name: mode for mode in modes}
        learns = args.distill_weight > 0
        return [self.of(mode, named[mode.teacher] if mode.teacher and learns else None) for mode in modes]

    def rows(self, mode: Mode) -> tuple[VisualRows, int]:
        """Visual rows of a mode, and rows of the isolator."""
        tokens = self.shape.visual_tokens
        if mode.action == "skip":
            crop = tokens
            if mode.skip_vision.split == "thumbnail":
                crop = self.shape.grid[0] * self.shape.grid[1]
            return skip_rows(mode.skip_vision, crop), 0
        if mode.action == "keep":
            return VisualRows(tokens), 0
        isolator = self.recipe.trainer.isolator_length if mode.isolator else 0
        return VisualRows(self._kept(mode.budget)), isolator

    def _kept(self, budget: TokenBudget) -> int:
        """Tokens that are kept of the image: of its small and its large picture apart, or of both together."""
        if budget.keeps_all:
            return self.shape.visual_tokens
        newlines, tokens = self.shape.newlines, self.shape.visual_tokens
        small = self.shape.grid[0] * self.shape.grid[1]
        pictures = [(tokens, newlines)]
        if newlines and budget.per == "crop":
            pictures = [(small, 0), (tokens - small, newlines)]
        kept = 0
        for available, lines in pictures:
            count = min(budget.count(available), available - lines)
            if self.recipe.trainer.newlines == "keep":
                count = min(max(1, budget.count(available) - lines), available - lines) + lines
            kept += count
        return kept

    def of(self, mode: Mode, teacher: Mode | None = None) -> ModeCost:
        """One sample in one mode."""
        rows, isolator = self.rows(mode)
        language = self._language(rows, isolator)
        if teacher is not None:
            language += self._forward(*self.rows(teacher))
        vision = self._vision()
        length = rows.total + isolator + self.text_tokens
        args = self.recipe.trainer
        samples = args.per_device_train_batch_size
        if mode.keeps_all and args.slow_micro_batch_size is not None:
            samples = min(samples, args.slow_micro_batch_size)
        return ModeCost(mode.name, mode.probability, rows, isolator, length, language + vision, language, samples)

    def _forward(self, rows: VisualRows, isolator: int) -> int:
        # Forward and backward are three times the forward where all weights train.
        stock = training_flops(self.text, rows, self.text_tokens + isolator, self.label_rows) // 3
        return stock + self._adapter_flops(rows, isolator)

    def _language(self, rows: VisualRows, isolator: int) -> int:
        """Forward and backward, and the forward that gradient checkpointing repeats in every layer."""
        full = self.trains_language and not self.recipe.options.lora
        trained = "language" if full else "projector"
        flops = training_flops(self.text, rows, self.text_tokens + isolator, self.label_rows, trained)
        flops += 3 * self._adapter_flops(rows, isolator)
        if self.recipe.trainer.gradient_checkpointing:
            flops += self._forward(rows, isolator) - head_flops(self.text, self.label_rows)
        return flops

    def _adapter_flops(self, rows: VisualRows, isolator: int) -> int:
        full = rows.kept + isolator + self.text_tokens
        every = self.adapters_attention + self.adapters_feed_forward
        return 2 * (full * every + rows.skipped * self.adapters_attention)

    def _vision(self) -> int:
        """Tower and projector on the full image, once a step; three times as much where they train."""
        if not self.shape.crops:
            return 0
        tower = tower_flops(self.config, self.shape.crops, self.shape.grid)
        projector = projector_flops(self.config, self.shape.crops, self.shape.grid)
        towers = 3 if any(p.requires_grad for p in self.family.vision_tower.parameters()) else 1
        projectors = 3 if any(p.requires_grad for p in self.family.projector.parameters()) else towers
        return towers * tower + projectors * projector

    def memory(self, modes: Sequence[ModeCost], shards: int, own: int) -> dict[str, float]:
        """Bytes a device, estimated: what the framework itself holds, fragments and buffers are left out.

        Weights in half precision that train have masters in float32, and optimizer states in float32 then: 2 bytes of
        weight, 2 of gradient, 4 and 8. FSDP and DeepSpeed come to the same sum.

        Args:
            modes: of the run, of which the hungriest counts.
            shards: devices that share weights, gradients and optimizer states.
            own: parameters of isolator and summary head.
        """
        four_bit = {id(w) for w in self._quantized()} if self.recipe.options.load_in_4bit else set()
        weights = sum(p.numel() * (NF4_BYTES if id(p) in four_bit else p.itemsize) for p in self.model.parameters())
        gradients = sum(p.numel() * p.itemsize for p in self.model.parameters() if p.requires_grad) + 4 * own
        optimizer = str(getattr(self.recipe.trainer.optim, "value", self.recipe.trainer.optim))
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad) + own
        in_half = sum(p.numel() for p in self.model.parameters() if p.requires_grad and p.dtype in HALF)
        with_masters = in_half if self.recipe.trainer.float32_masters is not False else 0
        states = 2 * trained if "8bit" in optimizer else 8 * trained - 4 * (in_half - with_masters)
        found = {
            "weights": (weights + 4 * own) / shards,
            "gradients": gradients / shards,
            "masters": 4 * with_masters / shards,
            "optimizer": states / shards,
            # The optimizer steps on gradients in float32, in the room that the activations have left.
            "activations": max(2 * with_masters / shards, *(mode.samples * self._activations(mode) for mode in modes)),
        }
        return {**found, "total": sum(found.values())}

    def _quantized(self) -> list[nn.Parameter]:
        return [p for p in quantized_weights(self.family.model) if not p.requires_grad]

    def _activations(self, mode: ModeCost) -> float:
        """Bytes that the backward pass needs of one sample.

        Of a layer: norms and residuals 8 d, queries and attended values 3 q, keys and values 4 k, and 4 f in the
        feed-forward network. With checkpointing one layer has these, and each its input. Logits stand three times in
        float32: themselves, their softmax, their gradient.
        """
        args, text = self.recipe.trainer, self.text
        size = 2 if args.bf16 or args.fp16 else next(self.model.parameters()).itemsize
        fed = mode.length - mode.rows.skipped
        layer = size * (
            mode.length * (8 * text.width + 3 * text.query_width + 4 * text.key_width) + 4 * fed * text.feed_forward
        )
        inputs = size * mode.length * text.width
        whole = layer + text.layers * inputs if args.gradient_checkpointing else text.layers * layer
        return whole + 3 * 4 * self.label_rows * text.vocabulary


def _dtype(name: str, config: PreTrainedConfig) -> torch.dtype:
    """The dtype that `load_model` would load in, where the configuration tells; else float32."""
    if name not in DTYPES:
        raise SaccadeError(f"dtype={name!r} is unknown: use one of {', '.join(DTYPES)}")
    found = config.dtype if name == "auto" else getattr(torch, name)
    # Half precision overflows in training, so that `auto` loads it as float32.
    return torch.float32 if name == "auto" and found in (None, torch.float16) else found


def _mode_row(mode: ModeCost) -> dict[str, Any]:
    return {
        "name": mode.name,
        "probability": mode.probability,
        "kept": mode.rows.retained,
        "skipped": mode.rows.skipped,
        "summary": mode.rows.summary,
        "isolator": mode.isolator,
        "length": mode.length,
        "flops": mode.flops,
        "language_flops": mode.language_flops,
    }
