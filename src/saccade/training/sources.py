"""Where a recipe's rows and weights come from: the embedded ones, files, folders, or the hub."""

import json
from pathlib import Path

from datasets import Dataset, load_dataset, load_from_disk
from peft import PeftConfig, PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from saccade.data import digit_scenes
from saccade.dualspeed.collator import place_images
from saccade.errors import SaccadeError
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
    try:
        if (Path(options.model) / "adapter_config.json").is_file():
            base = PeftConfig.from_pretrained(options.model).base_model_name_or_path
            model = AutoModelForImageTextToText.from_pretrained(base, dtype=options.dtype)
            model = PeftModel.from_pretrained(model, options.model).merge_and_unload()
        else:
            model = AutoModelForImageTextToText.from_pretrained(options.model, dtype=options.dtype)
        return model, AutoProcessor.from_pretrained(options.model)
    except (OSError, ValueError, KeyError) as error:
        line = " ".join(str(error).split())[:300]
        raise SaccadeError(f"model={options.model!r} cannot be loaded: {line}") from error


def load_rows(options: ModelOptions) -> Dataset:
    """The rows to train on, with `messages` (or `prompt` and `completion`) and `images`.

    Raises:
        SaccadeError: if they cannot be read, or a row names a missing image or has tags that match no image.
    """
    if options.dataset == "digits":
        rows = options.dataset_rows or _DIGIT_ROWS
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
        dataset = load_from_disk(str(path))
        dataset = dataset[options.dataset_split] if hasattr(dataset, "keys") else dataset
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
    rows = []
    for where, row in _json_rows(path):
        if not isinstance(row, dict) or not isinstance(row.get("messages"), list):
            raise SaccadeError(f"{where} has no 'messages' list: each row needs 'messages' and 'images'")
        names = row.get("images") or []
        names = [names] if isinstance(names, str) else names
        images = [str(image_folder / name) for name in names]
        missing = [image for image in images if not Path(image).is_file()]
        if missing:
            raise SaccadeError(f"{where}: image {missing[0]!r} does not exist: correct the path or image_folder")
        messages = [{"role": message.get("role"), "content": message.get("content")} for message in row["messages"]]
        try:
            place_images(messages, len(images))
        except SaccadeError as error:
            raise SaccadeError(f"{where}: {error}") from error
        rows.append({"messages": messages, "images": images})
    if not rows:
        raise SaccadeError(f"dataset={str(path)!r} has no rows")
    return Dataset.from_list(rows)


def _json_rows(path: Path):
    """Pairs of (where, row), from a JSON list or from JSON lines."""
    text = path.read_text(encoding="utf-8")
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
