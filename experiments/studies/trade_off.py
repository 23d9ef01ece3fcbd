"""The trade-off of accuracy, training time and inference cost: the points of a comparison, and their picture."""

import os
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from statistics import fmean, mean
from typing import Any

from matplotlib.lines import Line2D

from saccade.report.plots import FAINT, INK, save_figure, styled_figure
from saccade.report.run_plots import UNKNOWN_WAY, WAYS, short_name, way_name
from saccade.sweeps.figures import train_seconds

NAMED_POINTS = 8
SMALLEST, LARGEST = 30.0, 400.0  # areas of circles, in points squared
# As fractions of the axes, since matplotlib only knows the extent of a text after drawing it.
Box = tuple[float, float, float, float]  # left, bottom, right, top
LABEL_GAP = 0.019


def trade_off(
    groups: Mapping[str, Sequence[Mapping[str, Any]]],
    seconds_of: Callable[[Mapping[str, Any]], float] = train_seconds,
) -> list[dict[str, Any]]:
    """One point per group of results and way to run its models, in the form that `plot_trade_off` takes."""
    points = []
    for name, results in groups.items():
        seconds = mean(seconds_of(one) for one in results)
        ways: dict[str, list[dict[str, Any]]] = {}
        for entry in (entry for one in results for entry in one["evaluations"]):
            ways.setdefault(entry["inference"], []).append(entry)
        for inference, entries in ways.items():
            accuracies = [entry["accuracy"] for entry in entries]
            flops = [entry.get("prefill_flops") or 0.0 for entry in entries]
            points.append(
                {
                    "training": name,
                    "inference": inference,
                    "accuracy": mean(accuracies),
                    "accuracy_low": min(accuracies),
                    "accuracy_high": max(accuracies),
                    "seconds": seconds,
                    "tokens": mean(entry["mean_prompt_length"] for entry in entries),
                    "flops": mean(flops) if all(flops) else None,
                }
            )
    return points


def plot_trade_off(
    points: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], xlabel: str = "training time (s)"
) -> None:
    """Draw accuracy over training time as a PNG; the area of a circle is the cost of inference.

    A line joins the ways to run one training. Few trainings are labelled by name, many by number in the order of
    `points`.

    Args:
        points: each with `training` (a name), `inference` (one of `WAYS`), `accuracy` in [0, 1] with its minimum and
            maximum as `accuracy_low` and `accuracy_high`, `seconds` of training, `tokens` of a mean prompt, and
            `flops` from the pixels to the first token, or None. Circles show FLOPs if all points have them, otherwise
            tokens.

    Raises:
        ValueError: if there are no points.
    """
    if not points:
        raise ValueError("there are no points to draw")
    trainings = list(dict.fromkeys(point["training"] for point in points))
    named = len(trainings) <= NAMED_POINTS
    cost = cost_of(points)
    most = max(point[cost] for point in points)
    figure, (axes,) = styled_figure(1, (8.0, 5.6))
    for training in trainings:
        members = [point for point in points if point["training"] == training]
        heights = [100 * point["accuracy"] for point in members]
        # All ways of one training have the same training time, so they are above one another.
        axes.plot([point["seconds"] for point in members], heights, color=FAINT, linewidth=0.8, alpha=0.6, zorder=2)
    # Larger circles first, so that none hides another.
    for point in sorted(points, key=lambda point: -point[cost]):
        color = WAYS.get(point["inference"], (UNKNOWN_WAY,))[0]
        low, high = (100 * abs(point[f"accuracy_{end}"] - point["accuracy"]) for end in ("low", "high"))
        height = 100 * point["accuracy"]
        axes.errorbar(
            point["seconds"], height, yerr=[[low], [high]], fmt="none", ecolor=color, elinewidth=1, alpha=0.5, zorder=2
        )
        axes.scatter(
            point["seconds"], height, s=_area(point[cost], most), color=color, alpha=0.45, edgecolors=color,
            linewidths=1.2, zorder=3,
        )  # fmt: skip
    _set_limits(axes, points)
    _name_points(axes, points, trainings, named)
    axes.set_xlabel(xlabel)
    axes.set_ylabel("accuracy (%)")
    _legend(figure, points, cost)
    save_figure(figure, path)


