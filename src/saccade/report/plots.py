"""Plots as PNG: curves over steps, and accuracy over training time."""

import os
from collections.abc import Mapping, Sequence
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
TALL = (6.0, 5.0)
WAYS = {"full": "all tokens", "pruned": "pruned", "pruned_isolator": "pruned, with isolator", "skip": "skipping"}
LONGEST_NAME = 44
NAMED_POINTS = 8
"""With more trainings than these, the points of `plot_trade_off` have numbers."""
# As fractions of the axes, since matplotlib only knows the extent of a text after drawing it.
Box = tuple[float, float, float, float]  # left, bottom, right, top
LABEL_GAP = 0.026
LETTER = 0.0017  # width of a letter of one point, in a picture of size `TALL`


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
    figure, (axes,) = styled_figure(1, TALL, title)
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
    _name_points(axes, list(trainings.values()))
    axes.set_xlabel(xlabel)
    axes.set_ylabel("accuracy (%)")
    save_figure(figure, path)


def _name_points(axes: Axes, trainings: Sequence[Sequence[Mapping[str, Any]]]) -> None:
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()

    def place(point: Mapping[str, Any]) -> tuple[float, float]:
        return (point["seconds"] - left) / (right - left), (100 * point["accuracy"] - bottom) / (top - bottom)

    taken = [(x - 0.012, y - 0.02, x + 0.012, y + 0.02) for x, y in (place(one) for few in trainings for one in few)]
    few = len(trainings) <= NAMED_POINTS
    labels = []
    for number, (first, *others) in enumerate(trainings, start=1):
        name = f"{short_name(first['training'], 30)}  {100 * first['accuracy']:.1f} %" if few else str(number)
        labels.append((first, name, {"color": INK, "fontweight": "bold", "fontsize": 10}))
        for point in others if few else ():
            labels.append((point, way_name(point["inference"]), {"color": "#6A6A6A", "fontsize": 9}))
    for point, text, style in sorted(labels, key=lambda label: label[2]["fontsize"], reverse=True):
        x, y = place(point)
        box, side = free_box(x, y, style["fontsize"] * LETTER * len(text) + 0.012, 0.04, taken)
        taken.append(box)
        middle = (box[1] + box[3]) / 2
        leader = {"arrowstyle": "-", "color": FAINT, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 4}
        axes.annotate(
            text, xy=(x, y), xycoords="axes fraction", xytext=(x + side * 0.032, middle), textcoords="axes fraction",
            va="center", ha="left" if side > 0 else "right", arrowprops=leader if abs(middle - y) > 0.03 else None,
            zorder=5, **style,
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
        if box[0] >= 0 and box[2] <= 1.01 and not any(overlap(box, other) for other in taken)
    )
    return next(free, candidates[0])


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
