"""Scores in result folders of lmms-eval and `saccade eval`, and each as a share of a baseline's."""

import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from saccade.dualspeed.weights import read_evaluation, weight_files
from saccade.errors import SaccadeError
from saccade.evaluation.suites import BENCHMARKS, SUITES, Suite, get_suite
from saccade.files import check_exists, reading
from saccade.reducers.config import pruned_how
from saccade.values import is_number

LMMS_FILES = "*results.json"
DIGIT_FILE = "eval.json"
DIGITS = "digits/"


class Score(NamedTuple):
    """The score of a task.

    Args:
        value: in the unit used in papers.
        settings: what was run: lmms-eval's `model_args`, or the weights that `saccade eval` measured.
        documents: number of answered documents, if known.
        prompt_length: mean number of tokens read by the language model, if known.
        ours: whether `saccade eval` measured it.
        rows: which rows of a data file or which scenes it was measured on, if known.
        pruned: how images were pruned, if they were and `saccade eval` measured it.
    """

    value: float
    settings: str = ""
    documents: int | None = None
    prompt_length: float | None = None
    ours: bool = False
    rows: str | None = None
    pruned: str | None = None


Scores = dict[str, Score]
"""The scores of one model, by task."""


def compare_results(baseline: str | Path, model: str | Path, suite: str | None = None) -> dict[str, Any]:
    """Every score of a model as a share of the baseline's, and the mean of the shares.

    DualSpeed's summary is the mean over benchmarks of score / baseline score, including MME. Skip-Vision reports the
    mean of the scores without MME; its share of the baseline's is returned too. A mean over only part of a suite is
    marked.

    Args:
        baseline: result folder or file of the baseline model.
        model: that of the model to compare with it.
        suite: name of a suite, whose benchmarks are then the rows. By default the rows are the tasks that either of
            the two has, and the suite is the only one that contains all of them, if there is one.

    Returns:
        `rows` (`benchmark`, `task`, `baseline`, `model`, `share` as a fraction; None for missing values),
        `mean_share`, `shares` (how many are in the mean), `benchmarks` (how many there should be), `average` (None, or
        `baseline`, `model`, `share`, `scores`, `of`), `prompt_length` (None, or `baseline`, `model`, `share`),
        `suite`, `notes` and the two sources.

    Raises:
        SaccadeError: if a folder has no scores, the suite is unknown, or the two have no benchmark in common.
    """
    named = None if suite is None else get_suite(suite)
    first, second = read_scores(baseline), read_scores(model)
    tasks = list(dict.fromkeys([*first, *second]))
    fitting = [one for one in SUITES.values() if tasks and set(tasks) <= set(one.tasks)]
    chosen = named or (fitting[0] if len(fitting) == 1 else None)
    if chosen:
        tasks = [task for task in chosen.tasks if named or task in tasks]
    common = [task for task in tasks if task in first and task in second]
    if not common:
        raise SaccadeError(
            f"baseline={str(baseline)!r} has {', '.join(first)} and model={str(model)!r} {', '.join(second)}: no "
            f"benchmark {f'of suite {named.name} ' if named else ''}is in both"
        )
    rows = [
        {
            "benchmark": BENCHMARKS[task].name if task in BENCHMARKS else task,
            "task": task,
            **_pair(*(scores[task].value if task in scores else None for scores in (first, second))),
        }
        for task in tasks
    ]
    shares = [row["share"] for row in rows if row["share"] is not None]
    lengths = [(first[task].prompt_length, second[task].prompt_length) for task in common]
    return {
        "baseline": str(baseline),
        "model": str(model),
        "suite": chosen.name if chosen else None,
        "rows": rows,
        "mean_share": sum(shares) / len(shares) if shares else None,
        "shares": len(shares),
        "benchmarks": len(chosen.benchmarks) if chosen else len(rows),
        "average": _average(chosen, rows) if chosen and chosen.average else None,
        "prompt_length": None if any(None in pair for pair in lengths) else _pair(*_means(lengths)),
        "notes": _notes(rows, {f"{baseline} (baseline)": first, f"{model} (model)": second}),
    }


