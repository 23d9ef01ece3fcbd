"""Model families: one file each, found by the model's `config.model_type`."""

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from saccade.errors import SaccadeError
from saccade.families.base import Family
from saccade.families.chain_of_sight import ChainOfSightFamily
from saccade.families.encoded import Encoded
from saccade.families.gemma3 import Gemma3Family
from saccade.families.gemma4 import Gemma4Family
from saccade.families.glm4v import Glm4vFamily
from saccade.families.idefics3 import Idefics3Family
from saccade.families.internvl import InternVLFamily
from saccade.families.layout import use_released_names
from saccade.families.lfm2_vl import Lfm2VlFamily
from saccade.families.llava import LlavaFamily
from saccade.families.llava_next import LlavaNextFamily, LlavaNextVideoFamily, LlavaOnevisionFamily
from saccade.families.mistral3 import Mistral3Family, PixtralFamily
from saccade.families.ovis2 import Ovis2Family
from saccade.families.qwen_vl import Qwen2VLFamily, Qwen3VLFamily, Qwen3VLMoeFamily, Qwen35Family

_FAMILIES: dict[tuple[str, str | None], type[Family]] = {}


def register_family(family: type[Family]) -> type[Family]:
    """Register a family for each of its `model_types`, with its `towers`. Usable as a class decorator."""
    for model_type in family.model_types:
        for tower in family.towers or (None,):
            _FAMILIES[model_type, tower] = family
    return family


def list_families() -> list[str]:
    """The values of `config.model_type` that have a registered family."""
    return sorted({model_type for model_type, _ in _FAMILIES})


def family_class(config: PreTrainedConfig) -> type[Family]:
    """The family of a model with this config.

    Raises:
        SaccadeError: if none is registered; the message names the known ones.
    """
    tower = getattr(getattr(config, "vision_config", None), "model_type", None)
    family = _FAMILIES.get((config.model_type, tower)) or _FAMILIES.get((config.model_type, None))
    if family is None:
        raise SaccadeError(
            f"model_type={config.model_type!r} has no family in saccade; known: {', '.join(list_families())}. "
            "docs/add-a-family.md says how to add one"
        )
    return family


def get_family(model: nn.Module) -> Family:
    """The family of a model, through PEFT and parallel wrappers.

    Raises:
        SaccadeError: if no family is known for it.
    """
    stock = stock_model(model)
    return family_class(stock.config)(stock)


def stock_model(model: nn.Module) -> PreTrainedModel:
    """The stock transformers model inside DDP, FSDP, DeepSpeed, compile and PEFT wrappers."""
    while isinstance(inner := getattr(model, "_orig_mod", getattr(model, "module", None)), nn.Module):
        model = inner
    return model.get_base_model() if hasattr(model, "get_base_model") else model


for _family in (
    ChainOfSightFamily,
    Gemma3Family,
    Gemma4Family,
    Glm4vFamily,
    Idefics3Family,
    InternVLFamily,
    Lfm2VlFamily,
    LlavaFamily,
    LlavaNextFamily,
    LlavaNextVideoFamily,
    LlavaOnevisionFamily,
    Mistral3Family,
    Ovis2Family,
    PixtralFamily,
    Qwen2VLFamily,
    Qwen3VLFamily,
    Qwen3VLMoeFamily,
    Qwen35Family,
):
    register_family(_family)

__all__ = [
    "ChainOfSightFamily",
    "Encoded",
    "Family",
    "Gemma3Family",
    "Gemma4Family",
    "Glm4vFamily",
    "Idefics3Family",
    "InternVLFamily",
    "Lfm2VlFamily",
    "LlavaFamily",
    "LlavaNextFamily",
    "LlavaNextVideoFamily",
    "LlavaOnevisionFamily",
    "Mistral3Family",
    "Ovis2Family",
    "PixtralFamily",
    "Qwen2VLFamily",
    "Qwen3VLFamily",
    "Qwen3VLMoeFamily",
    "Qwen35Family",
    "family_class",
    "get_family",
    "list_families",
    "register_family",
    "stock_model",
    "use_released_names",
]
