"""Saccade: train and serve vision-language models on a fraction of their visual tokens."""

from typing import TYPE_CHECKING, Any

from saccade.errors import needing_extras
from saccade.late import late_names

if TYPE_CHECKING:
    from saccade.dualspeed import DualSpeedConfig, DualSpeedTrainer, ModeConfig
    from saccade.errors import SaccadeError
    from saccade.images import open_image
    from saccade.pruning import apply_pruning, prune_inputs
    from saccade.reducers import PruningConfig, get_reducer, list_reducers, register_reducer
    from saccade.skip_vision import SkipVisionConfig, apply_skip_vision
    from saccade.tokens import Reduction, VisualContext

__version__ = "0.1.0"

_HOMES = {
    "saccade.dualspeed": ("DualSpeedConfig", "DualSpeedTrainer", "ModeConfig"),
    "saccade.errors": ("SaccadeError",),
    "saccade.images": ("open_image",),
    "saccade.pruning": ("apply_pruning", "prune_inputs"),
    "saccade.reducers": ("PruningConfig", "get_reducer", "list_reducers", "register_reducer"),
    "saccade.skip_vision": ("SkipVisionConfig", "apply_skip_vision"),
    "saccade.tokens": ("Reduction", "VisualContext"),
}
__all__ = [
    "DualSpeedConfig",
    "DualSpeedTrainer",
    "ModeConfig",
    "PruningConfig",
    "Reduction",
    "SaccadeError",
    "SkipVisionConfig",
    "VisualContext",
    "apply_pruning",
    "apply_skip_vision",
    "get_reducer",
    "list_reducers",
    "open_image",
    "prune_inputs",
    "register_reducer",
]


_find = late_names(__name__, _HOMES)


def __getattr__(name: str) -> Any:
    # Importing torch and transformers takes seconds, and `saccade --help` needs neither.
    with needing_extras(f"saccade.{name}"):
        return _find(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
