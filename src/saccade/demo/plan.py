"""What the demo trains: the variants, their stages, and the numbers they share."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from saccade.errors import SaccadeError

METHODS: dict[str, dict[str, Any]] = {
    "all_tokens": {"prune_ratio": 0.0, "slow_probability": 1.0, "distill_weight": 0.0, "isolator_length": 0},
    "prune_only": {"slow_probability": 0.0, "distill_weight": 0.0, "isolator_length": 0},
    "slow_steps": {"distill_weight": 0.0, "isolator_length": 0},
    "slow_steps_isolator": {"distill_weight": 0.0},
    "dualspeed": {},
}
"""The options in which each method differs from DualSpeed. The order is that of the paper's Table 3, part by part."""

MAIN_METHODS = ("all_tokens", "prune_only", "dualspeed")


@dataclass(frozen=True)
class DemoSettings:
    """The numbers that every run of a demo shares.

    Args:
        pretrain_steps: steps of stage one, captions, projector only.
        sft_steps: steps of stage two, questions, projector and language model.
        batch_size: rows a step.
        pretrain_learning_rate: peak rate of stage one.
        learning_rate: peak rate of stage two.
        turns: questions about each scene in stage two.
        prune_ratio: p of fast steps and of pruned inference.
        slow_probability: r.
        isolator_length: l.
        reducer: method that chooses the tokens.
        test_scenes: scenes that every model is evaluated on.
        split: split of those scenes; settings are tuned on "validation".
        threads: threads a run computes with; one more process prepares its batches.
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


@dataclass(frozen=True)
class RunSpec:
    """One training run of the demo: both stages and the evaluation.

    Args:
        method: a key of `METHODS`.
        positions: "compact" or "original".
        seed: of weights, data order, and modes.
        settings: the shared numbers.

    Raises:
        SaccadeError: on an unknown method.
    """

    method: str
    positions: str
    seed: int
    settings: DemoSettings

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise SaccadeError(f"method={self.method!r} is unknown: use one of {', '.join(METHODS)}")

    @property
    def name(self) -> str:
        """Folder name of the run."""
        return f"{self.method}-{self.positions}-seed{self.seed}"

    def as_json(self) -> dict[str, Any]:
        """Plain values, from which `from_json` makes the spec again."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "RunSpec":
        """The inverse of `as_json`."""
        return cls(**{**values, "settings": DemoSettings(**values["settings"])})

    def recipe(self, stage: str, folder: Path) -> dict[str, Any]:
        """The recipe of one stage, "pretrain" or "sft", with everything of the run under `folder`."""
        settings = self.settings
        pretrain = stage == "pretrain"
        steps = settings.pretrain_steps if pretrain else settings.sft_steps
        return {
            "model": "tiny" if pretrain else str(folder / "pretrain"),
            "dataset": "digits",
            "dataset_stage": stage,
            "dataset_rows": steps * settings.batch_size,
            "dataset_seed": self.seed,
            "dataset_turns": 1 if pretrain else settings.turns,
            "output_dir": str(folder / stage),
            "seed": self.seed,
            "reducer": settings.reducer,
            "prune_ratio": settings.prune_ratio,
            "slow_probability": settings.slow_probability,
            # Short runs would otherwise depend on the luck of the draw; the share is the same.
            "schedule": "stratified",
            "isolator_length": settings.isolator_length,
            "positions": self.positions,
            "freeze_language_model": pretrain,
            "learning_rate": settings.pretrain_learning_rate if pretrain else settings.learning_rate,
            "max_steps": steps,
            "per_device_train_batch_size": settings.batch_size,
            "lr_scheduler_type": "cosine",
            "warmup_steps": max(1, round(0.03 * steps)),
            "logging_steps": max(1, steps // 20),
            "save_strategy": "no",
            "report_to": "none",
            "bf16": False,
            "use_cpu": True,
            "gradient_checkpointing": False,
            "dataloader_num_workers": 1,
            "dataloader_persistent_workers": True,
            "disable_tqdm": True,
            **METHODS[self.method],
        }


def plan_runs(settings: DemoSettings, seeds: int, full: bool) -> list[RunSpec]:
    """The runs of a demo, seed by seed, so that an interrupted one holds whole comparisons.

    Args:
        seeds: number of seeds.
        full: also `slow_steps` and `slow_steps_isolator`, the steps of the paper's Table 3.
    """
    runs = []
    for seed in range(seeds):
        runs.append(RunSpec("all_tokens", "compact", seed, settings))
        for method in METHODS:
            if method != "all_tokens" and (full or method in MAIN_METHODS):
                runs.append(RunSpec(method, "compact", seed, settings))
        for method in ("prune_only", "dualspeed"):
            runs.append(RunSpec(method, "original", seed, settings))
    return runs


def shrink(settings: DemoSettings, steps: int) -> DemoSettings:
    """The same settings with `steps` steps of stage two, and stage one in proportion; for tests."""
    share = steps / settings.sft_steps
    return replace(settings, sft_steps=steps, pretrain_steps=max(1, round(settings.pretrain_steps * share)))
