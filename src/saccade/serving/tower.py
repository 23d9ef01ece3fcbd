"""The vision tower and projector of a stock model, without its language model."""

import copy
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from saccade.errors import SaccadeError
from saccade.families import Family, family_class
from saccade.files import reading

LANGUAGE = ("language_model", "text_model", "lm_head")
"""Parts of the names of weights that belong to neither the tower nor the projector."""


def bare_family(folder: str | Path, revision: str | None = None) -> Family:
    """The family of the model in `folder`, with a model without weights, which can count tokens but not encode.

    Raises:
        SaccadeError: if its config cannot be read, or no family is known for it.
    """
    with reading(f"model={str(folder)!r}: its config.json cannot be read"), torch.device("meta"):
        config = without_layers(AutoConfig.from_pretrained(folder, revision=revision))
        return family_class(config)(AutoModelForImageTextToText.from_config(config))


def tower_family(
    folder: str | Path,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    revision: str | None = None,
    weights: bool = True,
) -> Family:
    """The family of the model in `folder`, with only its vision tower and projector loaded.

    Args:
        weights: whether to read the weights; they are random otherwise.

    Raises:
        SaccadeError: if no family is known for it, or weights of the tower or the projector are missing.
    """
    config = without_layers(AutoConfig.from_pretrained(folder, revision=revision))
    kind = family_class(config)
    with torch.device("cpu"):
        if weights:
            model, report = _read(folder, config, dtype, revision)
            missing = [name for name in sorted(report["missing_keys"]) if not _of_language(name)]
            if missing:
                raise SaccadeError(
                    f"model={str(folder)!r} lacks {len(missing)} of the weights of its vision tower and projector, "
                    f"such as {missing[0]!r}: quantized weights are not read, serve the folder that was exported"
                )
        else:
            model = AutoModelForImageTextToText.from_config(config).to(dtype)
    family = kind(model.eval().requires_grad_(False))
    family.language_model.to("meta")
    head = model.get_output_embeddings()
    if head is not None:
        head.to("meta")
    for name, module in model.named_children():
        if not _of_language(name):
            _move(module, device)
    return family


def without_layers(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the same model with no decoder layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = 0
    if getattr(text, "layer_types", None) is not None:
        text.layer_types = []
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _read(
    folder: str | Path, config: PreTrainedConfig, dtype: torch.dtype, revision: str | None
) -> tuple[PreTrainedModel, dict]:
    # It would report every weight of the decoder layers as unexpected.
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return AutoModelForImageTextToText.from_pretrained(
            folder, config=config, dtype=dtype, revision=revision, output_loading_info=True
        )
    finally:
        logging.set_verbosity(level)


def _of_language(name: str) -> bool:
    return any(part in name.split(".") for part in LANGUAGE)


def _move(module: torch.nn.Module, device: torch.device | str) -> None:
    """Move everything but the language model, which has no values any more."""
    for name, child in module.named_children():
        if not _of_language(name):
            child.to(device)
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        tensor.data = tensor.data.to(device)
