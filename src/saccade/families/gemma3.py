"""Gemma 3: images of fixed size, pooled to a square of tokens that attend to each other in both directions."""

import math
from collections.abc import Mapping
from typing import Any

from saccade.families.base import Family, square_grid
from saccade.families.encoded import Encoded


class Gemma3Family(Family):
    """`Gemma3ForConditionalGeneration`.

    `token_type_ids` mark the tokens of images. The isolator's rows are not marked: they precede the image like text
    and are attended to causally. Sliding windows count tokens, not positions, so in a shortened sequence they reach
    further back.
    """

    name = "gemma3"
    model_types = ("gemma3",)
    token_inputs: Mapping[str, int] = {"token_type_ids": 0}
    bidirectional_image_attention = True
    joins_pixels = True
    unpadded = "are resized to a square by a processor that cannot pad, and nothing is cut off"

    def _encode(self, inputs: Mapping[str, Any]) -> Encoded:
        outputs = self.model.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True)
        features = outputs.pooler_output  # (R, N, D)
        side = math.isqrt(features.shape[1])
        return self.as_encoded(features, grid=square_grid(features.shape[0], side, side, features.device))

    @property
    def vision_feature_layers(self) -> tuple[int, ...]:
        return ()
