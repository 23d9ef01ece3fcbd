"""Where a recipe's rows and weights come from: the embedded ones, files, folders, or the hub."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from peft import PeftConfig, PeftModel
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from saccade.data import digit_scenes
from saccade.dualspeed.collator import as_parts, place_images
from saccade.errors import SaccadeError
from saccade.families import family_class
from saccade.tiny import load_tiny
from saccade.training.recipe import ModelOptions

DTYPES = ("auto", "float32", "bfloat16", "float16")
_DIGIT_ROWS = 50_000


def load_model(options: ModelOptions) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The model and its processor; LoRA adapters are merged into the model that they were trained on.

    Raises:
        SaccadeError: if they cannot be loaded.
    """
    if options.dtype not in DTYPES:
        raise SaccadeError(f"dtype={options.dtype!r} is unknown: use one of {', '.join(DTYPES)}")
    if options.model == "tiny":
        return load_tiny(grid=options.dataset_grid)
    check_family(options.model)
    try:
        if (Path(options.model) / "adapter_config.json").is_file():
            base = PeftConfig.from_pretrained(options.model).base_model_name_or_path
            model = AutoModelForImageTextToText.from_pretrained(base, dtype=options.dtype)
            model = PeftModel.from_pretrained(model, options.model).merge_and_unload()
        else:
            model = AutoModelForImageTextToText.from_pretrained(options.model, dtype=options.dtype)
        if options.dtype == "auto" and model.dtype == torch.float16:
            model = model.float()
        return model, AutoProcessor.from_pretrained(options.model)
    except (OSError, ValueError, KeyError) as error:
        line = " ".join(str(error).split())[:300]
        raise SaccadeError(f"model={options.model!r} cannot be loaded: {line}") from error


def check_family(model: str) -> None:
    """Look up the family of a model before its weights are read.

    Raises:
        SaccadeError: if there is none, or no config to tell it from.
    """
    try:
        folder = Path(model)
        if (folder / "adapter_config.json").is_file():
            model = PeftConfig.from_pretrained(model).base_model_name_or_path
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise SaccadeError(f"model={model!r} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    family_class(config)


def load_rows(options: ModelOptions) -> Dataset:
    """The rows to train on, with `messages` (or `prompt` and `completion`) and `images`.

    Raises:
        SaccadeError: if they cannot be read, or a row names a missing image or has tags that match no image.
    """
    if options.dataset_rows is not None and options.dataset_rows < 1:
        raise SaccadeError(f"dataset_rows={options.dataset_rows}: give at least 1, or null for all")
    if options.dataset == "digits":
        rows = _DIGIT_ROWS if options.dataset_rows is None else options.dataset_rows
        return digit_scenes(
            options.dataset_stage,
            options.dataset_split,
            rows,
            options.dataset_seed,
            options.dataset_grid,
            turns=options.dataset_turns,
        )
    path = Path(options.dataset)
    if path.suffix in (".json", ".jsonl"):
        dataset = _read_json(path, Path(options.image_folder) if options.image_folder else path.parent)
    elif path.is_dir():
        try:
            dataset = load_from_disk(str(path))
        except OSError as error:
            raise SaccadeError(f"dataset={str(path)!r} is no folder that save_to_disk wrote: {error}") from error
        if isinstance(dataset, DatasetDict):
            if options.dataset_split not in dataset:
                raise SaccadeError(
                    f"dataset_split={options.dataset_split!r} is not in {path}: use one of {', '.join(dataset)}"
                )
            dataset = dataset[options.dataset_split]
    else:
        try:
            dataset = load_dataset(options.dataset, split=options.dataset_split)
        except Exception as error:
            line = " ".join(str(error).split())[:300]
            raise SaccadeError(
                f"dataset={options.dataset!r} is neither a JSON file, nor a folder, nor a dataset that loads: {line}"
            ) from error
    if options.dataset_rows is not None:
        dataset = dataset.select(range(min(options.dataset_rows, len(dataset))))
    return dataset


def _read_json(path: Path, image_folder: Path) -> Dataset:
    """Rows of a JSON list or of JSON lines, image paths made absolute and looked up."""
    if not path.is_file():
        raise SaccadeError(f"dataset={str(path)!r} does not exist: give a JSON or JSON-lines file")
    rows = [_checked_row(where, row, image_folder) for where, row in _json_rows(path)]
    if not rows:
        raise SaccadeError(f"dataset={str(path)!r} has no rows")
    if len({tuple(row) for row in rows}) > 1:
        raise SaccadeError(f"dataset={str(path)!r} mixes rows with 'messages' and rows with 'prompt' and 'completion'")
    columns = [name for name in rows[0] if name != "images"]
    if any(isinstance(message["content"], list) for row in rows for name in columns for message in row[name]):
        # A column has one type: where some contents are lists of parts, all are.
        for row in rows:
            for name in columns:
                row[name] = [as_parts(message) for message in row[name]]
    return Dataset.from_list(rows)


def _checked_row(where: str, row: Any, image_folder: Path) -> dict[str, Any]:
    """One row with `images` and its conversation, checked.

    Raises:
        SaccadeError: naming the row.
    """
    columns = ("messages",) if isinstance(row, dict) and "messages" in row else ("prompt", "completion")
    if not isinstance(row, dict) or not all(isinstance(row.get(name), list) for name in columns):
        raise SaccadeError(
            f"{where} has no 'messages' list: each row needs 'messages', or 'prompt' and 'completion', and 'images'"
        )
    names = row.get("images") or []
    names = [names] if isinstance(names, str) else names
    images = [str(image_folder / name) for name in names]
    missing = [image for image in images if not Path(image).is_file()]
    if missing:
        raise SaccadeError(f"{where}: image {missing[0]!r} does not exist: correct the path or image_folder")
    checked: dict[str, Any] = {}
    for name in columns:
        for message in row[name]:
            fits = isinstance(message, dict) and isinstance(message.get("role"), str)
            if not fits or not isinstance(message.get("content"), (str, list)):
                raise SaccadeError(f"{where}: each message needs a 'role' and a 'content', found {str(message)[:80]}")
        checked[name] = [{"role": message["role"], "content": message["content"]} for message in row[name]]
    try:
        place_images(checked[columns[0]], len(images))
    except SaccadeError as error:
        raise SaccadeError(f"{where}: {error}") from error
    return {**checked, "images": images}


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Pairs of (where, row), from a JSON list or from JSON lines."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SaccadeError(f"{path} is not UTF-8 text: {error}") from error
    if path.suffix == ".json":
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise SaccadeError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(values, list):
            raise SaccadeError(f"{path} holds a {type(values).__name__}, expected a list of rows")
        yield from ((f"{path}, row {number}", row) for number, row in enumerate(values, start=1))
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                yield f"{path}, line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise SaccadeError(f"{path}, line {number} is not valid JSON: {error}") from error
