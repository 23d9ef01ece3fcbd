"""Records of a JSON list or of JSON lines, indexed once and read one at a time, so that large files cost little."""

import itertools
import json
import mmap
import re
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from saccade.data.stamps import FileStamps
from saccade.errors import RecordError, SaccadeError, kind_of
from saccade.files import similar_path

_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"|["\[\]{}]', re.DOTALL)
_ELEMENT = re.compile(rb'(?:"(?:[^"\\]++|\\.)*+"|[^,])++', re.DOTALL)
"""An element of a list that is neither an object nor a list."""
_HEAD = 1 << 16
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_SPACE = b" \t\r\n"
_QUOTE = ord('"')

Span = tuple[int, int, int]
"""First byte and byte after the last of a record, and its number: its line, or its place in the list, from 1."""


class RecordFile:
    """The records of a `.json` list or of JSON lines, parsed when they are read.

    The file is memory-mapped, which all processes of a machine share, and only the location of each record is stored:
    24 bytes per record.

    Args:
        path: the file. One that starts with a bracket is a list, one that starts with a brace is JSON lines.

    Raises:
        SaccadeError: if the file does not exist, is empty, starts with neither, or is not in UTF-8.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._stamps = FileStamps([self.path])
        self.is_list = _is_list(self.path)
        self._starts, self._ends, self._numbers = array("q"), array("q"), array("q")
        self._mapped: mmap.mmap | None = None
        for start, end, number in _spans(self._bytes, self.is_list):
            self._starts.append(start)
            self._ends.append(end)
            self._numbers.append(number)
        if not self._starts:
            raise SaccadeError(f"dataset={str(path)!r} has no rows")

    def __len__(self) -> int:
        return len(self._starts)

    @property
    def nbytes(self) -> int:
        """Size of the file when it was opened."""
        return self._stamps.nbytes

    def name(self, index: int) -> str:
        """The location of record `index`, counted from 0, in the file."""
        return place(self.path, self.is_list, self._numbers[index])

    def read(self, index: int) -> dict[str, Any]:
        """Record `index`, counted from 0.

        Raises:
            RecordError: if it is not a JSON object.
            SaccadeError: if the file has changed since it was opened.
        """
        self._stamps.check()
        return parse(self._bytes[self._starts[index] : self._ends[index]])

    @property
    def _bytes(self) -> mmap.mmap:
        if self._mapped is None:
            self._mapped = _map(self.path)
        return self._mapped

    def __getstate__(self) -> dict[str, Any]:
        # A memory map cannot be pickled; a spawned worker makes its own.
        return {**self.__dict__, "_mapped": None}


def stream_records(path: str | Path, shard: int = 0, num_shards: int = 1) -> Iterator[tuple[str, bytes]]:
    """Location and bytes of every `num_shards`-th record starting at `shard`, without indexing the file.

    Raises:
        SaccadeError: as for `RecordFile`, and if the file changes in the meantime.
    """
    path = Path(path)
    stamps = FileStamps([path])
    is_list = _is_list(path)
    content = _map(path)
    spans = _spans(content, is_list)
    for count in itertools.count():
        stamps.check()  # before reading the map: accessing a truncated part kills the process
        span = next(spans, None)
        if span is None:
            return
        start, end, number = span
        if count % num_shards == shard:
            yield place(path, is_list, number), content[start:end]


def place(path: Path, is_list: bool, number: int) -> str:
    """The name of a record in messages."""
    return f"{path}, {'row' if is_list else 'line'} {number}"


def parse(content: bytes) -> dict[str, Any]:
    """The JSON object in `content`.

    Raises:
        RecordError: if it is not one.
    """
    try:
        record = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"this is not valid JSON: {' '.join(str(error).split())}", "not_json") from error
    if not isinstance(record, dict):
        raise RecordError(f"this is {kind_of(record)}: each row is a JSON object", "not_json")
    return record


def no_dataset(path: str | Path) -> SaccadeError:
    """The error for a data file that does not exist."""
    hint = similar_path(path, "give a JSON, JSON-lines or Parquet file")
    return SaccadeError(f"dataset={str(path)!r} does not exist: {hint}")


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _is_list(path: Path) -> bool:
    if not path.is_file():
        raise no_dataset(path)
    with path.open("rb") as file:
        head = file.read(_HEAD)
    encoding = json.detect_encoding(head)
    if not encoding.startswith("utf-8"):
        # Lines are found by a byte, which is half of a character there.
        raise SaccadeError(f"dataset={str(path)!r} starts like a file in {encoding.upper()}: save it as UTF-8")
    head = head.removeprefix(_BYTE_ORDER_MARK).lstrip(_SPACE)
    if not head:
        raise SaccadeError(f"dataset={str(path)!r} has no rows")
    if path.suffix == ".json" and head[:1] == b"{":
        # JSON lines are often called .json. A single object over several lines is something else.
        try:
            json.loads(_first_line(path))
        except (ValueError, RecursionError) as error:
            what = "is a single object"
            if path.stat().st_size > _HEAD:  # too large to find out
                what += ", or not valid JSON"
            elif not _is_valid(head):
                what = f"is not valid JSON ({error})"
            raise SaccadeError(f"{path} {what}: expected a list of rows, or one row per line") from error
        return False
    return path.suffix != ".jsonl" and head[:1] == b"["


def _first_line(path: Path) -> bytes:
    """The first line with anything in it, which may be longer than the beginning of a file that is looked at."""
    with path.open("rb") as file:
        return next(line for line in file if line.removeprefix(_BYTE_ORDER_MARK).strip(_SPACE)).removeprefix(
            _BYTE_ORDER_MARK
        )


def _is_valid(content: bytes) -> bool:
    try:
        json.loads(content)
    except (ValueError, RecursionError):
        return False
    return True


def _spans(content: mmap.mmap, is_list: bool) -> Iterator[Span]:
    return _spans_of_list(content) if is_list else _spans_of_lines(content)


def _spans_of_lines(content: mmap.mmap) -> Iterator[Span]:
    size, start, number = len(content), 0, 1
    if content[:3] == _BYTE_ORDER_MARK:
        start = 3
    while start < size:
        end = content.find(b"\n", start)
        end = size if end < 0 else end
        if content[start:end].strip(_SPACE):
            yield start, end, number
        start, number = end + 1, number + 1


def _spans_of_list(content: mmap.mmap) -> Iterator[Span]:
    """Spans of a list's elements. Elements that are not objects, or are truncated, give spans that do not parse."""
    depth, start, end, number = 0, 0, content.find(b"[") + 1, 0
    for token in _TOKEN.finditer(content, end):
        first = content[token.start()]
        if first == _QUOTE:
            if token.end() - token.start() == 1:  # unterminated: the file ends inside a string
                break
        elif first in b"{[":
            if depth == 0:
                start = token.start()
            depth += 1
        elif depth > 1:
            depth -= 1
        else:
            # Anything between two objects other than a comma is an element of another type.
            for element in _ELEMENT.finditer(content, end, start if depth else token.start()):
                if element[0].strip(_SPACE):
                    number += 1
                    yield *element.span(), number
            end = token.end()
            if depth == 0:
                if content[end:].strip(_SPACE):
                    yield end, len(content), number + 1
                return
            depth = 0
            number += 1
            yield start, end, number
    yield (start if depth else end), len(content), number + 1
