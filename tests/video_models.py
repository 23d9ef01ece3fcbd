"""Tiny models with processors that take videos: the stock video processors, or one that needs no torchvision.

The stock ones are tested by `make test-video`, in an environment that has torchvision.
"""

from typing import Any

import numpy as np
import torch
import transformers
from family_models import FAMILIES, RELATIVES
from transformers import PreTrainedModel, ProcessorMixin
from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE
from transformers.video_utils import VideoMetadata

from experiments.motion.model import with_videos
from saccade.testing.tiny_models import PATCH, build_tokenizer, finish, special_ids, text_options
from saccade.tiny.vocabulary import IMAGE

SIZES = {"size": {"shortest_edge": 256, "longest_edge": 1024}, "patch_size": PATCH}
STOCK: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen2_vl": ("Qwen2VLProcessor", "Qwen2VLVideoProcessor", SIZES),
    "qwen2_5_vl": ("Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor", SIZES),
    **dict.fromkeys(("qwen3_vl", "qwen3_vl_moe", "qwen3_5"), ("Qwen3VLProcessor", "Qwen3VLVideoProcessor", SIZES)),
    "llava_onevision": (
        "LlavaOnevisionProcessor",
        "LlavaOnevisionVideoProcessor",
        {"size": {"height": 16, "width": 16}},
    ),
    "llava_next_video": (
        "LlavaNextVideoProcessor",
        "LlavaNextVideoVideoProcessor",
        {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}},
    ),
    "internvl": ("InternVLProcessor", "InternVLVideoProcessor", {"size": {"height": 32, "width": 32}}),
    "smolvlm": (
        "SmolVLMProcessor",
        "SmolVLMVideoProcessor",
        {"size": {"longest_edge": 48}, "max_image_size": {"longest_edge": 24}, "num_frames": 4, "fps": 1},
    ),
    "glm4v": ("Glm4vProcessor", "Glm4vVideoProcessor", SIZES),
    "glm46v": ("Glm46VProcessor", "Glm46VVideoProcessor", SIZES),
}
"""The stock classes of processor and video processor, and the options of a tiny one."""
PLACES = {
    **dict.fromkeys(("llava_onevision", "llava_next_video"), "<video>"),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), "<|vision_start|><|video_pad|><|vision_end|>"),
    **dict.fromkeys(("qwen3_vl", "qwen3_vl_moe", "qwen3_5"), "<|video_pad|>"),
    **dict.fromkeys(("internvl", "smolvlm"), "<video>"),
    **dict.fromkeys(("glm4v", "glm46v"), "<|begin_of_video|><|video|><|end_of_video|>"),
}
"""How a chat template writes a video."""


class FramesToPatches:
    """What `Qwen2VLVideoProcessor` makes of frames, without torchvision: they are not resized, so their sides have to
    be multiples of two patches."""

    merge_size, temporal_patch_size, patch_size = 2, 2, PATCH
    model_input_names = ("pixel_values_videos", "video_grid_thw")

    def __call__(self, videos, do_sample_frames, input_data_format, video_metadata, **options):
        assert not do_sample_frames
        assert input_data_format == "channels_last"
        patches, grids = [], []
        for frames in videos:
            if len(frames) % 2:
                frames = np.concatenate([frames, frames[-1:]])
            pixels = torch.from_numpy(frames / 127.5 - 1).float().permute(0, 3, 1, 2)  # (T, C, H, W)
            time, height, width = len(pixels) // 2, pixels.shape[2] // PATCH, pixels.shape[3] // PATCH
            split = pixels.reshape(time, 2, 3, height // 2, 2, PATCH, width // 2, 2, PATCH)
            patches.append(split.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(time * height * width, -1))
            grids.append([time, height, width])
        return {
            "pixel_values_videos": torch.cat(patches),
            "video_grid_thw": torch.tensor(grids),
            "video_metadata": [VideoMetadata(**metadata) for metadata in video_metadata],
        }


def build_llava_next_video() -> tuple[PreTrainedModel, ProcessorMixin]:
    """LLaVA-NeXT-Video, as LLaVA-NeXT with 2 x 2 tokens for a frame; with LLaVA-NeXT's processor, of images."""
    tokenizer = build_tokenizer({"image_token": IMAGE, "video_token": "<video>"}, IMAGE)
    model, processor = FAMILIES["llava_next"].build()
    config = transformers.LlavaNextVideoConfig(
        vision_config=model.config.vision_config,
        text_config=transformers.LlamaConfig(**text_options(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=model.config.image_grid_pinpoints,
        vision_feature_layer=-1,
        **special_ids(tokenizer),
    )
    processor.tokenizer = tokenizer
    return finish(transformers.LlavaNextVideoForConditionalGeneration(config), processor)


def build(name: str, stock: bool = False) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A tiny model, and its processor with a video processor.

    Args:
        stock: take transformers' own one, which needs torchvision; otherwise Qwen's alone, as `FramesToPatches`.
    """
    model, processor = build_llava_next_video() if name == "llava_next_video" else (FAMILIES | RELATIVES)[name].build()
    template = with_videos(processor.chat_template, PLACES[name])
    assert PLACES[name] in template
    if not stock:
        processor.chat_template = template
        processor.video_processor = FramesToPatches()
        return model, processor
    processor_class, video_class, options = STOCK[name]
    kept = {}
    if name == "internvl":
        kept = {"image_seq_length": processor.image_seq_length}
    if name == "smolvlm":
        kept = {"image_seq_len": processor.image_seq_len}
        # Its processor takes this template for conversations with videos, whatever the model's is.
        template = DEFAULT_CHAT_TEMPLATE
        end = processor.tokenizer.convert_tokens_to_ids("<end_of_utterance>")
        model.generation_config.eos_token_id = end
    if name == "llava_next_video":
        names = ("patch_size", "num_additional_image_tokens", "vision_feature_select_strategy")
        kept = {key: getattr(processor, key) for key in names}
    if name == "llava_onevision":
        names = ("num_image_tokens", "vision_feature_select_strategy", "vision_aspect_ratio")
        kept = {key: getattr(processor, key) for key in names}
    video_processor = getattr(transformers, video_class)(**options)
    built = getattr(transformers, processor_class)(
        image_processor=processor.image_processor,
        tokenizer=processor.tokenizer,
        video_processor=video_processor,
        chat_template=template,
        **kept,
    )
    assert built.image_token == processor.image_token
    assert IMAGE not in PLACES[name]
    return model, built
