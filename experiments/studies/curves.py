"""Pictures of studies: curves over one setting with a spread at each point, and curves over time."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from matplotlib.axes import Axes

from saccade.report.plots import COLORS, FAINT, INK, save_figure, styled_figure

# With the colours, no two of the first twenty-eight curves look alike.
LINES = ("-", "-.", ":")  # one for each repetition of the palette
MARKERS = ("o", "^", "D", "v", "P", "X", "s")
PANEL_SIZE, LEGEND_ROW, LEGEND_COLUMNS = (5.4, 4.2), 0.28, 3
SIDESTEP = 0.3  # share of the distance between ticks over which curves are spread, so that whiskers do not overlap
Spread = Mapping[str, float]


@dataclass(frozen=True)
class CurvePanel:
    """One panel.

    Args:
        title: text above the panel.
        xlabel: what varies.
        ylabel: what is measured.
        ticks: the values of what varies, as text, in order; they are drawn at equal distances.
        curves: by name, the spread ("mean", "min", "max", as fractions) at each tick, or None if it is missing.
        reference: name and mean of a dashed line across the panel.
        joined: whether a line joins the points; it should not if the ticks are categories.
    """

    title: str
    xlabel: str
    ylabel: str
    ticks: Sequence[str]
    curves: Mapping[str, Sequence[Spread | None]]
    reference: tuple[str, float] | None = None
    joined: bool = True


@dataclass(frozen=True)
class TimeCurve:
    """The accuracy over time of runs that differ only in their seed.

    Args:
        name: name in the legend.
        color: color of the lines.
        marker: marker of the points.
        runs: per run, the seconds and the accuracy (a fraction) at each checkpoint.
    """

    name: str
    color: str
    marker: str
    runs: Sequence[Sequence[tuple[float, float]]]

    @property
    def mean(self) -> list[tuple[float, float]]:
        """Mean seconds and mean accuracy at each checkpoint."""
        return [
            (fmean(seconds for seconds, _ in points), fmean(share for _, share in points))
            for points in zip(*self.runs, strict=True)
        ]


def plot_time_curves(
    curves: Sequence[TimeCurve],
    path: str | os.PathLike[str],
    xlabel: str,
    ylabel: str,
    reference: tuple[str, float] | None = None,
) -> None:
    """Draw accuracy over time as a PNG: the mean of each curve's runs, and single runs as thin, faint lines.

    Args:
        reference: name and accuracy of a dashed line across the picture.

    Raises:
        ValueError: if there is nothing to draw.
    """
    if not curves:
        raise ValueError("there are no curves to draw")
    figure, (axes,) = styled_figure()
    if reference is not None:
        name, share = reference
        axes.axhline(100 * share, color=FAINT, linestyle="--", linewidth=1.2, label=name, zorder=1)
    for curve in curves:
        for points in curve.runs if len(curve.runs) > 1 else ():
            xs, ys = zip(*points, strict=True)
            axes.plot(xs, [100 * y for y in ys], color=curve.color, linewidth=0.8, alpha=0.35, zorder=2)
        xs, ys = zip(*curve.mean, strict=True)
        axes.plot(
            xs, [100 * y for y in ys], color=curve.color, marker=curve.marker, markersize=5.5, linewidth=1.8,
            label=curve.name, zorder=3,
        )  # fmt: skip
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    # From zero, so that lengths are proportional to times.
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    entries = len(curves) + (reference is not None)
    columns = entries if entries <= LEGEND_COLUMNS + 1 else LEGEND_COLUMNS
    figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=9.5, labelcolor=INK)
    save_figure(figure, path)


def plot_panels(panels: Sequence[CurvePanel], path: str | os.PathLike[str]) -> None:
    """Draw panels side by side as a PNG; curves of the same name look the same in all panels.

    Raises:
        ValueError: if there is nothing to draw.
    """
    names = list(dict.fromkeys(name for panel in panels for name in panel.curves))
    if not names:
        raise ValueError("there are no curves to draw")
    labelled = len(names) > 1 or any(panel.reference for panel in panels)
    entries = len(names) + any(panel.reference is not None for panel in panels)
    columns = LEGEND_COLUMNS * len(panels)
    rows = -(-entries // columns) if labelled else 0
    width, height = PANEL_SIZE
    width = max(width * len(panels), 8.0)
    figure, drawn = styled_figure(len(panels), (width, height + LEGEND_ROW * rows))
    for axes, panel in zip(drawn, panels, strict=True):
        _draw_panel(axes, panel, names)
    if labelled:
        handles: dict[str, object] = {}
        for axes in drawn:
            for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
                handles.setdefault(name, handle)
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=min(columns, entries), frameon=False,
            fontsize=9.5, labelcolor=INK,
        )  # fmt: skip
    save_figure(figure, path)


def _draw_panel(axes: Axes, panel: CurvePanel, names: Sequence[str]) -> None:
    axes.set_title(panel.title, fontsize=11, color=INK)
    axes.set_xlabel(panel.xlabel)
    axes.set_ylabel(panel.ylabel)
    axes.set_xticks(range(len(panel.ticks)), panel.ticks)
    axes.set_xlim(-0.5, len(panel.ticks) - 0.5)
    if panel.reference is not None:
        name, value = panel.reference
        axes.axhline(100 * value, color=FAINT, linestyle="--", linewidth=1.2, label=name, zorder=1)
    for number, (name, spreads) in enumerate(panel.curves.items()):
        style = names.index(name)
        shift = SIDESTEP * ((number + 0.5) / len(panel.curves) - 0.5)
        known = [(place + shift, entry) for place, entry in enumerate(spreads) if entry is not None]
        means = [100 * entry["mean"] for _, entry in known]
        low = [100 * (entry["mean"] - entry["min"]) for _, entry in known]
        high = [100 * (entry["max"] - entry["mean"]) for _, entry in known]
        axes.errorbar(
            [place for place, _ in known], means, yerr=[low, high], label=name, color=COLORS[style % len(COLORS)],
            marker=MARKERS[(style + style // len(COLORS)) % len(MARKERS)], markersize=5.5, linewidth=1.4,
            linestyle=LINES[style // len(COLORS) % len(LINES)] if panel.joined else "none",
            elinewidth=1, alpha=0.9, zorder=3,
        )  # fmt: skip
        if len(panel.curves) == 1:
            for (place, entry), mean in zip(known, means, strict=True):
                axes.annotate(
                    f"{mean:.1f}", (place, 100 * entry["max"]), xytext=(0, 5), textcoords="offset points",
                    ha="center", fontsize=9, color=INK,
                )  # fmt: skip
    axes.margins(y=0.12)
