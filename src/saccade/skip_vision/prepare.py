"""Convert processor outputs to the inputs of a skipping model."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from saccade.errors import SaccadeError
from saccade.families import Encoded, Family
from saccade.pruning import prune
from saccade.skip_vision.skipper import Skipper

PER_IMAGE = (
    "image_sizes",
    "image_sizes_videos",
    "batch_num_images",
    "image_grid_thw",
    "video_grid_thw",
    "second_per_grid_ts",
    "mm_token_type_ids",
)
"""Processor outputs that describe images and videos and are consumed along with them."""


def processor_outputs(family: Family, given: Mapping[str, Any]) -> dict[str, Any]:
    """What a processor returned, among other arguments of `forward` or `generate`."""
    names = {"input_ids", "attention_mask", *family.vision_inputs, *family.token_inputs, *PER_IMAGE}
    return {name: value for name, value in given.items() if name in names and value is not None}


def prepare(
    skipper: Skipper,
    family: Family,
    inputs: Mapping[str, Any],
    labels: Tensor | None = None,
    padding_side: str | None = None,
    encoded: Encoded | None = None,
) -> dict[str, Any]:
    """See `SkipVision.prepare`."""
    if padding_side not in (None, "left", "right"):
        raise SaccadeError(f"padding_side={padding_side!r}: use 'left' or 'right'")
    if inputs.get("input_ids") is None:
        raise SaccadeError("inputs has no 'input_ids': pass what the processor returned with return_tensors='pt'")
    inputs = dict(inputs)
    labels = inputs.pop("labels", None) if labels is None else labels
    if inputs.get("attention_mask") is None:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if padding_side is None:
        padding_side = "left" if bool(inputs["attention_mask"][:, -1].all()) else "right"
    laid = prune(family, inputs, skipper, lambda laid: laid, encoded=encoded, labels=labels, padding_side=padding_side)
    return laid.inputs if labels is None else {**laid.inputs, "labels": laid.labels}