def comparison_rows(comparison: Mapping[str, Any]) -> tuple[list[str], list[list[str | None]]]:
    """The columns and cells of a table of what `compare_results` returned."""
    found = [(row["benchmark"], row) for row in comparison["rows"]]
    average = comparison["average"]
    if average is not None:
        found.append((_partly("average without MME", average["scores"], average["of"]), average))
    label = _partly("mean share", comparison["shares"], comparison["benchmarks"])
    found.append((label, {"share": comparison["mean_share"]}))
    if comparison["prompt_length"] is not None:
        found.append(("mean prompt length", comparison["prompt_length"]))
    rows = [
        [label, _number(row.get("baseline")), _number(row.get("model")), _percent(row["share"])]
        for label, row in found
    ]
    return ["benchmark", "baseline", "model", "share"], rows


def read_scores(path: str | Path) -> Scores:
    """The scores in a result folder, or in one of its files.

    If a task has several results of lmms-eval, the newest counts.

    Args:
        path: what `lmms_eval --output_path` or `saccade eval` wrote: a JSON file, or a folder with such files at any
            depth. For digit scenes and data files, each inference is a task, such as "digits/full",
            "digits/validation/full" or "test.json/full".

    Raises:
        SaccadeError: if there is no result, a file cannot be read, lmms-eval ran the model in several ways, or
            `saccade eval` measured several models, or a task twice.
    """
    place, shown = Path(path), f"folder={str(path)!r}"
    check_exists(place, "folder", "give what an evaluation wrote")
    files = [place] if place.is_file() else {*place.rglob(LMMS_FILES), *place.rglob(DIGIT_FILE)}
    scores: Scores = {}
    origin: dict[str, Path] = {}
    # By whose evaluation it is: the settings of all of its scores, and the first file.
    ways: dict[bool, tuple[str, Path]] = {}
    # Files of equal time are ordered by name, which in lmms-eval begins with the date.
    for file in sorted(files, key=lambda file: (file.stat().st_mtime, file.name)):
        with reading(f"file={str(file)!r} has results that cannot be read; evaluate again, or remove it"):
            found = list(_read(file, must=file is place))
        for task, score in found:
            if score.ours and file != origin.setdefault(task, file):
                raise SaccadeError(f"{shown} has {task} in {origin[task]} and in {file}: name the folder of one")
            settings, first = ways.setdefault(score.ours, (score.settings, file))
            if settings != score.settings:
                ways_to_run = f"a model run in two ways, {settings!r} and {score.settings!r} in {file}"
                two = f"two models, in {first} and in {file}" if score.ours else ways_to_run
                raise SaccadeError(f"{shown} has results of {two}: name the folder of one")
            scores[task] = score
    if not scores:
        raise SaccadeError(f"{shown} has no scores: give a folder with {LMMS_FILES} of lmms-eval or {DIGIT_FILE}")
    return scores


