"""Qwen2-VL to Qwen3.5: dynamic resolution, a patch merger, three position axes, images and videos."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.vision_utils import get_vision_window_index

from saccade.errors import SaccadeError
from saccade.families.base import Family
from saccade.families.encoded import AttentionBlock, Encoded, Patches
from saccade.families.rows import FeatureRow, assemble, split_kinds, tokens_to_rows
from saccade.families.some_patches import order_of, tower_arguments, window_grids, windows_of
from saccade.interfaces import changed
from saccade.reducers import Needs, reproduced

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
    takes_some_patches = True
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
        return self._encode_kept(inputs, {})

    def _encode_some(self, inputs: Mapping[str, Any], needs: Needs) -> Encoded:
        kept = {}
        for kind, grid in _given_grids(inputs):
            tower = self.model.base_model.visual
            windows = windows_of(inputs[PIXELS[kind]], tower.config.patch_size, tower.spatial_merge_size)
            kept[kind] = ~reproduced(windows, window_grids(grid, tower.spatial_merge_size), needs.patch_tolerance)
        if all(bool(windows.all()) for windows in kept.values()):
            return self._encode(inputs)
        return self._encode_kept(inputs, kept, whole=needs.whole_images)

    def _encode_kept(self, inputs: Mapping[str, Any], kept: Mapping[str, Tensor], whole: bool = True) -> Encoded:
        """The encoding, with absent tokens.

        Args:
            kept: bool `(windows,)` by kind, which windows are not absent; empty if none is.
            whole: whether the tower sees all patches, and not just those of the kept windows.
        """
        rows: dict[str, list[FeatureRow]] = {"image": [], "video": []}
        outputs = {}
        for kind, grid in _given_grids(inputs):
            left = kept.get(kind)
            shapes = self._token_grids(grid)
            if whole or left is None:
                layers = self._features(kind, inputs[PIXELS[kind]], grid)
                outputs[kind] = self._wrap(layers)
            else:
                layers = self._features_of(inputs[PIXELS[kind]], grid, left)
            sizes = [frames * high * wide for frames, high, wide in shapes]
            absent = [None] * len(sizes) if left is None else (~left).split(sizes)
            for number, shape in enumerate(shapes):
                rows[kind] += self._rows([layer[number] for layer in layers], shape, number, absent[number])
        is_video = self._video_tokens(inputs)[self.placeholder(inputs["input_ids"])]
        return assemble(rows["image"], outputs if whole else {}, rows["video"], is_video)

    def _features(self, kind: str, pixels: Tensor, grid: Tensor) -> list[list[Tensor]]:
        """The tokens `(n, D)` of each image or video, for each layer of the language model at which they are added."""
        output = getattr(self.model, f"get_{kind}_features")(pixels, grid, return_dict=True)
        return [list(output.pooler_output), *map(list, self._deepstack(output))]

    def _features_of(self, pixels: Tensor, grid: Tensor, kept: Tensor) -> list[list[Tensor]]:
        """`_features` with a tower that sees the kept windows only; zero for the others.

        Raises:
            SaccadeError: if the tower does not take the arguments that say where the patches stand.
        """
        tower = self.model.base_model.visual
        pixels = pixels[kept.repeat_interleave(tower.spatial_merge_size**2)].type(tower.dtype)
        output = tower(pixels, grid_thw=grid, return_dict=True, **tower_arguments(tower, grid, kept))
        place = kept.nonzero().squeeze(1)
        sizes = (grid.prod(-1) // tower.spatial_merge_size**2).tolist()
        layers = []
        for values in (output.pooler_output, *self._deepstack(output)):
            if len(values) != len(place):
                raise changed(f"{type(tower).__name__} gave {len(values)} tokens for {len(place)} windows of patches")
            full = values.new_zeros(len(kept), values.shape[-1]).index_copy(0, place, values)
            layers.append(list(full.split(sizes)))
        return layers

    def _token_grids(self, grid: Tensor) -> list[tuple[int, int, int]]:
        """Frames, rows and columns of tokens of each image or video."""
        merge = self.model.base_model.visual.spatial_merge_size
        return [(frames, height // merge, width // merge) for frames, height, width in grid.tolist()]

    def _video_tokens(self, inputs: Mapping[str, Any]) -> Tensor:
        """bool `(B, L)`, true on the placeholders of videos."""
        return inputs["input_ids"] == self.model.config.video_token_id

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
        kept = {} if encoded.outputs else self._kept(encoded)
        tokens = {}
        for (kind, grid), entry in zip(_given_grids(inputs), patches, strict=True):
            merged = entry.values.reshape(-1, unit, entry.values.shape[-1]).mean(dim=1)
            merged = merged[self._token_places(grid, kept.get(kind))]
            if kind in kept:
                full = merged.new_zeros(len(kept[kind]), merged.shape[-1])
                full[kept[kind]] = merged
                merged = full
            tokens[kind] = merged
        return tokens_to_rows(tokens, encoded)

    def _kept(self, encoded: Encoded) -> dict[str, Tensor]:
        """Which tokens of each kind the tower has seen, in the order of its images or videos."""
        context = encoded.context
        rows = [absent[valid] for absent, valid in zip(context.absent, context.valid, strict=True)]
        kinds = split_kinds(rows, encoded.videos)
        return {kind: ~torch.cat(values) for kind, values in kinds.items()}

    def _token_places(self, grid: Tensor, kept: Tensor | None = None) -> Tensor | slice:
        """Indices of the tokens in the tower's order, which is by window in Qwen2.5-VL; of the kept ones if given."""
        vision = self.model.config.vision_config
        if not hasattr(vision, "window_size"):
            return slice(None)
        order, _ = get_vision_window_index(grid, vision.spatial_merge_size, vision.window_size, vision.patch_size)
        order = order.to(grid.device)
        return (order if kept is None else order_of(order, kept)).argsort()

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

    def _rows(
        self, layers: Sequence[Tensor], grid: tuple[int, int, int], number: int, absent: Tensor | None = None
    ) -> list[FeatureRow]:
        """The feature rows of an image or a video, from `(n, D)` per layer: a video has one per frame."""
        frames = zip(*(layer.chunk(grid[0]) for layer in layers), strict=True)
        lacking = [None] * grid[0] if absent is None else absent.chunk(grid[0])
        return [
            FeatureRow(frame[0], (1, *grid[1:]), number, deepstack_features=frame[1:], absent=lack)
            for frame, lack in zip(frames, lacking, strict=True)
        ]

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


class Qwen3VLMoeFamily(Qwen3VLFamily):
    """`Qwen3VLMoeForConditionalGeneration`.

    The loss has no term that balances the experts' load, as the stock model's has none unless `output_router_logits`
    is set.
    """

    name = "qwen3_vl_moe"
    model_types = ("qwen3_vl_moe",)


class Qwen35Family(Qwen2VLFamily):
    """`Qwen3_5ForConditionalGeneration` and `Qwen3_5MoeForConditionalGeneration`.

    Three of four layers are gated delta nets: a state that each token decays and writes to, behind a convolution over
    four tokens. They know no positions, so a dropped token leaves no gap in them: see `Family.recurrent`.
    """

    name = "qwen3_5"
    model_types = ("qwen3_5", "qwen3_5_moe")


def _given_grids(inputs: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    """The kinds of vision inputs that are present, in encoding order, with their grids."""
    return [(kind, inputs[f"{kind}_grid_thw"]) for kind, pixels in PIXELS.items() if inputs.get(pixels) is not None]
