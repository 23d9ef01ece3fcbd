"""LFM2-VL: images or crops at their own aspect ratio, and a language model whose layers mostly are convolutions."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from saccade.families.base import Family, images_of_crops, pad_rows
from saccade.families.encoded import AttentionBlock, Encoded, Patches
from saccade.families.vision_attention import encoder_block
from saccade.tokens import VisualContext


class Lfm2VlFamily(Family):
    """`Lfm2VlForConditionalGeneration`: a row is an image, or a crop or thumbnail of a large one.

    Most layers of the language model convolve each token with the two before it. They know no positions, so a dropped
    token leaves no gap in them: see `Family.recurrent`.
    """

    name = "lfm2_vl"
    model_types = ("lfm2_vl",)
    vision_inputs = ("pixel_values", "spatial_shapes", "pixel_attention_mask")
    takes_list = True
    joins_pixels = True
    text_between_crops = True

    def _encode(self, inputs: Mapping[str, Any]) -> Encoded:
        given = {name: inputs[name] for name in self.vision_inputs}
        rows = list(self.model.get_image_features(**given, return_dict=True).pooler_output)
        features, valid = pad_rows(rows)
        grid = torch.nn.functional.pad(inputs["spatial_shapes"] // self._merged, (1, 0), value=1)
        context = VisualContext(
            features=features,
            valid=valid,
            grid=grid.to(features.device),
            group=images_of_crops(self.placeholder(inputs["input_ids"]), [len(row) for row in rows]),
        )
        return Encoded(context, {"image": BaseModelOutputWithPooling(pooler_output=rows)})

    @property
    def _merged(self) -> int:
        """The edge of a block of patches that becomes one token."""
        return self.model.config.downsample_factor

    def attention_block(self) -> AttentionBlock | None:
        return encoder_block(self.vision_tower, -1)

    def patches_to_tokens(self, patches: list[Patches], encoded: Encoded, inputs: Mapping[str, Any]) -> Tensor:
        """The mean over the block of patches that becomes a token."""
        lengths = encoded.context.valid.sum(dim=1).tolist()
        if patches[0].values.dim() == 4:
            # Of the projector: a grid of patches per image, or one of the blocks of all, padding included.
            tokens = torch.cat([self._means(entry.values[0]) for entry in patches])
            slots = lengths if len(tokens) == sum(lengths) else len(tokens) // len(lengths)
            rows = tokens.split(slots)
        else:
            rows = [
                self._means(values[: height * width].unflatten(0, (height, width)))
                for values, (height, width) in zip(
                    torch.cat([entry.values for entry in patches]), inputs["spatial_shapes"].tolist(), strict=True
                )
            ]
        return pad_rows([row[:length] for row, length in zip(rows, lengths, strict=True)])[0]

    def _means(self, values: Tensor) -> Tensor:
        """Values `(height, width, C)` of patches as the means `(tokens, C)` over blocks, line by line."""
        edge = self._merged
        height, width, channels = values.shape
        blocks = values.reshape(height // edge, edge, width // edge, edge, channels)
        return blocks.mean(dim=(1, 3)).flatten(0, 1)
