"""Scores out of the files that evaluations leave: lmms-eval's results, and those of `saccade eval` on digit scenes."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saccade.errors import SaccadeError
from saccade.suites.definitions import BENCHMARKS

LMMS_FILES = "*results.json"
DIGIT_FILE = "eval.json"


@dataclass
class Scores:
    """What one folder says of one model.

    Args:
        source: the folder, or the file.
        values: score by task, in the unit that papers print.
        settings: by task, how the model was run, as text.
        documents: by task, how many documents were answered, where the file says so.
    """

    source: str
    values: dict[str, float] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    documents: dict[str, int] = field(default_factory=dict)


def read_scores(path: str | Path) -> Scores:
    """The scores in a result folder, or in one of its files.

    Of several results of one task the newest counts, if the model was run in the same way for all.

    Args:
        path: what `lmms_eval --output_path` or `saccade eval` wrote: a JSON file, or a folder with such files at any
            depth. Of digit scenes, each inference is a task: "digits/full".

    Raises:
        SaccadeError: if there is no result, a file cannot be read, or the results are of several ways to run a model.
    """
    place = Path(path)
    if place.is_file():
        files = [place]
    elif place.is_dir():
        found = {*place.rglob(LMMS_FILES), *place.rglob(DIGIT_FILE)}
        # Files of one second of the clock are told apart by name: lmms-eval's start with the date.
        files = sorted(found, key=lambda file: (file.stat().st_mtime, file.name))
    else:
        raise SaccadeError(f"folder={str(path)!r} does not exist: give what an evaluation wrote")
    scores = Scores(str(path))
    origin: dict[str, Path] = {}
    for file in files:
        for task, score, settings, documents in _read(file, must=file is place):
            known = scores.settings.get(task)
            if known is not None and known != settings:
                raise SaccadeError(
                    f"folder={str(path)!r} has results of {task} for two ways to run a model, in {origin[task]} and "
                    f"{file}: name the folder of one"
                )
            scores.values[task], scores.settings[task], origin[task] = score, settings, file
            scores.documents.pop(task, None)
            if documents is not None:
                scores.documents[task] = documents
    if not scores.values:
        raise SaccadeError(
            f"folder={str(path)!r} holds no scores: give a folder with {LMMS_FILES} of lmms-eval or {DIGIT_FILE}"
        )
    return scores


def _read(file: Path, must: bool) -> Iterator[tuple[str, float, str, int | None]]:
    """Task, score, settings and number of documents of every result in a file; none from a JSON of another kind."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SaccadeError(
            f"file={str(file)!r} is not readable JSON: {error}; evaluate again, or remove it"
        ) from error
    results = content.get("results") if isinstance(content, dict) else None
    if isinstance(results, list) and all(isinstance(entry, dict) and "accuracy" in entry for entry in results):
        for entry in results:
            # What was trained is the same for every inference of one file: the name tells them apart.
            yield f"digits/{entry['inference']}", 100 * entry["accuracy"], "digit scenes", entry.get("samples")
    elif isinstance(results, dict):
        settings = str((content.get("config") or {}).get("model_args", ""))
        for task, metrics in results.items():
            score = _score(task, metrics, (content.get("higher_is_better") or {}).get(task) or {}, file)
            if score is not None:
                samples = (content.get("n-samples") or {}).get(task) or {}
                yield task, score, settings, samples.get("effective")
    elif must:
        raise SaccadeError(f"file={str(file)!r} has no results: give one that lmms-eval or `saccade eval` wrote")


def _score(task: str, metrics: Mapping[str, Any], higher_is_better: Mapping[str, Any], file: Path) -> float | None:
    """The score that stands for a task; None where it has none, as a group of tasks may.

    Of a benchmark of a suite it is the suite's metric; of another task the first number of which more is better.

    Raises:
        SaccadeError: if a benchmark of a suite lacks its metric.
    """
    # lmms-eval names entries "metric,filter".
    numbers: dict[str, float] = {}
    for key, value in metrics.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            numbers.setdefault(key.partition(",")[0], float(value))
    if task in BENCHMARKS:
        benchmark = BENCHMARKS[task]
        if benchmark.metric not in numbers:
            raise SaccadeError(
                f"file={str(file)!r}: {task} has no number for {benchmark.metric}, only for "
                f"{', '.join(numbers) or 'nothing'}: evaluate it again"
            )
        return benchmark.scale * numbers[benchmark.metric]
    names = [name for name in numbers if higher_is_better.get(name, True) and "_stderr" not in name]
    names = [name for name in names if name not in ("samples", "alias")]
    return numbers[names[0]] if names else None
