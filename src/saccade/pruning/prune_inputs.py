"""Pruned inference on any stock model: processor outputs in, inputs for `generate` or `forward` out."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saccade.errors import SaccadeError, kind_of
from saccade.families import Family, get_family
from saccade.pruning.isolator import ModeIsolator
from saccade.pruning.prune import WHOLE, clear_errors, places_and_text, prune
from saccade.pruning.pruner import Pruner
from saccade.reducers import PruningConfig, list_reducers
from saccade.tokens import Reduction, VisualContext


@torch.no_grad()
def prune_inputs(
    model: nn.Module,
    inputs: Mapping[str, Any],
    config: PruningConfig | str | Path | None = None,
    *,
    padding_side: str = "left",
    isolator: ModeIsolator | Tensor | str | Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Drop visual tokens from a processed batch.

    The outputs of `generate` on a pruned batch start with the shortened prompt: cut them at
    `outputs[:, pruned["input_ids"].shape[1]:]`.

    Args:
        model: a stock model of a known family, PEFT-wrapped or not.
        inputs: what the model's processor returned with `return_tensors="pt"`, for any number of samples and images.
        config: how tokens are reduced, or the folder of a trained model, which says how it was trained.
        padding_side: "left" for `generate`, "right" for a plain forward.
        isolator: the mode isolator to put before each image, its rows `(l, D)`, or the folder or file that it was
            saved in; by default that of the config.
        options: fields of [`PruningConfig`] that override the config's.

    Returns:
        `input_ids`, `attention_mask`, `position_ids` and, if there are images, `mm_encoder_outputs`.

    Raises:
        SaccadeError: on an unknown family, reducer or option, a budget out of range, an isolator of the wrong width,
            placeholders that do not match the images, or inputs that are incomplete or already pruned.
    """
    config = pruning_config(config, **options)
    family = get_family(model)
    _check_inputs(family, inputs, padding_side)
    pruner = Pruner(config, isolator_rows(family, config.isolator if isolator is None else isolator))
    shorter = prune(family, inputs, pruner, lambda laid: laid.inputs, padding_side=padding_side)
    if "mm_encoder_outputs" not in shorter:
        return shorter
    if config.positions == "original" and padding_side == "left" and not family.uses_mrope:
        shorter = _pad_one_left(shorter, {**family.token_inputs, "input_ids": family.pad_id})
    return shorter


@torch.no_grad()
def reduce_inputs(
    model: nn.Module, inputs: Mapping[str, Any], config: PruningConfig
) -> tuple[VisualContext, Reduction]:
    """The visual tokens of a processed batch with images, and which of them `prune_inputs` keeps.

    Raises:
        SaccadeError: as `prune_inputs`.
    """
    family = get_family(model)
    isolator, pruner = isolator_rows(family, config.isolator), Pruner(config)
    with clear_errors():
        encoded = family.encode(inputs, pruner.needs)
        places, text = places_and_text(family, inputs, encoded)
        return encoded.context, pruner.choose(encoded, places, text, 0 if isolator is None else len(isolator))


def pruning_config(config: PruningConfig | str | Path | None = None, **options: Any) -> PruningConfig:
    """The config given directly, by the folder of a trained model, or by options alone.

    Raises:
        SaccadeError: on anything else, or an unknown option.
    """
    if config is None:
        config = PruningConfig()
    elif isinstance(config, (str, Path)):
        if config in list_reducers():
            raise SaccadeError(f"config={config!r} is the name of a reducer: write reducer={config!r}")
        return PruningConfig.from_pretrained(config, **options)
    elif not isinstance(config, PruningConfig):
        raise SaccadeError(f"config is {kind_of(config)}: give a PruningConfig, or the folder of a model")
    return config.replace(**options) if options else config


def isolator_rows(family: Family, isolator: ModeIsolator | Tensor | str | Path | None) -> Tensor | None:
    """The rows `(l, D)` of an isolator, on the model's device unless its weights are offloaded, or None.

    Raises:
        SaccadeError: if it is not an isolator, or was trained for a model of another width.
    """
    if isolator is None:
        return None
    if isinstance(isolator, (str, Path)):
        isolator = ModeIsolator.from_pretrained(isolator)
    rows = isolator() if isinstance(isolator, nn.Module) else isolator
    if not isinstance(rows, Tensor) or rows.ndim != 2:
        raise SaccadeError(
            f"isolator is {kind_of(isolator)} and not rows (length, width): give a ModeIsolator, or its folder"
        )
    width = family.model.config.get_text_config().hidden_size
    if rows.shape[-1] != width:
        raise SaccadeError(f"isolator has width {rows.shape[-1]}, the model {width}: it was trained for another model")
    device = family.model.device
    return rows if device.type == "meta" else rows.to(device)


def _check_inputs(family: Family, inputs: Mapping[str, Any], padding_side: str) -> None:
    if padding_side not in ("left", "right"):
        raise SaccadeError(f"padding_side={padding_side!r} is unknown: use 'left' for generate, 'right' for a forward")
    if "mm_encoder_outputs" in inputs:
        raise SaccadeError(
            "inputs has 'mm_encoder_outputs', so it is pruned already: prune what the processor returned"
        )
    for name in ("input_ids", "attention_mask"):
        if name not in inputs:
            raise SaccadeError(f"inputs has no {name!r}: {WHOLE}")
        if not isinstance(inputs[name], Tensor) or inputs[name].ndim != 2:
            raise SaccadeError(f"inputs: {name!r} is not a tensor (samples, tokens): {WHOLE}")
    placeholders = 0 if family.has_images(inputs) else int(family.placeholder(inputs["input_ids"]).sum())
    if placeholders:
        raise SaccadeError(f"inputs has {placeholders} placeholders of visual tokens, but no 'pixel_values': {WHOLE}")


def _pad_one_left(inputs: dict[str, Any], fills: Mapping[str, int]) -> dict[str, Any]:
    """Add one column of left padding.

    `generate` discards an all-ones mask, and a forward with neither mask nor cache takes gaps in the positions for
    borders between packed sequences.
    """
    return {
        name: torch.nn.functional.pad(value, (1, 0), value=fills.get(name, 0)) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }
