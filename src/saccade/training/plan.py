"""Estimate what training a recipe takes, before anything is loaded: weights, tokens, operations, memory.

The model is built on the meta device, so neither its weights nor an accelerator are needed.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig

from saccade.dualspeed.modes import ModeConfig
from saccade.dualspeed.packing import check_packing
from saccade.dualspeed.trainer import freeze_parts
from saccade.errors import SaccadeError
from saccade.families import family_class, get_family
from saccade.families.cache import check_cacheable
from saccade.families.padding import check_aspect_ratio
from saccade.recipes import earlier_stage, find_recipe, parse_overrides, read_recipe
from saccade.reducers import PruningConfig
from saccade.training.checks import check_chat_here
from saccade.training.costs import Costs
from saccade.training.lengths import SampleLength, recipe_lengths
from saccade.training.model_presets import SHAPES, Shape, shape_of
from saccade.training.models import quantized_weights
from saccade.training.recipe import Recipe, load_recipe, make_recipe
from saccade.training.run import check_lora, lora_config
from saccade.values import check_counts

ANYWHERE = ("--use_cpu", "true")
PUBLISHED = {
    "llava-1.5-7b": {"stage one": 5.8, "stage two": 1.9, "both stages": 2.1},
    "llava-next-7b": {"both stages": 4.0},
}
"""Speed-ups in seconds on one L40 with DivPrune, p = 0.9, r = 0.1 and LoRA (DualSpeed, arXiv 2602.03815). That of
LLaVA-1.5's stage two is not published but an estimate derived from the other two."""


def plan_recipe(
    path: str | Path,
    overrides: Sequence[str] = (),
    text_tokens: int | None = None,
    label_rows: int | None = None,
    images: int | None = None,
    devices: int = 8,
    shards: int = 1,
) -> dict[str, Any]:
    """Estimate what training a recipe takes, and the stage before it if that is a recipe in the same folder.

    Args:
        path: path or name of the recipe.
        overrides: fields, as for `load_recipe`.
        text_tokens: text tokens of a sample; by default, samples are as found by `recipe_lengths`.
        label_rows: how many of these have labels; by default half.
        images: images of such a sample; by default one.
        devices: number of devices that train in parallel.
        shards: number of devices that share weights, gradients and optimizer states (FSDP, ZeRO-3); 1 if each has all.

    Returns:
        `model`, `parameters`, `visual_tokens`, `modes`, `expected`, `memory` in bytes per device, `batch`, `lengths`,
        `schedule`: each stage with its samples and its speed-up, and the overall speed-up; `published`: the paper's
            speed-ups in time, if the recipe has the paper's settings; `chat_checked`: false if the model's processor
            is not available.

    Raises:
        SaccadeError: on bad input, a model whose configuration is not available, or a chat template from which answers
            and their end tokens cannot be learned.
    """
    given = _given_lengths(text_tokens, label_rows, images)
    check_counts(devices=devices, shards=shards)
    if devices % shards:
        raise SaccadeError(f"shards={shards!r}: give a number that divides the {devices} devices")
    # Planning must also work on a machine without a GPU.
    recipe = load_recipe(path, [*overrides, *ANYWHERE])
    # A template that does not render images in questions would fail later, when tokens are counted.
    chat_checked = check_chat_here(recipe)
    plan, stage = _plan_stage(recipe, path, given, devices, shards)
    stages = [stage]
    before = earlier_stage(path, recipe.options.model)
    if before is not None:
        fields = {name: value for name, value in read_recipe(before).items() if name != "pretrain"}
        first = make_recipe({**fields, **parse_overrides(ANYWHERE)}, source=str(before))
        stages.insert(0, _plan_stage(first, before, None, devices, shards)[1])
    baseline, expected = (sum(one["samples"] * one[name] for one in stages) for name in ("baseline_flops", "flops"))
    return {
        **plan,
        "schedule": {"stages": stages, "speedup": baseline / expected},
        "published": published_speedups(recipe, plan["shape"], len(stages)),
        "chat_checked": chat_checked,
    }


