"""LFM2-VL: images or crops at their own aspect ratio, and a language model whose layers mostly are convolutions."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from saccade.families.base import Family, block_means, images_of_crops, pad_rows
from saccade.families.encoded import Encoded, Patches


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
    thumbnail = -1

    def _encode(self, inputs: Mapping[str, Any]) -> Encoded:
        given = {name: inputs[name] for name in self.vision_inputs}
        rows = list(self.model.get_image_features(**given, return_dict=True).pooler_output)
        grid = torch.nn.functional.pad(inputs["spatial_shapes"] // self._merged, (1, 0), value=1)
        group = images_of_crops(self.placeholder(inputs["input_ids"]), [len(row) for row in rows])
        return self.as_encoded(rows, grid=grid.to(rows[0].device), group=group)

    @property
    def _merged(self) -> int:
        """The edge of a block of patches that becomes one token."""
        return self.model.config.downsample_factor

    def patches_to_tokens(self, patches: list[Patches], encoded: Encoded, inputs: Mapping[str, Any]) -> Tensor:
        """The mean over the block of patches that becomes a token."""
        lengths = encoded.context.valid.sum(dim=1).tolist()
        if patches[0].values.dim() == 4:
            # Of the projector: a grid of patches per image, or one of the blocks of all, padding included.
            tokens = torch.cat([block_means(entry.values[0], self._merged) for entry in patches])
            slots = lengths if len(tokens) == sum(lengths) else len(tokens) // len(lengths)
            rows = tokens.split(slots)
        else:
            rows = [
                block_means(values[: height * width].unflatten(0, (height, width)), self._merged)
                for values, (height, width) in zip(
                    torch.cat([entry.values for entry in patches]), inputs["spatial_shapes"].tolist(), strict=True
                )
            ]
        return pad_rows([row[:length] for row, length in zip(rows, lengths, strict=True)])[0]
