"""From processor outputs to the inputs of a skipping model: encode, compose, lay out."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from saccade.errors import SaccadeError
from saccade.families import Encoded, Family
from saccade.families.collect import encode_for
from saccade.skip_vision.compose import compose, rows_per_feature_row
from saccade.skip_vision.config import SkipVisionConfig
from saccade.skip_vision.language import ROLES_KEYWORD
from saccade.skip_vision.summary import SummaryHead
from saccade.tokens import TokenBudget, VisualContext, find_blocks, lay_out

PER_IMAGE = (
    "image_sizes",
    "image_sizes_videos",
    "batch_num_images",
    "image_grid_thw",
    "video_grid_thw",
    "second_per_grid_ts",
    "mm_token_type_ids",
)
"""Processor outputs about images and videos that are used up with them."""


def processor_outputs(family: Family, given: Mapping[str, Any]) -> dict[str, Any]:
    """What a processor returned, among other arguments of `forward` or `generate`."""
    names = {"input_ids", "attention_mask", *family.vision_inputs, *family.token_inputs, *PER_IMAGE}
    return {name: value for name, value in given.items() if name in names and value is not None}


def encode(family: Family, config: SkipVisionConfig, inputs: Mapping[str, Any], labels: Tensor | None) -> Encoded:
    """Encode the images with what the split and the merge need to know of them."""
    reducer = config.split_reducer()
    if reducer is None:
        return family.encode(inputs, config.merge_needs, labels=labels)
    return encode_for(family, reducer, inputs, TokenBudget(), labels, config.merge_needs)


def prepare(
    family: Family,
    config: SkipVisionConfig,
    head: SummaryHead | None,
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
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    inputs["attention_mask"] = mask
    if padding_side is None:
        padding_side = "left" if bool(mask[:, -1].all()) else "right"
    placeholder = family.placeholder(ids)
    several = family.several_axes
    try:
        if encoded is None and family.has_images(inputs):
            encoded = encode(family, config, inputs, labels)
        if encoded is None:
            blocks = find_blocks(placeholder, VisualContext(features=torch.zeros(0, 1, 1, device=ids.device)))
            role = source = blocks.token
        else:
            blocks = find_blocks(placeholder, encoded.context)
            composed = compose(family, config, head, encoded, blocks)
            role, source = composed.role, composed.source
        layout = lay_out(
            ids,
            mask,
            placeholder,
            blocks,
            role,
            source,
            position_ids=family.full_positions(inputs) if several and encoded is not None else None,
            labels=labels,
            pad_id=family.model.config.get_text_config().pad_token_id or 0,
            padding_side=padding_side,
        )
    except SaccadeError:
        raise
    except ValueError as error:
        raise SaccadeError(f"inputs: {error}; the text needs one image placeholder run for each image") from error
    positions = layout.position_ids
    prepared = {
        "input_ids": layout.input_ids,
        "attention_mask": layout.attention_mask,
        # On every axis text counts alike.
        "position_ids": positions.expand(3, -1, -1) if several and positions.dim() == 2 else positions,
        ROLES_KEYWORD: layout.role,
    }
    for name, fill in family.token_inputs.items():
        if inputs.get(name) is not None:
            prepared[name] = layout.gather(inputs[name], fill, summary=fill)
    if encoded is not None:
        rows = [
            rows_per_feature_row(composed.rows(layer), blocks, encoded.context.shape[0])
            for layer in (composed.features, *composed.deeper)
        ]
        prepared["mm_encoder_outputs"] = family.wrap_features(rows[0], encoded, rows[1:])
    if labels is not None:
        prepared["labels"] = layout.labels
    return prepared
