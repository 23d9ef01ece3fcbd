"""Plots as PNG: curves over steps, and accuracy over training time."""

import math
import os
import random
import textwrap
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from saccade.files import atomic_path

# Okabe and Ito's palette, distinguishable with all common kinds of colour blindness.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", ":", "-.")
INK, FAINT = "#333333", "#8A8A8A"
# 8 by 4.75 inches at 150 dpi: 10-point text stays readable when a page shows the picture 800 pixels wide.
SIZE, DPI = (8.0, 4.75), 150
SMALL = (5.0, 3.4)
"""Size of the plots of one run: text stays readable when a phone shows them 320 pixels wide."""
TALL, WIDE = (6.0, 5.0), (9.0, 5.6)
WAYS = {"full": "all tokens", "pruned": "pruned", "pruned_isolator": "pruned, with isolator", "skip": "skipping"}
CPU_TIME = "CPU time of training (s)"
"""What `plot_trade_off` has across where machines are shared."""
LONGEST_NAME = 44
NAMED_POINTS = 8
"""With more trainings than these, the points of `plot_trade_off` have numbers."""
# As fractions of the axes, since matplotlib only knows the extent of a text after drawing it.
Box = tuple[float, float, float, float]  # left, bottom, right, top
LABEL_GAP = 0.026
LABEL_LINE = 26
"""Characters after which a point's name goes on in a second line."""
ORDERS = 24  # in which labels are placed, to find the one with the shortest lines
LETTER = 0.00165  # width of a letter of one point, in a picture of size `TALL`


def way_name(inference: str) -> str:
    """A way to run a model, in words."""
    return WAYS.get(inference, inference.replace("_", " "))


