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
    drops_only_token = True
    """Whether the stock model fails on a batch of one token: it drops the dimension of tokens there."""

    def _encode(self, inputs: Mapping[str, Any]) -> Encoded:
        sizes, pixels = inputs["image_sizes"], inputs["pixel_values"]
        edge = self.model.config.vision_config.patch_size * self._merged
        only = self.drops_only_token and pixels.shape[0] == 1 and tuple(pixels.shape[-2:]) == (edge, edge)
        times = 2 if only else 1  # beside itself
        output = self.model.get_image_features(
            pixel_values=pixels.repeat(times, 1, 1, 1), image_sizes=sizes.repeat(times, 1), return_dict=True
        )
        rows = list(output.pooler_output)[: len(sizes)]
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
        counts = [rows * columns * edge**2 for rows, columns in shapes]
        images = values[: sum(counts)].split(counts)
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
    drops_only_token = False

    @property
    def _merged(self) -> int:
        return 1
