"""The page of a study or a sweep with the costs of its runs: its pictures, training time, and kept tokens."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from experiments.studies.curves import plot_panels
from experiments.studies.methods import FIGURES, WORDS
from experiments.studies.over_time import checkpointed_runs, draw_over_time
from experiments.studies.results_page import curve_panel
from experiments.studies.studies import STUDIES
from saccade.data import digit_scenes
from saccade.errors import SaccadeError
from saccade.pages.page import Page, blocks, html_table
from saccade.pages.run import KEPT
from saccade.pages.sweep import Result, add_runs, begin_sweep
from saccade.reducers import PruningConfig
from saccade.report.training_log import time_parts
from saccade.report.view import view_reducers
from saccade.sweeps.runner import STAGES
from saccade.sweeps.table import Standing
from saccade.training import ModelOptions, load_model

COMPARED = ("uniform", "random")
"""Plain reducers that a single one is compared to."""


def study_page(folder: Path, workshop: Path) -> Page:
    """The page of the finished runs of a study or a sweep.

    Raises:
        SaccadeError: if no run has finished, or a file is incomplete.
    """
    page, standing = begin_sweep(folder, workshop, WORDS, FIGURES)
    _add_pictures(page, standing)
    _add_time(page, standing)
    _add_kept(page, list(standing.results.values()), folder)
    add_runs(page, standing)
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
            page.add("Results", page.draw(f"study-{number}.png", alt, "", plot_panels, [drawn]))
    runs = checkpointed_runs(standing) if study.over_time else {}
    if runs:
        alt = f"Accuracy on all tokens over the training time of stage two, one curve for each of {', '.join(runs)}."
        caption = "Further up and further left is better. Faint lines are seeds. Stage one is not in the time."
        page.add("Results", page.draw("over-time.png", alt, caption, draw_over_time, runs))


def _add_time(page: Page, standing: Standing) -> None:
    spent: dict[str, dict[str, float]] = {}
    for name, results in standing.groups().items():
        of_runs = [[stage["log_history"] for stage in one["stages"].values()] for one in results]
        found = [parts for one in of_runs if (parts := [known for log in one if (known := time_parts(log))])]
        shown = dict.fromkeys(part for parts in found for known in parts for part in known)
        if found:
            spent[name] = {
                part: fmean(sum(known.get(part, 0.0) for known in parts) for parts in found) for part in shown
            }
    if not spent:
        page.add("Time", blocks.paragraph("The logs do not say how long the steps took."))
        return
    shown = list(dict.fromkeys(part for parts in spent.values() for part in parts))
    rows = [[name, *(round(parts.get(part, 0.0), 1) for part in shown)] for name, parts in spent.items()]
    caption = "Values are seconds of both stages up to the last log, means over seeds."
    page.add("Time", html_table(("training", *shown), rows, caption))
    page.record["seconds"] = spent


def _add_kept(page: Page, results: Sequence[Result], folder: Path) -> None:
    """Draw what each reducer of the runs keeps of one scene, or say why not."""
    stages = [one["spec"]["stages"][-1] for one in results]
    if any(stage.get("dataset", "digits") != "digits" for stage in stages):
        page.add(KEPT, blocks.paragraph("No pictures: the runs are not on the digit scenes."))
        return
    ways = [way for one in results for way in (one["spec"]["evaluation"] or {}).get("inferences", [])]
    entries = [stage for stage in stages if stage.get("prune_ratio", 0.9) != 0]
    entries += [way for way in ways if way["name"] != "full"]
    names = list(dict.fromkeys(entry.get("reducer", "divprune") for entry in entries))
    if not names:
        page.add(KEPT, blocks.paragraph("No pictures: no run prunes."))
        return
    # If runs keep a fixed number of tokens instead of a ratio, so does the picture.
    keep = next((entry["keep_tokens"] for entry in entries if entry.get("keep_tokens")), None)
    ratio = next((entry["prune_ratio"] for entry in entries if entry.get("prune_ratio")), 0.9)
    pruning = PruningConfig(keep_tokens=keep) if keep else PruningConfig(prune_ratio=ratio)
    reducers = names if len(names) > 1 else list(dict.fromkeys([*names, *COMPARED]))
    try:
        model, processor = load_model(ModelOptions(model=str(_model_folder(results[0], folder))))
        scenes = digit_scenes("sft", "test", 200, kinds=["read"])
        row = scenes[max(range(len(scenes)), key=lambda index: scenes[index]["num_digits"])]
        question = row["messages"][-2]["content"]
        alt = f"One scene of {row['num_digits']} digits, with what each of {', '.join(reducers)} keeps."
        caption = f"A scene of the test split at {f'{keep} tokens' if keep else f'p = {ratio:g}'} is drawn as each "
        caption += "reducer sees it; where tokens are merged, a region has the colour of the token that it flows into."

        arguments = (model, processor, row["images"][0], reducers, question)
        drawn = page.draw("kept-tokens.png", alt, caption, view_reducers, *arguments, pruning=pruning)
    except SaccadeError as error:
        page.add(KEPT, blocks.paragraph(f"No picture: {error}"))
        return
    page.add(KEPT, drawn)


def _model_folder(result: Result, folder: Path) -> Path:
    """The folder of a run's model: where it was written, or in the folder of stages if that was moved."""
    recorded = Path(result["model"])
    places = (recorded, folder / STAGES / recorded.name, folder.parent / STAGES / recorded.name)
    return next((place for place in places if place.is_dir()), recorded)
