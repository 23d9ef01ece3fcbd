"""Compare the scores of two result folders: each as a share of the baseline's, and the mean share."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from saccade.errors import SaccadeError
from saccade.evaluation.results import Scores, read_scores
from saccade.evaluation.suites import BENCHMARKS, SUITES, Suite, get_suite


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
    tasks = list(dict.fromkeys([*first.values, *second.values]))
    chosen = named or _suite_of(tasks)
    if chosen:
        tasks = [task for task in chosen.tasks if named or task in tasks]
    common = [task for task in tasks if task in first.values and task in second.values]
    if not common:
        raise SaccadeError(
            f"baseline={first.source!r} has {', '.join(first.values)} and model={second.source!r} "
            f"{', '.join(second.values)}: no benchmark {f'of suite {named.name} ' if named else ''}is in both"
        )
    rows = [_row(task, first, second) for task in tasks]
    shares = [row["share"] for row in rows if row["share"] is not None]
    return {
        "baseline": first.source,
        "model": second.source,
        "suite": chosen.name if chosen else None,
        "rows": rows,
        "mean_share": sum(shares) / len(shares) if shares else None,
        "shares": len(shares),
        "benchmarks": len(chosen.benchmarks) if chosen else len(rows),
        "average": _average(chosen, rows) if chosen and chosen.average else None,
        "prompt_length": _prompt_length(common, first, second),
        "notes": _notes(rows, first, second),
    }


def comparison_rows(comparison: Mapping[str, Any]) -> tuple[list[str], list[list[str | None]]]:
    """The columns and cells of a table of what `compare_results` returned."""
    rows: list[list[str | None]] = [
        [row["benchmark"], _number(row["baseline"]), _number(row["model"]), _percent(row["share"])]
        for row in comparison["rows"]
    ]
    average, length = comparison["average"], comparison["prompt_length"]
    if average is not None:
        label = _partly("average without MME", average["scores"], average["of"])
        rows.append([label, _number(average["baseline"]), _number(average["model"]), _percent(average["share"])])
    label = _partly("mean share", comparison["shares"], comparison["benchmarks"])
    rows.append([label, None, None, _percent(comparison["mean_share"])])
    if length is not None:
        cells = [_number(length["baseline"]), _number(length["model"]), _percent(length["share"])]
        rows.append(["mean prompt length", *cells])
    return ["benchmark", "baseline", "model", "share"], rows


def _suite_of(tasks: Sequence[str]) -> Suite | None:
    """The only suite that contains all tasks; None if there is none, or more than one."""
    fitting = [suite for suite in SUITES.values() if tasks and set(tasks) <= set(suite.tasks)]
    return fitting[0] if len(fitting) == 1 else None


def _row(task: str, baseline: Scores, model: Scores) -> dict[str, Any]:
    first, second = baseline.values.get(task), model.values.get(task)
    return {
        "benchmark": _name(task),
        "task": task,
        "baseline": first,
        "model": second,
        # A share of a baseline of zero is undefined.
        "share": second / first if first and second is not None else None,
    }


def _average(suite: Suite, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The means over the scores that both have, among those that the suite averages."""
    averaged = [benchmark.task for benchmark in suite.benchmarks if benchmark.in_average]
    counted = [row for row in rows if row["task"] in averaged]
    pairs = [(row["baseline"], row["model"]) for row in counted if None not in (row["baseline"], row["model"])]
    first, second = (sum(values) / len(pairs) for values in zip(*pairs, strict=True)) if pairs else (None, None)
    share = second / first if first and second is not None else None
    return {"baseline": first, "model": second, "share": share, "scores": len(pairs), "of": len(averaged)}


def _prompt_length(tasks: Sequence[str], baseline: Scores, model: Scores) -> dict[str, float] | None:
    """The mean over tasks of the mean prompt length; None unless both folders have it."""
    pairs = [(baseline.prompt_lengths.get(task), model.prompt_lengths.get(task)) for task in tasks]
    if any(None in pair for pair in pairs):
        return None
    first, second = (sum(values) / len(pairs) for values in zip(*pairs, strict=True))
    return {"baseline": first, "model": second, "share": second / first}


def _notes(rows: Sequence[dict[str, Any]], baseline: Scores, model: Scores) -> list[str]:
    """Reasons why rows are not proper comparisons."""
    notes = []
    for row in rows:
        task = row["task"]
        for scores, name in ((baseline, "baseline"), (model, "model")):
            if task not in scores.values:
                notes.append(f"{row['benchmark']}: no score in {scores.source} ({name})")
        counts = [scores.documents.get(task) for scores in (baseline, model)]
        if None not in counts and counts[0] != counts[1]:
            notes.append(f"{row['benchmark']}: {counts[0]} documents against {counts[1]}, not the same benchmark")
        if row["baseline"] == 0:
            notes.append(f"{row['benchmark']}: the baseline's score is 0, so there is no share")
    return notes


def _name(task: str) -> str:
    """The benchmark's name in the papers."""
    return BENCHMARKS[task].name if task in BENCHMARKS else task


def _partly(label: str, count: int, total: int) -> str:
    return label if count == total else f"{label} ({count} of {total})"


def _number(value: float | None) -> str | None:
    """One decimal, or three for what looks like a fraction."""
    return None if value is None else f"{value:.3f}" if abs(value) <= 1 else f"{value:.1f}"


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.1f} %"
