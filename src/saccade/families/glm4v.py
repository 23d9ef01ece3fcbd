"""GLM-4.1V, GLM-4.5V and GLM-4.6V: as Qwen2-VL, but a convolution merges the patches."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from saccade.errors import SaccadeError
from saccade.families.encoded import Encoded
from saccade.families.qwen_vl import Qwen2VLFamily
from saccade.families.text_relevance import row_samples


class Glm4vFamily(Qwen2VLFamily):
    """`Glm4vForConditionalGeneration`, `Glm46VForConditionalGeneration` and `Glm4vMoeForConditionalGeneration`.

    Videos are refused: their placeholders are those of images, and the stock models cannot take both in one batch.
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
        if inputs.get("pixel_values_videos") is not None:
            raise SaccadeError(
                f"model_type={self.model.config.model_type!r}: videos are not supported, since their placeholders are "
                "those of images; leave them out, or give frames as images"
            )
        encoded = super()._encode_kept(inputs, kept, whole)
        context = encoded.context
        known = replace(
            encoded, context=context.replace(sample=row_samples(context, self.placeholder(inputs["input_ids"])))
        )
        if not whole:
            return known
        return replace(known, outputs=self.wrap_features(encoded.outputs["image"].pooler_output, known))

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
