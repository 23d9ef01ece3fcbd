"""A sweep from its first check to its table, and the table of what is done so far at any time."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console

from saccade.data import digit_scenes
from saccade.errors import SaccadeError
from saccade.evaluation import Inference
from saccade.files import write_json_atomically, write_text_atomically
from saccade.report.environment import environment
from saccade.report.tables import markdown_table, print_table
from saccade.sweeps.digits import DigitSettings
from saccade.sweeps.figures import percent, run_figures, spread, summarise
from saccade.sweeps.grid import choose
from saccade.sweeps.runner import Outcome, read_failure, read_result, run_specs
from saccade.sweeps.spec import RunSpec, stage_names
from saccade.sweeps.studies import STUDIES, WORDS, study
from saccade.training import ModelOptions, load_rows, make_recipe
from saccade.training.run import check_lora
from saccade.training.sources import check_family

PLAN_FILE = "sweep.json"
TABLE_FILES = ("table.json", "table.md")
FIGURES = {
    "accuracy_full": "accuracy, all tokens",
    "share_of_all_tokens": "share of all-token",
    "accuracy_pruned": "accuracy, pruned",
    "accuracy_pruned_isolator": "pruned + isolator",
    "train_loss": "last loss",
    "train_seconds": "training time",
    "speedup_steps": "speed-up of steps",
    "speedup_tokens": "tokens allow",
}
PERCENT = ("accuracy_full", "share_of_all_tokens", "accuracy_pruned", "accuracy_pruned_isolator")


@dataclass(frozen=True)
class Plan:
    """What `sweep.json` holds: every run of a sweep, and where they came from.

    Args:
        title: above the table.
        runs: in their order.
        study: name of the study, None for a sweep over a recipe.
        settings: the study's settings.
        command: what was typed.
        started: the day.
    """

    title: str
    runs: tuple[RunSpec, ...]
    study: str | None = None
    settings: dict[str, Any] | None = None
    command: str = ""
    started: str = ""

    def write(self, output: Path) -> None:
        """Write it into the sweep's folder."""
        values = {**asdict(self), "runs": [spec.as_json() for spec in self.runs]}
        write_json_atomically(output / PLAN_FILE, values)

    @classmethod
    def read(cls, output: Path) -> "Plan":
        """What `write` wrote.

        Raises:
            SaccadeError: if the folder holds no sweep.
        """
        path = output / PLAN_FILE
        if not path.is_file():
            raise SaccadeError(f"output={str(output)!r} holds no sweep: there is no {PLAN_FILE} in it")
        values = json.loads(path.read_text())
        return cls(**{**values, "runs": tuple(RunSpec.from_json(run) for run in values["runs"])})


def make_plan(
    title: str, runs: Sequence[RunSpec], study: str | None = None, settings: DigitSettings | None = None
) -> Plan:
    """A plan of today with the command of this process."""
    command = " ".join(["saccade", *sys.argv[1:]])
    return Plan(title, tuple(runs), study, settings and asdict(settings), command, date.today().isoformat())


def run_sweep(
    plan: Plan,
    output: Path,
    stages: Path | None = None,
    only: Mapping[str, Sequence[Any]] | None = None,
    jobs: int = 1,
    any_commit: bool = False,
    console: Console | None = None,
) -> Outcome:
    """Check every run, make those that are missing, and write and print the table.

    Args:
        output: the sweep's folder.
        stages: folder of stages that several sweeps share; inside `output` when left out.
        only: labels and the values to make now; the plan stays whole.
        jobs: runs at a time.
        any_commit: take runs and stages of any commit and version as they are.

    Raises:
        SaccadeError: on bad values, before any run starts.
    """
    console = console or Console()
    chosen = choose(plan.runs, only or {})
    check_runs(chosen)
    plan.write(output)
    outcome = run_specs(chosen, output, stages, jobs, any_commit, console)
    write_table(plan, output)
    show_table(plan, output, console)
    return outcome


def check_runs(specs: Sequence[RunSpec]) -> None:
    """Read every recipe, look up every model, row and reducer.

    Raises:
        SaccadeError: on the first value that cannot be, with the run that has it.
    """
    seen: set[str] = set()
    for spec in specs:
        try:
            for number, (name, values) in enumerate(zip(stage_names(spec.stages), spec.stages, strict=True)):
                if spec.stage_ids[number] not in seen:
                    seen.add(spec.stage_ids[number])
                    _check_stage(f"stage {name}", values, is_first=number == 0, seen=seen)
            _check_evaluation(spec, seen)
        except SaccadeError as error:
            raise SaccadeError(f"run {spec.name}: {error}") from error


def _check_stage(source: str, values: Mapping[str, Any], is_first: bool, seen: set[str]) -> None:
    recipe = make_recipe(values, source)
    check_lora(recipe)
    options = recipe.options
    if is_first and options.model != "tiny" and f"model {options.model}" not in seen:
        check_family(options.model)
        seen.add(f"model {options.model}")
    # One row of made-up scenes, every row of a file: what is wrong with them shows in either.
    rows = 1 if options.dataset == "digits" and options.dataset_rows else options.dataset_rows
    data = {name: value for name, value in asdict(options).items() if name.startswith(("dataset", "image_folder"))}
    data |= {"dataset_rows": rows, "dataset_seed": 0}
    if f"data {data}" not in seen:
        load_rows(ModelOptions(**data))
        seen.add(f"data {data}")


