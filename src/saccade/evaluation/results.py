"""Read scores from the result files of evaluations: lmms-eval's, and those of `saccade eval` on digit scenes."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saccade.dualspeed.weights import read_evaluation, weight_files
from saccade.errors import SaccadeError
from saccade.evaluation.suites import BENCHMARKS

LMMS_FILES = "*results.json"
DIGIT_FILE = "eval.json"
DIGITS = "digits/"


@dataclass
class Scores:
    """The scores of one model in one folder.

    Args:
        source: the folder, or the file.
        values: score by task, in the unit used in papers.
        settings: how the model was run, as lmms-eval's `model_args`; None for digit scenes.
        documents: number of answered documents by task, if known.
        prompt_lengths: mean number of tokens read by the language model by task, if known.
    """

    source: str
    values: dict[str, float] = field(default_factory=dict)
    settings: str | None = None
    documents: dict[str, int] = field(default_factory=dict)
    prompt_lengths: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Result:
    """One task's result in one file."""

    task: str
    score: float
    settings: str
    documents: int | None
    prompt_length: float | None


def read_scores(path: str | Path) -> Scores:
    """The scores in a result folder, or in one of its files.

    If a task has several results, the newest counts.

    Args:
        path: what `lmms_eval --output_path` or `saccade eval` wrote: a JSON file, or a folder with such files at any
            depth. For digit scenes, each inference is a task, such as "digits/full".

    Raises:
        SaccadeError: if there is no result, a file cannot be read, or lmms-eval ran the model in several ways.
    """
    place = Path(path)
    if place.is_file():
        files = [place]
    elif place.is_dir():
        found = {*place.rglob(LMMS_FILES), *place.rglob(DIGIT_FILE)}
        # Files of equal time are ordered by name, which in lmms-eval begins with the date.
        files = sorted(found, key=lambda file: (file.stat().st_mtime, file.name))
    else:
        raise SaccadeError(f"folder={str(path)!r} does not exist: give what an evaluation wrote")
    scores = Scores(str(path))
    origin: dict[str, Path] = {}
    for file in files:
        for result in _read(file, must=file is place):
            task = result.task
            if task.startswith(DIGITS):
                if task in origin and file != origin[task]:
                    raise SaccadeError(f"folder={str(path)!r} has {origin[task]} and {file}: name the folder of one")
            elif scores.settings not in (None, result.settings):
                raise SaccadeError(
                    f"folder={str(path)!r} has results of a model run in two ways, {scores.settings!r} and "
                    f"{result.settings!r} in {file}: name the folder of one"
                )
            else:
                scores.settings = result.settings
            origin[task] = file
            scores.values[task] = result.score
            for kept, value in ((scores.documents, result.documents), (scores.prompt_lengths, result.prompt_length)):
                kept.pop(task, None)
                if value is not None:
                    kept[task] = value
    if not scores.values:
        raise SaccadeError(
            f"folder={str(path)!r} has no scores: give a folder with {LMMS_FILES} of lmms-eval or {DIGIT_FILE}"
        )
    return scores


def _read(file: Path, must: bool) -> Iterator[_Result]:
    """Every result in a file. JSON files of another kind have none, which is an error if `must` is true."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SaccadeError(
            f"file={str(file)!r} is not readable JSON: {error}; evaluate again, or remove it"
        ) from error
    results = content.get("results") if isinstance(content, dict) else None
    scenes = {"inference", "accuracy"}
    if isinstance(results, list) and all(isinstance(entry, dict) and scenes <= entry.keys() for entry in results):
        _check_is_of_its_weights(file)
        for entry in results:
            yield _Result(
                DIGITS + entry["inference"],
                100 * entry["accuracy"],
                "",
                entry.get("samples"),
                entry.get("mean_prompt_length"),
            )
    elif isinstance(results, dict) and all(isinstance(metrics, dict) for metrics in results.values()):
        settings = str((content.get("config") or {}).get("model_args", ""))
        for task, metrics in results.items():
            score = _score(task, metrics, (content.get("higher_is_better") or {}).get(task) or {}, file)
            if score is not None:
                samples = (content.get("n-samples") or {}).get(task) or {}
                yield _Result(task, score, settings, samples.get("effective"), None)
    elif must:
        raise SaccadeError(f"file={str(file)!r} has no results: give one that lmms-eval or `saccade eval` wrote")


def _check_is_of_its_weights(file: Path) -> None:
    """Refuse an evaluation next to a model that it does not belong to."""
    if file.name == DIGIT_FILE and weight_files(file.parent):
        _, fault = read_evaluation(file.parent)
        if fault is not None:
            raise SaccadeError(f"{fault}: `saccade eval {file.parent}` measures those next to it")


def _score(task: str, metrics: Mapping[str, Any], higher_is_better: Mapping[str, Any], file: Path) -> float | None:
    """The score that represents a task; None if it has none, as for some groups of tasks.

    For a benchmark of a suite it is the suite's metric; for any other task, the first number that is better when
    higher.

    Raises:
        SaccadeError: if a benchmark of a suite lacks its metric.
    """
    # lmms-eval names entries "metric,filter".
    numbers: dict[str, float] = {}
    for key, value in metrics.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            name = key.partition(",")[0]
            if name != "samples" and "_stderr" not in name:
                numbers.setdefault(name, float(value))
    if task in BENCHMARKS:
        benchmark = BENCHMARKS[task]
        if benchmark.metric not in numbers:
            raise SaccadeError(
                f"file={str(file)!r}: {task} has no number for {benchmark.metric}, only for "
                f"{', '.join(numbers) or 'nothing'}: evaluate it again"
            )
        return benchmark.scale * numbers[benchmark.metric]
    names = [name for name in numbers if higher_is_better.get(name, True)]
    return numbers[names[0]] if names else None
