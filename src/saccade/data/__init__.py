"""Training data: records and datasets, and the embedded task of questions about scenes of handwritten digits."""

from typing import TYPE_CHECKING

from saccade.late import late_names

if TYPE_CHECKING:
    from saccade.data.digits import SPLITS, digit_samples, split_indices
    from saccade.data.questions import KINDS
    from saccade.data.rows import digit_scenes, scene_specs, write_jsonl
    from saccade.data.scenes import PATCH_SIZE, patch_labels, render_scene

_HOMES = {
    "saccade.data.digits": ("SPLITS", "digit_samples", "split_indices"),
    "saccade.data.questions": ("KINDS",),
    "saccade.data.rows": ("digit_scenes", "scene_specs", "write_jsonl"),
    "saccade.data.scenes": ("PATCH_SIZE", "patch_labels", "render_scene"),
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
