"""The page of all studies in a folder: tables, pictures, what the paper reports, and notes written by hand."""

import re
from collections.abc import Mapping, Sequence
from math import sqrt
from pathlib import Path
from typing import Any

from experiments.studies.curves import CurvePanel, plot_panels
from experiments.studies.methods import FIGURES, WORDS
from experiments.studies.over_time import Runs, checkpoint_table, checkpointed_runs, draw_over_time, reach_table
from experiments.studies.studies import STUDIES, Panel, Study
from saccade.errors import SaccadeError, counted
from saccade.files import write_text_atomically
from saccade.report.plots import CPU_TIME, plot_trade_off, way_name
from saccade.report.tables import markdown_table
from saccade.sweeps.plan import PLAN_FILE, Plan
from saccade.sweeps.table import Standing, percent, trade_off, train_cpu_seconds

PAGE = "results.md"
IMAGES = "images"
NO_NOTES = "*Nobody has written here yet where this agrees with the paper and where it does not.*"
INTRODUCTION = """# The paper's studies on the digit scenes

This page repeats the studies of [DualSpeed](dualspeed.md) ([arXiv 2602.03815](https://arxiv.org/abs/2602.03815)) on
the [digit scenes](digit-scenes.md) with the tiny LLaVA, and compares them with what the paper reports for
LLaVA-1.5-7B. A model of 0.8 million parameters on a synthetic task shows the direction of an effect, not how large it
is elsewhere. On [the testbed](testbed-results.md#what-was-measured), with a language model of 135 million parameters,
shapes, pages of text and charts, DualSpeed as published is further from all-token training than it is here.

From the root of a clone, `python -m experiments.studies NAME --output OUT` runs a study, and `python -m
experiments.studies --output OUT --write-docs docs` writes this page from its folders. The notes, marked in the source
of the page, are written by hand and are kept; everything else is overwritten.

Each section ends with the command, the date and the commits of its runs, whose folders are not in the repository.
The code has changed since; where a method chooses differently today, the notes say so.

An answer counts if greedy decoding matches it exactly. Accuracies are means over seeds, with minimum and maximum in
brackets; *n* is the number of seeds if some are missing. *Share* is relative to all-token training with the same
seed. *Speed-up of steps* is measured within a run: the time of a slow step without its teacher, divided by that of
the mean step. *Tokens allow* is the speed-up that token counts allow.
"""


def write_docs(output: Path, folder: Path) -> Path:
    """Write `results.md` and its pictures into `folder`, from all studies in `output`, and return the page's path.

    An existing page keeps its notes; sections of studies that `output` does not contain are left out.

    Raises:
        SaccadeError: if `output` contains no study with a finished run.
    """
    page = folder / PAGE
    notes = read_notes(page.read_text(encoding="utf-8")) if page.is_file() else {}
    sections = []
    for name, study in STUDIES.items():
        if not (output / name / PLAN_FILE).is_file():
            continue
        standing = Standing(Plan.read(output / name), output / name, WORDS, FIGURES)
        if standing.rows:
            picture = f"{IMAGES}/study_{name}.png"
            panels = [curve_panel(standing, panel) for panel in study.panels if panel.drawn]
            drawn = [panel for panel in panels if any(any(curve) for curve in panel.curves.values())]
            if drawn:
                plot_panels(drawn, folder / picture)
            points = trade_off_points(standing, study)
            if points:
                plot_trade_off(points, folder / picture, CPU_TIME)
            runs = checkpointed_runs(standing) if study.over_time else {}
            if runs:
                draw_over_time(runs, folder / picture)
            text = notes.pop(name, NO_NOTES)
            shown = picture if drawn or points or runs else None
            sections.append(_section(name, study, standing, shown, text, points, runs))
    if not sections:
        raise SaccadeError(
            f"output={str(output)!r} has no study with a finished run: run `python -m experiments.studies NAME`"
        )
    lost = [name for name, text in notes.items() if text != NO_NOTES]
    if lost:
        raise SaccadeError(
            f"{page} has notes on {', '.join(lost)}, which output={str(output)!r} does not contain: "
            "give the folder that does, or move the notes away"
        )
    return write_text_atomically(page, "\n".join([INTRODUCTION, *sections]))


def read_notes(text: str) -> dict[str, str]:
    """The text between the marks of notes, by study."""
    return {
        name: note.strip() for name, note in re.findall(r"<!-- notes: (\w+) -->(.*?)<!-- end -->", text, re.DOTALL)
    }


def trade_off_points(standing: Standing, study: Study) -> list[dict[str, Any]]:
    """The points of a study's picture of accuracy over training time; empty without a picture or finished runs."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for method, ways in study.ways:
        for result in standing.results.values():
            if result["spec"]["labels"]["method"] == method and train_cpu_seconds(result) is not None:
                shown = [entry for entry in result["evaluations"] if entry["inference"] in ways]
                groups.setdefault(WORDS[method], []).append({**result, "evaluations": shown})
    return trade_off(groups, train_cpu_seconds)


def trade_off_table(points: Sequence[Mapping[str, Any]]) -> str:
    """The points as a table, with ratios to the first."""
    first = points[0]
    columns = [
        "training",
        "answers",
        "accuracy",
        "CPU time of training",
        "times as fast",
        "GFLOPs per prompt",
        "share",
    ]
    cells = [
        [
            point["training"],
            way_name(point["inference"]),
            percent({"mean": point["accuracy"], "min": point["accuracy_low"], "max": point["accuracy_high"]}),
            f"{point['seconds']:.0f} s",
            f"{first['seconds'] / point['seconds']:.2f}x",
            f"{point['flops'] / 1e9:.3f}",
            f"{100 * point['flops'] / first['flops']:.0f} %",
        ]
        for point in points
    ]
    return markdown_table(columns, cells)


def curve_panel(standing: Standing, panel: Panel) -> CurvePanel:
    """A panel's curves from the finished runs."""
    entries = [entry for entry in standing.summary(panel.where) if entry[panel.x] is not None]
    ticks = list(dict.fromkeys(entry[panel.x] for entry in entries))
    amounts = all(isinstance(tick, (int, float)) for tick in ticks)
    if amounts:
        ticks.sort()
    curves: dict[str, list[Mapping[str, float] | None]] = {}
    for entry in entries:
        curve = curves.setdefault(_series(standing, panel, entry), [None] * len(ticks))
        curve[ticks.index(entry[panel.x])] = entry.get(panel.figure)
    reference = standing.baseline()
    return CurvePanel(
        title=panel.title,
        xlabel=AXES.get(panel.x, panel.x.replace("_", " ")),
        ylabel=panel.y,
        ticks=[standing.word(tick) for tick in ticks],
        curves=curves,
        reference=("all tokens, in training and inference", reference["mean"]) if amounts and reference else None,
        joined=amounts,
    )


AXES = {
    "prune_ratio": "share of visual tokens dropped, p",
    "slow_probability": "share of slow steps, r",
    "isolator_length": "rows of the isolator, l",
    "method": "training",
    "pruned_stages": "pruned",
}


def _series(standing: Standing, panel: Panel, entry: Mapping[str, Any]) -> str:
    return ", ".join(standing.word(entry[name]) for name in panel.series) or panel.y


def pivot_table(standing: Standing, panel: Panel) -> str | None:
    """A panel as a table: one row per curve, one column per value of `x`; None without finished runs."""
    entries = [entry for entry in standing.summary(panel.where) if entry[panel.x] is not None]
    ticks = sorted({entry[panel.x] for entry in entries})
    planned = len({spec.labels["seed"] for spec in standing.plan.runs})
    cells: dict[str, dict[Any, str]] = {}
    for entry in entries:
        missing = f", n = {entry['seeds']}" if entry["seeds"] < planned else ""
        cells.setdefault(_series(standing, panel, entry), {})[entry[panel.x]] = (
            percent(entry.get(panel.figure)) + missing
        )
    if not cells:
        return None
    columns = [" and ".join(panel.series), *(f"{AXES[panel.x][-1]} = {tick}" for tick in ticks)]
    return markdown_table(columns, [[name, *(row.get(tick) for tick in ticks)] for name, row in cells.items()])


def _section(
    name: str,
    study: Study,
    standing: Standing,
    picture: str | None,
    notes: str,
    points: Sequence[Mapping[str, Any]],
    runs: Runs,
) -> str:
    parts = [f"## {study.title}", study.varies, f"**The paper.** {study.paper}"]
    if picture:
        parts.append(f"![{study.title}]({picture})")
    reference = standing.baseline()
    if study.pivot and reference:
        parts.append(f"All tokens in training and inference: {percent(reference)}.")
    for panel in study.panels if study.pivot else ():
        found = pivot_table(standing, panel)
        if found:
            parts.append(f"**{panel.title}**, {panel.y.removesuffix(' (%)')}:\n\n{found.rstrip()}")
    if points:
        parts.append(
            "Training time is the CPU time of the training process in both stages, which other load on the machine "
            "hardly affects. Filled circles answer from all tokens or as trained, hollow ones as their label says.\n\n"
            + trade_off_table(points).rstrip()
        )
    if runs:
        parts += over_time_parts(standing, runs)
    columns, cells = standing.table(study.detail)
    if cells:
        where = " and ".join(f"{label.replace('_', ' ')} {value}" for label, value in study.detail)
        parts.append((f"All figures of {where}:\n\n" if where else "") + markdown_table(columns, cells).rstrip())
    parts.append(f"<!-- notes: {name} -->\n{notes}\n<!-- end -->")
    parts.append(origin(standing))
    return "\n\n".join(parts) + "\n"


def over_time_parts(standing: Standing, runs: Runs) -> list[str]:
    """The tables of checkpoints over training time, with explanations of what is counted."""
    seeds = len({spec.labels["seed"] for spec in standing.plan.runs})
    scenes = next(iter(standing.results.values()))["spec"]["extra"]["scenes"]
    parts = [
        "Training time is the CPU time of the training process in stage two, from its first step on. It does not "
        "include stage one, nor saving and evaluating checkpoints. Bold lines are means over seeds, faint ones single "
        "seeds. The learning rate decays to zero at the end of a run, so an early checkpoint is not what a shorter "
        "run would end with.",
        f"Accuracy with all tokens at each checkpoint, on {scenes} scenes, which gives one run a standard error of up "
        f"to {100 * sqrt(0.25 / scenes):.1f} points:\n\n" + checkpoint_table(runs, seeds).rstrip(),
    ]
    reached = reach_table(runs, seeds)
    if reached:
        parts.append(
            "Time to reach shares of the final accuracy of all-token training with the same seed, and how many times "
            "sooner than all-token training. Accuracy is interpolated linearly between checkpoints, and the first "
            "time counts. What the first checkpoint has reached counts as reached at its time:\n\n" + reached.rstrip()
        )
    return parts


def origin(standing: Standing) -> str:
    """The origin of the figures: settings, runs, command, dates, commits, machines and versions."""
    plan, results = standing.plan, list(standing.results.values())
    settings = plan.about["settings"]
    seeds = sorted({result["spec"]["labels"]["seed"] for result in results})
    found = [result["environment"] for result in results]
    packages = ("torch", "transformers", "trl")
    python = [f"Python {one['python']}" for one in found]
    versions = [", ".join(f"{name} {one['packages'][name]}" for name in packages) for one in found]
    machines = [f"{one['cpu']} ({counted(one['cores'], 'core')}, {one['memory_gib']} GiB)" for one in found]
    commits = [(one["commit"] or "unknown")[:7] for one in found]
    days = [result.get("finished", plan.started) for result in results]
    steps = f"{settings['pretrain_steps']} and {settings['sft_steps']} steps of {settings['batch_size']} rows"
    usual = f"p = {settings['prune_ratio']}, r = {settings['slow_probability']}, l = {settings['isolator_length']}"
    return (
        f"*{standing.progress}. {steps}, the `stratified` schedule; except where varied, {usual}, "
        f"{settings['reducer']}, compact positions; {settings['test_scenes']} scenes of the {settings['split']} "
        f"split. Seeds {_list(seeds)}; `{plan.command}`; {_list(days)}; commit {_list(commits)}; {_list(machines)}, "
        f"{settings['threads']} thread per run; {_list(python)}, {_list(versions)}. Training times, and therefore the "
        f"speed-up of steps, depend on the other load of the machine.*"
    )


def _list(values: Sequence[Any]) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in values))
