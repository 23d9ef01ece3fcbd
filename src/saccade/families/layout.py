"""The names that weights have in released checkpoints, which engines look for."""

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping


def use_released_names(model: PreTrainedModel) -> None:
    """Let `model.save_pretrained` write the names that the released checkpoints of its family have.

    transformers renames weights while it loads, and undoes on saving what loading did. So a model that was built from
    a configuration, or loaded from a folder that such a one wrote, is saved without the parts of names that its
    modules no longer have (`vision_tower.vision_model.` of towers that are CLIP's or SigLIP's since 5.19). It reads
    both; vLLM reads released names only. Quantized weights are left alone: undoing their conversion is not renaming.
    """
    if getattr(model, "hf_quantizer", None) is None:
        model._weight_conversions = get_model_conversion_mapping(model, add_legacy=False)