def _given_lengths(text_tokens: int | None, label_rows: int | None, images: int | None) -> SampleLength | None:
    if text_tokens is None:
        for name, value in {"label_rows": label_rows, "images": images}.items():
            if value is not None:
                raise SaccadeError(f"{name}={value!r} without text_tokens: give both, or neither")
        return None
    images = 1 if images is None else images
    check_counts(text_tokens=text_tokens, images=images)
    label_rows = max(1, text_tokens // 2) if label_rows is None else label_rows
    if not 1 <= label_rows <= text_tokens:
        raise SaccadeError(f"label_rows={label_rows!r}: give from 1 to the {text_tokens} text tokens")
    return SampleLength(text_tokens, label_rows, images)


def _plan_stage(
    recipe: Recipe, path: str | Path, given: SampleLength | None, devices: int, shards: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The plan of one recipe, and its entry in the schedule."""
    args = recipe.trainer
    check_lora(recipe)
    shape, config, model_name = find_shape(recipe, path)
    check_aspect_ratio(family_class(config), args.image_aspect_ratio)
    limit = args.max_length if args.fit_length is None else None
    images = 1 if given is None else given.images
    if limit is not None and images * shape.visual_tokens >= limit:
        have = "an image" if images == 1 else f"{images} images"
        raise SaccadeError(
            f"max_length={limit} cuts image tokens: {have} of {shape.name} {'has' if images == 1 else 'have'} "
            f"{images * shape.visual_tokens}, give more, and room for text, or fit_length, which drops some of them"
        )
    model = meta_model(recipe, config)
    family = get_family(model)
    for mode in args.all_modes():
        family.check_gives(mode.needs)
    if args.feature_cache is not None:
        check_cacheable(family, args.feature_cache)
    if args.padding_free:
        check_packing(family)
    if given is None:
        lengths = recipe_lengths(recipe, model_name)
    else:
        lengths = replace(recipe_lengths(recipe, model_name, samples=1), samples=(given,), source="as given")
    cut = [sample.cut(limit, shape.visual_tokens) for sample in lengths.samples]
    cost = Costs(recipe, model, shape, config, Counter(cut))
    modes = cost.modes()
    baseline = cost.of(ModeConfig("all_tokens", 1.0, "keep"))
    expected = sum(mode.probability * mode.flops for mode in modes)
    language = sum(mode.probability * mode.language_flops for mode in modes)
    own = cost.own_parameters()
    micro, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    batch = micro * accumulation * devices
    sizes = {"per_device": micro, "accumulation": accumulation, "devices": devices, "shards": shards}
    plan = {
        "recipe": str(find_recipe(path)),
        "model": recipe.options.model,
        "shape": shape.name,
        "parameters": {**cost.parameters(), "own": own},
        "visual_tokens": shape.visual_tokens,
        "modes": [asdict(mode) for mode in modes],
        "baseline": asdict(baseline),
        "expected": {
            "visual_rows": sum(mode.probability * (mode.kept + mode.skipped + mode.summary) for mode in modes),
            "length": sum(mode.probability * mode.length for mode in modes),
            "flops": expected,
            "speedup": baseline.flops / expected,
            "speedup_language": baseline.language_flops / language,
        },
        "memory": cost.memory([mode for mode in modes if mode.probability], shards, own),
        "batch": {**sizes, "global": batch},
        "lengths": {**replace(lengths, samples=tuple(cut)).means(), "source": lengths.source},
    }
    trained = lengths.records - round((recipe.options.eval_share or 0.0) * lengths.records)
    stage = {
        "recipe": plan["recipe"],
        "samples": args.max_steps * batch if args.max_steps > 0 else trained * args.num_train_epochs,
        "speedup": baseline.flops / expected,
        "baseline_flops": baseline.flops,
        "flops": expected,
        "lengths": plan["lengths"],
    }
    return plan, stage


def published_speedups(recipe: Recipe, shape: str, stages: int) -> dict[str, float]:
    """The paper's speed-ups by stage for a recipe with its settings, if `stages` are planned; empty for others."""
    options, args = recipe.options, recipe.trainer
    setting = (args.pruning, args.slow_probability, args.modes, args.skip_vision)
    adapters = args.freeze_language_model or (options.lora and not options.load_in_4bit)
    if setting != (PruningConfig("divprune", prune_ratio=0.9), 0.1, None, None) or not adapters:
        return {}
    own = "stage one" if args.freeze_language_model else "stage two"
    names = {own} | ({"both stages"} if stages > 1 else set())
    return {name: value for name, value in PUBLISHED.get(shape, {}).items() if name in names}


def find_shape(recipe: Recipe, path: str | Path) -> tuple[Shape, PreTrainedConfig, str]:
    """Shape and configuration of a recipe's model, found offline, and the model's name or folder."""
    model = recipe.options.model
    for shape in SHAPES.values():
        if model in shape.hub_ids or (model in shape.folders and not Path(model).is_dir()):
            return shape, shape.config(), model
    before = None if Path(model).is_dir() else earlier_stage(path, model)
    if before is not None:
        options = replace(recipe.options, model=read_recipe(before)["model"])
        return find_shape(replace(recipe, options=options), before)
    trust = recipe.trainer.trust_remote_code
    try:
        if (Path(model) / "adapter_config.json").is_file():
            base = PeftConfig.from_pretrained(model).base_model_name_or_path
            return find_shape(replace(recipe, options=replace(recipe.options, model=base)), path)
        config = AutoConfig.from_pretrained(model, local_files_only=True, trust_remote_code=trust)
    except (OSError, ValueError, KeyError) as error:
        known = ", ".join(name for shape in SHAPES.values() for name in shape.hub_ids)
        raise SaccadeError(
            f"model={model!r} is not a folder with a readable config.json, not in the hub's cache, and none of "
            f"{known}: put its config.json into a folder and give that"
        ) from error
    family_class(config)
    return shape_of(model, config), config, model


def meta_model(recipe: Recipe, config: PreTrainedConfig) -> nn.Module:
    """The model without weights, with adapters and frozen parts as in training."""
    options, args = recipe.options, recipe.trainer
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=_dtype(options.dtype, config))
        if options.load_in_4bit:  # as by `peft.prepare_model_for_kbit_training`
            quantized = {id(weight) for weight in quantized_weights(model)}
            for parameter in model.parameters():
                parameter.data = parameter.data if id(parameter) in quantized else parameter.data.float()
        if options.lora:
            return get_peft_model(model, lora_config(model, recipe))
    freeze_parts(get_family(model), args)
    return model


def _dtype(name: str, config: PreTrainedConfig) -> torch.dtype:
    """The dtype that `load_model` would load in, if the configuration says so; else float32."""
    found = config.dtype if name == "auto" else getattr(torch, name)
    # float16 overflows in training, so `auto` loads it as float32.
    return torch.float32 if name == "auto" and found in (None, torch.float16) else found
