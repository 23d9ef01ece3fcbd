"""Plots for a run's page: values by mode, and where the time went."""

import os
from collections.abc import Mapping, Sequence

from saccade.report.plots import (
    COLORS,
    INK,
    MODE_STYLES,
    OTHER_STYLES,
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
BAR_HEIGHT, LONGEST_NAME = 0.42, 44
SMALL = (5.0, 3.4)
"""Size in inches of the plots of one run: text stays readable when a phone shows them 320 pixels wide."""


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
        curves: points (x, y) by name; more than seven curves also differ in their dashes.
        smooth: draw running means, with the values themselves faint in the background if there is only one curve.
        size: width and height in inches, without the legend.
        colors: colours of the curves by name; by default those of `COLORS` in order.

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
            xs, running_mean(ys) if smooth else ys, line, color=color, linewidth=1.8, label=short_name(name),
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
    """Draw where the time of each run went, one bar per run, as PNG.

    Args:
        bars: for each run by name, the seconds of each part as returned by `time_parts`.

    Raises:
        ValueError: if there are no bars.
    """
    if not bars:
        raise ValueError("there are no bars to draw")
    colors = _part_colors(bars)
    parts = list(colors)
    # A single bar needs no space for its name, and its legend fits in one column.
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
    axes.set_yticks(range(len(bars)), [short_name(name) for name in bars])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color="#E6E6E6", linewidth=0.8)
    axes.set_xlim(0, 1.1 * longest)
    axes.set_xlabel("training time (s)")
    figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=9.5, labelcolor=INK)
    save_figure(figure, path)


def _part_colors(bars: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    """The parts that occur, with their colours: modes in order, other parts at the end."""
    found = dict.fromkeys(part for bar in bars.values() for part in bar)
    others = iter(OTHER_STYLES * len(found))
    modes = [part for part in (*PART_COLORS, *found) if part in found and part not in REST_COLORS]
    colors = {part: PART_COLORS.get(part) or next(others)[0] for part in modes}
    return colors | {part: color for part, color in REST_COLORS.items() if part in found}


def short_name(name: str, longest: int = LONGEST_NAME) -> str:
    """A name that fits, without characters that matplotlib would read as mathematics."""
    shown = name if len(name) <= longest else name[: longest - 3] + "..."
    return shown.replace("$", r"\$")
