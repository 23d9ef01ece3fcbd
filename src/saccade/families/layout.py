"""The weight names of released checkpoints, which inference engines look for."""

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping


def use_released_names(model: PreTrainedModel) -> None:
    """Make `model.save_pretrained` write weight names as in the released checkpoints of its family.

    transformers renames weights on loading and reverts on saving what it renamed. A model built from a configuration,
    or loaded from a folder that such a model wrote, is therefore saved under the names of its modules, which since
    5.19 lack a part of the released names (`vision_tower.vision_model.` of CLIP and SigLIP towers). transformers reads
    both; vLLM reads released names only. Quantized weights are left alone: reverting their conversion is more than
    renaming.
    """
    if getattr(model, "hf_quantizer", None) is None:
        model._weight_conversions = get_model_conversion_mapping(model, add_legacy=False)
