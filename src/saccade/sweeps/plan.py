"""The plan of a sweep: a grid over a recipe and seeds, what is checked before anything long starts, and its file."""

import hashlib
import json
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from saccade.data import digit_scenes
from saccade.errors import SaccadeError
from saccade.evaluation import Inference
from saccade.files import reading, to_json, write_json_atomically
from saccade.recipes import put_over
from saccade.sweeps.spec import STAGES, Evaluation, RunSpec, stage_names, standard_inferences
from saccade.training import ModelOptions, load_rows, make_recipe
from saccade.training.models import check_family
from saccade.training.run import check_dataset_given, check_lora
from saccade.values import check_counts

PLAN_FILE = "sweep.json"
BOTH_STAGES = (
    "reducer", "reducer_options", "prune_ratio", "keep_tokens", "slow_probability", "schedule", "isolator_length",
    "distill_weight", "distill_temperature", "positions", "seed", "data_seed", "dataset_seed", "use_cpu", "bf16",
)  # fmt: skip
"""Fields that also apply to the pretraining stage, unless they are given for a named stage."""


@dataclass(frozen=True)
class Plan:
    """The content of `sweep.json`: every run of a sweep, the command and the date on which it began.

    `about` has further values for the caller's own use.
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
            SaccadeError: if the folder contains no sweep, or a damaged one.
        """
        path = output / PLAN_FILE
        if not path.is_file():
            raise SaccadeError(f"output={str(output)!r} has no sweep: there is no {PLAN_FILE} in it")
        with reading(f"output={str(output)!r}: {PLAN_FILE} is damaged, restore it or give another output"):
            values = json.loads(path.read_text())
            return cls(**{**values, "runs": tuple(RunSpec.from_json(run) for run in values["runs"])})


def make_plan(
    title: str, runs: Sequence[RunSpec], command: Sequence[str] = ("saccade",), about: dict[str, Any] | None = None
) -> Plan:
    """A plan with today's date and the command line of this process: `command` is the program before its arguments."""
    return Plan(title, tuple(runs), shlex.join([*command, *sys.argv[1:]]), date.today().isoformat(), about)


def plan_grid(
    recipe: Mapping[str, Any],
    pretrain: Mapping[str, Any] | None,
    grid: Mapping[str, Sequence[Any]],
    seeds: int | None,
    scenes: int = 1000,
    split: str = "test",
    threads: int = 1,
    overrides: Mapping[str, Any] | None = None,
) -> list[RunSpec]:
    """The product of a grid and seeds, seed by seed, so that an interrupted sweep contains complete comparisons.

    Args:
        recipe: the fields of the recipe, whose own seed counts without `seeds`.
        pretrain: those of the recipe that runs before it, or None.
        grid: values by field, which apply to the stages as in `place`.
        scenes: number of scenes of `split` to evaluate on if the recipe trains on "digits".
        overrides: further fields, which apply to the stages before those of the grid.

    Raises:
        SaccadeError: on a number below 1, a grid over seeds together with `seeds`, a stage that does not exist, or a
            grid that makes the same run twice.
    """
    check_counts(seeds=seeds, scenes=scenes, threads=threads)
    if seeds is not None and "seed" in grid:
        raise SaccadeError("--grid seed and --seeds both choose the seeds: give one of them")
    if seeds is not None and "seed" in (overrides or {}):
        raise SaccadeError(f"--seed {overrides['seed']} and --seeds both choose the seeds: give one of them")
    for name in grid:
        if name in (overrides or {}):
            raise SaccadeError(f"--{name} {overrides[name]} and --grid {name} both set it: give one of them")
    recipes = ({} if pretrain is None else {STAGES[0]: pretrain}) | {STAGES[1]: recipe}
    overrides = overrides or {}
    own_seed = place(recipes, overrides)[STAGES[1]].get("seed", 0)
    seeded = seeds is not None or "seed" in grid
    values_by_field = {**grid, "seed": grid.get("seed", range(seeds) if seeds else [own_seed])}
    fields = ["seed", *(name for name in grid if name != "seed")]
    specs: list[RunSpec] = []
    for seed, *values in product(*(values_by_field[name] for name in fields)):
        given = {**dict(zip(fields[1:], values, strict=True)), "seed": seed}
        labels = {name: label_of(value) for name, value in given.items()}
        stages = place(recipes, overrides, given)
        for key, stage in stages.items() if seeded else ():
            asked = {"dataset_seed", f"{key}.dataset_seed"} & {*overrides, *given}
            if stage.get("dataset", "digits") == "digits" and not asked:
                stage["dataset_seed"] = seed
        last, evaluation = stages[STAGES[1]], None
        if last.get("dataset", "digits") == "digits":
            evaluation = Evaluation(standard_inferences(last), split, scenes)
        name = re.sub(r"[^A-Za-z0-9.=_+-]+", "_", "-".join(f"{name}={value}" for name, value in labels.items()))
        if any(spec.name == name for spec in specs):  # labels that differ in what a folder's name leaves out
            name += f"-{hashlib.sha256(to_json(labels).encode()).hexdigest()[:8]}"
        specs.append(RunSpec(name, labels, tuple(stages.values()), evaluation, threads))
    _check_different(specs)
    return specs


