"""Gemma 4: images at their own aspect ratio, as patches with positions, pooled to tokens."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from saccade.errors import SaccadeError
from saccade.families.base import Family, pad_rows
from saccade.families.encoded import AttentionBlock, Encoded, Patches


class Gemma4Family(Family):
    """`Gemma4ForConditionalGeneration`; videos and sound are refused.

    `mm_token_type_ids` mark the tokens of images. In the larger models these attend to one another in both directions
    within sliding windows, which count tokens, not positions, as in Gemma 3.
    """

    name = "gemma4"
    model_types = ("gemma4",)
    vision_inputs = ("pixel_values", "image_position_ids", "pixel_values_videos", "input_features")
    token_inputs: Mapping[str, int] = {"mm_token_type_ids": 0}
    takes_list = True

    @property
    def bidirectional_image_attention(self) -> bool:
        return self.model.config.get_text_config().use_bidirectional_attention == "vision"

    @property
    def projector(self) -> nn.Module:
        return self.model.base_model.embed_vision

    def _encode(self, inputs: Mapping[str, Any]) -> Encoded:
        for name in ("pixel_values_videos", "input_features"):
            if inputs.get(name) is not None:
                raise SaccadeError(f"model_type='gemma4': {name!r} is not supported: give text and images only")
        given = {name: inputs[name] for name in ("pixel_values", "image_position_ids")}
        rows = list(self.model.get_image_features(**given, return_dict=True).pooler_output)
        return self.as_encoded(rows, grid=self._grid(inputs))

    @property
    def _pooled(self) -> int:
        """The edge of a block of patches that becomes one token."""
        return self.model.config.vision_config.pooling_kernel_size

    def _grid(self, inputs: Mapping[str, Any]) -> Tensor:
        """Frames, rows and columns of the tokens of each image: long `(R, 3)`."""
        last = inputs["image_position_ids"].amax(dim=1)  # (R, 2), column and row
        return torch.nn.functional.pad((last.flip(1) + 1) // self._pooled, (1, 0), value=1)

    def attention_block(self) -> AttentionBlock | None:
        block = super().attention_block()
        attention = block.attention
        return replace(block, query=attention.q_norm, key=attention.k_norm, scale=attention.scaling, axes=2)

    def patches_to_tokens(self, patches: list[Patches], encoded: Encoded, inputs: Mapping[str, Any]) -> Tensor:
        """The mean over the block of patches that becomes a token; what enters the projector is pooled already."""
        (values,) = (entry.values for entry in patches)
        context = encoded.context
        if values.dim() == 2:
            return pad_rows(values.split(context.valid.sum(dim=1).tolist()))[0]
        positions = inputs["image_position_ids"]
        real = (positions >= 0).all(dim=2)
        column, row = (positions.clamp(min=0) // self._pooled).unbind(dim=2)
        token = row * context.grid[:, 2:] + column
        rows, _, width = values.shape
        total = values.new_zeros(rows, context.shape[1], width)
        index = token.masked_fill(~real, 0).unsqueeze(2).expand(-1, -1, width)
        return total.scatter_add(1, index, values.masked_fill(~real.unsqueeze(2), 0)) / self._pooled**2

    def logits(self, hidden_states: Tensor) -> Tensor:
        values = super().logits(hidden_states)
        bound = self.model.config.get_text_config().final_logit_softcapping
        return values if bound is None else torch.tanh(values / bound) * bound
