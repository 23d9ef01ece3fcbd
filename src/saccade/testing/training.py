"""A configuration for a few steps on the CPU, and DualSpeed's step without a trainer."""

from pathlib import Path
from typing import Any

from torch import nn

from saccade.dualspeed import DualSpeedConfig
from saccade.dualspeed.step import DualSpeedStep, ModePlan
from saccade.families import Family, get_family
from saccade.pruning import ModeIsolator, Pruner
from saccade.reducers import PruningConfig, Reducer, get_reducer


def make_config(output_dir: str | Path, **options: Any) -> DualSpeedConfig:
    """A config for a few steps on the CPU."""
    defaults = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "seed": 3,
    }
    return DualSpeedConfig(output_dir=str(output_dir), **{**defaults, **options})


def fast_slow_step(
    model: nn.Module | Family,
    reducer: str | Reducer = "divprune",
    budget: PruningConfig | None = None,
    isolator: ModeIsolator | None = None,
    positions: str = "compact",
    distill: bool = True,
    distill_weight: float = 1.0,
    distill_temperature: float = 1.0,
    **options: Any,
) -> DualSpeedStep:
    """The step with the two published modes."""
    family = model if isinstance(model, Family) else get_family(model)
    config = (budget or PruningConfig()).replace(positions=positions)
    reducer = get_reducer(reducer) if isinstance(reducer, str) else reducer
    fast = ModePlan(Pruner(config, isolator, reducer))
    modes = {"fast": fast, "slow": ModePlan(None, fast if distill else None)}
    return DualSpeedStep(family, modes, distill_weight, distill_temperature, **options)
