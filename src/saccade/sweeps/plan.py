"""The plan of a sweep, which its folder keeps, and the checks of every value in it before anything long starts."""

import json
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
from saccade.sweeps.digits import DigitSettings
from saccade.sweeps.spec import RunSpec, stage_names
from saccade.sweeps.studies import study
from saccade.training import ModelOptions, load_rows, make_recipe
from saccade.training.run import check_lora
from saccade.training.sources import check_family

PLAN_FILE = "sweep.json"


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


def plan_study(name: str, settings: DigitSettings, seeds: int) -> Plan:
    """The plan of a study.

    Raises:
        SaccadeError: on an unknown study, or a number of seeds below 1.
    """
    found = study(name)
    return make_plan(f"{name}: {found.title}", found.plan(settings, seeds), name, settings)


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
            _check_checkpoints(spec)
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
        Inference.of_run(folder="its own", **fields)
    for name in ("scenes", "checkpoint_scenes"):
        if getattr(evaluation, name) < 1:
            raise SaccadeError(f"{name}={getattr(evaluation, name)}: give at least 1")
    digit_scenes("sft", evaluation.split, 1)
    seen.add(str(evaluation))


def _check_checkpoints(spec: RunSpec) -> None:
    values = spec.stages[-1]
    if spec.checkpoints < 0:
        raise SaccadeError(f"checkpoints={spec.checkpoints}: give a number of checkpoints, or 0 for none")
    if spec.checkpoints and values.get("save_strategy") != "no":
        raise SaccadeError(
            f"checkpoints={spec.checkpoints} choose their own steps: set save_strategy of the last stage to 'no'"
        )
    steps = values.get("max_steps") or 0
    if spec.checkpoints > max(0, steps):
        raise SaccadeError(
            f"checkpoints={spec.checkpoints} are more than the max_steps={steps} of the last stage: "
            f"set it, for a study with --steps, to at least {spec.checkpoints}"
        )
