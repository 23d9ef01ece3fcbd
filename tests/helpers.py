"""Small training runs, and looks at a tower and its cache, that several test files share."""

from pathlib import Path
from typing import Any

from torch import nn

from saccade import DualSpeedTrainer
from saccade.data import digit_scenes
from saccade.dualspeed.modes import ModeSchedule
from saccade.families import Family, get_family
from saccade.families.store import SUFFIX
from saccade.testing.training import make_config

ORDINARY = {"prune_ratio": 0.0, "slow_probability": 1.0, "distill_weight": 0.0}
PRUNE_ONLY = {"slow_probability": 0.0, "isolator_length": 0}


def make_trainer(model, processor, output_dir, rows=None, peft_config=None, **options: Any) -> DualSpeedTrainer:
    """A trainer on digit scenes."""
    return DualSpeedTrainer(
        model,
        args=make_config(output_dir, **options),
        train_dataset=digit_scenes("sft", "train", 64, seed=5) if rows is None else rows,
        processing_class=processor,
        peft_config=peft_config,
    )


def fast_slow_schedule(seed: int, slow_probability: float, kind: str = "bernoulli") -> ModeSchedule:
    """The schedule of the published two modes."""
    return ModeSchedule(seed, {"fast": 1 - slow_probability, "slow": slow_probability}, kind)


def losses(trainer) -> list[float]:
    """The logged loss of each step."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class TowerRows:
    """How many rows the first layer of a vision tower ran on."""

    def __init__(self, tower: nn.Module) -> None:
        self.rows = 0
        layers = getattr(tower.encoder, "layers", None) or tower.encoder.layer
        layers[0].register_forward_hook(self.count)

    def count(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.rows += (output[0] if isinstance(output, tuple) else output).shape[0]


def frozen_family(model: nn.Module) -> Family:
    """The family of a model whose tower does not train."""
    family = get_family(model)
    family.vision_tower.requires_grad_(False)
    return family


def feature_files(folder: str | Path) -> list[Path]:
    """The entries of a feature cache."""
    return sorted(Path(folder).rglob(f"*{SUFFIX}"))
