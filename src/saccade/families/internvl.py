"""InternVL: crops and a thumbnail of fixed size, each pixel-shuffled to a quarter of its patches."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from saccade.families.base import Family, run_numbers, square_grid
from saccade.families.encoded import AttentionBlock, Encoded


class InternVLFamily(Family):
    """`InternVLForConditionalGeneration`: a row is a crop, a thumbnail or a frame; one `<img>...</img>` is a group."""

    name = "internvl"
    model_types = ("internvl",)
    joins_pixels = True
    thumbnail = -1
    projects_tokens = True

    def _encode(self, inputs: Mapping[str, Any]) -> Encoded:
        pixels = inputs["pixel_values"]
        features = self.model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output  # (R, N, D)
        rows, tokens, _ = features.shape
        height, width = self._grid(pixels)
        grid = square_grid(rows, height, width, features.device)
        return self.as_encoded(features, grid=grid, group=self._groups(inputs["input_ids"], rows, tokens))

    @property
    def _patch(self) -> tuple[int, int]:
        """Height and width of a patch in pixels."""
        return tuple(self.model.config.vision_config.patch_size)

    def _grid(self, pixels: Tensor) -> tuple[int, int]:
        """Rows and columns of tokens of each crop `(R, C, H, W)`."""
        ratio = self.model.config.downsample_ratio
        height, width = (
            int(edge // patch * ratio) for edge, patch in zip(pixels.shape[-2:], self._patch, strict=True)
        )
        return height, width

    def _groups(self, input_ids: Tensor, rows: int, tokens: int) -> Tensor | None:
        """The image of each crop: long `(rows,)`, the index of its unbroken run of placeholders.

        None (one image per crop) if placeholders and visual tokens differ in number; the splice reports that clearly.
        """
        runs = run_numbers(self.placeholder(input_ids))
        return runs.reshape(rows, tokens)[:, 0] if runs.numel() == rows * tokens else None

    def attention_block(self) -> AttentionBlock | None:
        layer = self.model.config.vision_feature_layer
        layers = self.vision_tower.encoder.layer
        states = len(layers) + 1  # hidden_states[0] is the input of the first layer
        attention = layers[max(layer % states - 1, 0)].attention
        # The norms are identities where the model has none.
        return AttentionBlock(attention, attention.q_norm, attention.k_norm, attention.num_heads, class_token=True)

    @property
    def vision_feature_layers(self) -> tuple[int, ...]:
        layer = self.model.config.vision_feature_layer
        return () if layer == -1 else (layer,)
