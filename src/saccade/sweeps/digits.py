"""Settings and methods shared by runs on the digit scenes, in the demo and in studies."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from saccade.errors import SaccadeError, one_of
from saccade.sweeps.spec import Evaluation, RunSpec, standard_inferences

METHODS: dict[str, dict[str, Any]] = {
    "all_tokens": {"prune_ratio": 0.0, "slow_probability": 1.0, "distill_weight": 0.0, "isolator_length": 0},
    "prune_only": {"slow_probability": 0.0, "distill_weight": 0.0, "isolator_length": 0},
    "slow_steps": {"distill_weight": 0.0, "isolator_length": 0},
    "slow_steps_isolator": {"distill_weight": 0.0},
    "dualspeed": {},
}
"""The options in which each method differs from DualSpeed, in the order of the paper's Table 3."""

LABELS = {
    "all_tokens": "all tokens",
    "prune_only": "pruning only",
    "slow_steps": "+ slow steps",
    "slow_steps_isolator": "+ isolator",
    "dualspeed": "DualSpeed",
}


@dataclass(frozen=True)
class DigitSettings:
    """Settings shared by the runs of a demo or a study.

    Args:
        pretrain_steps: steps of stage one: captions, projector only.
        sft_steps: steps of stage two: questions, projector and language model.
        batch_size: rows per step.
        pretrain_learning_rate: peak rate of stage one.
        learning_rate: peak rate of stage two.
        turns: questions about each scene in stage two.
        prune_ratio: p of fast steps and of pruned inference.
        slow_probability: r.
        isolator_length: l.
        reducer: method that chooses the tokens.
        test_scenes: scenes that every model is evaluated on.
        split: split of those scenes; settings are tuned on "validation".
        threads: compute threads per run; one more process prepares its batches.
    """

    pretrain_steps: int
    sft_steps: int
    batch_size: int = 32
    pretrain_learning_rate: float = 3e-3
    learning_rate: float = 1e-3
    turns: int = 4
    prune_ratio: float = 0.9
    slow_probability: float = 0.1
    isolator_length: int = 4
    reducer: str = "divprune"
    test_scenes: int = 1000
    split: str = "test"
    threads: int = 1

    def shrink(self, steps: int) -> "DigitSettings":
        """The same settings with `steps` steps of stage two, and stage one in proportion."""
        share = steps / self.sft_steps
        return replace(self, sft_steps=steps, pretrain_steps=max(1, round(self.pretrain_steps * share)))


QUICK = DigitSettings(pretrain_steps=60, sft_steps=320)


def digit_run(
    name: str,
    labels: Mapping[str, Any],
    settings: DigitSettings,
    method: str | Mapping[str, Any],
    seed: int,
    options: Mapping[str, Any] | None = None,
    pretrain_method: str | Mapping[str, Any] | None = None,
    inferences: tuple[dict[str, Any], ...] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> RunSpec:
    """A run of both stages on the digit scenes, and the evaluation.

    Args:
        labels: what distinguishes it from the others; `seed` is added.
        method: a key of `METHODS`, or the fields in which another method differs from DualSpeed.
        options: fields of the recipe that differ in this run, in both stages.
        pretrain_method: the method of stage one, if different.
        inferences: ways to run the trained model; those of `standard_inferences` when left out.
        extra: values read by a custom worker.

    Raises:
        SaccadeError: on an unknown method.
    """
    chosen = {"pretrain": method if pretrain_method is None else pretrain_method, "sft": method}
    fields = {stage: method_fields(one) if isinstance(one, str) else one for stage, one in chosen.items()}
    stages = tuple({**_recipe(stage, settings, seed), **(options or {}), **fields[stage]} for stage in fields)
    if inferences is None:
        pruned = {"reducer": settings.reducer, "prune_ratio": settings.prune_ratio}
        pruned |= {name: value for name, value in (options or {}).items() if name in ("reducer", "prune_ratio")}
        inferences = standard_inferences({**stages[-1], **pruned})
    evaluation = Evaluation(inferences, settings.split, settings.test_scenes)
    return RunSpec(name, {**labels, "seed": seed}, stages, evaluation, settings.threads, dict(extra or {}))


def method_fields(name: str) -> Mapping[str, Any]:
    """The fields in which a method of `METHODS` differs from DualSpeed.

    Raises:
        SaccadeError: on an unknown method.
    """
    if name not in METHODS:
        raise SaccadeError(f"method={name!r} is unknown: {one_of(name, METHODS)}")
    return METHODS[name]


def stage_fields(stage: str, steps: int, seed: int, settings: Any) -> dict[str, Any]:
    """The fields that both stages of a two-stage study on a CPU have, whatever its data and model are.

    Args:
        stage: "pretrain", where the projector alone learns, or "sft".
        settings: `DigitSettings`, or another dataclass that has its fields of the method, the rates and the batch.
    """
    pretrain = stage == "pretrain"
    return {
        "seed": seed,
        "reducer": settings.reducer,
        "prune_ratio": settings.prune_ratio,
        "slow_probability": settings.slow_probability,
        # Short runs would otherwise depend on the luck of the draw; the share is the same.
        "schedule": "stratified",
        "isolator_length": settings.isolator_length,
        "freeze_language_model": pretrain,
        "learning_rate": settings.pretrain_learning_rate if pretrain else settings.learning_rate,
        "max_steps": steps,
        "per_device_train_batch_size": settings.batch_size,
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, round(0.03 * steps)),
        "logging_steps": max(1, steps // 20),
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }


def _recipe(stage: str, settings: DigitSettings, seed: int) -> dict[str, Any]:
    pretrain = stage == "pretrain"
    steps = settings.pretrain_steps if pretrain else settings.sft_steps
    return {
        **({"model": "tiny"} if pretrain else {}),
        **stage_fields(stage, steps, seed, settings),
        "dataset": "digits",
        "dataset_stage": stage,
        "dataset_rows": steps * settings.batch_size,
        "dataset_seed": seed,
        "dataset_turns": 1 if pretrain else settings.turns,
        "positions": "compact",
        "save_strategy": "no",
        "dataloader_num_workers": 1,
        "dataloader_persistent_workers": True,
    }
