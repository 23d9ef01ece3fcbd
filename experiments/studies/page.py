"""The page of a study or a sweep with the costs of its runs: pictures, trade-off, training time, kept tokens."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from experiments.studies.curves import plot_panels
from experiments.studies.methods import WORDS
from experiments.studies.over_time import checkpointed_runs, draw_over_time
from experiments.studies.results_page import curve_panel
from experiments.studies.studies import STUDIES
from experiments.studies.trade_off import NAMED_POINTS, cost_of, plot_trade_off, trade_off
from saccade.data import digit_scenes
from saccade.errors import SaccadeError
from saccade.pages.many import Groups, Result, add_runs, add_table, begin_sweep, group_results, has_own_training
from saccade.pages.page import Page
from saccade.pages.scenes import HEADING, where_kept
from saccade.reducers import PruningConfig
from saccade.report.html import fold, html_table, paragraph
from saccade.report.run_plots import plot_time_parts, way_name
from saccade.report.training_log import hides_teacher, time_parts
from saccade.report.view import view_reducers
from saccade.sweeps.runner import STAGES
from saccade.sweeps.table import Standing
from saccade.training import ModelOptions, load_model

COSTS = {"flops": "the operations up to an answer's first token", "tokens": "the tokens of a mean prompt"}
LONGEST_TABLE = 24
COMPARED = ("uniform", "random")
"""Plain reducers that a single one is compared to."""


def study_page(folder: Path, workshop: Path) -> Page:
    """The page of the finished runs of a study or a sweep.

    Raises:
        SaccadeError: if no run has finished, or a file is incomplete.
    """
    page, standing = begin_sweep(folder, workshop, WORDS)
    _add_pictures(page, standing)
    add_table(page, standing)
    results = list(standing.results.values())
    groups = group_results([one for one in results if has_own_training(one)], WORDS)
    if groups:
        _add_trade_off(page, trade_off(groups))
        _add_time(page, groups)
    _add_kept(page, results, folder)
    add_runs(page, results)
    return page


def _add_pictures(page: Page, standing: Standing) -> None:
    """Add the study's pictures."""
    study = STUDIES.get((standing.plan.about or {}).get("study"))
    if study is None:
        return
    for number, panel in enumerate(study.panels, start=1):
        drawn = curve_panel(standing, panel)
        known = {name: values for name, values in drawn.curves.items() if any(values)}
        if panel.drawn and known:
            alt = f"{drawn.ylabel} over {drawn.xlabel}, one curve for each of {', '.join(known)}; the table has the "
            alt += "values."
            page.add("Results", page.draw(f"study_{number}.png", alt, "", plot_panels, [drawn], wide=True))
    runs = checkpointed_runs(standing) if study.over_time else {}
    if runs:
        alt = f"Accuracy on all tokens over the training time of stage two, one curve for each of {', '.join(runs)}."
        caption = "Further up and further left is better. Faint lines are seeds. Stage one is not in the time."
        page.add("Results", page.draw("over_time.png", alt, caption, draw_over_time, runs, wide=True))


def _add_trade_off(page: Page, points: Sequence[Mapping[str, Any]]) -> None:
    if not points:
        return
    names, cost = list(dict.fromkeys(point["training"] for point in points)), cost_of(points)
    alt = f"Accuracy over training time of {len(names)} trainings, the area of a circle being {COSTS[cost]}; the "
    alt += "table below has every point."
    caption = "Higher is better, further left is faster to train; times depend on what else the machine did. "
    caption += f"The area of a circle is {COSTS[cost]}."
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
    words = "Accuracy, seconds of training, tokens of a mean prompt, and operations up to the first token"
    table = html_table(columns, rows, words)
    page.add("Trade-off", page.draw("trade_off.png", alt, caption, plot_trade_off, points, wide=True))
    page.add("Trade-off", table if len(rows) <= LONGEST_TABLE else fold(f"All {len(rows)} points as a table", table))
    page.record["trade_off"] = points


