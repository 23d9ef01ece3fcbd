"""Fingerprints of a run's data and initial model: a resumed run must have the same rows and the same model."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sized
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import ProcessorMixin

from saccade.data.mixture import Rows
from saccade.files import to_json

SAMPLED_ROWS = 64
STREAMED_ROWS = 4
SAMPLED_VALUES = 64
# Fields about a config's origin, which do not affect the model.
_PROVENANCE = frozenset({"_name_or_path", "name_or_path", "transformers_version", "torch_dtype", "dtype"})


def identify_rows(dataset: Any) -> dict[str, Any]:
    """The identity of a training set, computed without reading all of it.

    Returns:
        `rows`, the number of rows, and `bytes`, the size of the files or tables that they come from, each None if
        unknown; `sampled`, the number of sampled rows, evenly spaced from first to last (for a stream, the first few);
        `fingerprint`, a hash of those rows: of all texts, and of images by their bytes, or by their paths and sizes.
    """
    if not isinstance(dataset, Sized):
        rows = list(islice(iter(dataset), STREAMED_ROWS))
        return {"rows": None, "bytes": None, "sampled": len(rows), "fingerprint": _digest(rows)}
    count = len(dataset)
    places = sorted({round(place) for place in np.linspace(0, max(count - 1, 0), min(SAMPLED_ROWS, count))})
    stored = dataset
    if isinstance(dataset, Dataset) and dataset.format["type"] != "custom":
        stored = dataset.with_format("arrow")  # nothing is decoded
    return {
        "rows": count,
        "bytes": _bytes_behind(dataset),
        "sampled": len(places),
        "fingerprint": _digest(_row(stored, place) for place in places),
    }


def _bytes_behind(dataset: Any) -> int | None:
    if not isinstance(dataset, Dataset):
        return None
    if dataset.format["type"] != "custom":
        return dataset.data.nbytes
    transform = dataset.format["format_kwargs"].get("transform")
    return sum(source.nbytes for source in transform.sources) if isinstance(transform, Rows) else dataset.data.nbytes


def _row(dataset: Any, place: int) -> Any:
    try:
        row = dataset[place]
    except (
        Exception
    ) as error:  # unreadable rows are reported by training; here the type of the error stands in for the row
        return type(error).__name__
    return row.to_pylist() if hasattr(row, "to_pylist") else row


def identify_model(model: nn.Module, config: Any, adapters: bool) -> dict[str, Any]:
    """The identity of the model that a run starts from.

    Weight values are only sampled with adapters, a few of each frozen tensor, since adapter checkpoints do not contain
    the base model. Other checkpoints contain every weight.

    Returns:
        `config`, a hash of the architecture; `dtype`; `frozen_weights`, a hash or None.
    """
    return {
        "config": _digest([_without(config.to_dict(), _PROVENANCE)]),
        "dtype": str(getattr(model, "dtype", None)).removeprefix("torch."),
        "frozen_weights": _digest(_frozen(model)) if adapters else None,
    }


def _frozen(model: nn.Module) -> Iterator[Any]:
    for name, parameter in model.named_parameters():
        # An engine may keep the values elsewhere.
        if parameter.requires_grad or parameter.is_meta or hasattr(parameter, "ds_id"):
            continue
        flat = parameter.detach().flatten()
        step = max(1, flat.numel() // SAMPLED_VALUES)
        yield [name, list(parameter.shape), flat[::step][:SAMPLED_VALUES]]


def identify_processor(processor: Any) -> str:
    """A hash of what turns a row into tokens and pixels: vocabulary, chat template, image processor options."""
    parts = processor if isinstance(processor, ProcessorMixin) else None
    tokenizer = getattr(processor, "tokenizer", processor)
    images = getattr(parts, "image_processor", None)
    return _digest(
        [
            getattr(parts, "chat_template", None) or getattr(tokenizer, "chat_template", None),
            sorted(tokenizer.get_vocab().items()),
            None if images is None else _without(images.to_dict(), _PROVENANCE),
        ]
    )


def _without(value: Any, names: frozenset[str]) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _without(one, names) for key, one in value.items() if key not in names}
    return [_without(one, names) for one in value] if isinstance(value, (list, tuple)) else value


def _digest(values: Iterable[Any]) -> str:
    found = hashlib.sha256()
    for value in values:
        _feed(found, value)
    return found.hexdigest()[:16]


def _feed(found: Any, value: Any) -> None:
    """Add a value of any kind to a hash; equal values hash equally in every process."""
    if isinstance(value, Mapping):
        found.update(b"{")
        for key in sorted(value, key=str):
            _feed(found, str(key))
            _feed(found, value[key])
    elif isinstance(value, (list, tuple)):
        found.update(b"[")
        for one in value:
            _feed(found, one)
    elif isinstance(value, (bytes, bytearray, memoryview)):
        found.update(b"b" + len(value).to_bytes(8, "big"))
        found.update(value)
    elif isinstance(value, str):
        found.update(f"s{len(value)}:{value}".encode("utf-8", "surrogatepass"))
        if value and "\n" not in value and len(value) < 4096 and "/" in value:
            _feed_file(found, value)
    elif isinstance(value, Tensor):
        _feed(found, value.cpu().contiguous().view(torch.uint8).numpy())
    elif isinstance(value, np.ndarray):
        found.update(f"a{value.shape}{value.dtype}".encode())
        found.update(np.ascontiguousarray(value).tobytes())
    elif hasattr(value, "tobytes") and hasattr(value, "mode"):  # a PIL image
        found.update(f"i{value.size}{value.mode}".encode())
        found.update(value.tobytes())
    else:
        found.update(json.dumps(through_json(value), sort_keys=True).encode())


def _feed_file(found: Any, path: str) -> None:
    """Add the size of a file that a row names, such as an image."""
    try:
        found.update(str(Path(path).stat().st_size).encode())
    except (OSError, ValueError):
        return


def through_json(value: Any) -> Any:
    """A value as JSON has it, the same in every process, with sets sorted; of others the name of the type."""
    try:
        return json.loads(to_json(value))
    except TypeError:
        return type(value).__name__
