"""Saccade: train and serve vision-language models on a fraction of their visual tokens."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saccade.dualspeed import DualSpeedConfig, DualSpeedTrainer
    from saccade.errors import SaccadeError
    from saccade.images import open_image
    from saccade.pruning import prune_inputs
    from saccade.skip_vision import SkipVisionConfig, apply_skip_vision, load_skip_vision

__version__ = "0.1.0"
__all__ = [
    "DualSpeedConfig",
    "DualSpeedTrainer",
    "SaccadeError",
    "SkipVisionConfig",
    "apply_skip_vision",
    "load_skip_vision",
    "open_image",
    "prune_inputs",
]

_HOMES = {
    "DualSpeedConfig": "saccade.dualspeed",
    "DualSpeedTrainer": "saccade.dualspeed",
    "SaccadeError": "saccade.errors",
    "SkipVisionConfig": "saccade.skip_vision",
    "apply_skip_vision": "saccade.skip_vision",
    "load_skip_vision": "saccade.skip_vision",
    "open_image": "saccade.images",
    "prune_inputs": "saccade.pruning",
}


def __getattr__(name: str) -> Any:
    # Importing torch and transformers takes seconds, and `saccade --help` needs neither.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'saccade' has no attribute {name!r}")
