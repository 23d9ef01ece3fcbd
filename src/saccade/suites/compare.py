"""The scores of two result folders side by side, and the mean share of the baseline's."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from saccade.errors import SaccadeError
from saccade.suites.definitions import BENCHMARKS, SUITES, Suite, get_suite
from saccade.suites.results import Scores, read_scores


def compare_results(baseline: str | Path, model: str | Path, suite: str | None = None) -> dict[str, Any]:
    """Every score of a model as a share of the baseline's, and the mean of the shares.

    DualSpeed's summary is the mean over benchmarks of score / baseline score, MME's among them. Skip-Vision prints the
    mean of the scores without MME; its share of the baseline's is given too. A mean over a part of a suite says so.

    Args:
        baseline: result folder or file of the model that is the measure.
        model: that of the model to compare with it.
        suite: name of a suite, whose benchmarks are then the rows. When left out, the rows are the tasks that one of
            the two has, and the suite is the one that all of them belong to, if just one is.

    Returns:
        `rows` (`benchmark`, `task`, `baseline`, `model`, `share` as a share of 1; None where there is no value),
        `mean_share`, `shares` (number of them in the mean), `benchmarks` (number that there should be), `average`
        (None, or `baseline`, `model`, `share`, `scores`, `of`), `prompt_length` (None, or `baseline`, `model`,
        `share`), `suite`, `notes` and the two sources.

    Raises:
        SaccadeError: if a folder has no scores, the suite is unknown, or the two have no benchmark in common.
    """
    chosen = None if suite is None else get_suite(suite)
    return compare_scores(read_scores(baseline), read_scores(model), chosen)


def compare_scores(baseline: Scores, model: Scores, suite: Suite | None = None) -> dict[str, Any]:
    """What `compare_results` returns, for scores that were read.

    Raises:
        SaccadeError: if the two have no benchmark in common.
    """
    tasks = list(dict.fromkeys([*baseline.values, *model.values]))
    chosen = suite or _suite_of(tasks)
    if chosen:
        tasks = [task for task in chosen.tasks if suite or task in tasks]
    common = [task for task in tasks if task in baseline.values and task in model.values]
    if not common:
        raise SaccadeError(
            f"baseline={baseline.source!r} has {', '.join(baseline.values)} and model={model.source!r} "
            f"{', '.join(model.values)}: no benchmark {f'of suite {suite.name} ' if suite else ''}is in both"
        )
    rows = [_row(task, baseline, model) for task in tasks]
    shares = [row["share"] for row in rows if row["share"] is not None]
    return {
        "baseline": baseline.source,
        "model": model.source,
        "suite": chosen.name if chosen else None,
        "rows": rows,
        "mean_share": sum(shares) / len(shares) if shares else None,
        "shares": len(shares),
        "benchmarks": len(chosen.benchmarks) if chosen else len(rows),
        "average": _average(chosen, rows) if chosen and chosen.average else None,
        "prompt_length": _prompt_length(common, baseline, model),
        "notes": _notes(rows, baseline, model),
    }


def comparison_rows(comparison: Mapping[str, Any]) -> tuple[list[str], list[list[str | None]]]:
    """The columns and the cells of the table of what `compare_results` returned."""
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


def summarize(folders: Mapping[str, Path], tasks: Sequence[str], suite: str | None = None) -> dict[str, Any]:
    """Several ways to run one model: each compared with the first of them, on the tasks that were run.

    Args:
        folders: what `run_suite` returned.
        tasks: those that it ran.
        suite: name of the suite that they are of.

    Returns:
        `scores` (of each inference by task), `comparisons` (of each inference but the first, see `compare_results`)
        and `notes`.

    Raises:
        SaccadeError: if a folder has no scores of these tasks.
    """
    chosen = None if suite is None else get_suite(suite)
    # A folder may hold more, from other runs.
    read = {name: read_scores(folder, tasks) for name, folder in folders.items()}
    first, *others = read
    comparisons = {name: compare_scores(read[first], read[name], chosen) for name in others}
    notes = [note for comparison in comparisons.values() for note in comparison["notes"]]
    return {
        "suite": suite,
        "scores": {name: scores.values for name, scores in read.items()},
        "prompt_lengths": {name: scores.prompt_lengths for name, scores in read.items()},
        "comparisons": comparisons,
        "notes": list(dict.fromkeys(notes)),
    }


def summary_rows(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str | None]]]:
    """The columns and the cells of the table of what `summarize` returned."""
    scores = summary["scores"]
    first, *others = scores
    rows: list[list[str | None]] = [
        [_name(task), *(_number(values.get(task)) for values in scores.values())] for task in scores[first]
    ]
    if others:
        comparisons = [summary["comparisons"][name] for name in others]
        averages = [comparison["average"] for comparison in comparisons]
        if averages[0] is not None:
            label = _partly("average without MME", averages[0]["scores"], averages[0]["of"])
            rows.append([label, _number(averages[0]["baseline"]), *(_number(entry["model"]) for entry in averages)])
        label = _partly(f"mean share of {first}", comparisons[0]["shares"], comparisons[0]["benchmarks"])
        rows.append([label, None, *(_percent(comparison["mean_share"]) for comparison in comparisons)])
    lengths = summary["prompt_lengths"].values()
    rows.append(["mean prompt length", *(_number(sum(entry.values()) / len(entry)) for entry in lengths)])
    return ["benchmark", *scores], rows


def _suite_of(tasks: Sequence[str]) -> Suite | None:
    """The suite that tasks belong to, if it is one and only one."""
    fitting = [suite for suite in SUITES.values() if tasks and set(tasks) <= set(suite.tasks)]
    return fitting[0] if len(fitting) == 1 else None


def _row(task: str, baseline: Scores, model: Scores) -> dict[str, Any]:
    first, second = baseline.values.get(task), model.values.get(task)
    return {
        "benchmark": _name(task),
        "task": task,
        "baseline": first,
        "model": second,
        # Of a baseline of nothing there is no share.
        "share": second / first if first and second is not None else None,
    }


def _average(suite: Suite, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The means of the scores that both have, of those that the suite averages."""
    averaged = [benchmark.task for benchmark in suite.benchmarks if benchmark.in_average]
    counted = [row for row in rows if row["task"] in averaged]
    pairs = [(row["baseline"], row["model"]) for row in counted if None not in (row["baseline"], row["model"])]
    first, second = (sum(values) / len(pairs) for values in zip(*pairs, strict=True)) if pairs else (None, None)
    share = second / first if first and second is not None else None
    return {"baseline": first, "model": second, "share": share, "scores": len(pairs), "of": len(averaged)}


def _prompt_length(tasks: Sequence[str], baseline: Scores, model: Scores) -> dict[str, float] | None:
    """The mean over tasks of the mean prompt length, where both folders know it."""
    pairs = [(baseline.prompt_lengths.get(task), model.prompt_lengths.get(task)) for task in tasks]
    if any(None in pair for pair in pairs):
        return None
    first, second = (sum(values) / len(pairs) for values in zip(*pairs, strict=True))
    return {"baseline": first, "model": second, "share": second / first}


def _notes(rows: Sequence[dict[str, Any]], baseline: Scores, model: Scores) -> list[str]:
    """What makes a row less than a comparison."""
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
            notes.append(f"{row['benchmark']}: the baseline's score is 0, of which there is no share")
    return notes


def _name(task: str) -> str:
    """As the papers write it."""
    return BENCHMARKS[task].name if task in BENCHMARKS else task


def _partly(label: str, count: int, total: int) -> str:
    return label if count == total else f"{label} ({count} of {total})"


def _number(value: float | None) -> str | None:
    """One decimal, or three of what looks like a share of 1."""
    return None if value is None else f"{value:.3f}" if abs(value) <= 1 else f"{value:.1f}"


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.1f} %"