def _add_time(page: Page, groups: Groups) -> None:
    bars: dict[str, dict[str, float]] = {}
    for name, results in groups.items():
        found = [parts for one in results if (parts := _run_parts(one))]
        if found:
            known = dict.fromkeys(part for parts in found for part in parts)
            bars[name] = {part: fmean(parts.get(part, 0.0) for parts in found) for part in known}
    if not bars:
        page.add("Time", paragraph("The logs do not say how long the steps took."))
        return
    shown = list(dict.fromkeys(part for bar in bars.values() for part in bar))
    rows = [[name, *(round(bar.get(part, 0.0), 1) for part in shown)] for name, bar in bars.items()]
    logs = [stage["log_history"] for results in groups.values() for one in results for stage in one["stages"].values()]
    caption = "Both stages, up to the last log."
    caption += " Some logs count teachers with their steps." if any(map(hides_teacher, logs)) else ""
    alt = f"Where the training time of {len(bars)} trainings went, a bar each; the table below has the values."
    table = html_table(("training", *shown), rows, "Seconds of both stages, means over seeds")
    page.add(
        "Time",
        page.draw("time.png", alt, caption, plot_time_parts, bars, wide=len(bars) > 1),
    )
    page.add("Time", fold("The same as a table", table))
    page.record["seconds"] = bars


def _run_parts(result: Result) -> dict[str, float] | None:
    total: dict[str, float] = {}
    for stage in result["stages"].values():
        for part, value in (time_parts(stage["log_history"]) or {}).items():
            total[part] = total.get(part, 0.0) + value
    return total or None


def _add_compared_scene(
    page: Page,
    model_folder: Path,
    reducers: Sequence[str],
    prune_ratio: float | None,
    keep_tokens: int | None = None,
) -> None:
    """Draw the tokens of one scene that each of several reducers keeps, with the features of one model.

    Args:
        model_folder: folder with the weights; if they are missing, the page says so.
        keep_tokens: number of tokens to keep, in place of the ratio.
    """
    file = "kept_tokens.png"
    try:
        model, processor = load_model(ModelOptions(model=str(model_folder)))
        scenes = digit_scenes("sft", "test", 200, kinds=["read"])
        row = scenes[max(range(len(scenes)), key=lambda index: scenes[index]["num_digits"])]
        question = row["messages"][-2]["content"]
        pruning = PruningConfig(keep_tokens=keep_tokens) if keep_tokens else PruningConfig(prune_ratio=prune_ratio)
        seen = view_reducers(model, processor, row["images"][0], reducers, question, page.workshop / file, pruning)
    except SaccadeError as error:
        page.add(HEADING, paragraph(f"No picture: {error}"))
        return
    height, width = seen["grid"]
    alt = f"One scene of {row['num_digits']} digits, with what each reducer keeps of {height * width} patches."
    listed = [
        f"{entry['reducer']} keeps {len(entry['kept'])}: {where_kept(entry['kept'], width, height)}."
        for entry in seen["panels"]
    ]
    budget = f"{keep_tokens} tokens" if keep_tokens else f"p = {prune_ratio:g}"
    caption = f"A scene of the test split at {budget}: what stays is outlined, what is dropped is "
    caption += "dimmed; where tokens are merged, a region has the colour of the token that it flows into."
    page.add(HEADING, page.show(file, alt, caption, wide=True), fold("The picture in words", *map(paragraph, listed)))


def _add_kept(page: Page, results: Sequence[Result], folder: Path) -> None:
    stages = [one["spec"]["stages"][-1] for one in results]
    if any(stage.get("dataset", "digits") != "digits" for stage in stages):
        page.add("Kept tokens", paragraph("No pictures: the runs are not on the digit scenes."))
        return
    pruning = [stage for stage in stages if stage.get("prune_ratio", 0.9) != 0]
    ways = [way for one in results for way in (one["spec"]["evaluation"] or {}).get("inferences", [])]
    entries = [*pruning, *(way for way in ways if way["name"] != "full")]
    names = list(dict.fromkeys(entry.get("reducer", "divprune") for entry in entries))
    if not names:
        page.add("Kept tokens", paragraph("No pictures: no run prunes."))
        return
    # If runs keep a fixed number of tokens instead of a ratio, so does the picture.
    keep = next((entry["keep_tokens"] for entry in entries if entry.get("keep_tokens")), None)
    ratio = None if keep else next((entry["prune_ratio"] for entry in entries if entry.get("prune_ratio")), 0.9)
    reducers = names if len(names) > 1 else list(dict.fromkeys([*names, *COMPARED]))
    _add_compared_scene(page, _model_folder(results[0], folder), reducers, ratio, keep)


def _model_folder(result: Result, folder: Path) -> Path:
    """The folder of a run's model: where it was written, or in the folder of stages if that was moved."""
    recorded = Path(result["model"])
    places = (recorded, folder / STAGES / recorded.name, folder.parent / STAGES / recorded.name)
    return next((place for place in places if place.is_dir()), recorded)
