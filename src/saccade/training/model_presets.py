"""Stock configurations of released models, for a dry run without downloads."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoConfig, LlavaNextConfig, PreTrainedConfig

from saccade.data.scenes import PATCH_SIZE
from saccade.errors import SaccadeError
from saccade.families.chain_of_sight import ChainOfSightConfig, grown_config
from saccade.tiny import build_tiny_llava, build_tiny_processor
from saccade.tiny.model import GRID

PIXELS = 672


@dataclass(frozen=True)
class Shape:
    """A model's configuration, and the image that it is counted for.

    Args:
        crops: of the image that the vision tower sees; 0 without a tower.
        grid: patches of one crop (rows, columns).
        visual_tokens: what the language model receives of the image.
        newlines: how many of these are newlines of an image in crops.
        hub_ids: checkpoints on the hub with this shape.
        folders: where shipped recipes expect a model of this shape that `saccade assemble` has written.
    """

    name: str
    config: Callable[[], PreTrainedConfig]
    crops: int
    grid: tuple[int, int]
    visual_tokens: int
    newlines: int = 0
    hub_ids: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()


def _tiny() -> PreTrainedConfig:
    return build_tiny_llava(build_tiny_processor()).config


def _tiny_scales() -> PreTrainedConfig:
    values = {**_tiny().to_dict(), "model_type": ChainOfSightConfig.model_type}
    return grown_config(ChainOfSightConfig.from_dict(values), GRID * PATCH_SIZE)


def _tiny_crops() -> PreTrainedConfig:
    values, side = _tiny().to_dict(), GRID * PATCH_SIZE
    values["vision_config"]["image_size"] = side // 2
    return LlavaNextConfig.from_dict({**values, "model_type": "llava_next", "image_grid_pinpoints": [[side, side]]})


def shape_of(name: str, config: PreTrainedConfig) -> Shape:
    """The shape of a model by its configuration, with an image of 672 x 672 pixels if the size is not fixed."""
    vision = getattr(config, "vision_config", None)
    crops, newlines = 1, 0
    if config.model_type == "llava":
        side = vision.image_size // vision.patch_size
        tokens, grid = side * side, (side, side)
    elif config.model_type == "chain_of_sight":
        side, tokens = config.patches_side, config.image_seq_length
        grid = (side, side)
    elif config.model_type == "llava_next":
        # A thumbnail and 2 x 2 crops, with a newline after each line of the crops.
        side = vision.image_size // vision.patch_size
        tokens, grid, crops, newlines = 5 * side * side + 2 * side, (side, side), 5, 2 * side
    elif config.model_type in ("qwen2_5_vl", "qwen3_vl"):
        merge = vision.spatial_merge_size
        side = PIXELS // (vision.patch_size * merge)
        tokens, grid = side * side, (side * merge, side * merge)
    else:
        raise SaccadeError(
            f"model={name!r}: images of model_type={config.model_type!r} cannot be counted yet, only those of llava, "
            "llava_next, chain_of_sight, qwen2_5_vl and qwen3_vl"
        )
    return Shape(name, lambda: config, crops, grid, tokens, newlines)


def _presets() -> dict[str, Shape]:
    configs: dict[str, tuple[Callable[[], PreTrainedConfig], dict[str, Any]]] = {
        "tiny": (_tiny, {"hub_ids": ["tiny"]}),
        "tiny-chain-of-sight": (_tiny_scales, {"folders": ["out/chain-of-sight/grown"]}),
        "tiny-llava-hd": (_tiny_crops, {"folders": ["out/llava-hd/pretrain"]}),
    }
    text = Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")
    for name, entry in yaml.safe_load(text)["shapes"].items():
        values = entry.pop("config")
        configs[name] = (lambda values=values: AutoConfig.for_model(**deepcopy(values))), entry
    return {
        name: replace(shape_of(name, config()), config=config, **{key: tuple(one) for key, one in places.items()})
        for name, (config, places) in configs.items()
    }


SHAPES = _presets()
"""The shapes that recipes can be planned for, by name."""
