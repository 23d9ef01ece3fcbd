"""Idefics3 and SmolVLM: crops and a thumbnail, pixel-shuffled, with a marker token before each in the text."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from saccade.families.base import Encoded, Family, joined_rows, positions_from_mask, square_grid
from saccade.families.collect import AttentionBlock, encoder_block
from saccade.families.resolution import low_resolution_rows, shrink_images
from saccade.reducers.downsample import lower_grid
from saccade.tokens import TokenBudget, VisualContext


class Idefics3Family(Family):
    """`Idefics3ForConditionalGeneration` and `SmolVLMForConditionalGeneration`.

    A row is a crop or a thumbnail; those of one image are a group. The markers between them stay as they are.
    """

    name = "idefics3"
    model_types = ("idefics3", "smolvlm")
    vision_inputs = ("pixel_values", "pixel_attention_mask")

    @property
    def placeholder_id(self) -> int:
        return self.model.config.image_token_id

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
        # One (n_i, D) per sample; one (R, N, D) before transformers 5.20, whose forward takes no list.
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

    def _encode_low_resolution(self, inputs: Mapping[str, Any], budget: TokenBudget) -> Encoded:
        """The tower places patches by their share of the edge, whatever the size; the pixel shuffle takes squares."""
        pixels, mask = inputs["pixel_values"], inputs.get("pixel_attention_mask")
        full = (pixels.shape[-2] // self._side, pixels.shape[-1] // self._side)
        lower = lower_grid(*full, budget.count(full[0] * full[1]), square=True)
        size = (lower[0] * self._side, lower[1] * self._side)
        small = shrink_images(pixels.flatten(0, 1), *size).unflatten(0, pixels.shape[:2])
        if mask is not None:
            mask = torch.nn.functional.interpolate(mask.float(), size=size, mode="nearest").to(mask.dtype)
        samples = self.model.get_image_features(small, mask, return_dict=True).pooler_output
        tokens = torch.cat(tuple(samples))
        features = tokens.reshape(-1, lower[0] * lower[1], tokens.shape[-1])
        return low_resolution_rows(features, full, lower, self._groups(inputs["input_ids"], features.shape[0]))

    @property
    def _side(self) -> int:
        """Pixels along an edge of what becomes one token."""
        return self.model.config.vision_config.patch_size * self.model.config.scale_factor

    def _groups(self, input_ids: Tensor, rows: int) -> Tensor | None:
        """The image of each crop: long `(rows,)`, or None if the placeholders stand in another number of runs.

        An image ends with its thumbnail, whose marker the config does not name. It is the token before the last run.
        """
        placeholder = self.placeholder(input_ids)
        before = torch.nn.functional.pad(input_ids[:, :-1], (1, 0), value=-1)
        marker = before[placeholder & (before != self.placeholder_id)]
        if marker.numel() != rows or rows == 0:
            return None
        thumbnail = (marker == marker[-1]).long()
        return thumbnail.cumsum(dim=0) - thumbnail

    def wrap_features(
        self, features: Sequence[Tensor], encoded: Encoded, deeper: Sequence[Sequence[Tensor]] = ()
    ) -> dict[str, BaseModelOutputWithPooling]:
        return {"image": BaseModelOutputWithPooling(pooler_output=joined_rows(features))}

    def attention_block(self) -> AttentionBlock | None:
        return encoder_block(self.vision_tower, -1)

    @property
    def tower_states(self) -> tuple[int, ...]:
        return ()

    def full_positions(self, inputs: Mapping[str, Any]) -> Tensor:
        return positions_from_mask(inputs["attention_mask"])
