"""The plots of a run's page: values by mode, where the time went, and what accuracy cost in time and in tokens."""

import os
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from statistics import fmean
from typing import Any

from matplotlib.lines import Line2D

from saccade.report.curves import COLORS
from saccade.report.plots import (
    FAINT,
    INK,
    MODE_STYLES,
    OTHER_STYLES,
    free_box,
    running_mean,
    save_figure,
    styled_figure,
)
from saccade.report.training_log import EVALUATION, OTHER, TEACHER, part_of

PART_COLORS = {part_of(mode): color for mode, (color, _) in MODE_STYLES.items()}
REST_COLORS = {TEACHER: "#F0B48A", EVALUATION: "#F0E442", OTHER: "#B8BEC4"}
WAYS = {
    "full": ("#000000", "all tokens"),
    "pruned": ("#D55E00", "pruned"),
    "pruned_isolator": ("#0072B2", "pruned, with isolator"),
    "skip": ("#009E73", "skipping"),
}
"""Colour and name of each way to run a trained model."""
UNKNOWN_WAY = "#7A5195"
LINES = ("-", "--", ":", "-.")
BAR_HEIGHT, LONGEST_NAME, NAMED_POINTS = 0.42, 44, 8
SMALL = (5.0, 3.4)
"""Inches of the plots of one run: their text stays readable where a phone shows them 320 pixels wide."""
SMALLEST, LARGEST = 30.0, 400.0  # areas of circles, in points squared


def way_name(inference: str) -> str:
    """A way to run a model, in words."""
    return WAYS[inference][1] if inference in WAYS else inference.replace("_", " ")


def plot_values(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    xlabel: str,
    ylabel: str,
    path: str | os.PathLike[str],
    smooth: bool = False,
    size: tuple[float, float] = SMALL,
    colors: Mapping[str, str] | None = None,
) -> None:
    """Draw curves in one panel, as PNG.

    Args:
        curves: by name, (x, y) each; more than seven differ by their dashes too.
        smooth: draw running means, with the values themselves faint behind them where there is one curve.
        size: inches across and down, without the rows of the legend.
        colors: of the curves by name, those of `COLORS` in order when left out.

    Raises:
        ValueError: if there is no point to draw.
    """
    known = {name: curve for name, curve in curves.items() if curve}
    if not known:
        raise ValueError("there are no curves to draw")
    rows = -(-len(known) // 2) if len(known) > 3 else 1
    figure, (axes,) = styled_figure(1, (size[0], size[1] + 0.25 * rows))
    for number, (name, curve) in enumerate(known.items()):
        color = colors[name] if colors else COLORS[number % len(COLORS)]
        line = LINES[number // len(COLORS) % len(LINES)]
        xs, ys = zip(*curve, strict=True)
        if smooth and len(known) == 1:
            axes.plot(xs, ys, color=color, alpha=0.25, linewidth=1)
        axes.plot(
            xs, running_mean(ys) if smooth else ys, line, color=color, linewidth=1.8, label=_short(name),
            marker="o" if len(curve) == 1 else None,
        )  # fmt: skip
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_ylim(bottom=0)
    if len(known) > 1:
        columns = 2 if len(known) > 3 else len(known)
        figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=9.5, labelcolor=INK)
    save_figure(figure, path)


def plot_time_parts(bars: Mapping[str, Mapping[str, float]], path: str | os.PathLike[str]) -> None:
    """Draw where the time of each run went, one bar each, as PNG.

    Args:
        bars: by the name of a run, the seconds of each part, as `time_parts` gives them.

    Raises:
        ValueError: if there are no bars.
    """
    if not bars:
        raise ValueError("there are no bars to draw")
    colors = _part_colors(bars)
    parts = list(colors)
    # A single bar needs no room for its name, and its legend none beside itself.
    width, columns = (SMALL[0], 1) if len(bars) == 1 else (8.0, 2)
    rows = -(-len(parts) // columns)
    figure, (axes,) = styled_figure(1, (width, 1.1 + BAR_HEIGHT * len(bars) + 0.22 * rows))
    ends = [0.0] * len(bars)
    for part in parts:
        widths = [bar.get(part, 0.0) for bar in bars.values()]
        axes.barh(
            range(len(bars)), widths, left=ends, height=0.7, color=colors[part], label=part,
            edgecolor="white", linewidth=0.6,
        )  # fmt: skip
        ends = [end + width for end, width in zip(ends, widths, strict=True)]
    longest = max(ends)
    for place, end in enumerate(ends):
        axes.text(end + 0.01 * longest, place, f"{end:.0f} s", va="center", fontsize=9.5, color=INK)
    axes.set_yticks(range(len(bars)), [_short(name) for name in bars])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color="#E6E6E6", linewidth=0.8)
    axes.set_xlim(0, 1.1 * longest)
    axes.set_xlabel("training time (s)")
    figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=9.5, labelcolor=INK)
    save_figure(figure, path)


