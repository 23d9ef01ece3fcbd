"""One run of a sweep as plain values: its stages, its evaluation, and the names that tell it from the others."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from saccade.files import to_json

STAGES = ("pretrain", "sft")
IDLE_WHILE_FAST = ("slow_probability", "schedule", "distill_weight", "distill_temperature")
"""What changes nothing in a stage that is always fast, as it is while no parameter of the language model trains."""


@dataclass(frozen=True)
class Evaluation:
    """The digit scenes that a trained model is evaluated on, and the ways in which it is run.

    Args:
        inferences: the fields of `saccade.evaluation.Inference` each, without the isolator, which is the run's own.
        split: "train", "validation" or "test".
        scenes: number of scenes.
        checkpoints: number of checkpoints, evenly spread over the last stage, that are evaluated on all tokens too.
        checkpoint_scenes: number of scenes for each of them.
    """

    inferences: tuple[dict[str, Any], ...]
    split: str = "test"
    scenes: int = 1000
    checkpoints: int = 0
    checkpoint_scenes: int = 300


@dataclass(frozen=True)
class RunSpec:
    """One run: one or two stages of training, and an evaluation.

    Args:
        name: its folder's name, distinct within a sweep.
        labels: what distinguishes it, for tables; `seed` among them.
        stages: the fields of a recipe each, one stage or two. `output_dir`, and the `model` of a second stage, are
            left out: they follow from where the sweep keeps its stages.
        evaluation: None for none.
        threads: threads it computes with; one more process prepares its batches.
    """

    name: str
    labels: dict[str, Any]
    stages: tuple[dict[str, Any], ...]
    evaluation: Evaluation | None = None
    threads: int = 1
    stage_ids: tuple[str, ...] = field(init=False, compare=False)
    """Folder names of the stages, by content: runs whose stages have the same fields, and come after the same stages,
    share them."""

    def __post_init__(self) -> None:
        # Through JSON, so that a spec compares with one that was read from a file.
        stages = tuple(json.loads(to_json(canonical_stage(stage))) for stage in self.stages)
        object.__setattr__(self, "stages", stages)
        names = stage_names(stages)
        digests = [_digest(stages[: number + 1]) for number in range(len(stages))]
        if self.checkpoints:
            # Evaluated checkpoints are removed, so a stage serves one evaluation of them only.
            fields = ("split", "checkpoints", "checkpoint_scenes")
            digests[-1] = _digest([*stages, {name: getattr(self.evaluation, name) for name in fields}])
        ids = tuple(f"{name}-{digest}" for name, digest in zip(names, digests, strict=True))
        object.__setattr__(self, "stage_ids", ids)

    @property
    def checkpoints(self) -> int:
        """How many checkpoints of the last stage are evaluated."""
        return self.evaluation.checkpoints if self.evaluation else 0

    def as_json(self) -> dict[str, Any]:
        """Plain values, from which `from_json` makes the spec again."""
        values = asdict(self)
        del values["stage_ids"]
        if values["evaluation"] is not None and not self.checkpoints:
            # Finished runs are found by these values, and those without checkpoints are older than the fields.
            del values["evaluation"]["checkpoints"], values["evaluation"]["checkpoint_scenes"]
        return json.loads(to_json(values))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "RunSpec":
        """The inverse of `as_json`."""
        evaluation = values["evaluation"]
        if evaluation is not None:
            evaluation = Evaluation(**{**evaluation, "inferences": tuple(evaluation["inferences"])})
        return cls(**{**values, "stages": tuple(values["stages"]), "evaluation": evaluation})

    def recipes(self, folder: Path) -> list[dict[str, Any]]:
        """The stages as whole recipes, with everything under `folder`."""
        recipes, model = [], {}
        for values, name in zip(self.stages, self.stage_ids, strict=True):
            # An interrupted stage goes on from its newest checkpoint, if its recipe writes any.
            resume = {"resume": "auto"} if str(values.get("save_strategy", "steps")) not in ("no", "False") else {}
            recipes.append({**resume, **values, **model, "output_dir": str(folder / name)})
            model = {"model": str(folder / name)}
        return recipes


def stage_names(stages: Sequence[Any]) -> tuple[str, ...]:
    """What the stages of a run are called: a single one is fine-tuning."""
    return STAGES[-len(stages) :]


def canonical_stage(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that matter to a stage, so that stages which would train the same model are one stage."""
    always_fast = values.get("freeze_language_model") and values.get("prune_ratio") != 0
    idle = {"output_dir", *(IDLE_WHILE_FAST if always_fast else ())}
    return {name: values[name] for name in sorted(values) if name not in idle}


def _digest(values: Any) -> str:
    return hashlib.sha256(to_json(values).encode()).hexdigest()[:12]
