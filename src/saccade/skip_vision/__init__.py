"""Skip-Vision (arXiv 2503.21817) on stock models: most visual tokens skip the feed-forward networks and the KV
cache."""

from saccade.skip_vision.config import PRESETS, SkipVisionConfig
from saccade.skip_vision.patch import SkipVision, apply_skip_vision
from saccade.skip_vision.skipper import Skipper
from saccade.skip_vision.summary import SUMMARY_FILE, SUMMARY_NAME, SummaryHead

__all__ = [
    "PRESETS",
    "SUMMARY_FILE",
    "SUMMARY_NAME",
    "SkipVision",
    "SkipVisionConfig",
    "Skipper",
    "SummaryHead",
    "apply_skip_vision",
]
