"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: dynamic resolution, a patch merger, three position axes, images and videos."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from saccade.errors import SaccadeError
from saccade.families.base import Encoded, Family, pad_rows
from saccade.tokens import VisualContext

MERGERS = ("merger", "deepstack_merger_list")


class Qwen2VLFamily(Family):
    """`Qwen2VLForConditionalGeneration` and `Qwen2_5_VLForConditionalGeneration`.

    A feature row is an image or a video. Positions have three axes, time, height and width, and are always those that
    the tokens have in the full sequence.
    """

    name = "qwen2_vl"
    model_types = ("qwen2_vl", "qwen2_5_vl")
    # The grids stay: a pass over the full sequence computes its positions from them.
    vision_inputs = ("pixel_values", "pixel_values_videos")
    several_axes = True

    @property
    def placeholder_id(self) -> int:
        return self.model.config.image_token_id

    @property
    def projector(self) -> nn.Module:
        """The mergers, which stand inside the vision module here."""
        children = self.model.base_model.visual.named_children()
        return nn.ModuleList(child for name, child in children if name in MERGERS)

    @property
    def vision_tower(self) -> nn.Module:
        """The vision module less the mergers, so that freezing it leaves them trainable."""
        children = self.model.base_model.visual.named_children()
        return nn.ModuleList(child for name, child in children if name not in MERGERS)

    def placeholder(self, input_ids: Tensor) -> Tensor:
        return (input_ids == self.placeholder_id) | (input_ids == self.model.config.video_token_id)

    def _encode(self, inputs: Mapping[str, Any]) -> Encoded:
        outputs, rows, grids, deeper = {}, {}, {}, {}
        for kind, pixels, grid in (
            ("image", "pixel_values", "image_grid_thw"),
            ("video", "pixel_values_videos", "video_grid_thw"),
        ):
            if inputs.get(pixels) is None:
                continue
            get_features = getattr(self.model, f"get_{kind}_features")
            outputs[kind] = get_features(inputs[pixels], inputs[grid], return_dict=True)
            rows[kind] = self._split(outputs[kind].pooler_output, inputs[grid], kind)
            grids[kind] = self._row_grids(inputs[grid], kind)
            deeper[kind] = [self._split(layer, inputs[grid], kind) for layer in self._deeper(outputs[kind])]
        videos = self._video_rows(inputs["input_ids"], rows)
        features, valid = pad_rows(_interleave(rows, videos))
        context = VisualContext(features=features, valid=valid, grid=torch.stack(_interleave(grids, videos)))
        layers = len(next(iter(deeper.values())))
        padded = tuple(
            pad_rows(_interleave({kind: value[layer] for kind, value in deeper.items()}, videos))[0]
            for layer in range(layers)
        )
        full = {
            kind: self._wrap([list(output.pooler_output), *map(list, self._deeper(output))])
            for kind, output in outputs.items()
        }
        return Encoded(context, full, padded, videos)

    def wrap_features(
        self, features: Sequence[Tensor], encoded: Encoded, deeper: Sequence[Sequence[Tensor]] = ()
    ) -> dict[str, BaseModelOutputWithPooling]:
        wrapped = {}
        for kind, wanted in (("image", False), ("video", True)):
            chosen = [index for index, is_video in enumerate(encoded.videos) if is_video == wanted]
            if chosen:
                wrapped[kind] = self._wrap([[layer[index] for index in chosen] for layer in (features, *deeper)])
        return wrapped

    def full_positions(self, inputs: Mapping[str, Any]) -> Tensor:
        """Long `(3, B, L)`.

        Raises:
            SaccadeError: if `inputs` lack `mm_token_type_ids`, without which the model cannot compute them.
        """
        names = ("mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts", "attention_mask")
        if inputs.get("mm_token_type_ids") is None:
            raise SaccadeError(
                "inputs has no 'mm_token_type_ids': the processor of transformers 5.18 or newer returns them beside "
                "'input_ids', pass them on"
            )
        given = {name: inputs[name] for name in names if inputs.get(name) is not None}
        positions, _ = self.model.base_model.get_rope_index(inputs["input_ids"], **given)
        return positions

    def _split(self, rows: Sequence[Tensor], grid: Tensor, kind: str) -> list[Tensor]:
        """The features `(n_i, D)` of each row that a reducer sees, from those of each image or video."""
        return list(rows)

    def _row_grids(self, grid: Tensor, kind: str) -> list[Tensor]:
        """Frames, rows and columns of tokens after merging, long `(3,)` a row."""
        merge = self.model.base_model.visual.spatial_merge_size
        return list(grid // torch.tensor([1, merge, merge], device=grid.device))

    def _deeper(self, output: BaseModelOutputWithPooling) -> Sequence[Sequence[Tensor]]:
        """Features of each image or video that enter at further layers."""
        return ()

    def _wrap(self, layers: Sequence[Sequence[Tensor]]) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(pooler_output=list(layers[0]))

    def _video_rows(self, input_ids: Tensor, rows: Mapping[str, Sequence[Tensor]]) -> tuple[bool, ...]:
        """Whether each feature row, in the order of its placeholders, is from a video."""
        if len(rows) == 1:
            return (next(iter(rows)) == "video",) * len(next(iter(rows.values())))
        is_video = (input_ids == self.model.config.video_token_id)[self.placeholder(input_ids)].tolist()
        left = {kind: [len(row) for row in reversed(value)] for kind, value in rows.items()}
        order, position = [], 0
        while position < len(is_video):
            kind = "video" if is_video[position] else "image"
            if not left[kind]:
                raise ValueError(f"there are more {kind} placeholders than {kind} tokens")
            order.append(kind == "video")
            position += left[kind].pop()
        if any(left.values()):
            raise ValueError(f"{len(is_video)} image and video placeholders stand for more visual tokens than that")
        return tuple(order)


class Qwen3VLFamily(Qwen2VLFamily):
    """`Qwen3VLForConditionalGeneration`: features enter at several layers, and a frame of a video is a row."""

    name = "qwen3_vl"
    model_types = ("qwen3_vl",)

    def _split(self, rows: Sequence[Tensor], grid: Tensor, kind: str) -> list[Tensor]:
        if kind == "image":
            return list(rows)
        frames = grid[:, 0].tolist()
        return [frame for row, count in zip(rows, frames, strict=True) for frame in row.chunk(count)]

    def _row_grids(self, grid: Tensor, kind: str) -> list[Tensor]:
        grids = super()._row_grids(grid, kind)
        if kind == "image":
            return grids
        single = torch.ones(1, dtype=torch.long, device=grid.device)
        return [torch.cat((single, row[1:])) for row in grids for _ in range(int(row[0]))]

    def _deeper(self, output: BaseModelOutputWithPooling) -> Sequence[Sequence[Tensor]]:
        return output.deepstack_features

    def _wrap(self, layers: Sequence[Sequence[Tensor]]) -> BaseModelOutputWithPooling:
        from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

        return BaseModelOutputWithDeepstackFeatures(
            pooler_output=list(layers[0]), deepstack_features=[list(layer) for layer in layers[1:]]
        )


def _interleave(values: Mapping[str, Sequence[Tensor]], videos: Sequence[bool]) -> list[Tensor]:
    """The values of images and videos in the order of their placeholders."""
    kinds = {kind: iter(entries) for kind, entries in values.items()}
    return [next(kinds["video" if is_video else "image"]) for is_video in videos]