def _part_colors(bars: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    """The parts that occur with their colours: modes in order, and what is no mode at the end."""
    found = dict.fromkeys(part for bar in bars.values() for part in bar)
    others = iter(OTHER_STYLES * len(found))
    modes = [part for part in (*PART_COLORS, *found) if part in found and part not in REST_COLORS]
    colors = {part: PART_COLORS.get(part) or next(others)[0] for part in modes}
    return colors | {part: color for part, color in REST_COLORS.items() if part in found}


def plot_trade_off(
    points: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], xlabel: str = "training time (s)"
) -> None:
    """Draw accuracy over training time as PNG; the area of a circle is what inference costs.

    A line joins the ways to run one training. Few trainings are named, many are numbered in the order of `points`.

    Args:
        points: each with `training` (a name), `inference` (of `WAYS`), `accuracy` in [0, 1] with its least and
            greatest as `accuracy_low` and `accuracy_high`, `seconds` of training, `tokens` of a mean prompt,
            and `flops` from the pixels to the first token or None. Circles are of FLOPs where all points have
            them, else of tokens.

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
        # One training took one time: its ways stand above one another.
        axes.plot([point["seconds"] for point in members], heights, color=FAINT, linewidth=0.8, alpha=0.6, zorder=2)
    # The larger first, so that none hides another.
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
    """The key of what the circles of `plot_trade_off` show: "flops" or "tokens"."""
    return "flops" if all(point.get("flops") for point in points) else "tokens"


def _area(cost: float, most: float) -> float:
    return max(SMALLEST, LARGEST * cost / most)


def _set_limits(axes, points: Sequence[Mapping[str, Any]]) -> None:
    low = 100 * min(point["accuracy_low"] for point in points)
    high = 100 * max(point["accuracy_high"] for point in points)
    margin = max(2.5, 0.1 * (high - low))
    axes.set_ylim(low - margin if low > margin else -margin / 2, high + margin)
    # From zero seconds, so that lengths compare as times do.
    axes.set_xlim(0, 1.25 * max(point["seconds"] for point in points) or 1)


def _name_points(axes, points: Sequence[Mapping[str, Any]], trainings: Sequence[str], named: bool) -> None:
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()

    def place(point: Mapping[str, Any]) -> tuple[float, float]:
        return (point["seconds"] - left) / (right - left), (100 * point["accuracy"] - bottom) / (top - bottom)

    taken = [(x - 0.015, y - 0.025, x + 0.015, y + 0.025) for x, y in map(place, points)]
    for number, training in enumerate(trainings, start=1):
        first = next(point for point in points if point["training"] == training)
        x, y = place(first)
        text = _short(training, 30) if named else str(number)
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
    # Legends fill columns first: the ways get the upper row, the sizes the lower one.
    blank = Line2D([], [], linestyle="none", label=" ")
    pairs = list(zip_longest(handles, sizes, fillvalue=blank))
    figure.legend(
        handles=[handle for pair in pairs for handle in pair], loc="outside upper center", ncols=len(pairs),
        frameon=False, fontsize=9.5, labelcolor=INK, handletextpad=0.6, columnspacing=2.0, borderpad=0.8,
        labelspacing=1.1,
    )  # fmt: skip


def _short(name: str, longest: int = LONGEST_NAME) -> str:
    """A name that fits, without what matplotlib would read as mathematics."""
    shown = name if len(name) <= longest else name[: longest - 3] + "..."
    return shown.replace("$", r"\$")
