"""Stock configurations of released models, for a dry run without downloads."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
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
    """A model's shape, and the image size that it is counted for; `model_presets.yaml` describes the fields."""

    name: str
    description: str
    config: Callable[[], PreTrainedConfig]
    crops: int
    grid: tuple[int, int]
    visual_tokens: int
    hub_ids: tuple[str, ...] = ()
    newlines: int = 0
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


def _stock(values: Mapping[str, Any]) -> PreTrainedConfig:
    return AutoConfig.for_model(**deepcopy(values))


def _presets() -> dict[str, Shape]:
    text = Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")
    side = (GRID, GRID)
    shapes = {"tiny": Shape("tiny", "the embedded LLaVA, 96 x 96 pixels", _tiny, 1, side, 144, ("tiny",))}
    name, about = "tiny-chain-of-sight", "the embedded Chain-of-Sight, 96 x 96 pixels, grown"
    shapes[name] = Shape(name, about, _tiny_scales, 1, side, 224, folders=("out/chain-of-sight/grown",))
    name, about, place = "tiny-llava-hd", "the embedded LLaVA-HD, 96 x 96 pixels, 5 crops", "out/llava-hd/pretrain"
    half = (GRID // 2, GRID // 2)
    shapes[name] = Shape(name, about, _tiny_crops, 5, half, 192, newlines=GRID, folders=(place,))
    for name, entry in yaml.safe_load(text)["shapes"].items():
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
        values["config"] = partial(_stock, entry["config"])
        shapes[name] = Shape(name, **values)
    return shapes


SHAPES = _presets()
"""The shapes that recipes can be planned for, by name."""


def shape_of(name: str, config: PreTrainedConfig) -> Shape:
    """The shape of a model by its configuration, with an image of 672 x 672 pixels if the size is not fixed."""
    vision = getattr(config, "vision_config", None)
    if config.model_type == "llava":
        side = vision.image_size // vision.patch_size
        tokens, grid, crops, newlines = side * side, (side, side), 1, 0
    elif config.model_type == "chain_of_sight":
        side, tokens = config.patches_side, config.image_seq_length
        grid, crops, newlines = (side, side), 1, 0
    elif config.model_type == "llava_next":
        # A thumbnail and 2 x 2 crops, with a newline after each line of the crops.
        side = vision.image_size // vision.patch_size
        tokens, grid, crops, newlines = 5 * side * side + 2 * side, (side, side), 5, 2 * side
    elif config.model_type in ("qwen2_5_vl", "qwen3_vl"):
        merge = vision.spatial_merge_size
        side = PIXELS // (vision.patch_size * merge)
        tokens, grid, crops, newlines = side * side, (side * merge, side * merge), 1, 0
    else:
        raise SaccadeError(
            f"model={name!r}: images of model_type={config.model_type!r} cannot be counted yet, only those of llava, "
            "llava_next, chain_of_sight, qwen2_5_vl and qwen3_vl"
        )
    return Shape(name, config.model_type, lambda: config, crops, grid, tokens, newlines=newlines)
