"""Ovis 2: a thumbnail and crops, whose tokens are mixtures of a visual vocabulary, with markers between them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from saccade.families.base import Family, images_of_crops, joined_rows, square_grid
from saccade.families.encoded import Encoded, Patches
from saccade.tokens import VisualContext


class Ovis2Family(Family):
    """`Ovis2ForConditionalGeneration`: a row is a thumbnail or a crop; the rows of one image form a group.

    The markers before, between and after them are text with embeddings from the visual vocabulary, and always kept.
    """

    name = "ovis2"
    model_types = ("ovis2",)
    joins_pixels = True
    text_between_crops = True
    thumbnail = 0

    @property
    def projector(self) -> nn.Module:
        """The head over the visual vocabulary, which is inside the vision module here, and the vocabulary's table."""
        whole = self.model.base_model
        return nn.ModuleList([whole.vision_tower.head_linear, whole.vision_tower.head_norm, self._table])

    @property
    def projector_entry(self) -> nn.Module:
        return self.model.base_model.vision_tower.head_linear

    @property
    def vision_tower(self) -> nn.Module:
        """The vision module without its head, so that freezing it leaves the head trainable."""
        return self.model.base_model.vision_tower.transformer

    @property
    def _table(self) -> nn.Module:
        return self.model.base_model.visual_embeddings_table

    @property
    def projects_tokens(self) -> bool:
        """Whether words of the visual vocabulary are mixed, as in the released models, and not drawn or chosen."""
        return self.model.config.vision_config.tokenize_function == "softmax"

    def project(self, encoder_features: Tensor) -> Tensor:
        if not self.projects_tokens:
            return super().project(encoder_features)  # raises the error that explains why
        tower = self.model.base_model.vision_tower
        shares = tower.head_norm(tower.head_linear(encoder_features)).softmax(dim=-1)
        return shares @ self._table.weight[: shares.shape[-1]]  # the rest of the table is of the markers

    def _encode(self, inputs: Mapping[str, Any]) -> Encoded:
        output = self.model.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True)
        features = output.pooler_output  # (R, N, D)
        rows, tokens, _ = features.shape
        side = round(tokens**0.5)
        context = VisualContext(
            features=features,
            grid=square_grid(rows, side, side, features.device),
            group=images_of_crops(self.placeholder(inputs["input_ids"]), [tokens] * rows),
        )
        markers = output.visual_indicator_features
        return Encoded(context, {"image": self._wrap(features, markers)}, markers=markers)

    def wrap_features(
        self, features: Sequence[Tensor], encoded: Encoded, deepstack_features: Sequence[Sequence[Tensor]] = ()
    ) -> dict[str, BaseModelOutputWithPooling]:
        return {"image": self._wrap(joined_rows(features), encoded.markers)}

    def _wrap(self, features: Tensor, markers: Tensor) -> BaseModelOutputWithPooling:
        """The model's output for features `(R, n, D)`, with those of the markers `(5, D)`."""
        from transformers.models.ovis2.modeling_ovis2 import BaseModelOutputWithVisualIndicatorFeatures

        return BaseModelOutputWithVisualIndicatorFeatures(pooler_output=features, visual_indicator_features=markers)

    def patches_to_tokens(self, patches: list[Patches], encoded: Encoded, inputs: Mapping[str, Any]) -> Tensor:
        """The mean over the block of patches that becomes a token; blocks at the edge may be smaller."""
        values = torch.cat([entry.values for entry in patches])
        if values.shape[1] == encoded.context.shape[1]:  # not merged, or of the head, where they are merged already
            return values
        side = round(values.shape[1] ** 0.5)
        square = values.transpose(1, 2).unflatten(2, (side, side))
        stride = self.model.config.vision_config.hidden_stride
        return torch.nn.functional.avg_pool2d(square, stride, ceil_mode=True).flatten(2).transpose(1, 2)

    @property
    def vision_feature_layers(self) -> tuple[int, ...]:
        return ()
