"""Plots of benchmarks: speed-ups of training, where a step's time goes, how soon and how much a server answers."""

import os
from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes

from benchmarks.serving_tables import Spread, Summary, rounded
from saccade.report.plots import COLORS, FAINT, INK, save_figure, styled_figure

Speedup = tuple[float, float, float, float]
"""Median, 20th and 80th percentile, and the speed-up that FLOPs allow."""
ROW, HEAD = 0.36, 1.3  # Inches per bar, and for the title and axis together.


def plot_speedups(stages: Mapping[str, Mapping[str, Speedup]], path: str | os.PathLike[str]) -> None:
    """Draw each variant's speed-up by stage as PNG, with a mark at the speed-up that FLOPs allow.

    A stage without any, where the stock trainer ran out of memory, is left out, and so is a picture without stages, of
    which none stays from before.
    """
    stages = {stage: found for stage, found in stages.items() if found}
    if not stages:
        Path(path).unlink(missing_ok=True)
        return
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
    """Draw the shares of a step's time as PNG, one stacked bar per variant. Without any, none stays from before."""
    if not variants:
        Path(path).unlink(missing_ok=True)
        return
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


def plot_serving(
    visual_tokens: int, summaries: Mapping[int, Mapping[str, Summary]], path: str | os.PathLike[str]
) -> None:
    """Draw the time to the first token, and requests per second, a bar for each provider, as PNG.

    Args:
        summaries: by requests at a time, then by provider; the largest number that has any is drawn.
    """
    at_once = max(number for number, found in summaries.items() if found)
    found = summaries[at_once]
    figure, (first, rate) = styled_figure(2, (10.5, HEAD + 0.5 * len(found)))
    together = "1 request at a time" if at_once == 1 else f"{at_once} requests at a time"
    first.set_title(f"seconds to the first token, {together}", fontsize=11, color=INK, loc="left")
    rate.set_title(f"requests answered per second, {together}", fontsize=11, color=INK, loc="left")
    _bars(first, {name: (each.first, each.first_ratio[0], "as soon") for name, each in found.items()})
    _bars(rate, {name: (each.rate, each.rate_ratio[0], "as many") for name, each in found.items()})
    rate.set_yticklabels([])
    figure.supxlabel(
        f"{visual_tokens:,} visual tokens in a picture; lines: least to greatest", fontsize=9.5, color=INK
    )
    save_figure(figure, path)


def _bars(axes: Axes, values: Mapping[str, tuple[Spread, float, str]]) -> None:
    """Horizontal bars from the top down, each with what it says written behind it."""
    names = list(values)
    most = max(high for (_, _, high), _, _ in values.values())
    for place, name in enumerate(names):
        (middle, low, high), ratio, words = values[name]
        whole = name.endswith("all tokens")
        axes.barh(place, middle, color=FAINT if whole else COLORS[0], alpha=0.75, height=0.66)
        axes.plot([low, high], [place, place], color=INK, linewidth=1.2)
        said = rounded(middle, 2) if whole else f"{rounded(middle, 2)}   {ratio:.1f} times {words}"
        axes.text(high + 0.015 * most, place, said, va="center", fontsize=10, color=INK)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlim(0, 1.5 * most)
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
