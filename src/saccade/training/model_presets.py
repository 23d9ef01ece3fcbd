"""Stock configurations of real models, built in code without downloads."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen3VLConfig,
)

from saccade.errors import SaccadeError
from saccade.tiny import build_tiny_llava, build_tiny_processor

CLIP_LARGE_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
VICUNA_7B = {
    "vocab_size": 32064,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
}
VICUNA_13B = {
    **VICUNA_7B,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
}
LLAMA3_8B = {
    **VICUNA_7B,
    "vocab_size": 128256,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}
LLAVA_LLAMA3 = {**LLAMA3_8B, "vocab_size": 128320}
PIXELS = 672
GRID_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


@dataclass(frozen=True)
class Shape:
    """A model's shape, and the image size that it is counted for.

    Args:
        name: its name on the command line.
        description: one line.
        config: makes the stock configuration.
        crops: number of crops of the image that the vision tower sees.
        grid: patches (rows, columns) of one crop.
        visual_tokens: number of tokens that the language model receives for the image.
        hub_ids: checkpoints on the hub with this shape.
        newlines: how many of the visual tokens are newlines of an image in crops.
        folders: folders in which the shipped recipes expect a model of this shape written by `saccade assemble`.
    """

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


def _llava(text: dict[str, int], image_token_id: int = 32000, crops: list | None = None) -> PreTrainedConfig:
    """LLaVA-1.5 with this language model, or LLaVA-NeXT with these sizes of images in crops."""
    shared = {
        "vision_config": CLIPVisionConfig(**CLIP_LARGE_336),
        "text_config": LlamaConfig(**text),
        "vision_feature_layer": -2,
        "image_token_id": image_token_id,
        "tie_word_embeddings": False,
    }
    return LlavaConfig(**shared) if crops is None else LlavaNextConfig(**shared, image_grid_pinpoints=crops)


def _qwen() -> PreTrainedConfig:
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "max_position_embeddings": 128000,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
            "bos_token_id": 151643,
            "eos_token_id": 151645,
        },
        vision_config={
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        tie_word_embeddings=False,
    )


def _qwen3() -> PreTrainedConfig:
    return Qwen3VLConfig(
        text_config={
            "vocab_size": 151936,
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 262144,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 24,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_heads": 16,
            "out_hidden_size": 2560,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [5, 11, 17],
        },
        tie_word_embeddings=True,
    )


SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("tiny", "the embedded LLaVA, 96 x 96 pixels", _tiny, 1, (12, 12), 144, ("tiny",)),
        Shape(
            "llava-1.5-7b",
            "CLIP-L/14, Vicuna-7B, 336 x 336 pixels",
            partial(_llava, VICUNA_7B),
            1,
            (24, 24),
            576,
            ("llava-hf/llava-1.5-7b-hf",),
            folders=("out/llava-1.5-7b/start",),
        ),
        Shape(
            "llava-1.5-13b",
            "CLIP-L/14, Vicuna-13B, 336 x 336 pixels",
            partial(_llava, VICUNA_13B),
            1,
            (24, 24),
            576,
            ("llava-hf/llava-1.5-13b-hf",),
            folders=("out/llava-1.5-13b/start",),
        ),
        # 576 tokens of the thumbnail, and 48 lines of 48 tokens and a newline.
        Shape(
            "llava-next-7b",
            "CLIP-L/14, Vicuna-7B, 672 x 672 pixels, 5 crops",
            partial(_llava, {**VICUNA_7B, "max_position_embeddings": 32768}, crops=GRID_PINPOINTS),
            5,
            (24, 24),
            2928,
            ("llava-hf/llava-v1.6-vicuna-7b-hf",),
            newlines=48,
            folders=("out/llava-next-7b/start",),
        ),
        Shape(
            "qwen2.5-vl-7b",
            "Qwen2.5-VL, 672 x 672 pixels",
            _qwen,
            1,
            (48, 48),
            576,
            ("Qwen/Qwen2.5-VL-7B-Instruct",),
        ),
        Shape("qwen3-vl-4b", "Qwen3-VL, 672 x 672 pixels", _qwen3, 1, (42, 42), 441, ("Qwen/Qwen3-VL-4B-Instruct",)),
        Shape(
            "llava-llama3-8b",
            "CLIP-L/14, Llama-3-8B, 336 x 336 pixels",
            partial(_llava, LLAVA_LLAMA3, 128257),
            1,
            (24, 24),
            576,
            ("xtuner/llava-llama-3-8b-v1_1-transformers",),
            folders=("out/skip-vision/start",),
        ),
        Shape(
            "llava-hd-llama3-8b",
            "CLIP-L/14, Llama-3-8B, 672 x 672 pixels, 5 crops",
            partial(_llava, LLAVA_LLAMA3, 128256, [[PIXELS, PIXELS]]),
            5,
            (24, 24),
            2928,
            newlines=48,
            folders=("out/skip-vision/hd_start",),
        ),
    )
}
"""The shapes that recipes can be planned for, by name."""


def shape_of(name: str, config: PreTrainedConfig) -> Shape:
    """The shape of a model by its configuration, with an image of 672 x 672 pixels if the size is not fixed.

    Raises:
        SaccadeError: if images of the model's type cannot be counted yet.
    """
    vision = getattr(config, "vision_config", None)
    if config.model_type == "llava":
        side = vision.image_size // vision.patch_size
        tokens, grid, crops, newlines = side * side, (side, side), 1, 0
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
            "llava_next, qwen2_5_vl and qwen3_vl"
        )
    return Shape(name, config.model_type, lambda: config, crops, grid, tokens, newlines=newlines)