def cost_of(points: Sequence[Mapping[str, Any]]) -> str:
    """The quantity that the circles of `plot_trade_off` show: "flops" or "tokens"."""
    return "flops" if all(point.get("flops") for point in points) else "tokens"


def _area(cost: float, most: float) -> float:
    return max(SMALLEST, LARGEST * cost / most)


def _set_limits(axes, points: Sequence[Mapping[str, Any]]) -> None:
    low = 100 * min(point["accuracy_low"] for point in points)
    high = 100 * max(point["accuracy_high"] for point in points)
    margin = max(2.5, 0.1 * (high - low))
    axes.set_ylim(low - margin if low > margin else -margin / 2, high + margin)
    # From zero seconds, so that lengths are proportional to times.
    axes.set_xlim(0, 1.25 * max(point["seconds"] for point in points) or 1)


def _name_points(axes, points: Sequence[Mapping[str, Any]], trainings: Sequence[str], named: bool) -> None:
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()

    def place(point: Mapping[str, Any]) -> tuple[float, float]:
        return (point["seconds"] - left) / (right - left), (100 * point["accuracy"] - bottom) / (top - bottom)

    taken = [(x - 0.015, y - 0.025, x + 0.015, y + 0.025) for x, y in map(place, points)]
    for number, training in enumerate(trainings, start=1):
        first = next(point for point in points if point["training"] == training)
        x, y = place(first)
        text = short_name(training, 30) if named else str(number)
        box, side = free_box(x, y, 0.0105 * len(text) + 0.012, 0.04, taken)
        taken.append(box)
        middle = (box[1] + box[3]) / 2
        leader = {"arrowstyle": "-", "color": FAINT, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 4}
        axes.annotate(
            text, xy=(x, y), xycoords="axes fraction", xytext=(x + side * 0.028, middle), textcoords="axes fraction",
            va="center", ha="left" if side > 0 else "right", fontsize=9.5, color=INK,
            arrowprops=leader if abs(middle - y) > 0.03 else None, zorder=5,
        )  # fmt: skip


def _legend(figure, points: Sequence[Mapping[str, Any]], cost: str) -> None:
    shown = dict.fromkeys(point["inference"] for point in points)
    colors = {way: WAYS.get(way, (UNKNOWN_WAY,))[0] for way in (*WAYS, *shown)}
    plain = {"linestyle": "none", "marker": "o"}
    handles = [
        Line2D([], [], color=color, alpha=0.7, markersize=9, label=way_name(way), **plain)
        for way, color in colors.items()
        if way in shown
    ]
    costs = [point[cost] for point in points]
    sizes = []
    for size in sorted({min(costs), fmean((min(costs), max(costs))), max(costs)}):
        text = f"{size:.0f} tokens" if cost == "tokens" else f"{size / 1e6:,.0f} MFLOPs"
        width = _area(size, max(costs)) ** 0.5
        sizes.append(Line2D([], [], color=FAINT, alpha=0.5, markersize=width, label=text, **plain))
    # Legends are filled column by column: the ways go to the upper row, the sizes to the lower one.
    blank = Line2D([], [], linestyle="none", label=" ")
    pairs = list(zip_longest(handles, sizes, fillvalue=blank))
    figure.legend(
        handles=[handle for pair in pairs for handle in pair], loc="outside upper center", ncols=len(pairs),
        frameon=False, fontsize=9.5, labelcolor=INK, handletextpad=0.6, columnspacing=2.0, borderpad=0.8,
        labelspacing=1.1,
    )  # fmt: skip


def free_box(x: float, y: float, width: float, height: float, taken: Sequence[Box]) -> tuple[Box, int]:
    """The nearest free place for a label beside (x, y), and its side: 1 right, -1 left. In fractions of the axes."""
    candidates = []
    for shift in sorted((number * height / 4 for number in range(-24, 25)), key=abs):
        for side in (1, -1):
            near, far = x + side * LABEL_GAP, x + side * (LABEL_GAP + width)
            low = min(max(y + shift - height / 2, 0), 1 - height)
            candidates.append(((min(near, far), low, max(near, far), low + height), side))
    free = (
        (box, side)
        for box, side in candidates
        if box[0] >= 0 and box[2] <= 1.01 and not any(_overlap(box, other) for other in taken)
    )
    return next(free, candidates[0])


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
