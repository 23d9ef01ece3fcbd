"""LLaVA-NeXT, LLaVA-NeXT-Video and LLaVA-OneVision: a thumbnail of the whole image plus a large picture, in crops.

All give the language model an image as `[thumbnail][line newline][line newline]...`: the tokens of the thumbnail,
then the lines of the large picture without its padding, a newline after each. A feature row is one of the two
pictures, and the two form one group. The newlines are `protected` tokens of the row, see `saccade.reducers.reduce`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.image_processing_utils import select_best_resolution
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from saccade.families.base import Family, joined_rows
from saccade.families.encoded import Encoded, Patches
from saccade.families.rows import FeatureRow, assemble, split_kinds, tokens_to_rows
from saccade.families.tower import used_states


class LlavaNextFamily(Family):
    """`LlavaNextForConditionalGeneration`: anyres images, unpadded, with newlines."""

    name = "llava_next"
    model_types = ("llava_next",)
    takes_list = True
    image_inputs: tuple[str, ...] = ("pixel_values", "image_sizes")
    vision_inputs = image_inputs
    thumbnail = 0
    projects_tokens = True

    def _encode(self, inputs: Mapping[str, Any]) -> Encoded:
        rows, outputs = self._image_rows(inputs)
        return assemble(rows, {"image": outputs})

    def patches_to_tokens(self, patches: list[Patches], encoded: Encoded, inputs: Mapping[str, Any]) -> Tensor:
        """Values packed as the model packs features, with zeros for newlines."""
        return tokens_to_rows({"image": self._pack(patches[0], inputs)}, encoded)

    def _pack(self, patches: Patches, inputs: Mapping[str, Any]) -> Tensor:
        """Convert values of the crops' patches to values `(S, C)` of the tokens of all images, concatenated."""
        values = patches.values[:, 1:] if patches.class_token else patches.values
        sizes = inputs["image_sizes"]
        config = self.model.config
        crops = [
            image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size) if cut else 1
            for size, cut in zip(sizes, self._cut(inputs, len(sizes)), strict=True)
        ]
        newline = values.new_zeros(values.shape[-1])
        images, _ = self.model.base_model.pack_image_features(
            values.split(crops), sizes, image_newline=newline, **self.packing
        )
        return torch.cat(images)

    @property
    def packing(self) -> dict[str, Any]:
        """Further options of the model's `pack_image_features`."""
        return {"vision_feature_select_strategy": self.model.config.vision_feature_select_strategy}

    @property
    def vision_feature_layers(self) -> tuple[int, ...] | None:
        return used_states(self.vision_tower, self.model.config.vision_feature_layer)

    @property
    def _side(self) -> int:
        """Tokens along an edge of a crop."""
        vision = self.model.config.vision_config
        return vision.image_size // vision.patch_size

    def _cut(self, inputs: Mapping[str, Any], images: int) -> list[bool]:
        """Whether each image has crops besides its thumbnail."""
        return [True] * images

    def _image_rows(self, inputs: Mapping[str, Any]) -> tuple[list[FeatureRow], BaseModelOutputWithPooling]:
        """The rows of all images, and the model's own output for them."""
        sizes = torch.as_tensor(inputs["image_sizes"]).tolist()
        given = {name: inputs[name] for name in self.image_inputs if inputs.get(name) is not None}
        images = list(self.model.get_image_features(**given, return_dict=True).pooler_output)
        numbered = enumerate(zip(images, sizes, self._cut(inputs, len(sizes)), strict=True))
        rows = [row for number, (image, size, cut) in numbered for row in self._pictures(image, size, cut, number)]
        return rows, BaseModelOutputWithPooling(pooler_output=images)

    def _pictures(self, image: Tensor, size: Sequence[int], cut: bool, number: int) -> list[FeatureRow]:
        """The one or two pictures of an image `(n, D)`."""
        side = self._side
        count = side * side
        if not cut:
            return [FeatureRow(image, (1, side, side), number, newlines=[count])]
        height, width = self._large_grid(size)
        if image.shape[0] != count + height * (width + 1):
            raise ValueError(
                f"an image of {size[0]} x {size[1]} px has {image.shape[0]} tokens, not {side} x {side} and {height} "
                f"lines of {width} with a newline"
            )
        ends = [line * (width + 1) + width for line in range(height)]
        return [
            FeatureRow(image[:count], (1, side, side), number),
            FeatureRow(image[count:], (1, height, width), number, newlines=ends),
        ]

    def _large_grid(self, size: Sequence[int]) -> tuple[int, int]:
        """Lines and columns of the large picture of an image of `size` (height, width) pixels, without padding."""
        config, side = self.model.config, self._side
        best = select_best_resolution(list(size), config.image_grid_pinpoints)
        height, width = (edge // config.vision_config.image_size * side for edge in best)
        if size[1] / size[0] > width / height:
            new_height = int(round(size[0] * (width / size[1]), 7))
            height -= (height - new_height) // 2 * 2
        else:
            new_width = int(round(size[1] * (height / size[0]), 7))
            width -= (width - new_width) // 2 * 2
        return height, width


class LlavaNextVideoFamily(LlavaNextFamily):
    """`LlavaNextVideoForConditionalGeneration`: images as in LLaVA-NeXT; a row of a video is a frame, pooled.

    A video is one group.
    """

    name = "llava_next_video"
    model_types = ("llava_next_video",)
    vision_inputs = (*LlavaNextFamily.image_inputs, "pixel_values_videos")

    def placeholder(self, input_ids: Tensor) -> Tensor:
        return (input_ids == self.placeholder_id) | (input_ids == self.model.config.video_token_id)

    def _encode(self, inputs: Mapping[str, Any]) -> Encoded:
        images, videos, outputs = [], [], {}
        if inputs.get("pixel_values") is not None:
            images, outputs["image"] = self._image_rows(inputs)
        if inputs.get("pixel_values_videos") is not None:
            pixels = inputs["pixel_values_videos"]
            features = self.model.get_video_features(pixels, return_dict=True).pooler_output  # (V, tokens, D)
            outputs["video"] = BaseModelOutputWithPooling(pooler_output=features)
            for number, video in enumerate(features):
                videos += self._frames(video, pixels.shape[1], number)
        ids = inputs["input_ids"]
        is_video = (ids == self.model.config.video_token_id)[self.placeholder(ids)]
        return assemble(images, outputs, videos, is_video)

    def wrap_features(
        self, features: Sequence[Tensor], encoded: Encoded, deepstack_features: Sequence[Sequence[Tensor]] = ()
    ) -> dict[str, BaseModelOutputWithPooling]:
        wrapped = {}
        for kind, rows in split_kinds(features, encoded.videos).items():
            pooled = rows if kind == "image" else joined_rows(rows)
            wrapped[kind] = BaseModelOutputWithPooling(pooler_output=pooled)
        return wrapped

    def patches_to_tokens(self, patches: list[Patches], encoded: Encoded, inputs: Mapping[str, Any]) -> Tensor:
        calls = iter(patches)
        tokens = {}
        if inputs.get("pixel_values") is not None:
            tokens["image"] = self._pack(next(calls), inputs)
        if inputs.get("pixel_values_videos") is not None:
            tokens["video"] = self._frame_values(next(calls), len(inputs["pixel_values_videos"]))
        return tokens_to_rows(tokens, encoded)

    def _frame_values(self, patches: Patches, videos: int) -> Tensor:
        """Values of the patches of all frames as values `(S, C)` of tokens."""
        values = patches.values[:, 1:] if patches.class_token else patches.values
        if values.shape[1] == self._side**2:  # not those that enter the projector, which are pooled already
            square = values.transpose(1, 2).unflatten(2, (self._side, self._side))
            stride = self.model.config.spatial_pool_stride
            values = torch.nn.functional.avg_pool2d(square, stride).flatten(2).transpose(1, 2)
        return values.flatten(0, 1)

    def _frames(self, video: Tensor, count: int, number: int) -> list[FeatureRow]:
        """The frames of a video `(count * n, D)`."""
        side = self._side // self.model.config.spatial_pool_stride
        return [FeatureRow(frame, (1, side, side), number) for frame in video.split(side * side)]


class LlavaOnevisionFamily(LlavaNextVideoFamily):
    """`LlavaOnevisionForConditionalGeneration`: samples with several images use no crops; a row of a video is a frame.

    A video is one group; its single newline belongs to the last frame's row.
    """

    name = "llava_onevision"
    model_types = ("llava_onevision",)
    image_inputs = ("pixel_values", "image_sizes", "batch_num_images")
    vision_inputs = (*image_inputs, "pixel_values_videos", "image_sizes_videos")
    # Large pictures and frames are resized after the projector.
    projects_tokens = False

    def _frame_values(self, patches: Patches, videos: int) -> Tensor:
        values = self.model.base_model.apply_pooling(patches.values)  # (V * F, n, C)
        by_video = values.reshape(videos, -1, values.shape[-1])
        return torch.nn.functional.pad(by_video, (0, 0, 0, 1)).flatten(0, 1)

    @property
    def packing(self) -> dict[str, Any]:
        return {"vision_aspect_ratio": self.model.config.vision_aspect_ratio}

    def _frames(self, video: Tensor, count: int, number: int) -> list[FeatureRow]:
        """The frames of a video `(count * n + 1, D)`."""
        side = math.ceil(self._side / 2)
        pieces = list(video.split([side * side] * (count - 1) + [side * side + 1]))
        last = [*[()] * (count - 1), (side * side,)]
        return [FeatureRow(piece, (1, side, side), number, end) for piece, end in zip(pieces, last, strict=True)]

    def _cut(self, inputs: Mapping[str, Any], images: int) -> list[bool]:
        counts = inputs.get("batch_num_images")
        if counts is None:
            return [True] * images
        return [count == 1 for count in torch.as_tensor(counts).tolist() for _ in range(count)]

    def _large_grid(self, size: Sequence[int]) -> tuple[int, int]:
        height, width = super()._large_grid(size)
        largest = int(self.model.config.vision_aspect_ratio.removeprefix("anyres_max_"))
        ratio = math.sqrt(height * width / (largest * self._side**2))
        return (int(height // ratio), int(width // ratio)) if ratio > 1.1 else (height, width)
