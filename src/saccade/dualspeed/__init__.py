"""DualSpeed (arXiv 2602.03815): fast steps on a tenth of the visual tokens, slow steps on all of them."""

from saccade.dualspeed.collator import DualSpeedCollator
from saccade.dualspeed.config import DualSpeedConfig
from saccade.dualspeed.modes import ModeConfig
from saccade.dualspeed.schedule import ModeSchedule
from saccade.dualspeed.trainer import DualSpeedTrainer

__all__ = ["DualSpeedCollator", "DualSpeedConfig", "DualSpeedTrainer", "ModeConfig", "ModeSchedule"]
