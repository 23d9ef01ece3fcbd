"""GLM-4.1V, GLM-4.5V and GLM-4.6V: as Qwen2-VL, but a convolution merges the patches."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from saccade.families.encoded import Encoded
from saccade.families.qwen_vl import Qwen2VLFamily
from saccade.families.text_relevance import row_samples


class Glm4vFamily(Qwen2VLFamily):
    """`Glm4vForConditionalGeneration`, `Glm46VForConditionalGeneration` and `Glm4vMoeForConditionalGeneration`.

    The placeholders of videos are those of images, and the stock models take a batch of either. Here the rows of both
    are passed on together, in the order of their placeholders, so that a batch may have both.
    """

    name = "glm4v"
    model_types = ("glm4v", "glm46v", "glm4v_moe")
    mergers = ("post_layernorm", "downsample", "merger")

    @property
    def projector_entry(self) -> nn.Module:
        return self.model.base_model.visual.post_layernorm

    def placeholder(self, input_ids: Tensor) -> Tensor:
        return input_ids == self.placeholder_id

    def _encode_kept(self, inputs: Mapping[str, Any], kept: Mapping[str, Tensor], whole: bool = True) -> Encoded:
        encoded = super()._encode_kept(inputs, kept, whole)
        context = encoded.context
        known = replace(
            encoded, context=context.replace(sample=row_samples(context, self.placeholder(inputs["input_ids"])))
        )
        if not whole:
            return known
        rows = [row[valid] for row, valid in zip(context.features, context.valid, strict=True)]
        return replace(known, outputs=self.wrap_features(rows, known))

    def _features_of(self, pixels: Tensor, grid: Tensor, kept: Tensor) -> list[list[Tensor]]:
        """As the stock model does, the tower is given each frame of a video as an image."""
        frames = grid[:, 0].tolist()
        each = grid.repeat_interleave(grid[:, 0], dim=0)
        each[:, 0] = 1
        (rows,) = super()._features_of(pixels, each, kept)
        pieces = iter(rows)
        return [[torch.cat([next(pieces) for _ in range(count)]) for count in frames]]

    def _video_tokens(self, inputs: Mapping[str, Any]) -> Tensor:
        kinds = inputs.get("mm_token_type_ids")
        return torch.zeros_like(inputs["input_ids"], dtype=torch.bool) if kinds is None else kinds == 2

    def wrap_features(
        self, features: Sequence[Tensor], encoded: Encoded, deepstack_features: Sequence[Sequence[Tensor]] = ()
    ) -> dict[str, BaseModelOutputWithPooling]:
        """As the features of one image per sample.

        To repeat a prompt, `generate` of these models repeats each of its images in place (A, A, B, B for A, B), so
        that its sequences would share them out among themselves.
        """
        by_sample: dict[int, list[Tensor]] = {}
        for sample, row in zip(encoded.context.sample.tolist(), features, strict=True):
            by_sample.setdefault(sample, []).append(row)
        return {"image": BaseModelOutputWithPooling(pooler_output=[torch.cat(rows) for rows in by_sample.values()])}
