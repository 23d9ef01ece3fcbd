"""The plan of a sweep, stored in its folder, and checks of all its values before anything long starts."""

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from saccade.data import digit_scenes
from saccade.errors import SaccadeError
from saccade.evaluation import Inference
from saccade.files import write_json_atomically
from saccade.sweeps.spec import RunSpec, stage_names
from saccade.training import ModelOptions, load_rows, make_recipe
from saccade.training.models import check_family
from saccade.training.run import check_lora

PLAN_FILE = "sweep.json"


@dataclass(frozen=True)
class Plan:
    """The content of `sweep.json`: every run of a sweep, and where they came from.

    Args:
        title: title of the table.
        runs: the runs, in order.
        command: the command line.
        started: the date.
        about: further values for the caller's own use.
    """

    title: str
    runs: tuple[RunSpec, ...]
    command: str = ""
    started: str = ""
    about: dict[str, Any] | None = None

    def write(self, output: Path) -> None:
        """Write it into the sweep's folder."""
        values = {**asdict(self), "runs": [spec.as_json() for spec in self.runs]}
        write_json_atomically(output / PLAN_FILE, values)

    @classmethod
    def read(cls, output: Path) -> "Plan":
        """Read what `write` wrote.

        Raises:
            SaccadeError: if the folder contains no sweep.
        """
        path = output / PLAN_FILE
        if not path.is_file():
            raise SaccadeError(f"output={str(output)!r} has no sweep: there is no {PLAN_FILE} in it")
        values = json.loads(path.read_text())
        return cls(**{**values, "runs": tuple(RunSpec.from_json(run) for run in values["runs"])})


def make_plan(
    title: str, runs: Sequence[RunSpec], command: Sequence[str] = ("saccade",), about: dict[str, Any] | None = None
) -> Plan:
    """A plan with today's date and the command line of this process.

    Args:
        command: the program, before the arguments of this process.
    """
    return Plan(title, tuple(runs), shlex.join([*command, *sys.argv[1:]]), date.today().isoformat(), about)


def check_runs(specs: Sequence[RunSpec]) -> None:
    """Check every recipe, model, dataset and reducer.

    Raises:
        SaccadeError: on the first invalid value, naming its run.
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
    # One row of generated scenes, or every row of a file, is enough to show what is wrong.
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
        Inference.of_run(folder="its own", **fields)
    if evaluation.scenes < 1:
        raise SaccadeError(f"scenes={evaluation.scenes}: give at least 1")
    digit_scenes("sft", evaluation.split, 1)
    seen.add(str(evaluation))
