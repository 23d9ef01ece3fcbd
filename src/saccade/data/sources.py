"""Sources of rows: a JSON file, or anything that `datasets` reads. Rows are read and converted one at a time."""

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

from saccade.data.conversation import convert
from saccade.data.fields import MEDIA_FIELDS
from saccade.data.folders import ImageFolders
from saccade.data.records import RecordFile, parse, stream_records
from saccade.data.stamps import FileStamps
from saccade.data.tables import stream_table
from saccade.errors import RecordError, SaccadeError, kind_of
from saccade.files import reading
from saccade.values import DATA_SUFFIXES, JSON_SUFFIXES

PROBED = 100
"""How many rows to try to find a usable one. If none is usable, the options are wrong rather than the rows."""

Row = dict[str, Any]
"""`messages`, or `prompt` and `completion`; `images` and `videos`; `record`, its location in the file; and `fault`
with `kind`, why it is unusable, both None if it is usable."""


class Source(ABC):
    """Rows that are read by index.

    Args:
        form: as for `convert`.
        folders: the folders of images and videos that are stored as paths; None leaves media as they are.
    """

    place: Hashable = None
    """Where its rows lie, the same for each source that reads them, in whatever way; None for rows of its own."""

    def __init__(self, form: str, folders: ImageFolders | None) -> None:
        self.form, self.folders = form, folders

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, index: int) -> str:
        """The location of row `index`, counted from 0."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Size in bytes of the file or table that the rows are in."""

    @abstractmethod
    def record(self, index: int) -> Row:
        """The fields of row `index` as they are stored. Raises a `RecordError` if there are none to read."""

    def row(self, record: Row) -> Row:
        """Messages and images of a record. Raises a `RecordError` if it cannot be used."""
        row = convert(record, self.form)
        return row if self.folders is None else found(row, self.folders)

    def read(self, index: int) -> Row:
        """Messages and images of row `index`. Raises a `RecordError` if it cannot be used."""
        return self.row(self.record(index))


class JsonSource(Source):
    """Rows of a JSON list or of JSON lines, in the file `path`."""

    def __init__(self, path: Path, form: str, folders: ImageFolders) -> None:
        super().__init__(form, folders)
        self.records = RecordFile(path)

    def __len__(self) -> int:
        return len(self.records)

    def name(self, index: int) -> str:
        return self.records.name(index)

    @property
    def nbytes(self) -> int:
        return self.records.nbytes

    def record(self, index: int) -> Row:
        return self.records.read(index)


class TableSource(Source):
    """Rows of a `datasets.Dataset`, with images left as the stored bytes or path; `path` is its name in messages."""

    def __init__(self, dataset: Dataset, path: str, form: str = "auto", folders: ImageFolders | None = None) -> None:
        super().__init__(form, folders)
        # In Arrow format nothing is decoded; otherwise `datasets` would open any path that a row names, and fail on
        # the first bad image.
        self.dataset = dataset if folders is None else dataset.with_format("arrow")
        self.path = path
        self._stamps = FileStamps([file["filename"] for file in dataset.cache_files], every_seconds=1.0)

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        return f"{self.path}, row {index + 1}"

    @property
    def nbytes(self) -> int:
        return self.dataset.data.nbytes

    def record(self, index: int) -> Row:
        self._stamps.check()
        return self.dataset[index] if self.folders is None else self.dataset[index].to_pylist()[0]


class Rows:
    """A `datasets` transform from indices of sources and rows to the rows themselves.

    An unusable row has a `fault` and empty messages; the reader decides what to do with it.

    Raises:
        SaccadeError: if no row can be read, or sources have different columns.
    """

    def __init__(self, sources: list[Source]) -> None:
        self.sources = sources
        kinds = [_columns(source) for source in sources]
        if len(set(kinds)) > 1:
            raise SaccadeError(
                f"dataset mixes sources with {' and '.join(map(repr, sorted(set(kinds))))}: train them separately"
            )
        self.columns = kinds[0]
        places = [number if source.place is None else source.place for number, source in enumerate(sources)]
        self.firsts = [places.index(place) for place in places]
        """For each source the first one that has the same rows."""

    def __call__(self, batch: Mapping[str, list]) -> dict[str, list]:
        rows = [self.read(*place) for place in zip(batch["source"], batch["row"], strict=True)]
        return {**{name: [row[name] for row in rows] for name in rows[0]}, "index": list(batch["index"])}

    def read(self, source: int, index: int) -> Row:
        """Row `index` of a source, or a row with its fault."""
        origin = self.sources[source]
        try:
            row = origin.read(index)
            _check_columns(row, self.columns)
        except RecordError as error:
            return faulty_row(self.columns, origin.name(index), error)
        return {**row, "record": origin.name(index), "fault": None, "kind": None}

    def __deepcopy__(self, memo: dict) -> "Rows":
        # It is immutable, and `datasets` copies transforms whenever rows or columns are selected.
        return self


def faulty_row(columns: tuple[str, ...], record: str, error: RecordError) -> Row:
    """The placeholder for an unusable row."""
    # Has the columns of a usable row, since trainers inspect the first row to determine the format.
    roles = ["user" if name == "prompt" else "assistant" for name in columns]
    empty: Row = {name: [{"role": role, "content": ""}] for name, role in zip(columns, roles, strict=True)}
    return {**empty, "images": [], "videos": [], "record": record, "fault": str(error), "kind": error.kind}


