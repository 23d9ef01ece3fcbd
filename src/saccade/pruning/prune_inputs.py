"""Pruned inference on any stock model: processor outputs in, inputs for `generate` or `forward` out."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saccade.errors import SaccadeError
from saccade.families import Family, get_family
from saccade.families.collect import encode_for
from saccade.pruning.isolator import ModeIsolator
from saccade.pruning.shorten import check_newlines, check_positions, reduce, shorten
from saccade.reducers import check_resolution_budget, get_reducer
from saccade.tokens import Reduction, TokenBudget, VisualContext, splice

SIZES = ("image_sizes", "image_sizes_videos", "image_grid_thw", "video_grid_thw")
"""What a processor returns beside pixels, and what a family cannot read them without."""
WHOLE = "pass all that the processor returned with return_tensors='pt'"


@torch.no_grad()
def prune_inputs(
    model: nn.Module,
    inputs: Mapping[str, Any],
    reducer: str = "divprune",
    prune_ratio: float | None = None,
    isolator: ModeIsolator | Tensor | str | Path | None = None,
    positions: str = "compact",
    padding_side: str = "left",
    reducer_options: Mapping[str, Any] | None = None,
    newlines: str = "keep",
    keep_tokens: int | None = None,
    budget: str = "crop",
    adaptive: bool = False,
) -> dict[str, Any]:
    """Drop visual tokens from a processed batch.

    The outputs of `generate` on a pruned batch start with the shortened prompt: cut them at
    `outputs[:, pruned["input_ids"].shape[1]:]`.

    Args:
        model: a stock model of a known family, PEFT-wrapped or not.
        inputs: what the model's processor returned with `return_tensors="pt"`, for any number of samples and images.
        reducer: name of the method that chooses the tokens, see `saccade reducers`.
        prune_ratio: share of visual tokens to drop, in [0, 1); 0.9 where it and `keep_tokens` are left out.
        isolator: the trained mode isolator to put before each image, or the folder or file it was saved in. None, as
            published for inference, uses none.
        positions: "compact" or "original", as the model was trained. Models with several position axes (Qwen-VL)
            always keep the original ones.
        padding_side: "left" for `generate`, "right" for a plain forward.
        reducer_options: keyword options of the reducer.
        newlines: "keep" or "drop", for the newline tokens of anyres images.
        keep_tokens: number of tokens to keep, in place of the ratio.
        budget: what the ratio or the number is of: each "crop" or frame, all crops of an "image" or frames of a video,
            or all images and videos of a "sample".
        adaptive: share the batch's tokens out by how varied the images are, see `saccade.pruning.adaptive_counts`. A
            sample's tokens then depend on the samples beside it.

    Returns:
        `input_ids`, `attention_mask`, `position_ids` and, if there are images, `mm_encoder_outputs`.

    Raises:
        SaccadeError: on an unknown family, reducer or position mode, a ratio beside a number of tokens, a budget out
            of range or one that the reducer cannot follow, an isolator of another width, placeholders that do not
            match the images, or inputs that lack something or are pruned already.
    """
    tokens = TokenBudget(prune_ratio, keep_tokens, budget, adaptive)
    check_positions(positions)
    check_newlines(newlines)
    if reducer_options is not None and not isinstance(reducer_options, Mapping):
        raise SaccadeError(f"reducer_options={reducer_options!r}: give a mapping of options to values")
    chosen = get_reducer(reducer, **(reducer_options or {}))
    check_resolution_budget(chosen, tokens)
    family = get_family(model)
    _check_inputs(family, inputs, padding_side)
    text_config = family.model.config.get_text_config()
    pad_id = text_config.pad_token_id or 0
    if not family.has_images(inputs):
        return _pad_again(family, inputs, pad_id, padding_side)
    rows = _isolator_rows(isolator, text_config.hidden_size, family.model.device)
    try:
        encoded = encode_for(family, chosen, inputs, tokens)
        reduction = reduce(encoded.context, chosen, tokens, newlines)
        shortened = shorten(
            family,
            encoded,
            inputs,
            reduction,
            isolator=rows,
            positions=positions,
            padding_side=padding_side,
            pad_id=pad_id,
        ).inputs
    except SaccadeError:
        raise
    except KeyError as error:
        if error.args[0] not in SIZES:
            raise
        raise SaccadeError(f"inputs has no {error}: {WHOLE}") from error
    except ValueError as error:
        raise SaccadeError(f"inputs: {error}; the text needs one image placeholder run for each image") from error
    if positions == "original" and padding_side == "left" and not family.several_axes:
        shortened = _pad_one_left(shortened, {**family.token_inputs, "input_ids": pad_id})
    return shortened


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
            raise SaccadeError(f"inputs: {name!r} is no tensor (samples, tokens): {WHOLE}")
    placeholders = 0 if family.has_images(inputs) else int(family.placeholder(inputs["input_ids"]).sum())
    if placeholders:
        raise SaccadeError(f"inputs has {placeholders} placeholders of visual tokens, but no 'pixel_values': {WHOLE}")


def _pad_again(family: Family, inputs: Mapping[str, Any], pad_id: int, padding_side: str) -> dict[str, Any]:
    """A batch without images, padded on the side that was asked for."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    empty = VisualContext(features=torch.zeros(0, 1, 1, device=ids.device))
    nothing = Reduction(index=torch.zeros(0, 1, dtype=torch.long, device=ids.device), dense=True)
    spliced = splice(
        ids, mask, torch.zeros_like(ids, dtype=torch.bool), empty, nothing, pad_id=pad_id, padding_side=padding_side
    )
    extras = {name: spliced.gather(inputs[name], fill) for name, fill in family.token_inputs.items() if name in inputs}
    # On every axis text counts alike.
    positions = spliced.position_ids.expand(3, -1, -1) if family.several_axes else spliced.position_ids
    return {
        "input_ids": spliced.input_ids,
        "attention_mask": spliced.attention_mask,
        "position_ids": positions,
        **extras,
    }


def _isolator_rows(
    isolator: ModeIsolator | Tensor | str | Path | None, width: int, device: torch.device
) -> Tensor | None:
    """`(l, D)` on the model's device, or None."""
    if isolator is None:
        return None
    if isinstance(isolator, (str, Path)):
        isolator = ModeIsolator.load(isolator)
    rows = isolator() if isinstance(isolator, nn.Module) else isolator
    if not isinstance(rows, Tensor) or rows.ndim != 2:
        raise SaccadeError(
            f"isolator is a {type(isolator).__name__} and no rows (length, width): give a ModeIsolator, or its folder"
        )
    if rows.shape[-1] != width:
        raise SaccadeError(f"isolator has width {rows.shape[-1]}, the model {width}: it was trained for another model")
    return rows.to(device)


def _pad_one_left(inputs: dict[str, Any], fills: Mapping[str, int]) -> dict[str, Any]:
    """Add one column of left padding.

    `generate` throws an all-ones mask away, and a forward with neither mask nor cache reads the gaps in the positions
    as borders between packed sequences.
    """
    return {
        name: torch.nn.functional.pad(value, (1, 0), value=fills.get(name, 0)) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }
