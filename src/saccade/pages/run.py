"""The page about one run."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from markupsafe import Markup

from saccade.errors import SaccadeError
from saccade.pages.page import Page
from saccade.pages.scenes import add_answered_scenes
from saccade.pages.source import RunRecord, read_run
from saccade.report.html import command, fold, gallery, html_table, paragraph, tiles, warning
from saccade.report.plots import mode_styles, plot_loss_by_mode
from saccade.report.run_plots import SMALL, plot_time_parts, plot_values, way_name
from saccade.report.training_log import curve, hides_teacher, last, modes_of, not_finite, part_of, time_parts

Log = Sequence[dict[str, Any]]


def run_page(folder: Path, workshop: Path) -> Page:
    """The page about a finished or unfinished run of `saccade train`.

    Raises:
        SaccadeError: if a file of the run is half-written, or its log is empty.
    """
    record = read_run(folder)
    if not curve(record.log_history, "loss"):
        raise SaccadeError(f"the log of {record.model} has no loss: train with logging_steps below max_steps")
    page = Page(workshop, folder.resolve().name, "run", folder)
    page.lead = _lead(record)
    parts = time_parts(record.log_history)
    _add_summary(page, record, parts)
    _add_accuracy(page, record)
    _add_curves(page, record.log_history)
    _add_time(page, parts, hides_teacher(record.log_history))
    if record.recipe.get("dataset", "digits") == "digits" and record.recipe:
        add_answered_scenes(page, record.model, record.recipe.get("dataset_grid", 12))
    else:
        reason = "the run is not on the digit scenes" if record.recipe else "a checkpoint does not name its data"
        page.add("Kept tokens", paragraph(f"No pictures: {reason}. `saccade view IMAGE --model {folder}` draws any."))
    _add_settings(page, record)
    evaluated = (record.evaluation or {}).get("environment")
    if record.environment or not evaluated:
        found = [record.environment] if record.environment else []
        page.add_environment(found, [record.finished] if record.finished else [])
    else:
        page.add_environment([evaluated], [], "Where the evaluation took place; the training did not record it")
    return page


def _lead(record: RunRecord) -> str:
    recipe = record.config | record.recipe
    model, data = recipe.get("model", "tiny" if record.recipe else None), recipe.get("dataset")
    words = ["A training run"]
    words += [f"of {model}"] if model else []
    words += [f"on {data}"] if data else []
    if recipe.get("prune_ratio") == 0:
        return " ".join(words) + ", all visual tokens in every step."
    names = ["reducer", "prune_ratio"] + ([] if recipe.get("modes") else ["slow_probability"])
    parts = [f"{name} {recipe[name]}" for name in names if name in recipe]
    parts += [f"modes {', '.join(mode['name'] for mode in recipe['modes'])}"] if recipe.get("modes") else []
    return " ".join(words) + (f": {', '.join(parts)}." if parts else ".")


def _add_summary(page: Page, record: RunRecord, parts: dict[str, float] | None) -> None:
    log = record.log_history
    planned, done = record.recipe.get("max_steps", -1), max(entry.get("step", 0) for entry in log)
    ways = {entry["inference"]: entry["accuracy"] for entry in (record.evaluation or {}).get("results", [])}
    trained, full = record.tokens.get("trained"), record.tokens.get("full")
    losses = {f"last loss, {part_of(mode)}": _number(last(log, f"loss_{mode}"), "{:.3f}") for mode in modes_of(log)}
    if len(losses) < 2:
        losses = {"last loss": _number(last(log, "loss"), "{:.3f}")}
    values = {
        **{f"accuracy, {way_name(name)}": f"{100 * accuracy:.1f} %" for name, accuracy in ways.items()},
        "steps": f"{done} of {planned}" if planned > 0 and planned != done else done,
        **losses,
        "training time": f"{sum(parts.values()):.0f} s" if parts else _number(last(log, "train_runtime"), "{:.0f} s"),
        "speed-up of steps": _number(last(log, "speedup"), "{:.2f}x"),
        "speed-up that tokens allow": _number(last(log, "speedup_tokens"), "{:.2f}x"),
        "tokens trained on": f"{100 * trained / full:.0f} %" if trained and full else None,
    }
    page.add("Summary", tiles(values))
    page.record["summary"] = {name: value for name, value in values.items() if value is not None}
    if record.checkpoint:
        page.add("Summary", warning(f"This page shows {record.checkpoint}: there is no log of a finished run."))
    bad = not_finite(log)
    if bad:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        page.add("Summary", warning(f"The loss was not finite at step {', '.join(map(str, bad[:5]))}{more}."))


def _add_accuracy(page: Page, record: RunRecord) -> None:
    if record.left_out is not None:
        page.add("Accuracy", warning(f"{record.left_out}, and is not shown."))
    if record.evaluation is None:
        words = "Not evaluated on the digit scenes. To do so, run this, then make the report again:"
        page.add("Accuracy", command(words, f"saccade eval {shlex.quote(str(record.model))}"))
        return
    results = record.evaluation["results"]
    kinds = sorted({kind for result in results for kind in result["accuracy_by_kind"]})
    columns = ["questions", *(way_name(result["inference"]) for result in results)]
    rows: list[list[Any]] = [
        [kind.replace("_", " "), *(_percent(result["accuracy_by_kind"].get(kind)) for result in results)]
        for kind in kinds
    ]
    rows.insert(0, ["all", *(_percent(result["accuracy"]) for result in results)])
    rows.append(["mean tokens per prompt", *(f"{result['mean_prompt_length']:.0f}" for result in results)])
    split, samples = record.evaluation.get("split", "?"), results[0]["samples"]
    caption = f"Share of right answers to {samples} questions of the {split} split, by kind"
    page.add("Accuracy", html_table(columns, rows, caption))
    page.record["accuracy"] = results


def _add_curves(page: Page, log: Log) -> None:
    heading = "Curves"
    modes = modes_of(log)
    colors = {part_of(mode): color for mode, (color, _) in mode_styles(modes).items()}
    both = {part_of(mode): found for mode in modes if (found := curve(log, f"loss_{mode}"))}
    both = both or {"": curve(log, "loss")}
    loss = page.draw(
        "loss.png", f"Training loss over the steps: {_ends(both)}.",
        "Cross-entropy of the steps of each mode; faint as logged, strong as a running mean.",
        plot_loss_by_mode, log, size=SMALL,
    )  # fmt: skip
    panels = (
        (
            "kl.png", {"KL": "kl"}, "KL(teacher || mode)",
            "How far the output of steps with a teacher is from the teacher's: in DualSpeed, slow from fast.", True,
        ),
        (
            "lengths.png", {"before pruning": "length_full", "after it": "length_in"}, "tokens per sample",
            "Tokens per sample before and after pruning, averaged over the steps since the previous log.", False,
        ),
        (
            "step_seconds.png", {part_of(mode): f"step_seconds_{mode}" for mode in modes},
            "seconds per step", "The time of a step of each mode, without waiting for its batch.", False,
        ),
        (
            "speed.png", {"tokens": "tokens_per_second"}, "tokens per second",
            "Tokens per second of wall-clock time, counted before pruning, so that pruning shows as speed.", False,
        ),
        (
            "speedup.png", {"measured": "speedup", "predicted": "speedup_tokens"}, "speed-up of steps",
            "A slow step, minus its teacher, over the mean step so far; and the prediction from token counts.", False,
        ),
    )  # fmt: skip
    drawn = [loss]
    for file, keys, ylabel, caption, smooth in panels:
        found = {name: curve(log, key) for name, key in keys.items()}
        found = {name: values for name, values in found.items() if values}
        if found:
            alt = f"{ylabel[0].upper()}{ylabel[1:]} over the steps: {_ends(found)}."
            arguments = (found, "optimizer step", ylabel)
            # Curves by mode have the colours of the modes.
            shown = colors if found.keys() <= colors.keys() else None
            drawn.append(page.draw(file, alt, caption, plot_values, *arguments, smooth=smooth, colors=shown))
    page.add(heading, gallery(drawn, large=True))


def _add_time(page: Page, parts: dict[str, float] | None, with_teacher: bool) -> None:
    heading = "Time"
    if not parts:
        page.add(heading, paragraph("The log does not say how long the steps took."))
        return
    total = sum(parts.values())
    shares = ", ".join(f"{name} {100 * value / total:.0f} %" for name, value in parts.items())
    alt = f"Where {total:.0f} s of training went: {shares}."
    page.add(
        heading,
        gallery([page.draw("time.png", alt, "", plot_time_parts, {"": parts})], large=True),
        html_table(
            ("part", "seconds", "share"),
            [[name, f"{value:.1f}", _percent(value / total)] for name, value in parts.items()],
            "Where the time went, up to the last log",
        ),
    )
    if with_teacher:
        page.add(heading, paragraph("The log does not separate the time of teachers from that of their steps."))
    page.record["seconds"] = parts


def _add_settings(page: Page, record: RunRecord) -> None:
    heading, others = "Settings", {name: value for name, value in record.config.items() if name not in record.recipe}
    if record.recipe:
        page.add(heading, settings_table(record.recipe, "The recipe, as given"))
    if others:
        page.add(heading, fold("Other options that shape the run", settings_table(others, "Other options")))
    page.record["settings"] = record.config | record.recipe


def settings_table(values: dict[str, Any], caption: str) -> Markup:
    """Names and values of options, as a block."""
    rows = [[name, _option_text(value)] for name, value in sorted(values.items())]
    return html_table(("option", "value"), rows, caption, wrap=True)


def _option_text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_option_text(one)}" for name, one in value.items()) or "none"
    if isinstance(value, list):
        return "; ".join(map(_option_text, value)) or "none"
    return "none" if value is None else str(value)


def _ends(curves: dict[str, list[tuple[int, float]]]) -> str:
    """The values at which curves begin and end, in words."""
    tenth = {name: max(1, len(values) // 10) for name, values in curves.items()}
    return "; ".join(
        f"{(name + ' ') if name else ''}from {fmean(y for _, y in values[: tenth[name]]):.3g} to "
        f"{fmean(y for _, y in values[-tenth[name] :]):.3g}"
        for name, values in curves.items()
    )


def _number(value: float | None, form: str) -> str | None:
    return None if value is None else form.format(value)


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.1f} %"
