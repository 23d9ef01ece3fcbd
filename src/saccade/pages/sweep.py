"""The page about many runs: a sweep, such as the demo."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from saccade.errors import SaccadeError
from saccade.pages.page import Page, blocks, html_table, settings_table
from saccade.pages.source import read_json
from saccade.report.plots import NAMED_POINTS, TALL, plot_curves, plot_trade_off, way_name
from saccade.report.training_log import curve
from saccade.sweeps import LABELS
from saccade.sweeps.plan import PLAN_FILE, Plan
from saccade.sweeps.runner import RUNS, read_failure
from saccade.sweeps.table import FIGURES, Standing, percent, spread, trade_off

Result = Mapping[str, Any]
MOST_CURVES, MOST_CARDS, LONGEST_TABLE = 12, 8, 24


def sweep_page(folder: Path, workshop: Path) -> Page:
    """The page about the finished runs of a sweep.

    Raises:
        SaccadeError: if no run is done, or a file is half-written.
    """
    page, standing = begin_sweep(folder, workshop)
    add_runs(page, standing)
    return page


def begin_sweep(
    folder: Path, workshop: Path, words: Mapping[str, str] = LABELS, figures: Mapping[str, Any] = FIGURES
) -> tuple[Page, Standing]:
    """A page with the finding, the best settings, and the table of a sweep; and the sweep's state.

    Raises:
        SaccadeError: if no run is done, or a file is half-written.
    """
    for path in (folder / PLAN_FILE, *sorted(folder.glob(f"{RUNS}/*/*.json"))):
        if path.is_file():
            read_json(path)
    plan = Plan.read(folder)
    standing = Standing(plan, folder, words, figures)
    if not standing.results:
        raise SaccadeError(f"folder={str(folder)!r} contains a sweep with no finished run: wait for the first")
    lead = f"{plan.title or folder.resolve().name}. {standing.progress}; means over seeds."
    page = Page(workshop, "sweep", folder, standing.finding(), lead)
    ranked = standing.ranked()
    page.add("Summary", blocks.cards([_card(place, entry) for place, entry in enumerate(ranked[:MOST_CARDS], 1)]))
    if len(ranked) > MOST_CARDS:
        page.add("Summary", blocks.paragraph(f"These are the best {MOST_CARDS} of {len(ranked)} settings."))
    if plan.command:
        page.add("Summary", blocks.command(f"Begun on {plan.started} with", plan.command))
    for spec in plan.runs:
        if spec.name in standing.failed:
            page.add("Summary", blocks.warning(f"A run failed: {read_failure(folder, spec)}"))
    _add_trade_off(page, standing)
    columns, cells = standing.table()
    words = "Values are means over seeds, with minimum and maximum in brackets, and n where they are of fewer seeds."
    table = html_table(columns, cells, words)
    long = len(cells) > LONGEST_TABLE
    page.add("Results", blocks.fold(f"All {len(cells)} rows as a table", [table]) if long else table)
    page.record |= {"command": plan.command, "progress": standing.progress, "summary": standing.summary()}
    return page, standing


def _card(place: int, entry: Mapping[str, Any]) -> tuple[str, str, str]:
    """Name, value and remark of the setting in that place."""
    figure = next((name for name in ("accuracy_full", "accuracy_pruned", "train_loss") if name in entry), "")
    words = {"accuracy_full": "right from all tokens", "accuracy_pruned": "right, pruned", "train_loss": "last loss"}
    remark = [words.get(figure, "")]
    if "share_of_all_tokens" in entry and not entry["is_baseline"]:
        time = f"{100 / entry['speedup']['mean']:.0f} % of the time"
        remark = [f"{percent(entry['share_of_all_tokens'])} of all-token accuracy", time]
    elif "train_seconds" in entry:
        remark.append(spread(entry["train_seconds"], "{:.0f} s"))
    return (
        f"{place}. {entry['name']}",
        spread(entry.get(figure), FIGURES[figure][1]) if figure else "-",
        ", ".join(remark),
    )


def _add_trade_off(page: Page, standing: Standing) -> None:
    """Add the picture of accuracy over training time, and its points as a table; nothing without evaluations."""
    points = trade_off(standing.groups())
    if not points:
        return
    names = list(dict.fromkeys(point["training"] for point in points))
    alt = f"Accuracy over training time of {len(names)} trainings; the table below has every point."
    caption = "Further up is more accurate, further left is faster to train. Filled circles answer from all tokens, "
    caption += "hollow ones as their label says. Times depend on what else the machine did."
    caption += " The table says what the numbers are." if len(names) > NAMED_POINTS else ""
    rows = [
        [
            f"{names.index(point['training']) + 1}. {point['training']}",
            way_name(point["inference"]),
            f"{100 * point['accuracy']:.1f} %",
            f"{point['seconds']:.0f}",
            f"{point['tokens']:.0f}",
            f"{point['flops'] / 1e6:.0f}" if point["flops"] else None,
        ]
        for point in points
    ]
    columns = ("training", "answers from", "accuracy", "seconds", "tokens", "MFLOPs")
    words = "Seconds are of training, tokens those of a mean prompt, and MFLOPs reach up to the first token."
    title = page.title_of("accuracy over training time")
    page.add("Trade-off", page.draw("trade-off.png", alt, caption, plot_trade_off, points, title=title))
    page.add("Trade-off", blocks.fold(f"All {len(rows)} points as a table", [html_table(columns, rows, words)]))
    page.record["trade_off"] = points


def add_runs(page: Page, standing: Standing) -> None:
    """Add the losses, the options of each stage, and where the runs took place."""
    curves = {name: _mean_curve(results) for name, results in standing.groups().items()}
    shown = dict([(name, values) for name, values in curves.items() if values][:MOST_CURVES])
    if shown:
        ends = "; ".join(f"{name} ends at {values[-1][1]:.3g}" for name, values in shown.items())
        caption = "The loss of the last stage is a running mean, averaged over seeds."
        caption += f" These are the first {MOST_CURVES} of {len(curves)}." if len(curves) > MOST_CURVES else ""
        options = {"title": page.title_of("training loss"), "smooth": True, "size": TALL}
        arguments = ("loss.png", f"Training loss over the steps: {ends}.", caption, plot_curves)
        page.add("Loss", page.draw(*arguments, shown, "optimizer step", "training loss", **options))
    results = list(standing.results.values())
    for stage, number in (("fine-tuning", -1), ("pretraining", -2)):
        found = [one["spec"]["stages"][number] for one in results if len(one["spec"]["stages"]) >= -number]
        values = {}
        for name in dict.fromkeys(name for options in found for name in options):
            texts = dict.fromkeys("none" if name not in options else str(options[name]) for options in found)
            values[name] = next(iter(texts)) if len(texts) == 1 else "varies: " + ", ".join(texts)
        if values:
            table = settings_table(values, f"All runs of {stage} have these options.")
            page.add("Settings", blocks.fold(f"Options of {stage}", [table]))
    days = sorted({one["finished"] for one in results if one.get("finished")})
    page.add_environment(
        [json.loads(text) for text in dict.fromkeys(json.dumps(one["environment"]) for one in results)], days
    )


def _mean_curve(results: Sequence[Result]) -> list[tuple[int, float]]:
    """The loss of the last stage, averaged over seeds at the steps that all of them log."""
    curves = [dict(curve(list(one["stages"].values())[-1]["log_history"], "loss")) for one in results]
    return [(step, fmean(one[step] for one in curves)) for step in curves[0] if all(step in one for one in curves)]