def _check_different(specs: Sequence[RunSpec]) -> None:
    """Refuse runs with different labels that train and evaluate the same: their table would show a difference of
    nothing.
    """
    for number, spec in enumerate(specs):
        for other in specs[:number]:
            if (spec.stage_ids, spec.evaluation) == (other.stage_ids, other.evaluation):
                names = [name for name, value in spec.labels.items() if value != other.labels[name]]
                if names:
                    raise SaccadeError(
                        f"the runs {other.name} and {spec.name} would be the same: {' and '.join(names)} has no "
                        "effect on them; leave it out of --grid, or name the stage that it is for"
                    )


def label_of(value: Any) -> Any:
    """A field's value as a label, which tables compare: a mapping or a list as the text of a recipe."""
    if not isinstance(value, (Mapping, list)):
        return value
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=float("inf")).strip()


def place(stages: Mapping[str, Mapping[str, Any]], *given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The stages with fields put over those that they belong to, as `put_over` does; later mappings go over earlier.

    A field of `BOTH_STAGES` belongs to both stages, any other to the last only; `pretrain.field` and `sft.field` name
    the stage, and go over all fields that name none.

    Raises:
        SaccadeError: on a stage that does not exist.
    """
    placed = {key: dict(values) for key, values in stages.items()}
    for named in (False, True):
        for fields in given:
            mine: dict[str, dict[str, Any]] = {key: {} for key in stages}
            for name, value in fields.items():
                stage, dot, field = name.rpartition(".")
                if dot and stage not in stages:
                    raise SaccadeError(f"{name}: there is no stage {stage!r}, the stages are {', '.join(stages)}")
                for key in stages if bool(dot) == named else ():
                    if key == stage or (not dot and (key == STAGES[1] or field in BOTH_STAGES)):
                        mine[key][field] = value
            placed = {key: put_over(values, mine[key]) for key, values in placed.items()}
    return placed


def choose(specs: Sequence[RunSpec], only: Mapping[str, Sequence[Any]]) -> list[RunSpec]:
    """The runs whose labels have one of the values of `only`; labels that a run lacks are ignored.

    Raises:
        SaccadeError: on a label or a value that no run has.
    """
    only = {name: [label_of(value) for value in values] for name, values in only.items()}
    for name, values in only.items():
        known = list(dict.fromkeys(spec.labels[name] for spec in specs if name in spec.labels))
        if not known:
            labels = dict.fromkeys(label for spec in specs for label in spec.labels)
            raise SaccadeError(f"--only {name}: no run has this label, they have {', '.join(labels)}")
        for value in values:
            if value not in known:
                raise SaccadeError(f"--only {name}={value}: no run has it, there are {', '.join(map(str, known))}")
    wanted = list(only.items())
    return [spec for spec in specs if all(spec.labels.get(name, values[0]) in values for name, values in wanted)]


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
                    start = None if number == 0 else spec.stages[0].get("model")
                    _check_stage(f"stage {name}", values, start, seen)
            if spec.evaluation is not None and str(spec.evaluation) not in seen:
                seen.add(str(spec.evaluation))
                for fields in spec.evaluation.inferences:
                    Inference.of_run(folder="its own", **fields)
                digit_scenes("sft", spec.evaluation.split, 1)
        except SaccadeError as error:
            raise SaccadeError(f"run {spec.name}: {error}") from error


def _check_stage(source: str, values: Mapping[str, Any], start: str | None, seen: set[str]) -> None:
    """Check a stage; `start` is the model of the first one, None for itself."""
    recipe = make_recipe(values, source)
    check_lora(recipe)
    options = recipe.options
    check_dataset_given(recipe, values.get("model") if start is None else start)
    if start is None and options.model != "tiny" and f"model {options.model}" not in seen:
        check_family(options.model)
        seen.add(f"model {options.model}")
    # One row of generated scenes, or every row of a file, is enough to show what is wrong.
    rows = 1 if options.dataset == "digits" and options.dataset_rows else options.dataset_rows
    of_data = ("dataset", "image_", "allow_outside_images")
    data = {name: value for name, value in asdict(options).items() if name.startswith(of_data)}
    data |= {"dataset_rows": rows, "dataset_seed": 0}
    if f"data {data}" not in seen:
        load_rows(ModelOptions(**data))
        seen.add(f"data {data}")
