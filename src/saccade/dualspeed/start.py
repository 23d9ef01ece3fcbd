"""The model that a run starts from: loading it by name, and freezing parts of it."""

from typing import Any

from transformers import AutoConfig, PreTrainedModel

from saccade.dualspeed.config import DualSpeedConfig
from saccade.dualspeed.weights import load_whole
from saccade.families import Family
from saccade.files import check_entries, reading


def load_config(model: str, args: DualSpeedConfig) -> Any:
    """Load the config of a model by name.

    Raises:
        SaccadeError: if it cannot be loaded.
    """
    check_entries(model, "model")
    with reading(f"model={model!r} cannot be loaded"):
        return AutoConfig.from_pretrained(model, trust_remote_code=args.trust_remote_code)


def load_by_name(model: str, args: DualSpeedConfig, quantization: Any) -> PreTrainedModel:
    """Load a model as TRL would, in float32 unless `model_init_kwargs` says otherwise, and check every key.

    Raises:
        SaccadeError: if weights are missing, unexpected or have the wrong shape.
    """
    options = {"dtype": "float32", "trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    args.model_init_kwargs = None
    with reading(f"model={model!r} cannot be loaded"):
        return load_whole(model, **options, **({} if quantization is None else {"quantization_config": quantization}))


def freeze_parts(family: Family, args: DualSpeedConfig) -> None:
    """Freeze the parts of a model that the options name."""
    parts = (
        (args.freeze_vision_tower, family.vision_tower),
        (args.freeze_projector, family.projector),
        (args.freeze_language_model, family.language_model),
        (args.freeze_language_model, family.model.get_output_embeddings()),
    )
    for frozen, module in parts:
        if frozen:
            module.requires_grad_(False)