def styled_figure(panels: int = 1, size: tuple[float, float] = SIZE, title: str = "") -> tuple[Figure, list[Axes]]:
    """A figure of `size` inches with panels side by side, in the common style of all plots.

    Args:
        title: what is drawn, such as the name of a run, above the panels.
    """
    # `Figure` directly, not pyplot, which would look for a window system and affect the user's own figures.
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    drawn = list(figure.subplots(1, panels, squeeze=False)[0])
    for axes in drawn:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(FAINT)
        axes.tick_params(colors=INK, labelsize=10)
        axes.xaxis.label.set(color=INK, size=11)
        axes.yaxis.label.set(color=INK, size=11)
        axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
        axes.set_axisbelow(True)
    if title:
        figure.suptitle(short_name(title, 72), x=0.01, ha="left", fontsize=11, color=INK)
    return figure, drawn


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure as PNG, whole or not at all."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def plot_curves(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    xlabel: str,
    ylabel: str,
    path: str | os.PathLike[str],
    title: str = "",
    smooth: bool = False,
    size: tuple[float, float] = SIZE,
) -> None:
    """Draw curves in one panel.

    Args:
        curves: points (x, y) by name; more than seven curves also differ in their dashes.
        title: above the panel, such as the name of the run.
        smooth: draw running means; of one or two curves also the values themselves, faint.
        size: width and height in inches, without the legend.

    Raises:
        ValueError: if there is no point to draw.
    """
    known = {name: curve for name, curve in curves.items() if curve}
    if not known:
        raise ValueError("there are no curves to draw")
    columns = min(len(known), 2 if max(map(len, known)) > 16 else 3)
    rows = -(-len(known) // columns)
    figure, (axes,) = styled_figure(1, (size[0], size[1] + 0.25 * rows), title)
    for number, (name, curve) in enumerate(known.items()):
        look = {"color": COLORS[number % len(COLORS)], "linestyle": LINES[number // len(COLORS) % len(LINES)]}
        xs, ys = zip(*curve, strict=True)
        if smooth and len(known) <= 2:
            axes.plot(xs, ys, color=look["color"], alpha=0.25, linewidth=1)
        marker = "o" if len(curve) == 1 else None
        shown = running_mean(ys) if smooth else ys
        axes.plot(xs, shown, linewidth=1.8, label=short_name(name), marker=marker, **look)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_ylim(bottom=0)
    if len(known) > 1:
        figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=9.5, labelcolor=INK)
    save_figure(figure, path)


def plot_trade_off(
    points: Sequence[Mapping[str, Any]],
    path: str | os.PathLike[str],
    xlabel: str = "training time (s)",
    title: str = "",
) -> None:
    """Draw accuracy over training time, each training with its name beside it: further up and further left is better.

    A filled circle is the first way to run a training's model, all tokens where there is that; hollow ones above or
    below it are the other ways, named in grey. Whiskers reach from the lowest to the highest seed. More than
    `NAMED_POINTS` trainings are labelled by number, in the order of `points`.

    Args:
        points: each with `training` (a name), `inference` (such as those of `WAYS`), `accuracy` in [0, 1] with its
            minimum and maximum as `accuracy_low` and `accuracy_high`, and `seconds` of training.
        title: above the picture.

    Raises:
        ValueError: if there are no points.
    """
    if not points:
        raise ValueError("there are no points to draw")
    crowded = len({point["training"] for point in points}) > 4
    figure, (axes,) = styled_figure(1, WIDE if crowded else TALL, title)
    trainings: dict[str, list[Mapping[str, Any]]] = {}
    plain = {point["training"] for point in points if point["inference"] == "pruned"}
    for point in points:
        # With and without an isolator are too close to tell apart.
        if point["inference"] == "pruned_isolator" and point["training"] in plain:
            continue
        trainings.setdefault(point["training"], []).append(point)
    low, high = (pick(100 * one[f"accuracy_{end}"] for one in points) for end, pick in (("low", min), ("high", max)))
    margin = max(2.5, 0.1 * (high - low))
    axes.set_ylim(low - margin if low > margin else -margin / 2, high + margin)
    # From zero seconds, so that lengths are proportional to times.
    axes.set_xlim(0, 1.25 * max(point["seconds"] for point in points) or 1)
    for number, members in enumerate(trainings.values()):
        color, seconds = COLORS[number % len(COLORS)], [point["seconds"] for point in members]
        heights = [100 * point["accuracy"] for point in members]
        # All ways of one training have the same training time, so they are above one another.
        axes.plot(seconds, heights, color=color, linewidth=0.8, alpha=0.5, zorder=2)
        for place, (point, height) in enumerate(zip(members, heights, strict=True)):
            ends = [[abs(100 * point[f"accuracy_{end}"] - height)] for end in ("low", "high")]
            axes.errorbar(seconds[0], height, yerr=ends, fmt="none", ecolor=color, elinewidth=1, alpha=0.5, zorder=2)
            face = "white" if place else color
            axes.plot(
                seconds[0], height, "o", markersize=6 if place else 9, markeredgecolor=color, markerfacecolor=face,
                zorder=3,
            )  # fmt: skip
    _name_points(axes, list(trainings.values()), 0.9 * TALL[0] / WIDE[0] if crowded else 1.0)
    axes.set_xlabel(xlabel)
    axes.set_ylabel("accuracy (%)")
    save_figure(figure, path)


def _name_points(axes: Axes, trainings: Sequence[Sequence[Mapping[str, Any]]], scale: float) -> None:
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()

    def place(point: Mapping[str, Any]) -> tuple[float, float]:
        return (point["seconds"] - left) / (right - left), (100 * point["accuracy"] - bottom) / (top - bottom)

    points = [one for few in trainings for one in few]
    taken = [(x - 0.012, y - 0.02, x + 0.012, y + 0.02) for x, y in map(place, points)]
    for members in trainings:
        x, _ = place(members[0])
        ends = [
            [(100 * one[f"accuracy_{end}"] - bottom) / (top - bottom) for one in members] for end in ("low", "high")
        ]
        taken.append((x - 0.002, min(ends[0]), x + 0.002, max(ends[1])))
    few = len(trainings) <= NAMED_POINTS
    labels = []
    for number, (first, *others) in enumerate(trainings, start=1):
        name = f"{short_name(first['training'], 30)}  {100 * first['accuracy']:.1f} %" if few else str(number)
        name = textwrap.fill(name, LABEL_LINE, break_long_words=False)
        labels.append((first, name, {"color": INK, "fontweight": "bold", "fontsize": 10}))
        for point in others if few else ():
            labels.append((point, way_name(point["inference"]), {"color": "#6A6A6A", "fontsize": 9}))
    for (point, text, style), (box, side) in zip(labels, _lay_out(labels, place, scale, taken), strict=True):
        x, y = place(point)
        middle = (box[1] + box[3]) / 2
        # From the edge of the text that is next to the point.
        start = ((0.5, float(middle < y)), (0, 0.5), (1, 0.5))[side]
        leader = {"arrowstyle": "-", "color": FAINT, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 4, "relpos": start}
        axes.annotate(
            text, xy=(x, y), xycoords="axes fraction",
            xytext=(x + side * 0.032 if side else (box[0] + box[2]) / 2, middle),
            textcoords="axes fraction", va="center", ha=("center", "left", "right")[side],
            arrowprops=leader if abs(middle - y) > (0.03 if side else 0.06) else None, zorder=5, **style,
        )  # fmt: skip


def _lay_out(
    labels: Sequence[tuple[Mapping[str, Any], str, Mapping[str, Any]]],
    place: Callable[[Mapping[str, Any]], tuple[float, float]],
    scale: float,
    taken: Sequence[Box],
) -> list[tuple[Box, int]]:
    """The box and the side of each label: of several orders of placing them, the one with the shortest lines."""
    shuffler, best = random.Random(0), (math.inf, [])
    for attempt in range(ORDERS):
        order = list(range(len(labels)))
        if attempt:
            shuffler.shuffle(order)
        # The names before what is less important.
        order.sort(key=lambda number: -labels[number][2]["fontsize"])
        boxes, found, cost = list(taken), [((0.0,) * 4, 0)] * len(labels), 0.0
        for number in order:
            point, text, style = labels[number]
            x, y = place(point)
            lines = text.split("\n")
            width = scale * (style["fontsize"] * LETTER * max(map(len, lines)) + 0.012)
            found[number], far = free_box(x, y, width, 0.04 + 0.03 * (len(lines) - 1), boxes)
            boxes.append(found[number][0])
            cost += far
        best = min(best, (cost, found), key=lambda one: one[0])
    return best[1]


def free_box(x: float, y: float, width: float, height: float, taken: Sequence[Box]) -> tuple[tuple[Box, int], float]:
    """The nearest free place for a label of (x, y), in fractions of the axes, and its side: 1 right, -1 left, 0 above
    or below; and how far it is, plus 1 if the line from there crosses something, and 1 if nothing is free.
    """
    candidates = []
    for shift in sorted((number * height / 4 for number in range(-48, 49)), key=abs):
        low = min(max(y + shift - height / 2, 0), 1 - height)
        for side in (1, -1):
            near, far = x + side * LABEL_GAP, x + side * (LABEL_GAP + width)
            candidates.append(((min(near, far), low, max(near, far), low + height), side))
        if abs(shift) >= height:
            left = min(max(x - width / 2, 0), 1 - width)
            candidates.append(((left, low, left + width, low + height), 0))
    # A line may cross whiskers, which are thin.
    others = [a for a in taken if not (a[0] <= x <= a[2] and a[1] <= y <= a[3]) and a[2] - a[0] > 0.01]

    def is_free(box: Box) -> bool:
        return box[0] >= 0 and box[2] <= 1.01 and not any(overlap(box, other) for other in taken)

    def is_clear(box: Box, side: int) -> bool:
        upright = box[1] if box[1] > y else box[3]
        end = (x + side * LABEL_GAP, (box[1] + box[3]) / 2) if side else ((box[0] + box[2]) / 2, upright)
        steps = [part / 16 for part in range(17)]
        line = [(x + part * (end[0] - x), y + part * (end[1] - y)) for part in steps]
        return not any(a[0] < u < a[2] and a[1] < v < a[3] for u, v in line for a in others)

    free = [one for one in candidates if is_free(one[0])]
    found = next((one for one in free if is_clear(*one)), (free or candidates)[0])
    far = abs((found[0][1] + found[0][3]) / 2 - y)
    return found, far + (0 if free and is_clear(*found) else 1) + (0 if free else 1)


def overlap(one: Box, other: Box) -> bool:
    """Whether two boxes share more than an edge."""
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def running_mean(values: Sequence[float]) -> list[float]:
    """The mean over a centred window of about a tenth of the curve, truncated at its ends."""
    half = max(1, len(values) // 20)
    return [fmean(values[max(0, number - half) : number + half + 1]) for number in range(len(values))]


def short_name(name: str, longest: int = LONGEST_NAME) -> str:
    """A name that fits, without characters that matplotlib would read as mathematics."""
    shown = name if len(name) <= longest else name[: longest - 3] + "..."
    return shown.replace("$", r"\$")
