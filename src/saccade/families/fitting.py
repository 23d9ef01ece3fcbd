"""Check that a processor writes as many placeholders per image as the model makes tokens."""

from typing import Any

from saccade.errors import SaccadeError

WITH_CLASS = ("clip_vision_model", "mlcd_vision_model", "vit", "dinov2", "dinov2_with_registers", "dinov3_vit")
WITHOUT_CLASS = ("siglip_vision_model", "siglip2_vision_model", "aimv2_vision_model", "ijepa")
CLASS_TOKENS = {**dict.fromkeys(WITH_CLASS, 1), **dict.fromkeys(WITHOUT_CLASS, 0)}
"""Number of tokens that a tower puts before its patches, besides its registers."""


def check_processor(processor: Any, config: Any) -> None:
    """Check a processor's settings against the vision tower; otherwise the first image would fail in the model."""
    tower = getattr(config, "vision_config", None)
    fitting = {
        "patch_size": getattr(tower, "patch_size", None),
        "num_additional_image_tokens": _beyond_patches(tower, getattr(config, "tokens_beyond_patches", 0)),
        "vision_feature_select_strategy": getattr(config, "vision_feature_select_strategy", None),
    }
    given = {name: getattr(processor, name, None) for name in fitting}
    if _beside_patches(given) == _beside_patches(fitting) is not None:
        # Two settings that are each off by one compensate for each other.
        fitting = {"patch_size": fitting["patch_size"]}
    for name, expected in fitting.items():
        found = given[name]
        if found is not None and expected is not None and found != expected:
            raise SaccadeError(
                f"{name}={found!r} of the processor (processor_config.json) does not fit the model's vision tower: "
                f"set it to {expected!r}"
            )


def _beyond_patches(tower: Any, projector: int) -> int | None:
    """The tokens that a tower puts before its patches and a projector adds; None if this is not known."""
    count = CLASS_TOKENS.get(getattr(tower, "model_type", None))
    return None if count is None else count + getattr(tower, "num_register_tokens", 0) + projector


def _beside_patches(settings: dict[str, Any]) -> int | None:
    """The tokens of an image beyond its patches; None if a setting is unknown."""
    count, strategy = settings["num_additional_image_tokens"], settings["vision_feature_select_strategy"]
    return None if count is None or strategy is None else count - (strategy == "default")
