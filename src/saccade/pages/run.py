"""The page about one run."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from saccade.data import digit_scenes
from saccade.errors import SaccadeError, counted
from saccade.evaluation import Inference, plan_inferences
from saccade.evaluation.digits import GREEDY, collate_prompts
from saccade.pages.page import Page, blocks, html_table, option_text, settings_table
from saccade.pages.source import RunRecord, read_run
from saccade.reducers.config import pruned_how
from saccade.report.plots import SMALL, plot_curves, way_name
from saccade.report.training_log import curve, last, losses, modes_of, not_finite, part_of, time_parts
from saccade.report.view import view_reducers
from saccade.training import ModelOptions, load_model

KEPT = "Kept tokens"
KINDS = ("read", "count", "max", "where")
LONGEST_ANSWER = 12  # tokens, more than any answer of these kinds needs


def run_page(folder: Path, workshop: Path) -> Page:
    """The page about a finished or unfinished run of `saccade train`.

    Raises:
        SaccadeError: if a file of the run is half-written, or its log is empty.
    """
    record = read_run(folder)
    if not curve(record.log_history, "loss"):
        raise SaccadeError(f"the log of {record.model} has no loss: train with logging_steps below max_steps")
    page = Page(workshop, "run", folder, _finding(record), _lead(record, folder))
    parts = time_parts(record.log_history)
    _add_summary(page, record, parts)
    _add_accuracy(page, record)
    _add_curves(page, record)
    _add_time(page, parts)
    if record.recipe.get("dataset", "digits") == "digits" and record.recipe:
        _add_answered_scenes(page, record.model)
    else:
        reason = "the run is not on the digit scenes" if record.recipe else "a checkpoint does not name its data"
        page.add(KEPT, blocks.paragraph(f"No pictures: {reason}. `saccade view IMAGE --model {folder}` draws any."))
    if record.recipe:
        page.add("Settings", settings_table(record.recipe, "The recipe was given these values."))
    others = {name: value for name, value in record.config.items() if name not in record.recipe}
    if others:
        table = settings_table(others, "The recipe leaves these options out.")
        page.add("Settings", blocks.fold("Other options that shape the run", [table]))
    page.record["settings"] = record.config | record.recipe
    evaluated = (record.evaluation or {}).get("environment")
    if record.environment or not evaluated:
        found = [record.environment] if record.environment else []
        page.add_environment(found, [record.finished] if record.finished else [])
    else:
        page.add_environment([evaluated], [], "The evaluation took place here; the training did not record where.")
    return page


def _finding(record: RunRecord) -> str:
    """The first line: how often the model is right, or its loss, and how fast its steps are."""
    log, results = record.log_history, (record.evaluation or {}).get("results", [])
    speedup = last(log, "speedup")
    fast = f"steps {speedup:.1f} times as fast" if speedup else None
    ways = {entry["inference"]: entry["accuracy"] for entry in results}
    others = {way: accuracy for way, accuracy in ways.items() if way != "full"}
    if ways:
        best = max(others, key=others.get, default=None)
        words = [f"{100 * ways['full']:.1f} % right from all tokens"] if "full" in ways else []
        words += [f"{100 * others[best]:.1f} %{'' if words else ' right'} {way_name(best)}"] if best else []
        said = ", ".join(words)
    else:
        said = f"Loss {last(log, 'loss'):.3g} after {max(entry.get('step', 0) for entry in log)} steps"
    return f"{said}; {fast}" if fast else said


def _lead(record: RunRecord, folder: Path) -> str:
    recipe = record.config | record.recipe
    model, data = recipe.get("model", "tiny" if record.recipe else None), recipe.get("dataset")
    words = f"Training run {folder.resolve().name}" + (f": {model}" if model else "")
    words += f" on {option_text(data)}" if data else ""
    if recipe.get("prune_ratio") == 0:
        return f"{words}, all visual tokens in every step."
    names = ["reducer", "prune_ratio"] + ([] if recipe.get("modes") else ["slow_probability"])
    parts = [f"{name} {recipe[name]}" for name in names if name in recipe]
    parts += [f"modes {', '.join(mode['name'] for mode in recipe['modes'])}"] if recipe.get("modes") else []
    return f"{', '.join([words, *parts])}."


def _add_summary(page: Page, record: RunRecord, parts: Mapping[str, float] | None) -> None:
    """Add the cards, accuracy before speed before cost."""
    log = record.log_history
    planned, done = record.recipe.get("max_steps", -1), max(entry.get("step", 0) for entry in log)
    ways = sorted((record.evaluation or {}).get("results", []), key=lambda entry: -entry["accuracy"])
    trained, full, allowed = record.tokens.get("trained"), record.tokens.get("full"), last(log, "speedup_tokens")
    seconds = sum(parts.values()) if parts else last(log, "train_runtime")
    by_mode = {mode: value for mode in modes_of(log) if (value := last(log, f"loss_{mode}")) is not None}
    cards = [(f"accuracy, {way_name(way['inference'])}", _percent(way["accuracy"]), "") for way in ways]
    cards += [
        ("speed-up of steps", _number(last(log, "speedup"), "{:.2f}x"), _number(allowed, "tokens allow {:.2f}x")),
        ("tokens trained on", f"{100 * trained / full:.0f} %" if trained and full else None, "of all"),
        (
            "training time",
            _number(seconds, "{:.0f} s"),
            f"{done} of {planned} steps" if planned > 0 and planned != done else counted(done, "step"),
        ),
        (
            "last loss",
            _number(last(log, "loss"), "{:.3f}"),
            ", ".join(f"{part_of(mode)} {value:.3f}" for mode, value in by_mode.items()),
        ),
    ]
    shown = [(name, value, remark or "") for name, value, remark in cards if value is not None]
    page.add("Summary", blocks.cards(shown))
    page.record["summary"] = {name: value for name, value, _ in shown}
    if record.checkpoint:
        page.add("Summary", blocks.warning(f"This page shows {record.checkpoint}: there is no log of a finished run."))
    bad = not_finite(log)
    if bad:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        words = f"The loss was not finite at step {', '.join(map(str, bad[:5]))}{more}."
        page.add("Summary", blocks.warning(words))


def _add_accuracy(page: Page, record: RunRecord) -> None:
    if record.left_out is not None:
        page.add("Accuracy", blocks.warning(f"{record.left_out}, and is not shown."))
    if record.evaluation is None:
        words = "Not evaluated on the digit scenes. To do so, run this, then make the report again:"
        page.add("Accuracy", blocks.command(words, f"saccade eval {shlex.quote(str(record.model))}"))
        return
    results = record.evaluation["results"]
    kinds = sorted({kind for result in results for kind in result["accuracy_by_kind"]})
    rows: list[list[Any]] = [["all", *(_percent(result["accuracy"]) for result in results)]]
    for kind in kinds:
        rows.append([kind.replace("_", " "), *(_percent(result["accuracy_by_kind"].get(kind)) for result in results)])
    rows.append(["mean tokens per prompt", *(f"{result['mean_prompt_length']:.0f}" for result in results)])
    rows.append(["pruned by", *(pruned_how(result) or "" for result in results)])
    named, split = (record.evaluation.get(name) for name in ("dataset", "split"))
    where = named if named and not split else f"the {split or '?'} split{f' of {named}' if named else ''}"
    samples = results[0]["samples"]
    caption = f"This share of the answers to {samples} questions of {where} is right, by kind of question."
    page.add("Accuracy", html_table(["questions", *(way_name(one["inference"]) for one in results)], rows, caption))
    page.record["accuracy"] = results


def _add_curves(page: Page, record: RunRecord) -> None:
    log = record.log_history
    panels = (
        (
            "loss.png", losses(log), "training loss",
            "Here is the cross-entropy of each mode's steps, faint as logged, strong as a running mean.",
        ),
        (
            "kl.png", {"KL": curve(log, "kl")}, "KL(teacher || mode)",
            "This is how far the output of steps with a teacher is from the teacher's: in DualSpeed, slow from fast.",
        ),
        (
            "speedup.png",
            {"measured": curve(log, "speedup"), "what tokens allow": curve(log, "speedup_tokens")},
            "speed-up of steps",
            "The mean step takes this many times less than a slow step without its teacher.",
        ),
    )  # fmt: skip
    drawn = []
    for file, curves, ylabel, caption in panels:
        if any(curves.values()):
            known = {name: points for name, points in curves.items() if points}
            alt = f"{ylabel[0].upper()}{ylabel[1:]} over the steps: {_ends(known)}."
            arguments = (known, "optimizer step", ylabel)
            options = {"title": page.title_of(ylabel), "smooth": file != "speedup.png", "size": SMALL}
            drawn.append(page.draw(file, alt, caption, plot_curves, *arguments, **options))
    page.add("Curves", blocks.gallery(drawn))


def _add_time(page: Page, parts: Mapping[str, float] | None) -> None:
    if not parts:
        page.add("Time", blocks.paragraph("The log does not say how long the steps took."))
        return
    total = sum(parts.values())
    rows = [[name, f"{value:.1f}", _percent(value / total)] for name, value in parts.items()]
    page.add(
        "Time", html_table(("part", "seconds", "share"), rows, "This is where the time went, up to the last log.")
    )
    page.record["seconds"] = parts


def _add_answered_scenes(page: Page, model_folder: Path) -> None:
    """Draw one scene of each of `KINDS` with what the run's reducer keeps, and add the model's answers.

    If the weights are missing, or the reducer's choice cannot be drawn, the page says so.
    """
    drawn = []
    try:
        (pruned,) = plan_inferences(model_folder, ["pruned"])
        model, processor = load_model(ModelOptions(model=str(model_folder)))
        scenes = digit_scenes("sft", "test", 100, kinds=KINDS)
        rows = [scenes[scenes["kind"].index(kind)] for kind in KINDS]
        both = [_answers(model, processor, rows, way) for way in (Inference("full"), pruned)]
        for row, full, few in zip(rows, *both, strict=True):
            question = row["messages"][-2]["content"]
            alt = f"A scene of {row['num_digits']} digits with the tokens that {pruned.pruning.reducer} keeps."
            caption = (
                f"“{question}” Right: “{row['answer']}”; answered on all tokens “{full}”, on kept tokens “{few}”."
            )
            arguments = (model, processor, row["images"][0], [pruned.pruning.reducer], question)
            file = f"kept-{row['kind']}.png"
            drawn.append(page.draw(file, alt, caption, view_reducers, *arguments, pruning=pruned.pruning))
    except SaccadeError as error:
        page.add(KEPT, blocks.paragraph(f"No pictures: {error}"))
        return
    intro = f"These are scenes of the test split with the tokens that {pruned.pruning.reducer} keeps. "
    intro += "Answers are greedy, from all tokens and from the kept ones."
    page.add(KEPT, blocks.paragraph(intro), blocks.gallery(drawn))


@torch.no_grad()
def _answers(model: Any, processor: Any, rows: list[dict[str, Any]], inference: Inference) -> list[str]:
    with inference.on(model.eval()) as prepare:
        inputs = prepare(collate_prompts(processor, rows).to(model.device))
        outputs = model.generate(**inputs, max_new_tokens=LONGEST_ANSWER, **GREEDY)
    texts = processor.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [" ".join(text.split()) for text in texts]


def _ends(curves: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    """The values at which curves begin and end, in words."""
    tenth = {name: max(1, len(values) // 10) for name, values in curves.items()}
    return "; ".join(
        f"{name} from {fmean(y for _, y in values[: tenth[name]]):.3g} to "
        f"{fmean(y for _, y in values[-tenth[name] :]):.3g}"
        for name, values in curves.items()
    )


def _number(value: float | None, form: str) -> str | None:
    return None if value is None else form.format(value)


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.1f} %"
