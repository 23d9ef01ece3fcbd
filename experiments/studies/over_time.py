"""Accuracy over training time at the checkpoints of runs: the curves of each method, and how soon it gets where."""

import os
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from experiments.studies.curves import TimeCurve, plot_time_curves
from experiments.studies.methods import WORDS
from saccade.report.plots import method_styles
from saccade.report.tables import markdown_table
from saccade.sweeps.figures import mean_and_range, percent, spread
from saccade.sweeps.table import Standing

BASELINE = "all_tokens"
REACHED = (0.5, 0.75, 0.9, 1.0)
"""Shares of the accuracy that all-token training ends with."""
Runs = Mapping[str, Mapping[int, Sequence[Mapping[str, Any]]]]


def checkpointed_runs(standing: Standing) -> Runs:
    """The checkpoints of what is done, by method and by seed, the baseline first."""
    runs: dict[str, dict[int, Sequence[Mapping[str, Any]]]] = {}
    for result in standing.results.values():
        if "checkpoints" in result:
            labels = result["spec"]["labels"]
            runs.setdefault(labels["method"], {})[labels["seed"]] = result["checkpoints"]
    return {method: runs[method] for method in sorted(runs, key=lambda method: method != BASELINE)}


def time_curves(runs: Runs) -> list[TimeCurve]:
    """The curve of each method over the CPU time of stage two."""
    styles = method_styles(list(runs))
    return [
        TimeCurve(WORDS[method], *styles[method], [_points(checkpoints) for checkpoints in seeds.values()])
        for method, seeds in runs.items()
    ]


def draw_over_time(runs: Runs, path: str | os.PathLike[str]) -> None:
    """Draw the curves as PNG, with a line at what all-token training ends with if any of it is done.

    Raises:
        ValueError: if there are no runs.
    """
    ends = [checkpoints[-1]["accuracy"] for checkpoints in runs.get(BASELINE, {}).values()]
    reference = ("all tokens, at the end", mean(ends)) if ends else None
    plot_time_curves(time_curves(runs), path, "CPU time of stage two (s)", "accuracy on all tokens (%)", reference)


def seconds_to(points: Sequence[tuple[float, float]], accuracy: float) -> float | None:
    """When a curve first reaches an accuracy, on straight lines between its points; None if it never does.

    Before the first point nothing is known: what it has reached already counts with its time.

    Args:
        points: (seconds, accuracy), in order.
    """
    for number, (seconds, reached) in enumerate(points):
        if reached >= accuracy:
            if number == 0:
                return seconds
            before, lower = points[number - 1]
            return before + (seconds - before) * (accuracy - lower) / (reached - lower)
    return None


def checkpoint_table(runs: Runs, seeds: int) -> str:
    """Accuracy and training time at each checkpoint, two columns for each method.

    Args:
        seeds: how many are planned; fewer are said.
    """
    columns = ["step"]
    first = next(iter(next(iter(runs.values())).values()))
    rows: list[list[Any]] = [[entry["step"]] for entry in first]
    for method, members in runs.items():
        columns += [WORDS[method], "CPU time"]
        missing = f", n = {len(members)}" if len(members) < seeds else ""
        for row, entries in zip(rows, zip(*members.values(), strict=True), strict=True):
            row.append(percent(mean_and_range([entry["accuracy"] for entry in entries])) + missing)
            row.append(spread(mean_and_range([entry["cpu_seconds"] for entry in entries]), "{:.1f} s"))
    return markdown_table(columns, rows)


def reach_table(runs: Runs, seeds: int) -> str | None:
    """When each method reaches shares of what all-token training of the same seed ends with, and how much sooner.

    Args:
        seeds: how many are planned; fewer are said.

    Returns:
        None as long as no seed of all-token training is done.
    """
    baseline = {seed: _points(checkpoints) for seed, checkpoints in runs.get(BASELINE, {}).items()}
    if not baseline:
        return None
    rows = []
    for method, members in runs.items():
        curves = {seed: _points(members[seed]) for seed in members if seed in baseline}
        if not curves:
            continue
        row: list[Any] = [WORDS[method]]
        for share in REACHED:
            goals = {seed: share * baseline[seed][-1][1] for seed in curves}
            found = {seed: seconds_to(curves[seed], goals[seed]) for seed in curves}
            times = {seed: seconds for seed, seconds in found.items() if seconds is not None}
            if not times:
                row.append("not reached" + (f", n = {len(curves)}" if len(curves) < seeds else ""))
                continue
            text = spread(mean_and_range(list(times.values())), "{:.1f} s")
            if method != BASELINE:
                # Of means, over the same seeds: one seed's ratio of two short times can be anything.
                slower = mean(seconds_to(baseline[seed], goals[seed]) for seed in times)
                text += f", {slower / mean(times.values()):.2f}x"
            if len(times) < len(curves):
                text += f", reached by {len(times)} of {len(curves)}"
            elif len(curves) < seeds:
                text += f", n = {len(curves)}"
            row.append(text)
        rows.append(row)
    return markdown_table(["method", *(f"{100 * share:.0f} %" for share in REACHED)], rows)


def _points(checkpoints: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    return [(entry["cpu_seconds"], entry["accuracy"]) for entry in checkpoints]
