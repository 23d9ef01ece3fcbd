"""Plots of a comparison: accuracy over training time, and the loss in each mode."""

import os
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from saccade.files import atomic_path
from saccade.report.training_log import curve, modes_of, part_of

# Okabe and Ito's palette, distinguishable with all common kinds of colour blindness; shapes encode the same.
STYLES: dict[str, tuple[str, str, str]] = {
    "all_tokens": ("#000000", "s", "all tokens"),
    "prune_only": ("#D55E00", "^", "pruning only"),
    "dualspeed": ("#0072B2", "o", "DualSpeed"),
}
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
OTHER_STYLES = [("#009E73", "D"), ("#CC79A7", "v"), ("#E69F00", "P"), ("#56B4E9", "X")]
MODE_STYLES = {"fast": ("#0072B2", "fast steps (pruned)"), "slow": ("#D55E00", "slow steps (all tokens)")}
INK, FAINT = "#333333", "#8A8A8A"
# 8 by 4.75 inches at 150 dpi: 10-point text stays readable when a page shows the picture 800 pixels wide.
SIZE, DPI = (8.0, 4.75), 150


def plot_accuracy_over_time(runs: Sequence[dict[str, Any]], path: str | os.PathLike[str]) -> None:
    """Draw the accuracy on full inference over the training time, one point per method, as PNG.

    Runs that differ only in their seed become one point at their mean, with whiskers from minimum to maximum. An arrow
    leads from each point to the accuracy on pruned inference. Hollow markers are runs with compact positions.

    Args:
        runs: each with `method`, `positions` ("original", "compact" or None), `seed`, `accuracy_full` and
            `accuracy_pruned` in [0, 1] (`accuracy_pruned` may be None), `train_seconds`, `speedup` (None for the
            baseline) and `label`.
        path: the file to write.

    Raises:
        ValueError: if there are no runs.
        KeyError: if a run lacks one of the keys.
    """
    groups = _group(runs)
    if not groups:
        raise ValueError("there are no runs to draw")
    figure, (axes,) = styled_figure()
    styles = method_styles([group["method"] for group in groups])
    for group in groups:
        _draw_point(axes, group, styles[group["method"]])
    _limits(axes, groups)
    axes.set_xlabel("training time (s)")
    axes.set_ylabel("accuracy (%); arrows: pruned inference")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9.5, labelcolor=INK)
    save_figure(figure, path)


def plot_loss_by_mode(
    log_history: Sequence[dict[str, Any]], path: str | os.PathLike[str], size: tuple[float, float] = SIZE
) -> None:
    """Draw the training loss of the steps of each mode over the steps, as PNG, each with a running mean.

    Args:
        log_history: the trainer's log. Entries with `step` and `loss_MODE` are drawn by mode; if there are none,
            `loss` is drawn as one curve.
        path: the file to write.
        size: inches across and down.

    Raises:
        ValueError: if no entry has a loss.
    """
    styles = mode_styles(modes_of(log_history))
    curves = {mode: curve(log_history, f"loss_{mode}") for mode in styles}
    drawn = {mode: (*styles[mode], points) for mode, points in curves.items() if points}
    if not drawn:
        whole = curve(log_history, "loss")
        if not whole:
            raise ValueError("the log has no loss to draw")
        drawn = {"all": (INK, "all steps", whole)}
    figure, (axes,) = styled_figure(1, size)
    for color, label, points in drawn.values():
        steps, losses = zip(*points, strict=True)
        axes.plot(steps, losses, color=color, alpha=0.25, linewidth=1)
        axes.plot(steps, running_mean(losses), color=color, linewidth=2, label=label)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("training loss")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    save_figure(figure, path)


def mode_styles(modes: Sequence[str]) -> dict[str, tuple[str, str]]:
    """The colour and the name of each mode, the same in all pictures of a run."""
    others = iter(OTHER_STYLES * len(modes))
    return {mode: MODE_STYLES.get(mode) or (next(others)[0], part_of(mode)) for mode in modes}


