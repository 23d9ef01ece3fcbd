"""Mistral 3 and LLaVA with a Pixtral tower: images of any size, and text after each line of their tokens."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from saccade.families.base import Family, block_means, pad_rows
from saccade.families.encoded import Encoded, Patches


class Mistral3Family(Family):
    """`Mistral3ForConditionalGeneration` with a Pixtral tower.

    `[IMG_BREAK]` after each line of an image's tokens is text: it is always kept, and not counted among them.
    """

    name = "mistral3"
    model_types = ("mistral3",)
    takes_list = True
    text_between_lines = True

    def _encode(self, inputs: Mapping[str, Any]) -> Encoded:
        sizes = inputs["image_sizes"]
        output = self.model.get_image_features(
            pixel_values=inputs["pixel_values"], image_sizes=sizes, return_dict=True
        )
        rows = list(output.pooler_output)
        edge = self.model.config.vision_config.patch_size * self._merged
        grid = torch.cat((torch.ones_like(sizes[:, :1]), sizes // edge), dim=1)
        return self.as_encoded(rows, grid=grid.to(rows[0].device))

    @property
    def _merged(self) -> int:
        """The edge of a block of patches that becomes one token."""
        return self.model.config.spatial_merge_size

    def patches_to_tokens(self, patches: list[Patches], encoded: Encoded, inputs: Mapping[str, Any]) -> Tensor:
        """The mean over the block of patches that becomes a token."""
        edge, width = self._merged, patches[0].values.shape[-1]
        shapes = [tuple(shape) for shape in encoded.context.grid[:, 1:].tolist()]
        values = torch.cat([entry.values.reshape(-1, width) for entry in patches])
        images = values.split([rows * columns * edge**2 for rows, columns in shapes])
        squares = [
            image.unflatten(0, (rows * edge, columns * edge))
            for image, (rows, columns) in zip(images, shapes, strict=True)
        ]
        return pad_rows([block_means(square, edge) for square in squares])[0]


class PixtralFamily(Mistral3Family):
    """`LlavaForConditionalGeneration` with a Pixtral tower, each of whose patches becomes a token."""

    name = "pixtral"
    model_types = ("llava",)
    towers = ("pixtral",)
    projects_tokens = True

    @property
    def _merged(self) -> int:
        return 1
