"""Chain-of-Sight: a LLaVA whose projector looks at the image at several scales (arXiv 2407.15819).

Stock transformers has no such model, so configuration and model are defined here, as small as the stock classes allow,
and registered with the Auto classes: they load these folders once `saccade` has been imported. The image processor,
the tokenizer and the processor are stock.

Shapes: R images of side x side patches of width Dv; T visual tokens of width D.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForImageTextToText, LlavaConfig, LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from saccade.errors import SaccadeError
from saccade.families.encoded import Encoded, Patches
from saccade.families.llava import LlavaFamily
from saccade.families.rows import FeatureRow, assemble, tokens_to_rows

SCALES = ((1, 4), (4, 2))
"""The published scales at 224 px: 16 queries for the whole map, and 4 for each of 4 x 4 windows; 80 tokens."""
FINEST = 2
"""Patches along an edge of a window of the scale that `saccade grow` adds."""


class ChainOfSightConfig(LlavaConfig):
    """Configuration of a LLaVA with a multi-scale resampler.

    Args:
        scales: for each scale, coarse to fine, the number of windows along an edge of the map of patches, and of
            queries along an edge of a window. By default `SCALES`.

    Raises:
        SaccadeError: if a scale is not two positive numbers, scales are not ordered from coarse to fine, or the
            windows of one do not divide the map of patches.
    """

    model_type = "chain_of_sight"
    scales: list | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.scales = [list(scale) for scale in self.scales or SCALES]
        side = self.patches_side
        for scale in self.scales:
            if len(scale) != 2 or not all(isinstance(count, int) and count > 0 for count in scale) or side % scale[0]:
                raise SaccadeError(
                    f"scales={self.scales!r}: each is a number of windows along an edge, which divides the {side} "
                    f"patches of the vision tower, and one of queries in a window; {scale!r} is not"
                )
        if len(self.scales) < 2 or self.sides != sorted(set(self.sides)):
            raise SaccadeError(f"scales={self.scales!r}: give two or more, from coarse to fine, such as {SCALES!r}")
        self.image_seq_length = sum(edge * edge for edge in self.sides)

    @property
    def patches_side(self) -> int:
        """Patches along an edge of the image."""
        return self.vision_config.image_size // self.vision_config.patch_size

    @property
    def sides(self) -> list[int]:
        """Visual tokens along an edge of each scale."""
        return [windows * queries for windows, queries in self.scales]

    @property
    def tokens_beyond_patches(self) -> int:
        """Visual tokens of an image minus its patches, usually below zero."""
        return self.image_seq_length - self.patches_side**2


def grown_config(config: ChainOfSightConfig, image_size: int) -> ChainOfSightConfig:
    """The configuration for `image_size` pixels along an edge.

    Raises:
        SaccadeError: if that is not a multiple of the size before, or the finest scale is there already.
    """
    vision = config.vision_config
    times, remainder = divmod(image_size, vision.image_size)
    if times < 1 or remainder:
        raise SaccadeError(
            f"image_size={image_size!r}: give a multiple of the {vision.image_size} pixels of this model"
        )
    windows, beyond = divmod(image_size // vision.patch_size, FINEST)
    scales = [[count if count == 1 else count * times, queries] for count, queries in config.scales]
    if beyond or windows <= scales[-1][0]:
        raise SaccadeError(
            f"image_size={image_size!r}: {image_size // vision.patch_size} patches along an edge leave no scale finer "
            f"than {scales[-1][0]} windows with windows of {FINEST} x {FINEST} patches; give a larger multiple"
        )
    scales.append([windows, config.scales[-1][1]])
    values = config.to_dict()
    values["vision_config"] |= {"image_size": image_size}
    return ChainOfSightConfig.from_dict({**values, "scales": scales})


class MultiScaleResampler(LlavaMultiModalProjector):
    """Learned queries attend to windows of the patches, and LLaVA's two layers project the result.

    At a scale of w x w windows with q x q queries, each window's queries attend to the patches of that window only:
    `z = Q + softmax(W_q (Q + P) (W_k (x + P))^T / sqrt(d)) W_v x W_o`, with x the normalised patches of the window and
    P a sine-cosine code of the place within it. Scales share everything but their queries, so that one can be added
    (see `grow`). Tokens are those of the scales, coarse to fine, each a map of wq x wq tokens in raster order. The
    place codes, and attention at the width of the tower, are this project's choice.
    """

    def __init__(self, config: ChainOfSightConfig) -> None:
        super().__init__(config)
        vision = config.vision_config
        self.scales, self.heads = config.scales, vision.num_attention_heads
        width = self.linear_1.in_features
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width) for _ in range(4))
        self.queries = nn.ParameterList(nn.Parameter(torch.empty(count**2, width)) for _, count in self.scales)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new queries from N(0, 0.02)."""
        for queries in self.queries:
            nn.init.normal_(queries, std=0.02)

    def forward(self, image_features: Tensor) -> Tensor:
        """Patches `(R, P, Dv)` to visual tokens `(R, T, D)`."""
        side = round(image_features.shape[1] ** 0.5)
        image = self.norm(image_features).unflatten(1, (side, side))
        scales = zip(self.queries, self.scales, strict=True)
        return super().forward(torch.cat([self._attend(image, each, windows) for each, (windows, _) in scales], dim=1))

    def _attend(self, image: Tensor, queries: Tensor, windows: int) -> Tensor:
        """One scale: `(R, side, side, Dv)` to `(R, (wq)^2, Dv)`."""
        rows, side, _, width = image.shape
        edge, count = side // windows, round(queries.shape[0] ** 0.5)
        patches = image.reshape(rows, windows, edge, windows, edge, width).transpose(2, 3).reshape(-1, edge**2, width)
        q = self.q_proj(queries + place_codes(count, width, queries)).expand(len(patches), -1, -1)
        k = self.k_proj(patches + place_codes(edge, width, patches))
        q, k, v = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in (q, k, self.v_proj(patches)))
        seen = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (R w^2, q^2, Dv)
        tokens = queries + self.o_proj(seen)
        tokens = tokens.reshape(rows, windows, windows, count, count, width).transpose(2, 3)
        return tokens.reshape(rows, (windows * count) ** 2, width)


