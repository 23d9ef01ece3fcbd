"""Accuracy over training time at the checkpoints of runs: curves per method, and times to reach an accuracy."""

import os
from collections.abc import Mapping, Sequence
from itertools import cycle
from statistics import mean
from typing import Any

from experiments.studies.curves import TimeCurve, plot_time_curves
from experiments.studies.methods import WORDS
from saccade.report.plots import COLORS
from saccade.report.tables import markdown_table
from saccade.sweeps.table import Standing, mean_and_range, percent, spread

BASELINE = "all_tokens"
STYLES = {BASELINE: ("#000000", "s"), "prune_only": (COLORS[1], "^"), "dualspeed": (COLORS[0], "o")}
OTHER_STYLES = ((COLORS[2], "D"), (COLORS[3], "v"), (COLORS[4], "P"), (COLORS[5], "X"))
"""The styles of all other methods, in turn."""
REACHED = (0.5, 0.75, 0.9, 1.0)
"""Shares of the final accuracy of all-token training."""
Runs = Mapping[str, Mapping[int, Sequence[Mapping[str, Any]]]]


def checkpointed_runs(standing: Standing) -> Runs:
    """The checkpoints of finished runs, by method and by seed, the baseline first."""
    runs: dict[str, dict[int, Sequence[Mapping[str, Any]]]] = {}
    for result in standing.results.values():
        if "checkpoints" in result:
            labels = result["spec"]["labels"]
            runs.setdefault(labels["method"], {})[labels["seed"]] = result["checkpoints"]
    return {method: runs[method] for method in sorted(runs, key=lambda method: method != BASELINE)}


def time_curves(runs: Runs, words: Mapping[str, str] = WORDS) -> list[TimeCurve]:
    """Each method's curve over the CPU time of stage two.

    Args:
        words: the methods' names in the legend.
    """
    others = [method for method in runs if method not in STYLES]
    styles = {**STYLES, **dict(zip(others, cycle(OTHER_STYLES), strict=False))}
    return [
        TimeCurve(words[method], *styles[method], [_points(checkpoints) for checkpoints in seeds.values()])
        for method, seeds in runs.items()
    ]


def draw_over_time(runs: Runs, path: str | os.PathLike[str], words: Mapping[str, str] = WORDS) -> None:
    """Draw the curves as a PNG, with a line at the final accuracy of all-token training if a run of it has finished.

    Args:
        words: the methods' names in the legend.

    Raises:
        ValueError: if there are no runs.
    """
    ends = [checkpoints[-1]["accuracy"] for checkpoints in runs.get(BASELINE, {}).values()]
    reference = ("all tokens, at the end", mean(ends)) if ends else None
    plot_time_curves(
        time_curves(runs, words), path, "CPU time of stage two (s)", "accuracy on all tokens (%)", reference
    )


def seconds_to(points: Sequence[tuple[float, float]], accuracy: float) -> float | None:
    """The time at which a curve first reaches an accuracy, interpolated linearly; None if it never does.

    Nothing is known before the first point: an accuracy that it has already reached counts as reached at its time.

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


def checkpoint_table(runs: Runs, seeds: int, words: Mapping[str, str] = WORDS) -> str:
    """Accuracy and training time at each checkpoint, two columns per method.

    Args:
        seeds: number of planned seeds; the table says so if fewer have finished.
        words: the methods' names.
    """
    taken = [[entry["step"] for entry in entries] for members in runs.values() for entries in members.values()]
    same = all(steps == taken[0] for steps in taken)
    columns = ["step" if same else "checkpoint"]
    rows: list[list[Any]] = [[step if same else number] for number, step in enumerate(taken[0], 1)]
    for method, members in runs.items():
        columns += [words[method], "CPU time"]
        missing = f", n = {len(members)}" if len(members) < seeds else ""
        for row, entries in zip(rows, zip(*members.values(), strict=True), strict=True):
            row.append(percent(mean_and_range([entry["accuracy"] for entry in entries])) + missing)
            row.append(spread(mean_and_range([entry["cpu_seconds"] for entry in entries]), "{:.1f} s"))
    return markdown_table(columns, rows)


def reach_table(runs: Runs, seeds: int, words: Mapping[str, str] = WORDS) -> str | None:
    """When each method reaches shares of the final accuracy of all-token training, and how much sooner, per seed.

    Args:
        seeds: number of planned seeds; the table says so if fewer have finished.
        words: the methods' names.

    Returns:
        None until a seed of all-token training has finished.
    """
    baseline = {seed: _points(checkpoints) for seed, checkpoints in runs.get(BASELINE, {}).items()}
    if not baseline:
        return None
    rows = []
    for method, members in runs.items():
        curves = {seed: _points(members[seed]) for seed in members if seed in baseline}
        if not curves:
            continue
        row: list[Any] = [words[method]]
        for share in REACHED:
            goals = {seed: share * baseline[seed][-1][1] for seed in curves}
            found = {seed: seconds_to(curves[seed], goals[seed]) for seed in curves}
            times = {seed: seconds for seed, seconds in found.items() if seconds is not None}
            if not times:
                row.append("not reached" + (f", n = {len(curves)}" if len(curves) < seeds else ""))
                continue
            text = spread(mean_and_range(list(times.values())), "{:.1f} s")
            if method != BASELINE:
                # A ratio of means over the same seeds, since a single seed's ratio of two short times is unreliable.
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
