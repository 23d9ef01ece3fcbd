"""The page about many runs: a sweep or a demo."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from saccade.demo.summary import COLUMNS, finding, table_rows
from saccade.errors import SaccadeError
from saccade.pages.page import Page
from saccade.pages.run import settings_table
from saccade.pages.source import DEMO_FILE, read_json
from saccade.report.html import command, fold, html_table, tiles, warning
from saccade.report.plots import SIZE
from saccade.report.run_plots import plot_values
from saccade.report.training_log import curve
from saccade.sweeps import LABELS, RunSpec
from saccade.sweeps.figures import percent
from saccade.sweeps.plan import PLAN_FILE, Plan
from saccade.sweeps.runner import RUNS, read_failure
from saccade.sweeps.table import Standing
from saccade.sweeps.worker import RESULT_FILE

Result = Mapping[str, Any]
Groups = dict[str, list[Result]]
MOST_CURVES = 12
SYMBOLS = {"prune_ratio": "p", "slow_probability": "r", "isolator_length": "l"}
"""The papers' symbols for options, for short names."""
LONGEST_TABLE = 24


def sweep_page(folder: Path, workshop: Path) -> Page:
    """The page about the finished runs of a sweep.

    Raises:
        SaccadeError: if no run is done, or a file is half-written.
    """
    page, standing = begin_sweep(folder, workshop)
    add_table(page, standing)
    add_runs(page, list(standing.results.values()))
    return page


def begin_sweep(folder: Path, workshop: Path, words: Mapping[str, str] = LABELS) -> tuple[Page, Standing]:
    """A page with the summary of a sweep, and its state.

    Args:
        words: names of label values.

    Raises:
        SaccadeError: if no run is done, or a file is half-written.
    """
    check_whole(folder)
    plan = Plan.read(folder)
    standing = Standing(plan, folder, words)
    results = list(standing.results.values())
    if not results:
        raise SaccadeError(f"folder={str(folder)!r} contains a sweep with no finished run: wait for the first")
    page = Page(workshop, plan.title or folder.resolve().name, "sweep", folder)
    page.lead = f"{standing.progress}."
    _add_summary(page, results, f"{len(results)} of {len(plan.runs)}", standing.baseline())
    if plan.command:
        page.add("Summary", command(f"Begun on {plan.started} with", plan.command))
    for spec in plan.runs:
        if spec.name in standing.failed:
            page.add("Summary", warning(f"A run failed: {read_failure(folder, spec)}"))
    page.record |= {"command": plan.command, "progress": standing.progress, "summary": standing.summary()}
    return page, standing


def add_table(page: Page, standing: Standing) -> None:
    """Add the table over seeds, folded if it is long."""
    columns, cells = standing.table()
    table = html_table(columns, cells, "Means over seeds, with minimum and maximum in brackets")
    page.add("Results", table if len(cells) <= LONGEST_TABLE else fold(f"All {len(cells)} rows as a table", table))


def add_runs(page: Page, results: Sequence[Result]) -> None:
    """Add the losses, the options of each stage, and where the runs took place."""
    own = [one for one in results if has_own_training(one)]
    if own:
        _add_losses(page, group_results(own))
    _add_stages(page, results)


def demo_page(folder: Path, workshop: Path) -> Page:
    """The page of a demo.

    Raises:
        SaccadeError: if a file is half-written, or there is no run.
    """
    check_whole(folder)
    report = read_json(folder / DEMO_FILE, "summary", "settings", "environment")
    results = [read_json(path, "spec", "stages") for path in sorted(folder.glob(f"{RUNS}/*/{RESULT_FILE}"))]
    if not results:
        raise SaccadeError(f"folder={str(folder)!r} contains a demo without a run: make it again with `saccade demo`")
    page = Page(workshop, "The demo", "demo", folder)
    page.lead = finding(report)
    order = {(entry["method"], entry["positions"]): number for number, entry in enumerate(report["summary"])}
    results.sort(key=lambda one: order[one["spec"]["labels"]["method"], one["spec"]["labels"]["positions"]])
    baseline = next((entry for entry in report["summary"] if entry["method"] == "all_tokens"), {})
    _add_summary(page, results, str(len(results)), baseline.get("accuracy_full"))
    page.add("Summary", command("Made with", report.get("command", "saccade demo")))
    page.add(
        "Results", html_table(COLUMNS, table_rows(report), "Means over seeds, with minimum and maximum in brackets")
    )
    page.record["summary"] = report["summary"]
    page.add("Settings", settings_table(report["settings"], "Settings shared by all runs"))
    add_runs(page, results)
    return page


def group_results(results: Sequence[Result], words: Mapping[str, str] = LABELS) -> Groups:
    """Group the results by their labels without the seed, in words; only labels that differ are named.

    Args:
        words: names of label values.
    """
    labels = [{name: value for name, value in one["spec"]["labels"].items() if name != "seed"} for one in results]
    names = list(dict.fromkeys(name for entry in labels for name in entry))
    varying = [name for name in names if len({str(entry.get(name)) for entry in labels}) > 1] or names
    groups: Groups = {}
    for result, entry in zip(results, labels, strict=True):
        parts = [_label(name, entry[name], words) for name in varying if entry.get(name) is not None]
        groups.setdefault(", ".join(parts) or result["spec"]["name"], []).append(result)
    return groups


def has_own_training(result: Result) -> bool:
    """Whether a run has its own training, rather than several evaluations of a model trained by another run."""
    names = [entry["inference"] for entry in result["evaluations"]]
    return len(names) == len(set(names))


def _label(name: str, value: Any, words: Mapping[str, str]) -> str:
    if isinstance(value, str):
        return words.get(value, value)
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
    """Seconds of training, counting stages shared by several runs once."""
    seconds = {}
    for one in results:
        names = RunSpec.from_json(one["spec"]).stage_ids
        seconds |= {name: stage["seconds"] for name, stage in zip(names, one["stages"].values(), strict=True)}
    return sum(seconds.values())


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
    """The loss of the last stage, averaged over seeds at the steps that all of them log."""
    curves = [dict(curve(list(one["stages"].values())[-1]["log_history"], "loss")) for one in results]
    return [(step, fmean(one[step] for one in curves)) for step in curves[0] if all(step in one for one in curves)]


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


def check_whole(folder: Path) -> None:
    """Check every file that a sweep or a demo writes.

    Raises:
        SaccadeError: naming the first half-written file.
    """
    for path in (folder / PLAN_FILE, *sorted(folder.glob(f"{RUNS}/*/*.json"))):
        if path.is_file():
            read_json(path)
