"""LLaVA-1.5: one image, one row of visual tokens, one-dimensional positions."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from saccade.errors import SaccadeError
from saccade.families.base import Family, square_grid
from saccade.families.encoded import AttentionBlock, Encoded
from saccade.families.tower import used_states
from saccade.families.vision_attention import encoder_block
from saccade.tokens import VisualContext


class LlavaFamily(Family):
    """`LlavaForConditionalGeneration` with a tower that takes images of one size, such as CLIP or SigLIP.

    Raises:
        SaccadeError: for a Pixtral tower, whose images vary in size.
    """

    name = "llava"
    model_types = ("llava",)
    takes_list = True
    projects_tokens = True
    unpadded = None

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        tower = model.config.vision_config.model_type
        if tower == "pixtral":
            raise SaccadeError(
                f"vision_config.model_type={tower!r}: this family knows LLaVA with images of one size only; "
                "docs/add-a-family.md says how to add one for images of many"
            )

    def _encode(self, inputs: Mapping[str, Any]) -> Encoded:
        config = self.model.config
        outputs = self.model.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True)
        features = torch.stack(tuple(outputs.pooler_output))  # (R, N, D)
        patch = config.vision_config.patch_size
        height, width = inputs["pixel_values"].shape[-2:]
        grid = square_grid(features.shape[0], height // patch, width // patch, features.device)
        if features.shape[1] != (height // patch) * (width // patch):
            grid = None  # the features include the class token, so they do not fill a grid; SigLIP has none
        context = VisualContext(features=features, grid=grid)
        return Encoded(context, {"image": BaseModelOutputWithPooling(pooler_output=list(outputs.pooler_output))})

    def attention_block(self) -> AttentionBlock | None:
        return encoder_block(self.vision_tower, self.model.config.vision_feature_layer)

    @property
    def vision_feature_layers(self) -> tuple[int, ...] | None:
        return used_states(self.vision_tower, self.model.config.vision_feature_layer)
