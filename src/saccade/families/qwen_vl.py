"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: dynamic resolution, a patch merger, three position axes, images and videos."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.vision_utils import get_vision_window_index

from saccade.errors import SaccadeError
from saccade.families.base import Family
from saccade.families.encoded import AttentionBlock, Encoded, Patches
from saccade.families.rows import FeatureRow, assemble, split_kinds, tokens_to_rows

MERGERS = ("merger", "deepstack_merger_list")
PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


class Qwen2VLFamily(Family):
    """`Qwen2VLForConditionalGeneration` and `Qwen2_5_VLForConditionalGeneration`.

    A feature row is an image or a frame of a video, which here stands for two or more of the clip
    (`temporal_patch_size`). Positions have three axes (time, height, width) and are always those of the
    full sequence.
    """

    name = "qwen2_vl"
    model_types = ("qwen2_vl", "qwen2_5_vl")
    # The grids are not listed: a pass over the full sequence computes its positions from them.
    vision_inputs = ("pixel_values", "pixel_values_videos")
    joins_pixels = True
    uses_mrope = True
    mergers: tuple[str, ...] = MERGERS
    """The children of the vision module that belong to the projector."""

    @property
    def projector(self) -> nn.Module:
        """The mergers, which are inside the vision module here."""
        children = self.model.base_model.visual.named_children()
        return nn.ModuleList(child for name, child in children if name in self.mergers)

    @property
    def projector_entry(self) -> nn.Module:
        return self.model.base_model.visual.merger

    @property
    def vision_tower(self) -> nn.Module:
        """The vision module without the mergers, so that freezing it leaves them trainable."""
        children = self.model.base_model.visual.named_children()
        return nn.ModuleList(child for name, child in children if name not in self.mergers)

    def placeholder(self, input_ids: Tensor) -> Tensor:
        return (input_ids == self.placeholder_id) | (input_ids == self.model.config.video_token_id)

    def _encode(self, inputs: Mapping[str, Any]) -> Encoded:
        rows: dict[str, list[FeatureRow]] = {"image": [], "video": []}
        outputs = {}
        for kind, grid in _given_grids(inputs):
            layers = self._features(kind, inputs[PIXELS[kind]], grid)
            for number, shape in enumerate(self._token_grids(grid)):
                rows[kind] += self._rows([layer[number] for layer in layers], shape, number)
            outputs[kind] = self._wrap(layers)
        return self._assembled(rows, inputs, outputs)

    def _features(self, kind: str, pixels: Tensor, grid: Tensor) -> list[list[Tensor]]:
        """The tokens `(n, D)` of each image or video, for each layer of the language model at which they are added."""
        output = getattr(self.model, f"get_{kind}_features")(pixels, grid, return_dict=True)
        return [list(output.pooler_output), *map(list, self._deepstack(output))]

    def _token_grids(self, grid: Tensor) -> list[tuple[int, int, int]]:
        """Frames, rows and columns of tokens of each image or video."""
        merge = self.model.base_model.visual.spatial_merge_size
        return [(frames, height // merge, width // merge) for frames, height, width in grid.tolist()]

    def _assembled(
        self, rows: Mapping[str, list[FeatureRow]], inputs: Mapping[str, Any], outputs: dict[str, Any]
    ) -> Encoded:
        ids = inputs["input_ids"]
        is_video = (ids == self.model.config.video_token_id)[self.placeholder(ids)]
        parts = assemble(rows["image"], rows["video"], is_video)
        return Encoded(parts.context, outputs, parts.deepstack_features, parts.videos)

    def wrap_features(
        self, features: Sequence[Tensor], encoded: Encoded, deepstack_features: Sequence[Sequence[Tensor]] = ()
    ) -> dict[str, BaseModelOutputWithPooling]:
        layers = [split_kinds(layer, encoded.videos) for layer in (features, *deepstack_features)]
        return {kind: self._wrap([layer[kind] for layer in layers]) for kind in layers[0]}

    def attention_block(self) -> AttentionBlock | None:
        attention = self.model.base_model.visual.blocks[-1].attn
        given = frozenset({"cu_seqlens", "position_embeddings"})
        return AttentionBlock(attention, attention.qkv, attention.qkv, attention.num_heads, False, given)

    def patches_to_tokens(self, patches: list[Patches], encoded: Encoded, inputs: Mapping[str, Any]) -> Tensor:
        """The mean over the patches that the merger combines into one token; they are consecutive."""
        unit = self.model.base_model.visual.spatial_merge_size**2
        tokens = {}
        for (kind, grid), entry in zip(_given_grids(inputs), patches, strict=True):
            merged = entry.values.reshape(-1, unit, entry.values.shape[-1]).mean(dim=1)
            tokens[kind] = merged[self._token_places(grid)]
        return tokens_to_rows(tokens, encoded)

    def _token_places(self, grid: Tensor) -> Tensor | slice:
        """Indices of the tokens in the tower's order, which is by window in Qwen2.5-VL."""
        vision = self.model.config.vision_config
        if not hasattr(vision, "window_size"):
            return slice(None)
        order, _ = get_vision_window_index(grid, vision.spatial_merge_size, vision.window_size, vision.patch_size)
        return order.to(grid.device).argsort()

    def full_positions(self, inputs: Mapping[str, Any]) -> Tensor:
        """Long `(3, B, L)`; `position_ids` of `inputs` if given.

        Raises:
            SaccadeError: if `inputs` lack `mm_token_type_ids`, without which the model cannot compute them.
        """
        if inputs.get("position_ids") is not None:
            return inputs["position_ids"]
        names = ("mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts", "attention_mask")
        if inputs.get("mm_token_type_ids") is None:
            raise SaccadeError(
                "inputs has no 'mm_token_type_ids': the processor of transformers 5.18 or newer returns them beside "
                "'input_ids', pass them on"
            )
        given = {name: inputs[name] for name in names if inputs.get(name) is not None}
        positions, _ = self.model.base_model.get_rope_index(inputs["input_ids"], **given)
        return positions

    def _rows(self, layers: Sequence[Tensor], grid: tuple[int, int, int], number: int) -> list[FeatureRow]:
        """The feature rows of an image or a video, from `(n, D)` per layer: a video has one per frame."""
        frames = zip(*(layer.chunk(grid[0]) for layer in layers), strict=True)
        return [FeatureRow(frame[0], (1, *grid[1:]), number, deepstack_features=frame[1:]) for frame in frames]

    def _deepstack(self, output: BaseModelOutputWithPooling) -> Sequence[Sequence[Tensor]]:
        """Features of each image or video that are added at deeper layers."""
        return ()

    def _wrap(self, layers: Sequence[Sequence[Tensor]]) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(pooler_output=list(layers[0]))


class Qwen3VLFamily(Qwen2VLFamily):
    """`Qwen3VLForConditionalGeneration`: features are added at several layers, and the time of a frame precedes it."""

    name = "qwen3_vl"
    model_types = ("qwen3_vl",)

    def _deepstack(self, output: BaseModelOutputWithPooling) -> Sequence[Sequence[Tensor]]:
        return output.deepstack_features

    def _wrap(self, layers: Sequence[Sequence[Tensor]]) -> BaseModelOutputWithPooling:
        from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

        return BaseModelOutputWithDeepstackFeatures(
            pooler_output=list(layers[0]), deepstack_features=[list(layer) for layer in layers[1:]]
        )


def _given_grids(inputs: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    """The kinds of vision inputs that are present, in encoding order, with their grids."""
    return [(kind, inputs[f"{kind}_grid_thw"]) for kind, pixels in PIXELS.items() if inputs.get(pixels) is not None]
