"""One run of a sweep as plain values: its stages, its evaluation, and the labels that distinguish it."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from saccade.files import to_json
from saccade.recipes import put_over
from saccade.reducers.config import PRUNE_RATIO, trained_options

STAGES = ("pretrain", "sft")
IDLE_WHILE_FAST = ("slow_probability", "schedule", "distill_weight", "distill_temperature")
"""Fields without effect in a stage that is always fast, because no parameter of the language model trains."""


@dataclass(frozen=True)
class Evaluation:
    """The digit scenes that a trained model is evaluated on, and the ways in which it is run: fields of
    `saccade.evaluation.Inference`, without the isolator, which is the run's own."""

    inferences: tuple[dict[str, Any], ...]
    split: str = "test"
    scenes: int = 1000


@dataclass(frozen=True)
class RunSpec:
    """One run: one or two stages of training, and an evaluation.

    Args:
        name: its folder's name, unique within a sweep.
        labels: what distinguishes it in tables, including `seed`.
        stages: one or two stages, each the fields of a recipe without `output_dir` and without the `model` of a second
            stage, which follow from where the sweep keeps its stages.
        evaluation: None for none.
        threads: compute threads; one more process prepares its batches.
        extra: values read by a custom worker. Stages before the last do not depend on it.
    """

    name: str
    labels: dict[str, Any]
    stages: tuple[dict[str, Any], ...]
    evaluation: Evaluation | None = None
    threads: int = 1
    extra: dict[str, Any] = field(default_factory=dict)
    stage_ids: tuple[str, ...] = field(init=False, compare=False)
    """Folder names of the stages, derived from their content: runs share stages that have the same fields and follow
    the same earlier stages."""

    def __post_init__(self) -> None:
        # Through JSON, so that a spec equals one that was read from a file.
        stages = tuple(json.loads(to_json(canonical_stage(stage))) for stage in self.stages)
        object.__setattr__(self, "stages", stages)
        contents: list[Any] = [stages[: number + 1] for number in range(len(stages))]
        if self.extra:
            contents[-1] = [*stages, self.extra]
        digests = [hashlib.sha256(to_json(values).encode()).hexdigest()[:12] for values in contents]
        ids = tuple(f"{name}-{digest}" for name, digest in zip(stage_names(stages), digests, strict=True))
        object.__setattr__(self, "stage_ids", ids)

    def as_json(self) -> dict[str, Any]:
        """Plain values, from which `from_json` restores the spec."""
        values = asdict(self)
        del values["stage_ids"]
        return json.loads(to_json(values))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "RunSpec":
        """The inverse of `as_json`."""
        evaluation = values["evaluation"]
        if evaluation is not None:
            evaluation = Evaluation(**{**evaluation, "inferences": tuple(evaluation["inferences"])})
        return cls(**{**values, "stages": tuple(values["stages"]), "evaluation": evaluation})

    def recipes(self, folder: Path) -> list[dict[str, Any]]:
        """The stages as complete recipes, with everything under `folder`."""
        recipes, model = [], {}
        for values, name in zip(self.stages, self.stage_ids, strict=True):
            # An interrupted stage resumes from its newest checkpoint, if its recipe writes any.
            resume = {"resume": "auto"} if str(values.get("save_strategy", "steps")) not in ("no", "False") else {}
            # A stage of the embedded model may name none, but as a recipe it names a model: the folder of a stage.
            data = {"dataset": "digits"}
            recipes.append({**data, **resume, **values, **model, "output_dir": str(folder / name)})
            model = {"model": str(folder / name)}
        return recipes


def standard_inferences(values: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """Inferences for a recipe: on all tokens, pruned as in training, and with the isolator or skipping it trains.

    With `modes`, pruned is as in the first that drops anything, which is what the trainer saves beside the model.
    """
    modes = values.get("modes") or ()
    dropping = [mode for mode in modes if mode.get("action", "drop") == "drop"]
    each = [put_over(values, mode) for mode in dropping]
    pruning = next((one for one in each if one.get("keep_tokens") or one.get("prune_ratio") != 0), values)
    common = {"reducer": "divprune", "positions": "compact", **trained_options(pruning)}
    if "keep_tokens" not in common:
        common.setdefault("prune_ratio", PRUNE_RATIO)
    ways = [{"name": "full"}, {"name": "pruned", **common}]
    skips = values.get("skip_vision") is not None or any(mode.get("action") == "skip" for mode in modes)
    drops = not skips or values.get("skip_mode") == "slow"
    if modes:
        drops = any(mode.get("isolator", True) for mode in dropping)
    if values.get("isolator_length", 4) and drops:
        ways.append({"name": "pruned_isolator", **common})
    if skips:
        ways.append({"name": "skip"})
    return tuple(ways)


def stage_names(stages: Sequence[Any]) -> tuple[str, ...]:
    """The names of a run's stages; a single stage is fine-tuning."""
    return STAGES[-len(stages) :]


def canonical_stage(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that affect a stage, so that stages that would train the same model are shared."""
    always_fast = values.get("freeze_language_model") and values.get("prune_ratio") != 0
    idle = {"output_dir", *(IDLE_WHILE_FAST if always_fast else ())}
    return {name: values[name] for name in sorted(values) if name not in idle}