def place_codes(side: int, width: int, like: Tensor) -> Tensor:
    """Sines and cosines of the places of a grid that fills a window: `(side^2, width)`, in the dtype of `like`.

    A place is the same number from 0 to 1 whatever the number of patches of a window, so that codes keep their meaning
    for larger images.
    """
    place = (torch.arange(side, device=like.device) + 0.5) / side
    turns = torch.pi * 2.0 ** torch.linspace(0, 4, width // 4, device=like.device)
    angle = place.unsqueeze(1) * turns
    line = torch.cat((angle.sin(), angle.cos()), dim=1)  # (side, width / 2)
    rows, columns = line.unsqueeze(1).expand(-1, side, -1), line.expand(side, -1, -1)
    codes = torch.cat((rows, columns), dim=2).flatten(0, 1)
    return nn.functional.pad(codes, (0, width - codes.shape[1])).to(like.dtype)


class ChainOfSightForConditionalGeneration(LlavaForConditionalGeneration):
    """The stock LLaVA with a `MultiScaleResampler` as its projector."""

    config_class = ChainOfSightConfig

    def __init__(self, config: ChainOfSightConfig) -> None:
        super().__init__(config)
        self.model.multi_modal_projector = MultiScaleResampler(config)


AutoConfig.register(ChainOfSightConfig.model_type, ChainOfSightConfig)
AutoModelForImageTextToText.register(ChainOfSightConfig, ChainOfSightForConditionalGeneration)


class ChainOfSightFamily(LlavaFamily):
    """Chain-of-Sight: a feature row is a scale of an image, coarse to fine, and those of an image form a group."""

    name = "chain_of_sight"
    model_types = ("chain_of_sight",)
    projects_tokens = False
    has_scales = True

    def _encode(self, inputs: Mapping[str, Any]) -> Encoded:
        pixels = inputs["pixel_values"]
        images = list(self.model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output)
        sides = self.model.config.sides
        rows = [
            FeatureRow(part, (1, side, side), number)
            for number, image in enumerate(images)
            for side, part in zip(sides, image.split([side * side for side in sides]), strict=True)
        ]
        return assemble(rows, {"image": BaseModelOutputWithPooling(pooler_output=images)})

    def patches_to_tokens(self, patches: list[Patches], encoded: Encoded, inputs: Mapping[str, Any]) -> Tensor:
        """Values of the patches, averaged over the part of its window that a token stands for."""
        values = torch.cat([entry.values for entry in patches])
        config = self.model.config
        square = values[:, -(config.patches_side**2) :].transpose(1, 2).unflatten(2, (config.patches_side, -1))
        scales = [adaptive_avg_pool2d(square, side).flatten(2).transpose(1, 2) for side in config.sides]
        return tokens_to_rows({"image": torch.cat(scales, dim=1).flatten(0, 1)}, encoded)
