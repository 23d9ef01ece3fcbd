"""Grow a Chain-of-Sight model to larger images and one finer scale, with the weights that it has learned."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import AutoModelForImageTextToText

from saccade.dualspeed.weights import base_of
from saccade.errors import SaccadeError
from saccade.families.chain_of_sight import ChainOfSightConfig, grown_config
from saccade.files import check_new_folder
from saccade.training.assemble import resize_plainly, save_checked
from saccade.training.export import check_shard_size
from saccade.training.models import ModelOptions, check_family, load_model

POSITIONS = "vision_tower.embeddings.position_embedding.weight"
QUERIES = "multi_modal_projector.queries."


def grow_model(source: str | Path, output: str | Path, image_size: int, max_shard_size: str = "5GB") -> dict[str, Any]:
    """Write a Chain-of-Sight model for images of another size, with a finer scale of windows of 2 x 2 patches.

    Windows keep their size in patches, so that a larger image has more of them; that of the whole image stays one. The
    new scale's queries are those of the finest one before, position embeddings of the tower are interpolated, and all
    other weights stay as they are. From 224 to 448 px, 16 + 64 tokens become 16 + 256 + 1,024.

    Args:
        source: folder of a model that `saccade assemble --projector resampler` wrote, or that was trained from it.
        output: folder to create; it must not exist, or be empty.
        image_size: pixels along an edge, a multiple of those before; the same number only adds the scale.
        max_shard_size: size above which the weights are split into several files.

    Returns:
        `output`, `image_size`, `scales` (tokens of each, coarse to fine), `visual_tokens`, `parameters`.

    Raises:
        SaccadeError: if the model has another projector, or its windows do not fit the new size; raised before weights
            are read.
        OSError: if the folder cannot be written; nothing is left behind.
    """
    output = Path(output)
    check_new_folder(output, "output")
    check_shard_size(max_shard_size)
    if "chain_of_sight" not in check_family(str(source)).model_types:
        raise SaccadeError(f"model={str(source)!r} has no resampler that grows: name a Chain-of-Sight model")
    config = grown_config(ChainOfSightConfig.from_pretrained(base_of(source) or source), image_size)
    model, processor = load_model(ModelOptions(model=str(source)))
    with torch.device("meta"):
        grown = AutoModelForImageTextToText.from_config(config, dtype=model.dtype)
    grown.load_state_dict(grown_weights(model.state_dict(), config), assign=True)
    grown.tie_weights()
    grown.generation_config = model.generation_config
    resize_plainly(processor.image_processor, image_size)
    processor.num_additional_image_tokens += config.tokens_beyond_patches - model.config.tokens_beyond_patches
    save_checked(grown, processor, output, max_shard_size)
    return {
        "output": str(output),
        "image_size": image_size,
        "scales": [side * side for side in config.sides],
        "visual_tokens": config.image_seq_length,
        "parameters": sum(parameter.numel() for parameter in grown.parameters()),
    }


def grown_weights(weights: Mapping[str, Tensor], config: ChainOfSightConfig) -> dict[str, Tensor]:
    """The weights of a model for the grown `config`, made from those of the model before."""
    weights = dict(weights)
    finest = len(config.scales) - 1
    for name, values in list(weights.items()):
        if name.endswith(POSITIONS):
            weights[name] = _resized(values, config.patches_side)
        elif name.endswith(f"{QUERIES}{finest - 1}"):
            weights[f"{name.removesuffix(str(finest - 1))}{finest}"] = values.clone()
    return weights


def _resized(positions: Tensor, side: int) -> Tensor:
    """Position embeddings `(before + n, Dv)` of a square of n patches, interpolated to one of `side` x `side`."""
    before = int(positions.shape[0] ** 0.5) ** 2  # a class token makes it one more than a square
    extra, square = positions.split([positions.shape[0] - before, before])
    edge = round(before**0.5)
    square = square.float().T.reshape(1, -1, edge, edge)
    square = interpolate(square, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat((extra, square.flatten(2)[0].T.to(positions.dtype)))
