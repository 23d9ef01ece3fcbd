"""One dataset from one or more sources: concatenated or sampled by weight, in memory or streamed."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from glob import glob
from itertools import islice
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
from datasets import Dataset, Features, IterableDataset, List, Value, concatenate_datasets, interleave_datasets

from saccade.data.addresses import ImageAddresses
from saccade.data.conversation import FORMATS
from saccade.data.folders import ImageFolders
from saccade.data.records import no_dataset
from saccade.data.sources import (
    PROBED,
    JsonSource,
    Row,
    Rows,
    Source,
    TableSource,
    faulty_row,
    is_data_file,
    is_json,
    stream_source,
)
from saccade.data.tables import open_table
from saccade.errors import RecordError, SaccadeError, did_you_mean
from saccade.values import check_choice, coerce

_NUMBERS = Features({"source": Value("int32"), "row": Value("int64")})
_FILE = {"bytes": Value("binary"), "path": Value("string")}
_PACKED = Features(
    {
        "row": Value("string"),
        "images": List(_FILE),
        "videos": List({**_FILE, "frames": List(_FILE), "fps": Value("float64")}),
        "record": Value("string"),
        "fault": Value("string"),
        "kind": Value("string"),
    }
)


@dataclass(frozen=True)
class SourceOptions:
    """One source of a mixture.

    Args:
        path: a `.json`, `.jsonl` or `.parquet` file, a folder with Parquet files or written by `save_to_disk`, or a
            hub id.
        format: "llava" for rows with `conversations`, "chat" for rows with `messages`, or "auto".
        weight: how often its rows are drawn, relative to the other sources.
        rows: use only this many rows from the start; all by default.
        image_folder: folder, or several, as a list or as "a,b", that paths of images and videos are relative to; by
            default that of the data file.
        split: the split to read, if there are several.
    """

    path: str
    format: str = "auto"
    weight: float | None = None
    rows: int | None = None
    image_folder: str | list[str] | None = None
    split: str = "train"

    def __post_init__(self) -> None:
        if not isinstance(self.path, str) or not self.path:
            raise SaccadeError(f"dataset path={self.path!r}: give a file, a folder or a hub id")
        check_choice("dataset format", self.format, FORMATS)
        if self.rows is not None and (not isinstance(self.rows, int) or self.rows < 1):
            raise SaccadeError(f"dataset rows={self.rows!r}: give at least 1, or null for all")
        if self.weight is not None and not (isinstance(self.weight, (int, float)) and 0 < self.weight < float("inf")):
            raise SaccadeError(f"dataset weight={self.weight!r}: give a number above 0")

    def folders(self, allow_outside: bool, addresses: ImageAddresses | None = None) -> ImageFolders:
        """The folders of its images; the arguments are those of `ImageFolders`.

        Raises:
            SaccadeError: if one does not exist, or the source is a data file that does not, or a file of another kind.
        """
        if is_json(self.path) and not Path(self.path).is_file():
            raise no_dataset(self.path)
        # Patterns and addresses are left to `datasets`.
        if is_data_file(self.path) and not (
            Path(self.path).exists() or "://" in self.path or glob(self.path, recursive=True)
        ):
            raise no_dataset(self.path)
        # `datasets` would ask the hub for a data set of this name.
        if Path(self.path).is_file() and not is_data_file(self.path):
            raise SaccadeError(
                f"dataset={self.path!r} is a file of a kind that is not read: give one whose name ends in .json, "
                ".jsonl or .parquet"
            )
        given = self.image_folder
        if given is None:
            place = Path(self.path)
            given = place if place.is_dir() else place.parent if place.exists() else []
        if isinstance(given, str):
            given = [name.strip() for name in given.split(",")]
        names = [given] if isinstance(given, Path) else list(given)
        return ImageFolders(names, allow_outside, addresses)

    def open(self, allow_outside: bool = False, addresses: ImageAddresses | None = None) -> Source:
        """Open its rows; the arguments are those of `ImageFolders`."""
        folders = self.folders(allow_outside, addresses)
        source: Source
        if is_json(self.path):
            source = JsonSource(Path(self.path), self.format, folders)
        else:
            source = TableSource(open_table(self.path, self.split), self.path, self.format, folders)
        source.place = (os.path.realpath(self.path), None if is_data_file(self.path) else self.split)
        return source


def source_options(values: Sequence[Any], **defaults: Any) -> list[SourceOptions]:
    """The sources of a recipe's `dataset` list.

    Args:
        values: paths, or mappings with the fields of `SourceOptions`.
        defaults: default values of fields.

    Raises:
        SaccadeError: on an unknown field, a value of the wrong type or out of range, an empty list, or weights that
            only some sources have.
    """
    types = get_type_hints(SourceOptions)
    sources = []
    for value in values:
        value = {"path": value} if isinstance(value, str) else value
        if not isinstance(value, Mapping) or "path" not in value:
            raise SaccadeError(f"dataset has the entry {value!r}: give a path, or a mapping with a 'path'")
        for name in value:
            if name not in types:
                hint = did_you_mean(str(name), types, f"use {', '.join(types)}")
                raise SaccadeError(f"dataset has the unknown field {name!r}: {hint}")
        given = {name: coerce(f"dataset {name}", one, types[name]) for name, one in value.items()}
        if "split" in given and is_data_file(str(value["path"])):
            raise SaccadeError(
                f"dataset split={given['split']!r} of {value['path']!r}, a single file, which has no splits: remove it"
            )
        sources.append(SourceOptions(**{**defaults, **given}))
    if not sources:
        raise SaccadeError("dataset=[] is empty: give at least one source")
    if len({source.weight is None for source in sources}) > 1:
        raise SaccadeError("dataset gives only some sources a weight: give one to all of them, or to none")
    return sources


def mix(
    sources: Sequence[Source],
    weights: Sequence[float] | None = None,
    rows: Sequence[int | None] | None = None,
    seed: int = 0,
) -> Dataset:
    """The rows of all sources as one dataset, read and converted when they are used.

    The underlying table stores three numbers per row. Without weights the sources are concatenated. With weights, each
    row is drawn from a source with probability proportional to its weight, until every row of every source has been
    drawn once; shorter sources repeat.

    Args:
        sources: what to mix; one may be there several times.
        weights: one per source.
        rows: how many rows to use from the start of each; None for all.
        seed: seed of the draws.

    Raises:
        SaccadeError: if sources have different columns.
    """
    limits = [None] * len(sources) if rows is None else list(rows)
    tables = []
    for source, limit in zip(sources, limits, strict=True):
        count = len(source) if limit is None else min(limit, len(source))
        table = {"source": np.full(count, sources.index(source), dtype=np.int32), "row": np.arange(count)}
        tables.append(Dataset.from_dict(table, features=_NUMBERS))
    mixed = _joined(tables, weights, seed)
    numbers = {name: mixed.with_format("numpy")[name][:] for name in _NUMBERS}
    table = {**numbers, "index": np.arange(len(mixed))}
    features = Features({**_NUMBERS, "index": Value("int64")})
    return Dataset.from_dict(table, features=features).with_transform(Rows(list(sources)))


def stream(
    options: Sequence[SourceOptions],
    allow_outside: bool = False,
    seed: int = 0,
    shuffle_buffer: int = 0,
    shards: int = 1,
    rows: int | None = None,
    addresses: ImageAddresses | None = None,
) -> IterableDataset:
    """A stream of the rows of all sources; only those in use are in memory.

    Args:
        options: the sources.
        allow_outside: as for `ImageFolders`.
        seed: seed of the draws and of the shuffling.
        shuffle_buffer: size of the buffer that rows are shuffled in; 0 keeps the order.
        shards: number of parts to read in parallel: one per process and data-loader worker.
        rows: stop after this many rows.
        addresses: as for `ImageFolders`.
    """
    opened = [(source, source.folders(allow_outside, addresses)) for source in options]
    columns = _first_columns(_generate(tuple(opened[:1]), shards, columns=None, numbers=[0]), options[0].path)
    weights = None if options[0].weight is None else [source.weight for source in options]
    # Without weights, each part holds rows of every source in turn; otherwise ranks would read different sources.
    groups = [opened] if weights is None else [[source] for source in opened]
    given = {"shards": shards, "columns": columns, "numbers": list(range(shards))}
    streams = [
        IterableDataset.from_generator(_generate, features=_PACKED, gen_kwargs={"sources": tuple(group), **given})
        for group in groups
    ]
    mixed = _joined(streams, weights, seed)
    mixed = mixed if rows is None else mixed.take(rows)
    mixed = mixed.shuffle(seed=seed, buffer_size=shuffle_buffer) if shuffle_buffer else mixed
    return mixed.map(_unpack, remove_columns=list(_PACKED))


def _joined(parts: list, weights: Sequence[float] | None, seed: int) -> Any:
    if len(parts) == 1:
        return parts[0]
    if weights is None:
        return concatenate_datasets(parts)
    shares = [weight / sum(weights) for weight in weights]
    return interleave_datasets(parts, probabilities=shares, seed=seed, stopping_strategy="all_exhausted")


def _generate(
    sources: tuple[tuple[SourceOptions, ImageFolders], ...],
    shards: int,
    columns: tuple[str, ...] | None,
    numbers: list[int],
) -> Iterator[Row]:
    for number in numbers:
        for source, folders in sources:
            # Files of several sizes would each give another share of the first rows.
            by_file = source.rows is None
            rows = stream_source(source.path, source.format, source.split, folders, columns, number, shards, by_file)
            part = None if source.rows is None else len(range(number, source.rows, shards))
            yield from map(_pack, islice(rows, part))


def _first_columns(packed: Iterator[Row], path: str) -> tuple[str, ...]:
    """The columns of the first usable row of a stream."""
    bad = []
    for row in islice(packed, PROBED):
        if row["fault"] is None:
            return tuple(json.loads(row["row"]))
        bad.append(f"{row['record']}: {row['fault']}")
    if not bad:
        raise SaccadeError(f"dataset={path!r} has no rows")
    these = f"the first {len(bad)} rows are all" if len(bad) > 1 else "the only row is"
    raise SaccadeError(f"{these} bad; {bad[0]}")


def _pack(row: Row) -> Row:
    """The row in columns that have the same types for all sources, with its messages as JSON."""
    extras = ("images", "videos", "record", "fault", "kind")
    images, videos = [[_packed(item) for item in row[name]] for name in ("images", "videos")]
    videos = [{**video, "frames": [_packed(frame) for frame in video.get("frames", ())]} for video in videos]
    videos = [{"bytes": None, "path": None, "fps": None, **video} for video in videos]
    packed = {name: row[name] for name in extras} | {"images": images, "videos": videos}
    try:
        return {**packed, "row": json.dumps({name: row[name] for name in row if name not in extras})}
    except (TypeError, ValueError) as error:
        columns = tuple(name for name in row if name not in extras)
        fault = RecordError(f"its messages contain something other than text: {error}")
        return _pack(faulty_row(columns, row["record"], fault))


def _unpack(row: Row) -> Row:
    images = [_unpacked(image) for image in row["images"]]
    videos = []
    for video in row["videos"]:
        frames, rate = [_unpacked(frame) for frame in video["frames"] or ()], video["fps"]
        single = _unpacked({name: video[name] for name in ("bytes", "path")})
        videos.append({"frames": frames, **({} if rate is None else {"fps": rate})} if single is None else single)
    kept = {name: row[name] for name in ("record", "fault", "kind")}
    return {**json.loads(row["row"]), "images": images, "videos": videos, **kept}


def _packed(item: Any) -> Any:
    return {"bytes": None, "path": item} if isinstance(item, str) else item


def _unpacked(item: Mapping[str, Any]) -> Any:
    return item["path"] if item["bytes"] is None else item
