"""A recipe's options about the model and the data, and loading a model with its processor: the embedded one, a folder,
or one from the hub."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from saccade.data.conversation import FORMATS
from saccade.dualspeed.labels import stop_ids
from saccade.dualspeed.weights import base_of, load_whole, merge_adapters
from saccade.errors import MissingPackageError, SaccadeError, needs_package
from saccade.families import Family, family_class, get_family, use_released_names
from saccade.families.fitting import check_processor
from saccade.files import reading, similar_path
from saccade.model_files import check_files
from saccade.tiny import build_tiny_processor, load_tiny
from saccade.values import DTYPES, STAGES, check_choice, check_counts

NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8
"""Bytes per weight: four bits, an 8-bit scale per 64 weights, and a 32-bit scale per 256 scales (QLoRA, Sec. 3)."""


@dataclass
class ModelOptions:
    """The model to train and the data to train on.

    Args:
        model: folder or hub id of a stock checkpoint; "tiny" is the embedded model.
        dtype: dtype to load the weights in: "auto", "float32", "bfloat16" or "float16".
        dataset: "digits" for the embedded scenes, which a recipe with another model than "tiny" has to name; a JSON,
            JSON-lines or Parquet file; a folder with Parquet files or written by `save_to_disk`; a hub id; or a list
            of these and of mappings with `path` and optionally `format`, `weight`, `rows`, `image_folder`, `split`.
        dataset_format: "llava" for rows with `conversations`, "chat" for rows with `messages`, "auto" to infer it from
            the rows.
        dataset_streaming: stream the rows, for data that fits neither in memory nor on disk.
        dataset_shuffle_buffer: for a stream: size of the shuffle buffer; 0 keeps the order.
        dataset_split: split to train on.
        dataset_stage: for "digits": "pretrain" (captions) or "sft" (questions).
        dataset_rows: for "digits": number of rows to make; for others, how many rows to use from the start, by default
            all.
        dataset_seed: for "digits": selects the sequence of scenes; for others: seed of sampling a mixture and of
            shuffling a stream.
        dataset_turns: for "digits": questions about each image.
        eval_dataset: rows to evaluate on while training, in any form that `dataset` has, read with the same options;
            for "digits", its validation split. `eval_strategy` says when.
        eval_rows: at most so many of them; for "digits", 500 when left out.
        eval_share: in place of `eval_dataset`, hold out this share of the rows of `dataset`, in (0, 1).
        attn_implementation: of the model, such as "sdpa", "eager" or "flash_attention_2"; its own choice when left
            out.
        image_folder: folder, or several, that image paths are relative to; by default that of the data file.
        allow_outside_images: accept image paths that lead outside these folders.
        image_urls: what addresses begin with that images may be fetched from, one or several, such as
            "https://images.example.org/coco/"; nothing is fetched when left out.
        image_cache: folder for images that were fetched; `saccade/images` in the user's cache folder when left out.
        lora: train low-rank adapters of the language model, and the projector in full.
        lora_r: rank of the adapters.
        lora_alpha: scale of the adapters.
        lora_dropout: dropout before the adapters.
        lora_target_modules: names of the layers to adapt, or a regular expression of whole names, as PEFT takes them;
            every linear layer of the decoder when left out.
        lora_modules_to_save: names of the modules to train in full beside the adapters; the projector when left out.
        load_in_4bit: keep the decoder's weights in four bits (QLoRA: NF4, double quantization) under the adapters;
            needs `lora` and bitsandbytes.
        resume: "auto" resumes from the newest complete checkpoint of the run that `output_dir` belongs to, if there is
            one; a path names a checkpoint.

    Raises:
        SaccadeError: if a value is out of range; the message names the option and the fix.
    """

    model: str = "tiny"
    dtype: str = "auto"
    dataset: str | list[Any] = "digits"
    dataset_format: str = "auto"
    dataset_streaming: bool = False
    dataset_shuffle_buffer: int = 1000
    dataset_split: str = "train"
    dataset_stage: str = "sft"
    dataset_rows: int | None = None
    dataset_seed: int = 0
    dataset_turns: int = 1
    eval_dataset: str | list[Any] | None = None
    eval_rows: int | None = None
    eval_share: float | None = None
    attn_implementation: str | None = None
    image_folder: str | list[str] | None = None
    allow_outside_images: bool = False
    image_urls: str | list[str] | None = None
    image_cache: str | None = None
    lora: bool = False
    lora_r: int = 128
    lora_alpha: int = 256
    lora_dropout: float = 0.05
    lora_target_modules: str | list[str] | None = None
    lora_modules_to_save: list[str] | None = None
    load_in_4bit: bool = False
    resume: str | None = None

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("dataset_format", self.dataset_format, FORMATS)
        check_choice("dataset_stage", self.dataset_stage, STAGES)
        check_counts(dataset_rows=self.dataset_rows, dataset_turns=self.dataset_turns)
        if self.dataset_shuffle_buffer < 0:
            raise SaccadeError(f"dataset_shuffle_buffer={self.dataset_shuffle_buffer}: give 0 for none, or a number")


def load_model(options: ModelOptions, trust_remote_code: bool = False) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load the model and its processor; LoRA adapters are merged into their base model.

    Args:
        options: the recipe's options.
        trust_remote_code: run Python code that comes with a checkpoint.

    Raises:
        SaccadeError: if they cannot be loaded, or weights are missing, unexpected or have the wrong shape.
    """
    if options.load_in_4bit and options.model == "tiny":
        raise SaccadeError("load_in_4bit=true: the embedded model 'tiny' is too small for it, set it to false")
    if options.load_in_4bit and find_spec("bitsandbytes") is None:
        raise needs_package("load_in_4bit=true", "bitsandbytes")
    if options.model == "tiny":
        # Stored in float16, which overflows in training.
        dtype = torch.float32 if options.dtype == "auto" else getattr(torch, options.dtype)
        model, processor = load_tiny(dtype)
        use_released_names(model)
        return _with_attention(model, options.attn_implementation), processor
    check_family(options.model, trust_remote_code)
    loading = {"dtype": options.dtype, "trust_remote_code": trust_remote_code}
    with reading(f"model={options.model!r} cannot be loaded"):
        # Before the weights, which take minutes to load and longer to fetch.
        processor = _processor(options.model, trust_remote_code=trust_remote_code)
        if options.load_in_4bit:
            config = AutoConfig.from_pretrained(options.model, trust_remote_code=trust_remote_code)
            with torch.device("meta"):
                names = AutoModelForImageTextToText.from_config(config, trust_remote_code=trust_remote_code)
            loading["quantization_config"] = BitsAndBytesConfig(**quantization_options(names, options.dtype))
        base = base_of(options.model)
        model = load_whole(options.model if base is None else base, **loading)
        if base is not None:
            model = merge_adapters(model, options.model)
            if not options.load_in_4bit:  # merging leaves every weight frozen, but the next run should train them
                model.requires_grad_(True)
        if options.dtype == "auto" and model.dtype == torch.float16 and not options.load_in_4bit:
            model = model.float()
        use_released_names(model)
        check_processor(processor, model.config)
        return _with_attention(model, options.attn_implementation), processor


