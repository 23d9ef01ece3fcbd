"""Tables that `datasets` reads. A folder may come from a stranger, so that nothing outside it is opened.

`datasets` would open, from a folder's README.md or `state.json`, any file or address that these name.
"""

import json
import logging
import re
from collections.abc import Sequence
from glob import escape, glob
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, get_dataset_split_names, load_dataset, load_from_disk
from datasets.config import DATASET_STATE_JSON_FILENAME, DATASETDICT_JSON_FILENAME
from pyarrow.parquet import read_metadata

from saccade.errors import SaccadeError
from saccade.files import is_inside, reading

logger = logging.getLogger(__name__)

FIRST_SPLIT = "train"
"""What `datasets` calls rows without a split, and the default of `dataset_split`."""
SPLIT_WORDS = {
    FIRST_SPLIT: ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Words in the name of a Parquet file, or of its folder, that stand for a split, as on the hub."""
_SHARD = re.compile(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}")


def open_table(path: str, split: str) -> Dataset:
    """Open a dataset with `datasets`, without decoding images: Parquet, a folder, or a hub id.

    Raises:
        SaccadeError: if it cannot be read, has no such split, or is a folder that names files outside it.
    """
    folder = Path(path)
    if not folder.is_dir() or (not _is_saved(folder) and _parquet_files(folder)):
        return _load(path, split, streaming=False)
    places = [folder]
    with reading(f"dataset={path!r}, a folder written by save_to_disk, cannot be read"):
        if (folder / DATASETDICT_JSON_FILENAME).is_file():
            places = [folder / name for name in _read_json(folder / DATASETDICT_JSON_FILENAME)["splits"]]
        elif not (folder / DATASET_STATE_JSON_FILENAME).is_file():
            raise SaccadeError(
                f"dataset={path!r} is not a folder written by save_to_disk, and has no Parquet files: name a JSON "
                "file in it, if there is one"
            )
        for place in places:
            _check_inside(folder, [place / DATASET_STATE_JSON_FILENAME])
            entries = [
                place / entry["filename"] for entry in _read_json(place / DATASET_STATE_JSON_FILENAME)["_data_files"]
            ]
            _check_inside(folder, entries)
        try:
            dataset = load_from_disk(path)
        except IndexError as error:  # raised by `datasets` for a table without rows
            raise SaccadeError(f"dataset={path!r} has no rows") from error
    if isinstance(dataset, DatasetDict):
        if split not in dataset:
            raise SaccadeError(f"dataset_split={split!r} is not in {path}: use one of {', '.join(dataset)}")
        return dataset[split]
    if split not in (FIRST_SPLIT, str(dataset.split)):
        raise SaccadeError(f"dataset_split={split!r}: {path} has no splits, remove it")
    return dataset


def stream_table(path: str, split: str) -> IterableDataset:
    """As `open_table`, without reading all of it first."""
    folder = Path(path)
    if folder.is_dir() and (_is_saved(folder) or not _parquet_files(folder)):
        return open_table(path, split).to_iterable_dataset()
    return _load(path, split, streaming=True)


def list_splits(path: str) -> list[str]:
    """The names of a folder's or a hub id's splits; none where there are none, or where it does not open.

    Raises:
        SaccadeError: if a folder written by `save_to_disk` is damaged.
    """
    folder = Path(path)
    if folder.is_dir():
        saved = folder / DATASETDICT_JSON_FILENAME
        if saved.is_file():
            with reading(f"dataset={path!r}, a folder written by save_to_disk, cannot be read"):
                return list(_read_json(saved)["splits"])
        if _is_saved(folder):
            return []
        named = dict.fromkeys(split_of(file.relative_to(folder)) for file in _parquet_files(folder))
        return [name for name in named if name is not None]
    if is_parquet(path):
        return []
    try:
        return get_dataset_split_names(path)
    except Exception:  # opening it says what is wrong
        return []


def _is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote a folder."""
    return any((folder / name).is_file() for name in (DATASETDICT_JSON_FILENAME, DATASET_STATE_JSON_FILENAME))


def is_parquet(path: str) -> bool:
    """Whether a source is a Parquet file, or a pattern of such files."""
    return Path(path).suffix == ".parquet"


def _load(path: str, split: str, streaming: bool) -> Any:
    files = _local_files(path, split)
    if is_parquet(path) and not Path(path).is_dir():  # a single file has no splits
        split = FIRST_SPLIT
    try:
        if files is not None:
            names = {name: [escape(str(file.absolute())) for file in found] for name, found in files.items()}
            return load_dataset("parquet", data_files=names, split=split, streaming=streaming)
        if is_parquet(path):
            return load_dataset("parquet", data_files=path, split=split, streaming=streaming)
        return load_dataset(path, split=split, streaming=streaming)
    except Exception as error:
        line = " ".join(str(error).split())[:300]
        raise SaccadeError(
            f"dataset={path!r} is neither a JSON file, nor a folder, nor a dataset that loads: {line}"
        ) from error


def _local_files(path: str, split: str) -> dict[str, list[Path]] | None:
    """The Parquet files of a folder, a pattern or a file by split, without those that have no rows; None if it is
    elsewhere.

    Raises:
        SaccadeError: if one is damaged, or none has rows.
    """
    if Path(path).is_dir():
        splits = _files_of_splits(Path(path), split)
    elif is_parquet(path) and "://" not in path:
        found = [Path(path)] if Path(path).exists() else [Path(name) for name in sorted(glob(path, recursive=True))]
        splits = {FIRST_SPLIT: found}
    else:
        return None
    filled = {}
    for name, files in splits.items():
        filled[name] = [file for file in files if _count_rows(file, path)]
        if not filled[name]:
            raise SaccadeError(f"dataset={path!r} has no rows{'' if len(splits) == 1 else f' in its split {name!r}'}")
    return filled


def _count_rows(file: Path, path: str) -> int:
    with reading(f"dataset={path!r}: {file.name} is not a whole Parquet file"):
        return read_metadata(file).num_rows


def _parquet_files(folder: Path) -> list[Path]:
    """The Parquet files in a folder and in those inside it, sorted, without hidden ones."""
    found = (path for path in folder.rglob("*.parquet") if path.is_file())
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def _files_of_splits(folder: Path, split: str) -> dict[str, list[Path]]:
    """The Parquet files of each split that is read: all files, if no file's name says which split it is of.

    Args:
        split: as `datasets` takes it, such as "train", "train[:1000]" or "train+validation".
    """
    wanted = {part.split("[")[0].strip() for part in split.split("+")}
    files = _parquet_files(folder)
    _check_inside(folder, files)
    _warn_of_linked_folders(folder)
    splits: dict[str | None, list[Path]] = {}
    for file in files:
        splits.setdefault(split_of(file.relative_to(folder)), []).append(file)
    instead = f"list the files to read, or give a pattern such as {str(folder / '**' / '*.parquet')!r}"
    if len(splits) > 1 and None in splits:
        named = next(files[0] for name, files in splits.items() if name is not None)
        raise SaccadeError(
            f"dataset={str(folder)!r}: {named.name} is named by a split and {splits[None][0].name} is not: {instead}"
        )
    if wanted == {"all"}:
        wanted = {name or FIRST_SPLIT for name in splits}
    if None in splits:
        if wanted != {FIRST_SPLIT}:
            raise SaccadeError(f"dataset_split={split!r}: no Parquet file in {folder} is named by a split, remove it")
        return {FIRST_SPLIT: splits[None]}
    if not splits.keys() >= wanted:
        raise SaccadeError(f"dataset_split={split!r} is not in {folder}: use one of {', '.join(map(str, splits))}")
    for name in wanted:
        by_word = {_split_and_word(file.relative_to(folder))[1]: file.relative_to(folder) for file in splits[name]}
        if len(by_word) > 1:
            first, second = list(by_word.values())[:2]
            raise SaccadeError(
                f"dataset={str(folder)!r}: {first} and {second} may be of one split, {name!r}, or of two: {instead}"
            )
    return {name: files for name, files in splits.items() if name in wanted}


def split_of(path: Path) -> str | None:
    """The split that a Parquet file is of, as on the hub: by the whole name of a shard, as in
    `data/dev-00000-of-00001.parquet`, or a word in its name or its folders', `train.parquet`, `test/0.parquet`; None
    if they do not say.

    Args:
        path: relative to the folder of the dataset.
    """
    return _split_and_word(path)[0]


def _split_and_word(path: Path) -> tuple[str | None, str | None]:
    """The split that a Parquet file is of, and what in its path says so."""
    shard = _SHARD.fullmatch(path.stem)
    if shard and path.parent.name == "data":
        return shard[1], shard[1]
    for part in (path.stem, *reversed(path.parts[:-1])):
        words = re.split(r"[^a-z]+", part.lower())
        for split, names in SPLIT_WORDS.items():
            for name in names:
                if name in words:
                    return split, name
    return None, None


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _warn_of_linked_folders(folder: Path) -> None:
    """Say which Parquet files are left out because a link leads to their folder."""
    for link in folder.rglob("*"):
        if link.is_symlink() and next(link.rglob("*.parquet"), None):
            logger.warning("%s is a link to a folder, which is not followed: to read it, list it in dataset", link)


def _check_inside(folder: Path, files: Sequence[Path]) -> None:
    """Refuse files that are named, or linked to, outside a folder."""
    for file in files:
        if not is_inside(file, folder):
            raise SaccadeError(
                f"dataset={str(folder)!r} names {file}, which leads out of the folder: name the folder of that file"
            )
