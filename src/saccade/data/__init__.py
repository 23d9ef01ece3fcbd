"""Training data: records and datasets, and the embedded task of questions about scenes of handwritten digits."""

from typing import TYPE_CHECKING

from saccade.late import late_names

if TYPE_CHECKING:
    from saccade.data.digits import SPLITS, digit_samples, split_indices
    from saccade.data.questions import KINDS
    from saccade.data.rows import digit_scenes, scene_specs, write_jsonl
    from saccade.data.scenes import PATCH_SIZE, patch_labels, render_scene

_HOMES = {
    "KINDS": "saccade.data.questions",
    "PATCH_SIZE": "saccade.data.scenes",
    "SPLITS": "saccade.data.digits",
    "digit_samples": "saccade.data.digits",
    "digit_scenes": "saccade.data.rows",
    "patch_labels": "saccade.data.scenes",
    "render_scene": "saccade.data.scenes",
    "scene_specs": "saccade.data.rows",
    "split_indices": "saccade.data.digits",
    "write_jsonl": "saccade.data.rows",
}
__all__ = [
    "KINDS",
    "PATCH_SIZE",
    "SPLITS",
    "digit_samples",
    "digit_scenes",
    "patch_labels",
    "render_scene",
    "scene_specs",
    "split_indices",
    "write_jsonl",
]
__getattr__ = late_names(__name__, _HOMES)