def _read(file: Path, must: bool) -> Iterator[tuple[str, Score]]:
    """Every task in a file with its score. JSON of another kind has none, which is an error if `must` is true."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SaccadeError(
            f"file={str(file)!r} is not readable JSON: {error}; evaluate again, or remove it"
        ) from error
    results = content.get("results") if isinstance(content, dict) else None
    scenes = {"inference", "accuracy"}
    if isinstance(results, list) and all(isinstance(entry, dict) and scenes <= entry.keys() for entry in results):
        # An evaluation next to a model that it does not belong to says nothing about it.
        if file.name == DIGIT_FILE and weight_files(file.parent):
            _, fault = read_evaluation(file.parent)
            if fault is not None:
                raise SaccadeError(
                    f"{fault}: `saccade eval {shlex.quote(str(file.parent))}` measures those next to it"
                )
        of, rows = _measured_on(content)
        measured = str(content.get("weights") or content.get("model"))
        for entry in results:
            if not is_number(entry["accuracy"]):
                raise ValueError(f"accuracy={entry['accuracy']!r} is not a number")
            known = entry.get("samples"), entry.get("mean_prompt_length")
            how = {"ours": True, "rows": rows, "pruned": pruned_how(entry)}
            yield of + entry["inference"], Score(100 * entry["accuracy"], measured, *known, **how)
    elif isinstance(results, dict) and all(isinstance(metrics, dict) for metrics in results.values()):
        settings = str((content.get("config") or {}).get("model_args", ""))
        for task, metrics in results.items():
            score = _score(task, metrics, (content.get("higher_is_better") or {}).get(task) or {}, file)
            if score is not None:
                samples = (content.get("n-samples") or {}).get(task) or {}
                yield task, Score(score, settings, samples.get("effective"))
    elif must:
        raise SaccadeError(f"file={str(file)!r} has no results: give one that lmms-eval or `saccade eval` wrote")


def _measured_on(content: Mapping[str, Any]) -> tuple[str, str | None]:
    """How the tasks of an `eval.json` begin, and which rows they are of, if that is known."""
    if "dataset" in content:
        parts = (content["dataset"], content.get("split"))
        return "".join(f"{part}/" for part in parts if part is not None), content.get("rows")
    split = content.get("split", "test")
    return DIGITS if split == "test" else f"{DIGITS}{split}/", f"scenes of the {split} split"


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
        if is_number(value) and math.isfinite(value):
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
    return next((value for name, value in numbers.items() if higher_is_better.get(name, True)), None)


def _pair(baseline: float | None, model: float | None) -> dict[str, float | None]:
    # A share of a baseline of zero is undefined.
    return {
        "baseline": baseline,
        "model": model,
        "share": model / baseline if baseline and model is not None else None,
    }


def _means(pairs: Sequence[tuple[float, float]]) -> tuple[float | None, float | None]:
    if not pairs:
        return None, None
    first, second = (sum(values) / len(pairs) for values in zip(*pairs, strict=True))
    return first, second


def _average(suite: Suite, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The means over the scores that both have, among those that the suite averages."""
    averaged = [benchmark.task for benchmark in suite.benchmarks if benchmark.in_average]
    counted = [(row["baseline"], row["model"]) for row in rows if row["task"] in averaged]
    pairs = [pair for pair in counted if None not in pair]
    return {**_pair(*_means(pairs)), "scores": len(pairs), "of": len(averaged)}


def _notes(rows: Sequence[dict[str, Any]], both: Mapping[str, Scores]) -> list[str]:
    """Reasons why rows are not proper comparisons; `both` has the scores by their source."""
    notes = []
    for row in rows:
        task, name = row["task"], row["benchmark"]
        notes += [f"{name}: no score in {source}" for source, scores in both.items() if task not in scores]
        found = [scores[task] for scores in both.values() if task in scores]
        counts, data = [score.documents for score in found], [score.rows for score in found]
        if _differ(counts):
            notes.append(f"{name}: {counts[0]} documents against {counts[1]}, not the same benchmark")
        elif _differ(data):
            notes.append(f"{name}: other rows under the same name, not the same benchmark")
        ways = [score.pruned for score in found]
        if _differ(ways):
            notes.append(f"{name}: pruned by {ways[0]} against {ways[1]}")
        if row["baseline"] == 0:
            notes.append(f"{name}: the baseline's score is 0, so there is no share")
    return notes


def _differ(values: Sequence[Any]) -> bool:
    """Whether two values are there, known, and not equal."""
    return len(values) == 2 and None not in values and values[0] != values[1]


def _partly(label: str, count: int, total: int) -> str:
    return label if count == total else f"{label} ({count} of {total})"


def _number(value: float | None) -> str | None:
    """One decimal, or three for what looks like a fraction."""
    return None if value is None else f"{value:.3f}" if abs(value) <= 1 else f"{value:.1f}"


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.1f} %"
