"""The entry point `lmms_eval.models`, which tells lmms-eval where the model `saccade` is."""

from typing import Any


def manifest() -> Any:
    """The manifest of the model `saccade`, for `lmms_eval --model saccade`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="saccade", chat_class_path="saccade.evaluation.lmms.SaccadeModel")
