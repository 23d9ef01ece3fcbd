"""DualSpeed (arXiv 2602.03815): fast steps on a tenth of the visual tokens, slow steps on all of them."""

from typing import TYPE_CHECKING

from saccade.late import late_names

if TYPE_CHECKING:
    from saccade.dualspeed.collator import DualSpeedCollator as DualSpeedCollator
    from saccade.dualspeed.config import DualSpeedConfig as DualSpeedConfig
    from saccade.dualspeed.modes import ModeConfig as ModeConfig
    from saccade.dualspeed.schedule import ModeSchedule as ModeSchedule
    from saccade.dualspeed.trainer import DualSpeedTrainer as DualSpeedTrainer

_HOMES = {
    "DualSpeedCollator": "saccade.dualspeed.collator",
    "DualSpeedConfig": "saccade.dualspeed.config",
    "DualSpeedTrainer": "saccade.dualspeed.trainer",
    "ModeConfig": "saccade.dualspeed.modes",
    "ModeSchedule": "saccade.dualspeed.schedule",
}
__all__ = list(_HOMES)
__getattr__ = late_names(__name__, _HOMES)
