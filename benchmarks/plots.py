"""Plots of a training benchmark: speed-ups compared to the FLOP bound, and where a step's time goes."""

import os
from collections.abc import Mapping

from saccade.report.plots import COLORS, FAINT, INK, save_figure, styled_figure

Speedup = tuple[float, float, float, float]
"""Median, 20th and 80th percentile, and the speed-up that FLOPs allow."""
ROW, HEAD = 0.36, 1.3  # Inches per bar, and for the title and axis together.


def plot_speedups(stages: Mapping[str, Mapping[str, Speedup]], path: str | os.PathLike[str]) -> None:
    """Draw each variant's speed-up by stage as PNG, with a mark at the speed-up that FLOPs allow."""
    most = max(len(found) for found in stages.values())
    figure, drawn = styled_figure(len(stages), (5.6 * len(stages), HEAD + ROW * most))
    for axes, (stage, found) in zip(drawn, stages.items(), strict=True):
        names = list(found)[::-1]
        places = range(len(names))
        values = [found[name][0] for name in names]
        low = [max(0.0, found[name][0] - found[name][1]) for name in names]
        high = [max(0.0, found[name][2] - found[name][0]) for name in names]
        axes.barh(
            places, values, xerr=[low, high], color=COLORS[0], alpha=0.75, ecolor=INK, height=0.62, label="measured"
        )
        axes.scatter(
            [found[name][3] for name in names], places, marker="|", s=240, color=COLORS[1], label="FLOPs allow"
        )
        axes.axvline(1, color=FAINT, linestyle="--", linewidth=1)
        axes.set_yticks(places, names)
        axes.set_ylim(len(names) - most - 0.6, len(names) - 0.4)
        axes.set_xlabel("times as fast as stock TRL")
        axes.set_title(f"stage {stage}", fontsize=11, color=INK)
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", color="#E6E6E6", linewidth=0.8)
    handles, labels = drawn[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9.5, labelcolor=INK)
    save_figure(figure, path)


def plot_parts(variants: Mapping[str, Mapping[str, float]], path: str | os.PathLike[str]) -> None:
    """Draw the shares of a step's time as PNG, one stacked bar per variant."""
    names = list(variants)[::-1]
    parts = list(next(iter(variants.values())))
    figure, (axes,) = styled_figure(1, (9.0, HEAD + ROW * len(names)))
    left = [0.0] * len(names)
    for number, part in enumerate(parts):
        shares = [100 * variants[name][part] for name in names]
        axes.barh(range(len(names)), shares, left=left, color=COLORS[number % len(COLORS)], height=0.66, label=part)
        left = [start + share for start, share in zip(left, shares, strict=True)]
    axes.set_yticks(range(len(names)), names)
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of a step's time (%)")
    axes.grid(visible=False)
    figure.legend(loc="outside lower center", ncols=len(parts), frameon=False, fontsize=9.5, labelcolor=INK)
    save_figure(figure, path)
