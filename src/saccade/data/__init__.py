"""Training data: records and datasets, and the embedded task of questions about scenes of handwritten digits."""

from saccade.data.digits import SPLITS, digit_samples, split_indices
from saccade.data.questions import KINDS
from saccade.data.rows import digit_scenes, scene_specs, specified_rows, write_jsonl
from saccade.data.scenes import PATCH_SIZE, patch_labels, render_scene

__all__ = [
    "KINDS",
    "PATCH_SIZE",
    "SPLITS",
    "digit_samples",
    "digit_scenes",
    "patch_labels",
    "render_scene",
    "scene_specs",
    "specified_rows",
    "split_indices",
    "write_jsonl",
]
