"""Models of real shapes with random weights, optionally cut down to fit a smaller machine."""

from collections.abc import Sequence

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from saccade.errors import SaccadeError
from saccade.training.model_presets import SHAPES as PRESETS
from saccade.training.model_presets import Shape


def _llama3() -> PreTrainedConfig:
    config = PRESETS["llava-llama3-8b"].config().text_config
    config.vocab_size = 128256  # without the tokens that LLaVA adds
    return config


def _smol() -> PreTrainedConfig:
    text = LlamaConfig(
        vocab_size=49216,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
    )
    vision = CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=384,
        patch_size=16,
    )
    return LlavaConfig(vision_config=vision, text_config=text, image_token_id=49152, tie_word_embeddings=True)


SHAPES: dict[str, Shape] = {
    **PRESETS,
    "smol": Shape("smol", _smol, 1, (24, 24), 576),
    "llama3-8b": Shape("llama3-8b", _llama3, 0, (0, 0), 576),
}
"""The known shapes by name; `smol` is that of the testbed (docs/testbed.md) at 24 x 24 patches."""


def get_shape(name: str) -> Shape:
    """A known shape.

    Raises:
        SaccadeError: if no shape has this name.
    """
    if name not in SHAPES:
        raise SaccadeError(f"shape={name!r} is not known: choose one of {', '.join(SHAPES)}")
    return SHAPES[name]


def shape_config(name: str, layers: int | None = None, width: int | None = None) -> PreTrainedConfig:
    """The stock configuration of a shape, with its language model optionally cut down.

    Args:
        layers: language layers to keep (default: all).
        width: width of the language model, a multiple of the head width; the numbers of heads and key-value heads and
            the feed-forward network shrink in proportion.

    Raises:
        SaccadeError: on an unknown shape, or a size that it cannot be cut to.
    """
    config = get_shape(name).config()
    text = config.get_text_config()
    if layers is not None:
        if not isinstance(layers, int) or not 1 <= layers <= text.num_hidden_layers:
            raise SaccadeError(f"layers={layers!r}: {name} has {text.num_hidden_layers}, keep from 1 to all of them")
        text.num_hidden_layers = layers
        # Some configurations list a type for each layer.
        if getattr(text, "layer_types", None) is not None:
            text.layer_types = text.layer_types[:layers]
    if width is not None:
        _narrow(name, config, text, width)
    return config


def build_shape(
    name: str,
    layers: int | None = None,
    width: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    attention: str = "sdpa",
    seed: int = 0,
    tower_layers: int | None = None,
) -> PreTrainedModel:
    """A stock model of this shape with random weights, in evaluation mode; `device="meta"` allocates none.

    Args:
        tower_layers: layers of the vision tower to keep (default: all).

    Raises:
        SaccadeError: like `shape_config`, and on a tower size that it cannot be cut to.
    """
    config = shape_config(name, layers, width)
    if tower_layers is not None:
        _cut_tower(name, config, tower_layers)
    factory = AutoModelForCausalLM if isinstance(config, LlamaConfig) else AutoModelForImageTextToText
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seed)
        return factory.from_config(config, dtype=dtype, attn_implementation=attention).eval()


def check_place(device: str, dtype: str, dtypes: Sequence[str]) -> None:
    """Check device and dtype before a model is built.

    Raises:
        SaccadeError: on a dtype not in `dtypes`, or an unavailable device.
    """
    if dtype not in dtypes:
        raise SaccadeError(f"dtype={dtype!r} is not known: choose one of {', '.join(dtypes)}")
    if device != "cpu" and not (device.startswith("cuda") and torch.cuda.is_available()):
        raise SaccadeError(f"device={device!r} is not available: choose cpu, or cuda on a machine with a GPU")


def _cut_tower(name: str, config: PreTrainedConfig, layers: int) -> None:
    vision = config.vision_config
    field = "depth" if hasattr(vision, "depth") else "num_hidden_layers"
    whole = getattr(vision, field)
    if not isinstance(layers, int) or not 2 <= layers <= whole:
        raise SaccadeError(f"tower_layers={layers!r}: the tower of {name} has {whole}, keep from 2 to all of them")
    setattr(vision, field, layers)


def _narrow(name: str, config: PreTrainedConfig, text: PreTrainedConfig, width: int) -> None:
    """Keep the share `width` / D of heads, key-value heads and feed-forward columns."""
    heads, groups, whole = text.num_attention_heads, text.num_key_value_heads, text.hidden_size
    head = whole // heads
    per_group = heads // groups
    if not isinstance(width, int) or not 0 < width <= whole or width % (head * per_group):
        raise SaccadeError(
            f"width={width!r}: give a multiple of {head * per_group} up to {whole}, so that {name} keeps heads of "
            f"{head} in groups of {per_group}"
        )
    text.hidden_size = width
    text.num_attention_heads = width // head
    text.num_key_value_heads = width // head // per_group
    text.intermediate_size = max(8, text.intermediate_size * width // whole // 8 * 8)
    if hasattr(getattr(config, "vision_config", None), "out_hidden_size"):
        config.vision_config.out_hidden_size = width