def styled_figure(panels: int = 1, size: tuple[float, float] = SIZE) -> tuple[Figure, list[Axes]]:
    """A figure of `size` inches with panels side by side, in the common style of all plots."""
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
    return figure, drawn


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure as PNG, whole or not at all."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def _group(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Group the runs over seeds, each number as (mean, minimum, maximum), accuracies in percent."""
    together: dict[tuple, list[dict[str, Any]]] = {}
    for run in runs:
        together.setdefault((run["method"], run["positions"], run["label"]), []).append(run)
    groups = []
    for (method, positions, label), members in together.items():
        pruned = [100 * run["accuracy_pruned"] for run in members if run["accuracy_pruned"] is not None]
        speedups = [run["speedup"] for run in members if run["speedup"] is not None]
        groups.append(
            {
                "method": method,
                "positions": positions,
                "label": label,
                "full": _spread([100 * run["accuracy_full"] for run in members]),
                "seconds": _spread([run["train_seconds"] for run in members]),
                "pruned": fmean(pruned) if pruned else None,
                "speedup": fmean(speedups) if speedups else None,
            }
        )
    return groups


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    return fmean(values), min(values), max(values)


def method_styles(methods: Sequence[str]) -> dict[str, tuple[str, str]]:
    """The colour and the marker of each method, the same in all pictures."""
    others = iter(OTHER_STYLES * len(methods))
    return {method: STYLES[method][:2] if method in STYLES else next(others) for method in dict.fromkeys(methods)}


def _draw_point(axes: Axes, group: dict[str, Any], style: tuple[str, str]) -> None:
    color, marker = style
    (x, x_low, x_high), (y, y_low, y_high) = group["seconds"], group["full"]
    axes.errorbar(
        x, y, xerr=[[x - x_low], [x_high - x]], yerr=[[y - y_low], [y_high - y]], fmt="none", ecolor=color,
        elinewidth=1.2, alpha=0.45, zorder=2,
    )  # fmt: skip
    if group["pruned"] is not None:
        # A short dash marks the arrow's end, in case the two values are too close to see an arrow.
        arrow = {"arrowstyle": "-|>", "color": color, "alpha": 0.6, "shrinkA": 5, "shrinkB": 0, "linewidth": 1.2}
        axes.annotate("", xy=(x, group["pruned"]), xytext=(x, y), arrowprops=arrow, zorder=2)
        axes.plot(x, group["pruned"], marker="_", color=color, markersize=11, markeredgewidth=1.6, zorder=3)
    hollow = group["positions"] == "compact"
    axes.plot(
        x, y, marker=marker, markersize=9, markeredgecolor=color, markeredgewidth=1.8,
        markerfacecolor="white" if hollow else color, linestyle="none", zorder=4, label=_label(group),
    )  # fmt: skip


def _limits(axes: Axes, groups: Sequence[dict[str, Any]]) -> None:
    """Start the time axis at zero, so that distances are proportional to times."""
    heights = [value for group in groups for value in (*group["full"], group["pruned"]) if value is not None]
    low, high = min(heights), max(heights)
    margin = max(2.0, 0.12 * (high - low))
    axes.set_ylim(max(0, low - margin), min(102, high + margin))
    axes.set_xlim(0, max(group["seconds"][2] for group in groups) * 1.05 or 1)


def _label(group: dict[str, Any]) -> str:
    text = f"{group['label']}, {group['positions']}" if group["positions"] else group["label"]
    text += f": {group['full'][0]:.1f} %"
    return text if group["speedup"] is None else f"{text}, {group['speedup']:.1f}x as fast"


def running_mean(values: Sequence[float]) -> list[float]:
    """The mean over a centred window of about a tenth of the curve, truncated at its ends."""
    half = max(1, len(values) // 20)
    return [fmean(values[max(0, number - half) : number + half + 1]) for number in range(len(values))]
