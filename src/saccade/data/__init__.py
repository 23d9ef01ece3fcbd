"""Training data: records and datasets, and the embedded task of questions about scenes of handwritten digits."""

from typing import TYPE_CHECKING

from saccade.late import late_names

if TYPE_CHECKING:
    from saccade.data.digits import SPLITS as SPLITS
    from saccade.data.digits import digit_samples as digit_samples
    from saccade.data.digits import split_indices as split_indices
    from saccade.data.questions import KINDS as KINDS
    from saccade.data.rows import digit_scenes as digit_scenes
    from saccade.data.rows import scene_specs as scene_specs
    from saccade.data.rows import specified_rows as specified_rows
    from saccade.data.rows import write_jsonl as write_jsonl
    from saccade.data.scenes import PATCH_SIZE as PATCH_SIZE
    from saccade.data.scenes import patch_labels as patch_labels
    from saccade.data.scenes import render_scene as render_scene

_HOMES = {
    "KINDS": "saccade.data.questions",
    "PATCH_SIZE": "saccade.data.scenes",
    "SPLITS": "saccade.data.digits",
    "digit_samples": "saccade.data.digits",
    "digit_scenes": "saccade.data.rows",
    "patch_labels": "saccade.data.scenes",
    "render_scene": "saccade.data.scenes",
    "scene_specs": "saccade.data.rows",
    "specified_rows": "saccade.data.rows",
    "split_indices": "saccade.data.digits",
    "write_jsonl": "saccade.data.rows",
}
__all__ = list(_HOMES)
__getattr__ = late_names(__name__, _HOMES)
