"""Idefics3 and SmolVLM: crops and a thumbnail, pixel-shuffled, with a marker token before each in the text."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from saccade.families.base import Family, square_grid
from saccade.families.encoded import Encoded
from saccade.tokens import VisualContext


class Idefics3Family(Family):
    """`Idefics3ForConditionalGeneration` and `SmolVLMForConditionalGeneration`.

    A row is a crop or a thumbnail; the rows of one image form a group. The markers between them are kept.
    """

    name = "idefics3"
    model_types = ("idefics3", "smolvlm")
    vision_inputs = ("pixel_values", "pixel_attention_mask")
    text_between_crops = True
    thumbnail = -1

    @property
    def language_layers(self) -> nn.ModuleList:
        return self.language_model.layers

    @property
    def language_model(self) -> nn.Module:
        return self.model.base_model.text_model

    @property
    def projector(self) -> nn.Module:
        return self.model.base_model.connector

    @property
    def vision_tower(self) -> nn.Module:
        return self.model.base_model.vision_model

    def _encode(self, inputs: Mapping[str, Any]) -> Encoded:
        given = {name: inputs[name] for name in self.vision_inputs if inputs.get(name) is not None}
        # One (n_i, D) per sample; one (R, N, D) before transformers 5.20, whose forward does not accept a list.
        samples = self.model.get_image_features(**given, return_dict=True).pooler_output
        height, width = (edge // self._side for edge in inputs["pixel_values"].shape[-2:])
        tokens = torch.cat(tuple(samples))
        features = tokens.reshape(-1, height * width, tokens.shape[-1])
        context = VisualContext(
            features=features,
            grid=square_grid(features.shape[0], height, width, features.device),
            group=self._groups(inputs["input_ids"], features.shape[0]),
        )
        whole = samples if isinstance(samples, Tensor) else list(samples)
        return Encoded(context, {"image": BaseModelOutputWithPooling(pooler_output=whole)})

    @property
    def _side(self) -> int:
        """Edge length in pixels of the area that becomes one token."""
        return self.model.config.vision_config.patch_size * self.model.config.scale_factor

    def _groups(self, input_ids: Tensor, rows: int) -> Tensor | None:
        """The image of each crop: long `(rows,)`, or None if the number of placeholder runs differs from `rows`.

        An image ends with its thumbnail. The config does not name the thumbnail's marker; it is the token before the
        last run.
        """
        placeholder = self.placeholder(input_ids)
        before = torch.nn.functional.pad(input_ids[:, :-1], (1, 0), value=-1)
        marker = before[placeholder & (before != self.placeholder_id)]
        if marker.numel() != rows or rows == 0:
            return None
        thumbnail = (marker == marker[-1]).long()
        return thumbnail.cumsum(dim=0) - thumbnail

    @property
    def vision_feature_layers(self) -> tuple[int, ...]:
        return ()
