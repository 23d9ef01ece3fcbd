"""Read every row, image and video of a dataset before a training run does, and report what is bad."""

import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from saccade.data.fields import fields_left_aside
from saccade.data.lengths import ClipShape, Shape, TokenCounter, check_words, row_text
from saccade.data.sources import Source
from saccade.errors import RecordError, SaccadeError
from saccade.images import MAX_PIXELS, open_image
from saccade.values import check_counts
from saccade.videos import Sampling, open_video

PERCENTILES = (5, 25, 50, 75, 95, 99, 100)
_CHUNK = 64

Chunk = tuple[int, int, int]
"""A part of a source: the index of the source, the first row, and the row after the last one."""


@dataclass
class Findings:
    """What was found in some rows."""

    checked: int = 0
    images: int = 0
    videos: int = 0
    frames: int = 0
    text_only: int = 0
    turns: int = 0
    bad: list[dict[str, Any]] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    full: list[int] = field(default_factory=list)
    shortened: list[int] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)
    visual: int = 0

    def add(self, other: "Findings") -> None:
        """Add what was found in other rows."""
        for name, more in vars(other).items():
            total = getattr(self, name)
            total += more  # lists and counters in place
            setattr(self, name, total)


def check_sources(
    sources: Sequence[Source],
    counter: TokenCounter | None = None,
    max_pixels: int = MAX_PIXELS,
    jobs: int = 1,
    max_length: int | None = None,
    padded: bool = False,
    sampling: Sampling | None = None,
    start: Callable[[int], None] | None = None,
    progress: Callable[[int], None] | None = None,
    counts: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Read all rows, decode all images and the frames that training takes of videos, and report.

    Args:
        sources: what to read.
        counter: counts tokens; None for a report without lengths.
        max_pixels: size above which an image is bad.
        jobs: number of processes that read in parallel; fewer are used if there is little to read.
        max_length: longest full sequence that training does not truncate.
        padded: whether training pads images to a square, whose size then counts.
        sampling: which frames training takes of a video.
        start: called with the number of rows before the first is read.
        progress: called with the number of rows just read.
        counts: how many rows of each source to read from the start; all by default.

    Returns:
        `complete`, false after an interruption, which ends the check early; `records`, the number of rows; `checked`;
        `images`, `videos`, `frames` taken of these, `text_only` and `turns` (answers) of the good rows; `bad`, the
        number of bad rows; `bad_by_kind`;
        `ignored`, fields that are not read, with the number of rows that have them; `bad_records`, a list of
        {`record`, `source`, `index` from 0, `kind`, `reason`} in order; `tokens`, None without a counter, else the
        number of `visual` tokens, the percentiles of the lengths `full` and `shortened`, and the number of rows that
        are `longer` than `max_length`; `seconds`; `jobs`.

    Raises:
        SaccadeError: if `jobs` is below 1, or a process dies.
    """
    check_counts(jobs=jobs)
    began = time.perf_counter()
    found = Findings()
    complete = True
    counts = [len(source) for source in sources] if counts is None else counts
    records = sum(counts)
    if start is not None:
        start(records)
    chunks = [
        (number, first, min(first + _CHUNK, count))
        for number, count in enumerate(counts)
        for first in range(0, count, _CHUNK)
    ]
    jobs = max(1, min(jobs, len(chunks)))
    results = _results(_Reader(list(sources), counter, max_pixels, padded, sampling), chunks, jobs)
    try:
        for part in results:
            found.add(part)
            if progress is not None:
                progress(part.checked)
    except KeyboardInterrupt:
        complete = False
    except BrokenProcessPool as error:
        raise SaccadeError(f"jobs={jobs}: a process died, out of memory perhaps: try fewer") from error
    finally:
        results.close()
    found.bad.sort(key=lambda entry: (entry["source"], entry["index"]))
    return {
        "complete": complete,
        "records": records,
        "checked": found.checked,
        "images": found.images,
        "videos": found.videos,
        "frames": found.frames,
        "text_only": found.text_only,
        "turns": found.turns,
        "bad": len(found.bad),
        "bad_by_kind": dict(Counter(entry["kind"] for entry in found.bad).most_common()),
        "bad_records": found.bad,
        "ignored": dict(found.ignored.most_common()),
        "tokens": None if counter is None else _token_report(found, counter, max_length),
        "seconds": round(time.perf_counter() - began, 2),
        "jobs": jobs,
    }


@dataclass
class _Reader:
    """Reads a chunk of rows; each process has its own."""

    sources: list[Source]
    counter: TokenCounter | None
    max_pixels: int
    padded: bool
    sampling: Sampling | None

    def read(self, chunk: Chunk) -> Findings:
        found = Findings()
        source, start, stop = chunk
        for index in range(start, stop):
            found.checked += 1
            try:
                self._read_row(self.sources[source], index, found)
            except RecordError as error:
                name = self.sources[source].name(index)
                entry = {"record": name, "source": source, "index": index, "kind": error.kind, "reason": str(error)}
                found.bad.append(entry)
        return found

    def _read_row(self, source: Source, index: int, found: Findings) -> None:
        record = source.record(index)
        found.ignored.update(fields_left_aside(record))
        row = source.row(record)
        sizes: list[Shape] = [open_image(image, self.max_pixels, self.padded).size for image in row["images"]]
        # One clip is in memory at a time.
        clips = [ClipShape.of(open_video(video, self.sampling, self.max_pixels)) for video in row["videos"]]
        messages = row["messages"] if "messages" in row else row["completion"]
        if self.counter is not None:
            sizes += clips
            check_words(row, self.counter.processor, self.counter.placeholder_id)
            text = self.counter.text_tokens(row_text(row))
            self.counter.check_fits(text, sizes)
            full, shortened = self.counter.lengths(text, sizes)
            found.lost.append(self.counter.lost(text, sizes))
            found.full.append(full)
            found.shortened.append(shortened)
            found.visual += sum(self.counter.tokens(size)[1] for size in sizes)
        found.images += len(row["images"])
        found.videos += len(clips)
        found.frames += sum(len(clip.times) for clip in clips)
        found.text_only += not row["images"] and not clips
        found.turns += sum(message["role"] == "assistant" for message in messages)


_reader: _Reader | None = None


def _start_process(reader: _Reader) -> None:
    global _reader
    _reader = reader
    # Ctrl-C reaches every process of the terminal; only the main process handles it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _read_in_process(chunk: Chunk) -> Findings:
    assert _reader is not None
    return _reader.read(chunk)


def _results(reader: _Reader, chunks: list[Chunk], jobs: int) -> Iterator[Findings]:
    """The findings of each chunk, in order."""
    if jobs == 1:
        yield from map(reader.read, chunks)
        return
    with ProcessPoolExecutor(jobs, initializer=_start_process, initargs=(reader,)) as pool:
        yield from pool.map(_read_in_process, chunks)


def _token_report(found: Findings, counter: TokenCounter, max_length: int | None) -> dict[str, Any]:
    return {
        "prune_ratio": counter.budget.prune_ratio,
        "keep_tokens": counter.budget.keep_tokens,
        "budget": counter.budget.budget,
        "isolator_length": counter.isolator_length,
        "visual": found.visual,
        "full": _percentiles(found.full),
        "shortened": _percentiles(found.shortened),
        "max_length": max_length,
        "fit_length": counter.budget.fit_length,
        "cut": sum(lost > 0 for lost in found.lost),
        "lost": sum(found.lost),
        "longer": 0 if max_length is None else sum(length > max_length for length in found.full),
    }


def _percentiles(lengths: list[int]) -> dict[str, float]:
    """The mean and the percentiles of lengths."""
    if not lengths:
        return {}
    values = np.percentile(np.array(lengths), PERCENTILES, method="higher").tolist()
    names = [f"p{percent}" for percent in PERCENTILES[:-1]] + ["max"]
    return {"mean": round(sum(lengths) / len(lengths), 1), **dict(zip(names, values, strict=True))}