def _check_evaluation(spec: RunSpec, seen: set[str]) -> None:
    evaluation = spec.evaluation
    if evaluation is None or str(evaluation) in seen:
        return
    for fields in evaluation.inferences:
        Inference(**fields, isolator="its own" if fields["name"] == "pruned_isolator" else None)
    if evaluation.scenes < 1:
        raise SaccadeError(f"scenes={evaluation.scenes}: give at least 1")
    digit_scenes("sft", evaluation.split, 1)
    seen.add(str(evaluation))


def collect_rows(plan: Plan, output: Path) -> list[dict[str, Any]]:
    """One row for each run that is done, and for a run evaluated in many ways one for each of them.

    Rows hold the labels and what `run_figures` gives. Runs of any commit count, those of other specs do not.
    """
    results = {spec.name: read_result(output, spec) for spec in plan.runs}
    baselines = {
        spec.labels["seed"]: results[spec.name]
        for spec in plan.runs
        if results[spec.name] is not None and is_baseline(spec)
    }
    rows = []
    for spec in plan.runs:
        result = results[spec.name]
        if result is None:
            continue
        baseline = baselines.get(spec.labels["seed"])
        names = [entry["inference"] for entry in result["evaluations"]]
        if len(names) == len(set(names)):
            rows.append({**spec.labels, **run_figures(result, baseline)})
            continue
        for entry in result["evaluations"]:
            # Its training is that of the baseline, which has a row of its own.
            way = {name: entry[name] for name in ("prune_ratio", "positions", "mean_prompt_length")}
            rows.append({**spec.labels, **way, f"accuracy_{entry['inference']}": entry["accuracy"]})
    return rows


def is_baseline(spec: RunSpec) -> bool:
    """Whether a run trains on all tokens in every stage, and answers from all of them."""
    ways = [fields["name"] for fields in spec.evaluation.inferences] if spec.evaluation else []
    return "full" in ways and all(values.get("prune_ratio", 0.9) == 0 for values in spec.stages)


def table(plan: Plan, output: Path) -> tuple[list[str], list[list[str | None]]]:
    """Columns and cells of what is done so far: a row for each combination of labels, over its seeds."""
    rows = collect_rows(plan, output)
    keys = list(dict.fromkeys(name for row in rows for name in row if _is_label(plan, name)))
    entries = summarise(rows, keys)
    shown = [name for name in FIGURES if any(name in entry for entry in entries)]
    if "accuracy_full" in shown or "accuracy_pruned" in shown:
        shown = [name for name in shown if name != "train_loss"]
    columns = [*(key.replace("_", " ") for key in keys), "seeds", *(FIGURES[name] for name in shown)]
    cells = [
        [*(label_text(entry[key]) for key in keys), entry["seeds"], *(_cell(name, entry.get(name)) for name in shown)]
        for entry in entries
    ]
    return columns, cells


def _is_label(plan: Plan, name: str) -> bool:
    labels = {label for spec in plan.runs for label in spec.labels} | {"prune_ratio", "positions"}
    return name in labels and name != "seed"


def label_text(value: Any) -> str | None:
    """A label's value as tables and pictures write it."""
    return None if value is None else WORDS.get(value, str(value)) if isinstance(value, str) else str(value)


def _cell(name: str, value: Mapping[str, float] | None) -> str | None:
    if name in PERCENT:
        return percent(value) if value else None
    return value and spread(value, {"train_seconds": "{:.0f} s", "train_loss": "{:.3f}"}.get(name, "{:.2f}x"))


def progress_line(plan: Plan, output: Path) -> str:
    """How many of a plan's runs are done and failed."""
    done = [spec for spec in plan.runs if read_result(output, spec) is not None]
    failed = [spec.name for spec in plan.runs if spec not in done and read_failure(output, spec) is not None]
    line = f"{len(done)} of {len(plan.runs)} runs done"
    return line + (f", {len(failed)} failed: {', '.join(failed)}" if failed else "")


def show_table(plan: Plan, output: Path, console: Console) -> None:
    """Print the table of what is done so far."""
    columns, cells = table(plan, output)
    title = f"{plan.title}. {progress_line(plan, output)}"
    if cells:
        print_table(title, columns, cells, file=console.file)
    else:
        console.print(title, markup=False, highlight=False)


def write_table(plan: Plan, output: Path) -> None:
    """Write `table.json`, with every row and every spread, and `table.md`."""
    rows = collect_rows(plan, output)
    keys = list(dict.fromkeys(name for row in rows for name in row if _is_label(plan, name)))
    record = {
        "title": plan.title,
        "progress": progress_line(plan, output),
        "command": plan.command,
        "environment": environment(),
        "summary": summarise(rows, keys),
        "rows": rows,
    }
    write_json_atomically(output / TABLE_FILES[0], record)
    columns, cells = table(plan, output)
    write_text_atomically(output / TABLE_FILES[1], markdown_table(columns, cells) if cells else "")


def plan_study(name: str, settings: DigitSettings, seeds: int) -> Plan:
    """The plan of a study.

    Raises:
        SaccadeError: on an unknown study, or a number of seeds below 1.
    """
    found = study(name)
    return make_plan(f"{name}: {found.title}", found.plan(settings, seeds), name, settings)


def known_studies(output: Path) -> list[str]:
    """The studies that a folder holds, in the order of `STUDIES`."""
    return [name for name in STUDIES if (output / name / PLAN_FILE).is_file()]
