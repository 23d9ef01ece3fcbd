"""LLaVA-1.5: one image, one row of visual tokens, one-dimensional positions."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from saccade.families.base import Encoded, Family, positions_from_mask, square_grid
from saccade.families.collect import AttentionBlock, encoder_block
from saccade.tokens import VisualContext


class LlavaFamily(Family):
    """`LlavaForConditionalGeneration` with a CLIP tower of square images."""

    name = "llava"
    model_types = ("llava",)

    @property
    def placeholder_id(self) -> int:
        return self.model.config.image_token_id

    def _encode(self, inputs: Mapping[str, Any]) -> Encoded:
        config = self.model.config
        outputs = self.model.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True)
        features = torch.stack(tuple(outputs.pooler_output))  # (R, N, D)
        encoder_features = None
        if isinstance(config.vision_feature_layer, int) and outputs.hidden_states is not None:
            encoder_features = outputs.hidden_states[config.vision_feature_layer]
            if config.vision_feature_select_strategy == "default":
                encoder_features = encoder_features[:, 1:]
        patch = config.vision_config.patch_size
        height, width = inputs["pixel_values"].shape[-2:]
        grid = square_grid(features.shape[0], height // patch, width // patch, features.device)
        if config.vision_feature_select_strategy != "default":
            grid = None  # the class token is among the features, so they fill no grid
        context = VisualContext(features=features, encoder_features=encoder_features, grid=grid)
        return Encoded(context, {"image": BaseModelOutputWithPooling(pooler_output=list(outputs.pooler_output))})

    def wrap_features(
        self, features: Sequence[Tensor], encoded: Encoded, deeper: Sequence[Sequence[Tensor]] = ()
    ) -> dict[str, BaseModelOutputWithPooling]:
        return {"image": BaseModelOutputWithPooling(pooler_output=list(features))}

    def attention_block(self) -> AttentionBlock | None:
        return encoder_block(self.vision_tower, self.model.config.vision_feature_layer)

    def full_positions(self, inputs: Mapping[str, Any]) -> Tensor:
        return positions_from_mask(inputs["attention_mask"])
