"""QLoRA (arXiv 2305.14314): the decoder's weights in four bits, under trainable adapters."""

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from saccade.errors import SaccadeError, needs_package
from saccade.families import get_family

NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8
"""Bytes per weight: four bits, an 8-bit scale per 64 weights, and a 32-bit scale per 256 scales (QLoRA, Sec. 3)."""


def check_quantization(model: str) -> None:
    """Check that a model can be loaded in four bits here.

    Raises:
        SaccadeError: for the embedded model, or without bitsandbytes.
    """
    if model == "tiny":
        raise SaccadeError("load_in_4bit=true: the embedded model 'tiny' is too small for it, set it to false")
    if find_spec("bitsandbytes") is None:
        raise needs_package("load_in_4bit=true", "bitsandbytes")


def quantization_options(model: PreTrainedModel, dtype: str = "auto") -> dict[str, Any]:
    """Keyword options of `BitsAndBytesConfig` for a model, which may be on the meta device.

    Linear layers of the decoder are quantized; vision tower, projector and head are not.

    Args:
        model: provides the names of modules.
        dtype: dtype of computations; "auto" is bfloat16.
    """
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16 if dtype == "auto" else getattr(torch, dtype),
        "llm_int8_skip_modules": _not_quantized(model),
    }


def quantization_config(model: PreTrainedModel, dtype: str = "auto") -> BitsAndBytesConfig:
    """`quantization_options` as a transformers config; bitsandbytes must be installed."""
    return BitsAndBytesConfig(**quantization_options(model, dtype))


def quantized_weights(model: PreTrainedModel) -> list[nn.Parameter]:
    """The weights that are kept in four bits."""
    layers = get_family(model).language_layers
    return [module.weight for module in layers.modules() if isinstance(module, nn.Linear)]


def _not_quantized(model: PreTrainedModel) -> list[str]:
    """Two-part names of the modules outside the decoder that have linear layers, such as model.vision_tower."""
    inside = {id(weight) for weight in quantized_weights(model)}
    names = {
        ".".join(name.split(".")[:2])
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module.weight) not in inside
    }
    return sorted(names)
