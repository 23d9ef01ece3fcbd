"""Load a model with its processor: the embedded one, a folder, or one from the hub."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from saccade.dualspeed.labels import stop_ids
from saccade.dualspeed.weights import base_of, check_files, load_whole, merge_adapters
from saccade.errors import SaccadeError
from saccade.families import Family, family_class, use_released_names
from saccade.families.fitting import check_processor
from saccade.files import reading
from saccade.tiny import build_tiny_processor, load_tiny
from saccade.training.options import ModelOptions
from saccade.training.quantization import check_quantization, quantization_config

DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_model(options: ModelOptions, trust_remote_code: bool = False) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load the model and its processor; LoRA adapters are merged into their base model.

    Args:
        options: the recipe's options.
        trust_remote_code: run Python code that comes with a checkpoint.

    Raises:
        SaccadeError: if they cannot be loaded, or weights are missing, unexpected or have the wrong shape.
    """
    if options.dtype not in DTYPES:
        raise SaccadeError(f"dtype={options.dtype!r} is unknown: use one of {', '.join(DTYPES)}")
    if options.load_in_4bit:
        check_quantization(options.model)
    if options.model == "tiny":
        # Stored in float16, which overflows in training.
        dtype = torch.float32 if options.dtype == "auto" else getattr(torch, options.dtype)
        model, processor = load_tiny(grid=options.dataset_grid, dtype=dtype)
        use_released_names(model)
        return _with_attention(model, options.attn_implementation), processor
    check_family(options.model, trust_remote_code)
    loading = {"dtype": options.dtype, "trust_remote_code": trust_remote_code}
    with reading(f"model={options.model!r} cannot be loaded"):
        if options.load_in_4bit:
            config = AutoConfig.from_pretrained(options.model, trust_remote_code=trust_remote_code)
            with torch.device("meta"):
                names = AutoModelForImageTextToText.from_config(config, trust_remote_code=trust_remote_code)
            loading["quantization_config"] = quantization_config(names, options.dtype)
        base = base_of(options.model)
        model = load_whole(options.model if base is None else base, **loading)
        if base is not None:
            model = merge_adapters(model, options.model)
            if not options.load_in_4bit:  # merging leaves every weight frozen, but the next run should train them
                model.requires_grad_(True)
        if options.dtype == "auto" and model.dtype == torch.float16 and not options.load_in_4bit:
            model = model.float()
        use_released_names(model)
        processor = _processor(options.model, trust_remote_code=trust_remote_code)
        check_processor(processor, model.config)
        return _with_attention(model, options.attn_implementation), processor


def _with_attention(model: PreTrainedModel, name: str | None) -> PreTrainedModel:
    """The model, computing attention by the implementation of this name.

    Raises:
        SaccadeError: if it has none of this name, or its package is not installed.
    """
    if name is not None:
        try:
            model.set_attn_implementation(name)
        except (ValueError, ImportError) as error:
            raise SaccadeError(f"attn_implementation={name!r}: {' '.join(str(error).split())}") from error
    return model


def load_processor(
    options: ModelOptions, trust_remote_code: bool = False, local_files_only: bool = False
) -> tuple[ProcessorMixin, int, tuple[int, ...]]:
    """A model's processor, the token id of its visual tokens, and those at which its `generate` stops, without loading
    weights.

    Args:
        options: the recipe's options.
        trust_remote_code: run Python code that comes with a checkpoint.
        local_files_only: do not ask the hub.

    Raises:
        SaccadeError: if they cannot be loaded.
    """
    if options.model == "tiny":
        processor = build_tiny_processor(options.dataset_grid)
        tokenizer = processor.tokenizer
        return processor, tokenizer.convert_tokens_to_ids(processor.image_token), (tokenizer.eos_token_id,)
    loading = {"trust_remote_code": trust_remote_code, "local_files_only": local_files_only}
    check_family(options.model, **loading)
    with reading(f"model={options.model!r} has no processor that loads"):
        base = base_of(options.model) or options.model
        config = AutoConfig.from_pretrained(base, **loading)
        processor = _processor(options.model, **loading)
        try:
            generation_config = GenerationConfig.from_pretrained(base, local_files_only=local_files_only)
        except OSError:
            # What the model itself does if there is no such file.
            generation_config = GenerationConfig.from_model_config(config)
        return processor, config.image_token_id, stop_ids(generation_config, processor.tokenizer)


def _processor(model: str, **loading: Any) -> ProcessorMixin:
    """The processor of a model; its files are read by several packages, whose errors have no common type.

    Raises:
        SaccadeError: if it cannot be loaded.
    """
    try:
        return AutoProcessor.from_pretrained(model, **loading)
    except Exception as error:
        line = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise SaccadeError(
            f"model={model!r} has no processor that loads, from processor_config.json, tokenizer.json and the files "
            f"beside them: {line}"
        ) from error


def check_family(model: str, trust_remote_code: bool = False, local_files_only: bool = False) -> type[Family]:
    """The family of a model, without reading its weights.

    Raises:
        SaccadeError: if it has no known family or no readable config.
    """
    check_files(model)
    base = base_of(model)
    if base is not None:
        model = base
        check_files(model)
    where = "cannot be loaded" if Path(model).is_dir() else "is not a local folder, and cannot be loaded from the hub"
    with reading(f"model={model!r} {where}"):
        config = AutoConfig.from_pretrained(
            model, trust_remote_code=trust_remote_code, local_files_only=local_files_only
        )
    return family_class(config)
