"""DualSpeed (arXiv 2602.03815): fast steps on a tenth of the visual tokens, slow steps on all of them."""

from typing import TYPE_CHECKING

from saccade.late import late_names

if TYPE_CHECKING:
    from saccade.dualspeed.collator import DualSpeedCollator
    from saccade.dualspeed.config import DualSpeedConfig
    from saccade.dualspeed.modes import ModeConfig, ModeSchedule
    from saccade.dualspeed.trainer import DualSpeedTrainer

__getattr__ = late_names(
    __name__,
    {
        "saccade.dualspeed.collator": ("DualSpeedCollator",),
        "saccade.dualspeed.config": ("DualSpeedConfig",),
        "saccade.dualspeed.modes": ("ModeConfig", "ModeSchedule"),
        "saccade.dualspeed.trainer": ("DualSpeedTrainer",),
    },
)
__all__ = ["DualSpeedCollator", "DualSpeedConfig", "DualSpeedTrainer", "ModeConfig", "ModeSchedule"]
