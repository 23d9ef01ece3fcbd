"""Expand a recipe and `field=a,b,c` to the runs of a sweep, and select some of them by `label=a,b`."""

import re
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import yaml

from saccade.errors import SaccadeError
from saccade.recipes import put_over
from saccade.sweeps.spec import STAGES, Evaluation, RunSpec, standard_inferences

BOTH_STAGES = (
    "reducer",
    "reducer_options",
    "prune_ratio",
    "keep_tokens",
    "slow_probability",
    "schedule",
    "isolator_length",
    "distill_weight",
    "distill_temperature",
    "positions",
    "seed",
    "data_seed",
    "dataset_seed",
    "use_cpu",
    "bf16",
)
"""Fields that also apply to the pretraining stage, unless they are given for a named stage."""


def parse_grid(texts: Sequence[str], flag: str = "--grid") -> dict[str, list[Any]]:
    """Parse one `field=a,b,c` per field; values are read as YAML.

    Raises:
        SaccadeError: on a text without values, a field given twice, or a value given twice.
    """
    grid: dict[str, list[Any]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name or not values.strip():
            raise SaccadeError(f"{flag} {text!r}: write {flag} field=a,b,c")
        if name in grid:
            raise SaccadeError(f"{flag} {name} is given twice: write {flag} {name}=a,b,c once")
        try:
            grid[name] = yaml.safe_load(f"[{values}]")
        except yaml.YAMLError as error:
            raise SaccadeError(f"{flag} {text!r} cannot be read as values") from error
        repeated = [value for number, value in enumerate(grid[name]) if value in grid[name][:number]]
        if repeated:
            raise SaccadeError(f"{flag} {name}: the value {repeated[0]!r} is given twice")
    return grid


def plan_grid(
    recipe: Mapping[str, Any],
    pretrain: Mapping[str, Any] | None,
    grid: Mapping[str, Sequence[Any]],
    seeds: int | None,
    scenes: int = 1000,
    split: str = "test",
    threads: int = 1,
) -> list[RunSpec]:
    """The product of a grid and seeds, seed by seed, so that an interrupted sweep contains complete comparisons.

    A field of `BOTH_STAGES` applies to both stages, any other to the recipe only; `pretrain.field` and `sft.field`
    apply to the named stage.

    Args:
        recipe: the fields of the recipe.
        pretrain: those of the recipe that runs before it, or None.
        grid: values by field.
        seeds: number of seeds, starting at 0; by default the recipe's own seed.
        scenes: number of scenes to evaluate on if the recipe trains on "digits".
        split: their split.
        threads: compute threads per run.

    Raises:
        SaccadeError: on a number below 1, a grid over seeds together with `seeds`, or a stage that does not exist.
    """
    for name, value in (("seeds", seeds), ("scenes", scenes), ("threads", threads)):
        if value is not None and value < 1:
            raise SaccadeError(f"{name}={value}: give at least 1")
    if seeds is not None and "seed" in grid:
        raise SaccadeError("--grid seed and --seeds both choose the seeds: give one of them")
    first = {} if pretrain is None else {STAGES[0]: dict(pretrain)}
    own = recipe.get("seed", 0)
    seed_values = grid.get("seed", [own] if seeds is None else range(seeds))
    fields = [name for name in grid if name != "seed"]
    specs: list[RunSpec] = []
    for seed in seed_values:
        for values in product(*(grid[name] for name in fields)):
            labels = {**dict(zip(fields, values, strict=True)), "seed": seed}
            stages = {name: dict(stage) for name, stage in (first | {STAGES[1]: dict(recipe)}).items()}
            place(stages, labels)
            if seeds is not None or "seed" in grid:
                for stage in stages.values():
                    if stage.get("dataset", "digits") == "digits":
                        stage["dataset_seed"] = seed
            last = stages[STAGES[1]]
            evaluation = None
            if last.get("dataset", "digits") == "digits":
                evaluation = Evaluation(standard_inferences(last), split, scenes)
            specs.append(RunSpec(_name(labels), labels, tuple(stages.values()), evaluation, threads))
    return specs


def place(stages: dict[str, dict[str, Any]], fields: Mapping[str, Any]) -> None:
    """Set fields, `field` or `stage.field`, in the stages that they belong to, as `put_over` does.

    Raises:
        SaccadeError: on a stage that does not exist.
    """
    given: dict[str, dict[str, Any]] = {key: {} for key in stages}
    for name, value in fields.items():
        stage, dot, field = name.rpartition(".")
        if dot and stage not in stages:
            raise SaccadeError(f"{name}: there is no stage {stage!r}, the stages are {', '.join(stages)}")
        for key in stages:
            if key == stage or (not dot and (key == STAGES[1] or field in BOTH_STAGES)):
                given[key][field] = value
    for key, values in stages.items():
        stages[key] = put_over(values, given[key])


def choose(specs: Sequence[RunSpec], only: Mapping[str, Sequence[Any]]) -> list[RunSpec]:
    """The runs whose labels have one of the values of `only`; labels that a run lacks are ignored.

    Raises:
        SaccadeError: on a label or a value that no run has.
    """
    for name, values in only.items():
        known = list(dict.fromkeys(spec.labels[name] for spec in specs if name in spec.labels))
        if not known:
            labels = dict.fromkeys(label for spec in specs for label in spec.labels)
            raise SaccadeError(f"--only {name}: no run has this label, they have {', '.join(labels)}")
        for value in values:
            if value not in known:
                raise SaccadeError(f"--only {name}={value}: no run has it, there are {', '.join(map(str, known))}")
    return [
        spec
        for spec in specs
        if all(spec.labels[name] in values for name, values in only.items() if name in spec.labels)
    ]


def _name(labels: Mapping[str, Any]) -> str:
    words = "-".join(f"{name}={value}" for name, value in labels.items())
    return re.sub(r"[^A-Za-z0-9.=_+-]+", "_", words)