def found(row: Row, folders: ImageFolders) -> Row:
    """The row with the paths of its images and videos looked up.

    Raises:
        RecordError: if one is missing or outside the folders.
    """
    images = [_found(image, folders) for image in row["images"]]
    return {**row, "images": images, "videos": [_found_video(video, folders) for video in row["videos"]]}


def _found(image: Any, folders: ImageFolders) -> Any:
    if isinstance(image, str):
        return folders.find(image)
    if isinstance(image, Mapping) and isinstance(image.get("bytes"), bytes):
        return {"bytes": image["bytes"], "path": image.get("path")}
    if isinstance(image, Mapping) and image.get("bytes") is not None:
        raise RecordError(f"an image's 'bytes' are {kind_of(image['bytes'])}: store the bytes of the file")
    if isinstance(image, Mapping) and isinstance(image.get("path"), str):
        return folders.find(image["path"])
    raise RecordError(f"an image is a path, or has 'bytes' or a 'path', found {str(image)[:80]}")


def _found_video(video: Any, folders: ImageFolders) -> Any:
    """A path, or a dict with "bytes", or one with "frames", images that `_found` returns, and perhaps their "fps"."""
    if isinstance(video, (list, tuple)):
        video = {"frames": video}
    if isinstance(video, str):
        path = folders.find_video(video)
        return path if isinstance(path, str) else {"frames": path}
    if isinstance(video, Mapping):
        if isinstance(video.get("frames"), (list, tuple)):
            return {"frames": [_found(frame, folders) for frame in video["frames"]], **_rate(video)}
        if isinstance(video.get("bytes"), bytes):
            return {"bytes": video["bytes"], "path": video.get("path")}
        if video.get("bytes") is None and isinstance(video.get("path"), str):
            found = _found_video(video["path"], folders)
            return {**found, **_rate(video)} if isinstance(found, dict) else found
    raise RecordError(
        f"a video is a path, a list of frames, or has 'path', 'bytes' or 'frames', found {str(video)[:80]}"
    )


def _rate(video: Mapping[str, Any]) -> dict[str, float]:
    """The "fps" of frames, if they have one. A file has its own, whatever stands beside it."""
    fps = video.get("fps")
    if fps is None:
        return {}
    try:
        rate = math.nan if isinstance(fps, bool) else float(fps)
    except (TypeError, ValueError, OverflowError):
        rate = math.nan
    if not 0 < rate < math.inf:
        raise RecordError(f"a video's 'fps' is {str(fps)[:40]!r}: give its frames per second, a number above 0")
    return {"fps": rate}


def _columns(source: Source) -> tuple[str, ...]:
    """The columns of the first usable row."""
    faults = []
    for index in range(min(len(source), PROBED)):
        try:
            return tuple(name for name in source.read(index) if name not in MEDIA_FIELDS)
        except RecordError as error:
            faults.append(f"{source.name(index)}: {error}")
    if len(faults) == PROBED:
        raise SaccadeError(f"the first {PROBED} rows are all bad; {faults[0]}")
    return ("messages",)


def _check_columns(row: Row, columns: tuple[str, ...]) -> None:
    if columns[0] not in row:
        raise RecordError(
            f"this row has {[name for name in row if name not in MEDIA_FIELDS]}, the first one has {list(columns)}: "
            "a dataset that mixes rows with 'messages' and rows with 'prompt' and 'completion' is two datasets"
        )


def stream_source(
    path: str,
    form: str,
    split: str,
    folders: ImageFolders,
    columns: tuple[str, ...] | None,
    shard: int,
    shards: int,
    by_file: bool = True,
) -> Iterator[Row]:
    """Every `shards`-th row of a source, in order, without first reading or indexing all of it.

    Args:
        columns: the columns that rows must have; None for those of the first row.
        by_file: instead, read every `shards`-th file, if there are so many.
    """
    for record, raw in _stream(path, split, shard, shards, by_file):
        try:
            row = found(convert(parse(raw) if isinstance(raw, bytes) else raw, form), folders)
            columns = columns or tuple(name for name in row if name not in MEDIA_FIELDS)
            _check_columns(row, columns)
            yield {**row, "record": record, "fault": None, "kind": None}
        except RecordError as error:
            yield faulty_row(columns or ("messages",), record, error)


def _stream(path: str, split: str, shard: int, shards: int, by_file: bool) -> Iterator[tuple[str, bytes | Row]]:
    if is_json(path):
        yield from stream_records(path, shard, shards)
        return
    dataset = stream_table(path, split)
    own_files = by_file and shards > 1 and dataset.num_shards >= shards
    if own_files:
        dataset = dataset.shard(shards, shard)
    number = 0
    with reading(f"dataset={path!r} cannot be read"):
        for table in dataset.with_format("arrow").iter(batch_size=16):
            for raw in table.to_pylist():
                number += 1
                if own_files:
                    yield f"{path}, part {shard + 1} of {shards}, row {number}", raw
                elif (number - 1) % shards == shard:
                    yield f"{path}, row {number}", raw


def is_json(path: str) -> bool:
    """Whether a file has the suffix of a JSON list or JSON lines."""
    return Path(path).suffix in JSON_SUFFIXES


def is_data_file(path: str) -> bool:
    """Whether a source has the suffix of a single file that is read; it has no splits."""
    return Path(path).suffix in DATA_SUFFIXES
