"""Load a recipe's rows and weights: embedded ones, files, folders, or the hub."""

import logging
import random
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from saccade.data import digit_scenes
from saccade.data.mixture import SourceOptions, mix, source_options, stream
from saccade.data.sources import PROBED, Source, TableSource
from saccade.dualspeed.labels import stop_ids
from saccade.dualspeed.weights import base_of, check_files, load_whole, merge_adapters
from saccade.errors import RecordError, SaccadeError
from saccade.families import Family, family_class, use_released_names
from saccade.families.fitting import check_processor
from saccade.files import reading
from saccade.tiny import build_tiny_processor, load_tiny
from saccade.training.quantization import check_quantization, quantization_config
from saccade.training.recipe import ModelOptions

logger = logging.getLogger(__name__)

DTYPES = ("auto", "float32", "bfloat16", "float16")
DIGITS = "digits"
DIGIT_ROWS = 50_000
DIGIT_EVAL_ROWS = 500


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


def dataset_sources(options: ModelOptions) -> list[SourceOptions]:
    """The sources that a recipe's `dataset` names. The recipe's image folder, split and format are the defaults of
    each source.

    Raises:
        SaccadeError: if a source is not described correctly.
    """
    if options.dataset_rows is not None and options.dataset_rows < 1:
        raise SaccadeError(f"dataset_rows={options.dataset_rows}: give at least 1, or null for all")
    given = options.dataset if isinstance(options.dataset, list) else [options.dataset]
    folders = options.image_folder
    if isinstance(folders, str):
        folders = folders.split(",")
    return source_options(given, format=options.dataset_format, image_folder=folders, split=options.dataset_split)


def load_rows(options: ModelOptions, shards: int = 1) -> Dataset | IterableDataset:
    """The rows to train on, with `messages` (or `prompt` and `completion`) and `images`.

    Rows are read and converted when they are used; an unusable row has a `fault`.

    Args:
        options: the recipe's options.
        shards: for a stream: number of parts to read in parallel, one per process and data-loader worker.

    Raises:
        SaccadeError: if they cannot be read, or none of the first rows is usable.
    """
    if options.dataset_shuffle_buffer < 0:
        raise SaccadeError(f"dataset_shuffle_buffer={options.dataset_shuffle_buffer}: give 0 for none, or a number")
    sources = dataset_sources(options)
    if options.dataset_streaming:
        if any(source.path == DIGITS for source in sources):
            raise SaccadeError("dataset_streaming=true: digits are drawn when they are read, set it to false")
        return stream(
            sources,
            options.allow_outside_images,
            options.dataset_seed,
            options.dataset_shuffle_buffer,
            shards,
            options.dataset_rows,
        )
    if options.dataset == DIGITS:
        return _digits(options, options.dataset_rows)
    opened = [open_source(source, options) for source in sources]
    mixed = mix(
        opened,
        None if sources[0].weight is None else [source.weight for source in sources],
        [source.rows for source in sources],
        options.dataset_seed,
    )
    _warn_without_images(opened)
    return mixed if options.dataset_rows is None else mixed.select(range(min(options.dataset_rows, len(mixed))))


def load_eval_rows(options: ModelOptions) -> Dataset | None:
    """The rows of `eval_dataset`, read as those of `dataset` are; None without one.

    Raises:
        SaccadeError: as `load_rows` does.
    """
    if options.eval_dataset is None:
        return None
    rows = options.eval_rows
    mine = replace(options, dataset=options.eval_dataset, dataset_rows=rows, dataset_streaming=False)
    if options.eval_dataset == DIGITS:
        mine = replace(mine, dataset_split="validation", dataset_rows=DIGIT_EVAL_ROWS if rows is None else rows)
    return load_rows(mine)


def hold_out(rows: Dataset, share: float, seed: int, most: int | None = None) -> tuple[Dataset, Dataset]:
    """Split rows into those to train on and those to evaluate on. The order within each part is as before.

    Args:
        share: of the rows to hold out, in (0, 1).
        seed: of the draw.
        most: evaluate on at most so many of those held out.

    Raises:
        SaccadeError: if either part would be empty.
    """
    number = round(share * len(rows))
    if not 0 < number < len(rows):
        raise SaccadeError(
            f"eval_share={share}: {number} of {len(rows)} rows would be held out, and both parts need one: "
            "give another share"
        )
    held = set(random.Random(f"saccade eval {seed}").sample(range(len(rows)), number))
    kept = [index for index in range(len(rows)) if index not in held]
    return rows.select(kept), rows.select(sorted(held)[:most])


def _warn_without_images(sources: list[Source]) -> None:
    """Warn if the first rows of all sources have no images, usually because their column has another name."""
    for source in sources:
        for index in range(min(len(source), PROBED)):
            with suppress(RecordError):
                if source.read(index)["images"]:
                    return
    logger.warning(
        "the first rows of the dataset have no image: there is nothing to prune; images belong in 'images' or 'image'"
    )


def open_source(source: SourceOptions, options: ModelOptions) -> Source:
    """Open the rows of one source.

    Raises:
        SaccadeError: if there are none to read.
    """
    if source.path == DIGITS:
        return TableSource(_digits(options, source.rows), DIGITS)
    return source.open(options.allow_outside_images)


def _digits(options: ModelOptions, rows: int | None) -> Dataset:
    return digit_scenes(
        options.dataset_stage,
        options.dataset_split,
        DIGIT_ROWS if rows is None else rows,
        options.dataset_seed,
        options.dataset_grid,
        turns=options.dataset_turns,
    )
