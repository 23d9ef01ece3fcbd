"""The page of many runs: a sweep, a study of the paper, or a demo."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from saccade.demo.summary import COLUMNS, table_rows
from saccade.errors import SaccadeError
from saccade.pages.page import Page
from saccade.pages.run import settings_table
from saccade.pages.scenes import add_compared_scene
from saccade.pages.source import DEMO_FILE, read_json
from saccade.report.curves import plot_panels
from saccade.report.html import command, fold, paragraph, tiles, warning
from saccade.report.plots import SIZE
from saccade.report.run_plots import NAMED_POINTS, cost_of, plot_time_parts, plot_trade_off, plot_values, way_name
from saccade.report.tables import html_table
from saccade.report.training_log import curve, hides_teacher, time_parts
from saccade.sweeps import LABELS, RunSpec
from saccade.sweeps.docs import curve_panel
from saccade.sweeps.figures import percent, trade_off
from saccade.sweeps.over_time import checkpointed_runs, draw_over_time
from saccade.sweeps.plan import PLAN_FILE, Plan
from saccade.sweeps.runner import RUNS, STAGES, read_failure
from saccade.sweeps.studies import STUDIES
from saccade.sweeps.table import Standing, label_text
from saccade.sweeps.worker import RESULT_FILE

Result = Mapping[str, Any]
Groups = dict[str, list[Result]]
MOST_CURVES = 12
SYMBOLS = {"prune_ratio": "p", "slow_probability": "r", "isolator_length": "l"}
"""What the papers call options, for names that have to be short."""
COSTS = {"flops": "the operations up to an answer's first token", "tokens": "the tokens of a mean prompt"}
LONGEST_TABLE = 24
COMPARED = ("uniform", "random")
"""Plain reducers to see a single one beside."""


def sweep_page(folder: Path, workshop: Path) -> Page:
    """The page of what is done of a sweep.

    Raises:
        SaccadeError: if no run is done, or a file is half-written.
    """
    _check_whole(folder)
    plan = Plan.read(folder)
    standing = Standing(plan, folder)
    results = list(standing.results.values())
    if not results:
        raise SaccadeError(f"folder={str(folder)!r} holds a sweep of which no run is done: wait for the first")
    page = Page(workshop, plan.title or folder.resolve().name, "sweep", folder)
    page.lead = f"{standing.progress}."
    baseline = standing.baseline()
    _add_summary(page, results, f"{len(results)} of {len(plan.runs)}", baseline)
    if plan.command:
        page.add("Summary", command(f"Begun on {plan.started} with", plan.command))
    for name in standing.failed:
        spec = next(spec for spec in plan.runs if spec.name == name)
        page.add("Summary", warning(f"A run failed: {read_failure(folder, spec)}"))
    page.record |= {"title": plan.title, "command": plan.command, "progress": standing.progress}
    page.record["summary"] = standing.summary()
    for panel in STUDIES[plan.study].panels if plan.study in STUDIES else ():
        drawn = curve_panel(standing, panel)
        known = {name: values for name, values in drawn.curves.items() if any(values)}
        if panel.drawn and known:
            number = len([entry for entry in page.pictures if entry["file"].startswith("study")]) + 1
            alt = f"{drawn.ylabel} over {drawn.xlabel}, one curve for each of {', '.join(known)}; the table has the "
            alt += "values."
            page.add("Results", page.draw(f"study_{number}.png", alt, "", plot_panels, [drawn], wide=True))
    runs = checkpointed_runs(standing) if plan.study in STUDIES and STUDIES[plan.study].over_time else {}
    if runs:
        alt = f"Accuracy on all tokens over the training time of stage two, one curve for each of {', '.join(runs)}."
        caption = "Further up and further left is better. Faint lines are seeds. Stage one is not in the time."
        page.add("Results", page.draw("over_time.png", alt, caption, draw_over_time, runs, wide=True))
    columns, cells = standing.table()
    table = html_table(columns, cells, "Means over seeds, the least and the greatest in brackets")
    page.add("Results", table if len(cells) <= LONGEST_TABLE else fold(f"All {len(cells)} rows as a table", table))
    _add_comparison(page, results, folder)
    _add_stages(page, results)
    return page


def demo_page(folder: Path, workshop: Path) -> Page:
    """The page of a demo.

    Raises:
        SaccadeError: if a file is half-written, or no run is there.
    """
    _check_whole(folder)
    report = read_json(folder / DEMO_FILE, "summary", "settings", "environment")
    results = [read_json(path, "spec", "stages") for path in sorted(folder.glob(f"{RUNS}/*/{RESULT_FILE}"))]
    if not results:
        raise SaccadeError(f"folder={str(folder)!r} holds a demo without a run: make it again with `saccade demo`")
    page = Page(workshop, "The demo", "demo", folder)
    page.lead = "The tiny model trained with all tokens, with pruning only, and with DualSpeed."
    order = {(entry["method"], entry["positions"]): number for number, entry in enumerate(report["summary"])}
    results.sort(key=lambda one: order[one["spec"]["labels"]["method"], one["spec"]["labels"]["positions"]])
    baseline = next((entry for entry in report["summary"] if entry["method"] == "all_tokens"), {})
    _add_summary(page, results, str(len(results)), baseline.get("accuracy_full"))
    page.add("Summary", command("Made with", report.get("command", "saccade demo")))
    page.add("Results", html_table(COLUMNS, table_rows(report), "Means over seeds, least and greatest in brackets"))
    page.record["summary"] = report["summary"]
    _add_comparison(page, results, folder)
    page.add("Settings", settings_table(report["settings"], "Settings that all runs share"))
    _add_stages(page, results)
    return page


def group_results(results: Sequence[Result]) -> Groups:
    """The results by what their labels say beside the seed, in words: only labels that differ are named."""
    labels = [{name: value for name, value in one["spec"]["labels"].items() if name != "seed"} for one in results]
    names = list(dict.fromkeys(name for entry in labels for name in entry))
    varying = [name for name in names if len({str(entry.get(name)) for entry in labels}) > 1] or names
    groups: Groups = {}
    for result, entry in zip(results, labels, strict=True):
        words = [_label(name, entry[name]) for name in varying if entry.get(name) is not None]
        groups.setdefault(", ".join(words) or result["spec"]["name"], []).append(result)
    return groups


def _has_own_training(result: Result) -> bool:
    """Whether a run is more than many ways to run a model that another run trained."""
    names = [entry["inference"] for entry in result["evaluations"]]
    return len(names) == len(set(names))


def _label(name: str, value: Any) -> str:
    if isinstance(value, str):
        return LABELS.get(value) or label_text(value) or ""
    return f"{SYMBOLS.get(name, name.replace('_', ' '))} = {value}"


def _add_summary(page: Page, results: Sequence[Result], done: str, baseline: Mapping[str, float] | None) -> None:
    entries = [(entry["accuracy"], one) for one in results for entry in one["evaluations"]]
    best = max((accuracy for accuracy, _ in entries), default=None)
    values = {
        "runs": done,
        "accuracy of all-token training": percent(baseline) if baseline else None,
        "best accuracy of a run": None if best is None else f"{100 * best:.1f} %",
        "training time of all runs": f"{_all_seconds(results) / 60:.0f} min",
    }
    page.add("Summary", tiles(values))


def _all_seconds(results: Sequence[Result]) -> float:
    """Seconds of training, a stage that several runs share counted once."""
    seconds = {}
    for one in results:
        names = RunSpec.from_json(one["spec"]).stage_ids
        seconds |= {name: stage["seconds"] for name, stage in zip(names, one["stages"].values(), strict=True)}
    return sum(seconds.values())


def _add_comparison(page: Page, results: Sequence[Result], folder: Path) -> None:
    """The trade-off, the time, the losses and the kept tokens."""
    groups = group_results([one for one in results if _has_own_training(one)])
    if groups:
        _add_trade_off(page, trade_off(groups))
        _add_time(page, groups)
        _add_losses(page, groups)
    _add_kept(page, results, folder)


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


def _add_losses(page: Page, groups: Groups) -> None:
    curves = {name: _mean_curve(results) for name, results in groups.items()}
    curves = {name: values for name, values in curves.items() if values}
    if not curves:
        return
    shown = dict(list(curves.items())[:MOST_CURVES])
    note = f" The first {MOST_CURVES} of {len(curves)}." if len(curves) > MOST_CURVES else ""
    alt = "Training loss over the steps: " + "; ".join(f"{name} ends at {ys[-1][1]:.3g}" for name, ys in shown.items())
    caption = f"Loss of the last stage, means over seeds, as running means.{note}"
    arguments = (shown, "optimizer step", "training loss")
    page.add(
        "Loss", page.draw("loss.png", alt + ".", caption, plot_values, *arguments, smooth=True, size=SIZE, wide=True)
    )


def _mean_curve(results: Sequence[Result]) -> list[tuple[int, float]]:
    """The loss of the last stage, the mean of the seeds at the steps that all of them log."""
    curves = [dict(curve(list(one["stages"].values())[-1]["log_history"], "loss")) for one in results]
    return [(step, fmean(one[step] for one in curves)) for step in curves[0] if all(step in one for one in curves)]


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
    # A fixed number of tokens, in place of a ratio, is drawn as one.
    keep = next((entry["keep_tokens"] for entry in entries if entry.get("keep_tokens")), None)
    ratio = None if keep else next((entry["prune_ratio"] for entry in entries if entry.get("prune_ratio")), 0.9)
    reducers = names if len(names) > 1 else list(dict.fromkeys([*names, *COMPARED]))
    add_compared_scene(page, _model_folder(results[0], folder), reducers, ratio, keep)


def _model_folder(result: Result, folder: Path) -> Path:
    """Where a run's model is: where it was written, or in the folder of stages that moved along."""
    recorded = Path(result["model"])
    places = (recorded, folder / STAGES / recorded.name, folder.parent / STAGES / recorded.name)
    return next((place for place in places if place.is_dir()), recorded)


def _add_stages(page: Page, results: Sequence[Result]) -> None:
    """The options of each stage, and where the runs took place."""
    for stage, number in (("fine-tuning", -1), ("pretraining", -2)):
        found = [one["spec"]["stages"][number] for one in results if len(one["spec"]["stages"]) >= -number]
        values = {}
        for name in dict.fromkeys(name for options in found for name in options):
            texts = dict.fromkeys("none" if name not in options else str(options[name]) for options in found)
            values[name] = next(iter(texts)) if len(texts) == 1 else "varies: " + ", ".join(texts)
        if values:
            page.add("Settings", fold(f"Options of {stage}", settings_table(values, f"Options of {stage}")))
    days = sorted({one["finished"] for one in results if one.get("finished")})
    found = [json.loads(text) for text in dict.fromkeys(json.dumps(one["environment"]) for one in results)]
    page.add_environment(found, days)


def _check_whole(folder: Path) -> None:
    """Read every file that a sweep or a demo writes.

    Raises:
        SaccadeError: naming the first that is half-written.
    """
    for path in (folder / PLAN_FILE, *sorted(folder.glob(f"{RUNS}/*/*.json"))):
        if path.is_file():
            read_json(path)
