"""LLaVA-1.5, with CLIP or another tower of square patches: an image is a row, positions are one-dimensional."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from saccade.errors import SaccadeError
from saccade.families.base import Family, square_grid
from saccade.families.encoded import Encoded
from saccade.families.tower import used_states

TAKES_PATCHES = ("siglip2_vision_model",)


class LlavaFamily(Family):
    """`LlavaForConditionalGeneration` with a tower that takes pictures of one size, such as CLIP, SigLIP or DINO.

    A class token or registers among the features are not part of the image, so reducers do not get them. There are
    some with `vision_feature_select_strategy="full"`, and with DINO's registers.

    Raises:
        SaccadeError: for a tower that takes patches instead of pictures (SigLIP 2 with its own shapes).
    """

    name = "llava"
    model_types = ("llava",)
    takes_list = True
    projects_tokens = True
    unpadded = None

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        tower = model.config.vision_config.model_type
        if tower in TAKES_PATCHES:
            raise SaccadeError(
                f"vision_config.model_type={tower!r}: LLaVA's processor gives pictures, and this tower takes patches; "
                "SigLIP 2 with a fixed size is a 'siglip_vision_model', use that"
            )

    def _encode(self, inputs: Mapping[str, Any]) -> Encoded:
        config = self.model.config
        outputs = self.model.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True)
        features = list(outputs.pooler_output)
        patch = config.vision_config.patch_size
        height, width = inputs["pixel_values"].shape[-2:]
        rows, tokens, device = len(features), len(features[0]), features[0].device
        grid = square_grid(rows, height // patch, width // patch, device)
        before = tokens - (height // patch) * (width // patch)
        protected = None
        if before > 0:
            protected = (torch.arange(tokens, device=device) < before).expand(rows, -1)
        elif before < 0:
            grid = None  # a tower that merges patches, or the first patch left out as if it were a class token
        return self.as_encoded(features, grid=grid, protected=protected)

    @property
    def vision_feature_layers(self) -> tuple[int, ...] | None:
        return used_states(self.vision_tower, self.model.config.vision_feature_layer)