def load_to_run(options: ModelOptions, on_cpu: bool = False) -> tuple[PreTrainedModel, ProcessorMixin]:
    """As `load_model`, for a model that is to answer and not to train: on this process's accelerator, if it has one.

    Args:
        on_cpu: leave it on the CPU.
    """
    model, processor = load_model(options)
    if not on_cpu and torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    return model, processor


def _with_attention(model: PreTrainedModel, name: str | None) -> PreTrainedModel:
    if name is not None:
        with reading(f"attn_implementation={name!r}"):
            model.set_attn_implementation(name)
    return model


def quantization_options(model: PreTrainedModel, dtype: str = "auto") -> dict[str, Any]:
    """Keyword options of `BitsAndBytesConfig` for QLoRA (arXiv 2305.14314): linear layers of the decoder are
    quantized; vision tower, projector and head are not.

    Args:
        model: provides the names of modules; it may be on the meta device.
        dtype: dtype of computations; "auto" is bfloat16.
    """
    inside = {id(weight) for weight in quantized_weights(model)}
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    quantized = [name for name, module in linear.items() if id(module.weight) in inside]
    others = {_part_without(name, quantized) for name in linear.keys() - set(quantized)}
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16 if dtype == "auto" else getattr(torch, dtype),
        "llm_int8_skip_modules": sorted(others),
    }


def _part_without(name: str, quantized: Sequence[str]) -> str:
    """The largest part of the model that a module is in and no quantized one, such as model.vision_tower."""
    words = name.split(".")
    parts = (".".join(words[:count]) for count in range(1, len(words)))
    return next((part for part in parts if not any(one.startswith(f"{part}.") for one in quantized)), name)


def quantized_weights(model: PreTrainedModel) -> list[nn.Parameter]:
    """The weights that are kept in four bits."""
    layers = get_family(model).language_layers
    return [module.weight for module in layers.modules() if isinstance(module, nn.Linear)]


def load_processor(
    options: ModelOptions, trust_remote_code: bool = False, local_files_only: bool = False
) -> tuple[ProcessorMixin, int, tuple[int, ...]]:
    """A model's processor, the token id of its visual tokens, and those at which its `generate` stops, without loading
    weights.

    Args:
        options: the recipe's options.
        trust_remote_code: run Python code that comes with a checkpoint.
        local_files_only: do not ask the hub.
    """
    if options.model == "tiny":
        processor = build_tiny_processor()
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
    files = "processor_config.json, tokenizer.json and the files beside them"
    with reading(f"model={model!r} has no processor that loads, from {files}"):
        try:
            return AutoProcessor.from_pretrained(model, **loading)
        except ImportError as error:
            if find_spec("torchvision") is not None or "torchvision" not in str(error).lower():
                raise
            # Not as `needs_package` says: PyPI's torchvision breaks the model classes beside the CPU build of torch.
            raise MissingPackageError(
                f"model={model!r} has a processor that needs torchvision, which is not installed: install the release "
                'that belongs to your torch, from the index that torch came from (docs/install.md, "torchvision")'
            ) from error


def check_family(model: str, trust_remote_code: bool = False, local_files_only: bool = False) -> type[Family]:
    """The family of a model, without reading its weights."""
    check_files(model)
    base, what = base_of(model), f"model={model!r}"
    if base is not None:
        what = f"the adapters in {what} name the base {base!r}, which"
        model = base
        check_files(model)
    where = "cannot be loaded"
    if not Path(model).is_dir():
        near = similar_path(model, "")
        where = f"is not a local folder{near and f' ({near})'}, and {where} from the hub"
    with reading(f"{what} {where}"):
        config = AutoConfig.from_pretrained(
            model, trust_remote_code=trust_remote_code, local_files_only=local_files_only
        )
    return family_class(config)
