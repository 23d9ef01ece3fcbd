"""A tiny model with random weights and its processor for each family: built in code, offline, without torchvision.

A builder returns `(model, processor)` in evaluation mode, in float32: two layers, width 32, images of 32 px or less.
"""

import importlib
import sys
from collections.abc import Callable, Iterable
from functools import cached_property
from inspect import signature
from typing import Any
from unittest import mock

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import make_flat_list_of_images

from saccade.families.chain_of_sight import ChainOfSightConfig, ChainOfSightForConditionalGeneration
from saccade.families.fitting import CLASS_TOKENS
from saccade.testing.families import Case
from saccade.testing.tiny_models import (
    HEADS,
    LAYERS,
    PATCH,
    WIDTH,
    Tiny,
    build_tokenizer,
    finish,
    siglip_options,
    special_ids,
    text_options,
)
from saccade.tiny.vocabulary import ASSISTANT, IMAGE, START, USER


def images_only(processor_class: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """`processor_class` without its video processor, which needs torchvision."""

    class ImagesOnly(processor_class):
        def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
            stock = ProcessorMixin.__init__

            def without_videos(
                self, image_processor, tokenizer, video_processor=None, feature_extractor=None, **options
            ):
                stock(self, image_processor, tokenizer, **options)

            ProcessorMixin.__init__ = without_videos
            absent = {"feature_extractor": None, "video_processor": None}
            takes = signature(processor_class.__init__).parameters
            kwargs |= {name: value for name, value in absent.items() if name in takes}
            try:
                super().__init__(
                    image_processor=image_processor, tokenizer=tokenizer, chat_template=chat_template, **kwargs
                )
            finally:
                ProcessorMixin.__init__ = stock

    ImagesOnly.__name__ = ImagesOnly.__qualname__ = processor_class.__name__
    return ImagesOnly


# Qwen

QWEN_SPECIALS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


QWENS = {
    "2": "Qwen2VL",
    "2_5": "Qwen2_5_VL",
    "3": "Qwen3VL",
    "3_moe": "Qwen3VLMoe",
    "3_5": "Qwen3_5",
    "3_5_moe": "Qwen3_5Moe",
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": WIDTH}


def build_qwen(version: str, **options: Any) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Qwen2-VL and its successors, a key of `QWENS`: patches of 4 px, merged two by two. Options are of the text."""
    prefix = QWENS[version]
    tokenizer = build_tokenizer(QWEN_SPECIALS, QWEN_IMAGE)
    ids = {name: tokenizer.convert_tokens_to_ids(word) for name, word in QWEN_SPECIALS.items()}
    vision = {"patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_heads": HEADS, "depth": 2}
    sections = [WIDTH // HEADS // 16 * share for share in (2, 3, 3)]  # of half the head's width
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": sections}
    text = text_options(tokenizer, rope_parameters=rope)
    if version == "2":
        vision |= {"embed_dim": WIDTH, "hidden_size": WIDTH, "mlp_ratio": 2}
    else:
        vision |= {"hidden_size": WIDTH, "out_hidden_size": WIDTH, "intermediate_size": 2 * WIDTH}
    if version == "2_5":
        vision |= {"window_size": 16, "fullatt_block_indexes": [1]}
    if version.startswith("3"):
        vision["num_position_embeddings"] = 64
        text["head_dim"] = WIDTH // HEADS
        rope["mrope_interleaved"] = True
    if version in ("3", "3_moe"):
        # What enters at the second layer has to be attended to by a third one.
        vision |= {"deepstack_visual_indexes": [0, 1], "depth": 3}
        text["num_hidden_layers"] = 3
    if version.startswith("3_5"):
        rope["partial_rotary_factor"] = 1.0
        text["layer_types"] = ["linear_attention", "full_attention"]
        text |= {f"linear_num_{part}_heads": HEADS for part in ("key", "value")}
        text |= {f"linear_{part}_head_dim": WIDTH // HEADS for part in ("key", "value")}
    if version.endswith("moe"):
        text |= EXPERTS
        if version == "3_5_moe":
            text["shared_expert_intermediate_size"] = WIDTH
            del text["intermediate_size"]
    text |= options
    config = getattr(transformers, f"{prefix}Config")(
        vision_config=vision,
        text_config=text,
        image_token_id=ids["image_token"],
        video_token_id=ids["video_token"],
        vision_start_token_id=ids["vision_start_token"],
        vision_end_token_id=ids["vision_end_token"],
        **special_ids(tokenizer),
    )
    image_processor = transformers.Qwen2VLImageProcessorPil(
        size={"shortest_edge": 256, "longest_edge": 1024}, patch_size=PATCH, merge_size=2, temporal_patch_size=2
    )
    # What came after Qwen3-VL has its processor.
    processor_prefix = "Qwen3VL" if version.startswith("3") else prefix
    processor_class = images_only(getattr(transformers, f"{processor_prefix}Processor"))
    processor = processor_class(image_processor, tokenizer, chat_template=tokenizer.chat_template)
    return finish(getattr(transformers, f"{prefix}ForConditionalGeneration")(config), processor)


# LLaVA

PINPOINTS = [[16, 32], [32, 16], [32, 32]]


def build_llava_next() -> tuple[PreTrainedModel, ProcessorMixin]:
    """LLaVA-NeXT with a CLIP tower: crops of 16 px, 4 x 4 tokens each."""
    tokenizer = build_tokenizer({"image_token": IMAGE}, IMAGE)
    vision = transformers.CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        image_size=16,
        patch_size=PATCH,
    )
    config = transformers.LlavaNextConfig(
        vision_config=vision,
        text_config=transformers.LlamaConfig(**text_options(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-1,
        **special_ids(tokenizer),
    )
    image_processor = transformers.LlavaNextImageProcessorPil(
        size={"height": 16, "width": 16}, crop_size={"height": 16, "width": 16}, image_grid_pinpoints=PINPOINTS
    )
    processor = transformers.LlavaNextProcessor(
        image_processor,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )
    return finish(transformers.LlavaNextForConditionalGeneration(config), processor)


def build_llava_onevision() -> tuple[PreTrainedModel, ProcessorMixin]:
    """LLaVA-OneVision with a SigLIP tower and a Qwen2 language model; images of 32 x 32 px are scaled down again."""
    specials = {"image_token": IMAGE, "video_token": "<video>"}
    tokenizer = build_tokenizer(specials, IMAGE)
    config = transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(**siglip_options(16)),
        text_config=transformers.Qwen2Config(**text_options(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=[[16, 16], *PINPOINTS],
        vision_aspect_ratio="anyres_max_2",
        **special_ids(tokenizer),
    )
    image_processor = transformers.LlavaOnevisionImageProcessorPil(
        size={"height": 16, "width": 16}, image_grid_pinpoints=[[16, 16], *PINPOINTS]
    )
    processor = images_only(transformers.LlavaOnevisionProcessor)(
        image_processor,
        tokenizer,
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_2",
        chat_template=tokenizer.chat_template,
    )
    return finish(transformers.LlavaOnevisionForConditionalGeneration(config), processor)


# InternVL

INTERNVL_SPECIALS = {
    "context_image_token": "<IMG_CONTEXT>",
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "video_token": "<video>",
}


def build_internvl() -> tuple[PreTrainedModel, ProcessorMixin]:
    """InternVL: crops of 16 px, four by four patches, shuffled to 2 x 2 tokens; larger images are cut into crops."""
    tokenizer = build_tokenizer(INTERNVL_SPECIALS, "<IMG_CONTEXT>")
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "image_size": [32, 32],
        "patch_size": [PATCH, PATCH],
    }
    config = transformers.InternVLConfig(
        vision_config=vision,
        text_config=transformers.Qwen2Config(**text_options(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=16,
        **special_ids(tokenizer),
    )
    image_processor = transformers.GotOcr2ImageProcessorPil(
        size={"height": 32, "width": 32}, crop_to_patches=True, min_patches=1, max_patches=2
    )
    processor = images_only(transformers.InternVLProcessor)(
        image_processor, tokenizer, image_seq_length=16, chat_template=tokenizer.chat_template
    )
    return finish(transformers.InternVLForConditionalGeneration(config), processor)


# Idefics3 and SmolVLM

IDEFICS_SPECIALS = {
    "image_token": IMAGE,
    "fake_image_token": "<fake_token_around_image>",
    "end_of_utterance_token": "<end_of_utterance>",
    "global_image_token": "<global-img>",
    **{f"row_{row}_col_{column}": f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)},
}


def build_idefics3(name: str) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Idefics3 or SmolVLM: crops of 24 px, 3 x 3 tokens each. SmolVLM's own processor needs the num2words package."""
    tokenizer = build_tokenizer(IDEFICS_SPECIALS, IMAGE)
    vision = {key: value for key, value in siglip_options(24).items() if key != "vision_use_head"}
    config = getattr(transformers, f"{name}Config")(
        vision_config=vision,
        text_config=transformers.LlamaConfig(**text_options(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        scale_factor=2,
        **special_ids(tokenizer),
    )
    image_processor = transformers.Idefics3ImageProcessorPil(
        size={"longest_edge": 48}, max_image_size={"longest_edge": 24}
    )
    processor = transformers.Idefics3Processor(
        image_processor, tokenizer, image_seq_len=9, chat_template=tokenizer.chat_template
    )
    return finish(getattr(transformers, f"{name}ForConditionalGeneration")(config), processor)


# Gemma 3

GEMMA_SPECIALS = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}


def build_gemma3() -> tuple[PreTrainedModel, ProcessorMixin]:
    """Gemma 3: images of 32 px, pooled to 4 x 4 tokens; one layer with a sliding window and one without."""
    tokenizer = build_tokenizer(GEMMA_SPECIALS, "<start_of_image>")
    ids = {name: tokenizer.convert_tokens_to_ids(word) for name, word in GEMMA_SPECIALS.items()}
    config = transformers.Gemma3Config(
        vision_config=siglip_options(32),
        text_config=text_options(
            tokenizer,
            head_dim=WIDTH // HEADS,
            query_pre_attn_scalar=WIDTH // HEADS,
            layer_types=["sliding_attention", "full_attention"],
        ),
        mm_tokens_per_image=16,
        image_token_index=ids["image_token"],
        boi_token_index=ids["boi_token"],
        eoi_token_index=ids["eoi_token"],
        **special_ids(tokenizer),
    )
    image_processor = transformers.Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
    processor = transformers.Gemma3Processor(
        image_processor, tokenizer, image_seq_length=16, chat_template=tokenizer.chat_template
    )
    return finish(transformers.Gemma3ForConditionalGeneration(config), processor)


def build_llava(
    tower: Callable[..., PreTrainedConfig] | None = None,
    config_class: Callable[..., PreTrainedConfig] = transformers.LlavaConfig,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """LLaVA-1.5 with a CLIP tower: 32 px, 8 x 8 tokens. Another tower has three layers, and features of the second."""
    tokenizer = build_tokenizer({"image_token": IMAGE}, IMAGE)
    vision = {key: value for key, value in siglip_options(32).items() if key != "vision_use_head"}
    if tower is not None:
        vision["num_hidden_layers"] = 3
    vision_config = (tower or transformers.CLIPVisionConfig)(**vision)
    before = CLASS_TOKENS[vision_config.model_type] + getattr(vision_config, "num_register_tokens", 0)
    strategy = "default" if before else "full"
    config = config_class(
        vision_config=vision_config,
        text_config=transformers.LlamaConfig(**text_options(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=-1 if tower is None else -2,
        vision_feature_select_strategy=strategy,
        image_seq_length=64,
        **special_ids(tokenizer),
    )
    image_processor = transformers.CLIPImageProcessorPil(size={"height": 32, "width": 32}, do_center_crop=False)
    processor = transformers.LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=before + getattr(config, "tokens_beyond_patches", 0),
        chat_template=tokenizer.chat_template,
    )
    return finish(transformers.AutoModelForImageTextToText.from_config(config), processor)


FAMILIES: dict[str, Tiny] = {
    "gemma3": Tiny(build_gemma3, transformers.Gemma3ForConditionalGeneration),
    "idefics3": Tiny(lambda: build_idefics3("Idefics3"), transformers.Idefics3ForConditionalGeneration),
    "internvl": Tiny(build_internvl, transformers.InternVLForConditionalGeneration),
    "llava": Tiny(build_llava, transformers.LlavaForConditionalGeneration),
    "llava_next": Tiny(build_llava_next, transformers.LlavaNextForConditionalGeneration),
    "llava_onevision": Tiny(build_llava_onevision, transformers.LlavaOnevisionForConditionalGeneration),
    "smolvlm": Tiny(lambda: build_idefics3("SmolVLM"), transformers.SmolVLMForConditionalGeneration),
    "qwen2_vl": Tiny(lambda: build_qwen("2"), transformers.Qwen2VLForConditionalGeneration),
    "qwen2_5_vl": Tiny(lambda: build_qwen("2_5"), transformers.Qwen2_5_VLForConditionalGeneration),
    "qwen3_vl": Tiny(lambda: build_qwen("3"), transformers.Qwen3VLForConditionalGeneration),
}


# GLM

GLM_SPECIALS = {
    "image_token": "<|image|>",
    "video_token": "<|video|>",
    **{name: f"<|{name}|>" for name in ("begin_of_image", "end_of_image", "begin_of_video", "end_of_video")},
}
GLM_IMAGE = "<|begin_of_image|><|image|><|end_of_image|>"


def build_glm(version: str) -> tuple[PreTrainedModel, ProcessorMixin]:
    """GLM-4.1V (`Glm4v`), 4.6V (`Glm46V`) or 4.5V (`Glm4vMoe`): patches of 4 px, merged two by two."""
    tokenizer = build_tokenizer(GLM_SPECIALS, GLM_IMAGE)
    vision = {
        "patch_size": PATCH,
        "image_size": 32,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "num_heads": HEADS,
        "depth": LAYERS,
        "hidden_size": WIDTH,
        "out_hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
    }
    sections = [WIDTH // HEADS // 16 * share for share in (2, 3, 3)]
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": sections, "partial_rotary_factor": 1.0}
    text = text_options(tokenizer, rope_parameters=rope)
    if version == "Glm4vMoe":
        experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": WIDTH}
        text |= {**experts, "head_dim": WIDTH // HEADS}
    config = getattr(transformers, f"{version}Config")(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<|image|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video|>"),
        image_start_token_id=tokenizer.convert_tokens_to_ids("<|begin_of_image|>"),
        image_end_token_id=tokenizer.convert_tokens_to_ids("<|end_of_image|>"),
        video_start_token_id=tokenizer.convert_tokens_to_ids("<|begin_of_video|>"),
        video_end_token_id=tokenizer.convert_tokens_to_ids("<|end_of_video|>"),
        **special_ids(tokenizer),
    )
    image_processor = transformers.Glm46VImageProcessorPil(
        size={"shortest_edge": 256, "longest_edge": 2048}, patch_size=PATCH, merge_size=2, temporal_patch_size=2
    )
    processor_class = images_only(transformers.Glm46VProcessor if version == "Glm46V" else transformers.Glm4vProcessor)
    processor = processor_class(image_processor, tokenizer, chat_template=tokenizer.chat_template)
    return finish(getattr(transformers, f"{version}ForConditionalGeneration")(config), processor)


# Pixtral's tower

PIXTRAL_SPECIALS = {"image_token": "[IMG]", "break_token": "[IMG_BREAK]", "end_token": "[IMG_END]"}


def pixtral_processor() -> type[ProcessorMixin]:
    """The stock processor's class, whose module takes one function from the image processor that needs torchvision."""
    pixtral = "transformers.models.pixtral"
    sizes = importlib.import_module(f"{pixtral}.image_processing_pil_pixtral")
    with mock.patch.dict(sys.modules, {f"{pixtral}.image_processing_pixtral": sizes}):
        # By its name: the package holds a placeholder where torchvision is missing.
        return importlib.import_module(f"{pixtral}.processing_pixtral").PixtralProcessor


def build_pixtral(name: str) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Mistral 3 (`Mistral3`), which merges patches two by two, or Pixtral (`Llava`): images of up to 32 px."""
    tokenizer = build_tokenizer(PIXTRAL_SPECIALS, "[IMG]")
    merged = {"spatial_merge_size": 2} if name == "Mistral3" else {"vision_feature_select_strategy": "full"}
    vision = {key: value for key, value in siglip_options(32).items() if key != "vision_use_head"}
    config = getattr(transformers, f"{name}Config")(
        vision_config=transformers.PixtralVisionConfig(**vision, head_dim=WIDTH // HEADS),
        text_config=transformers.MistralConfig(
            **text_options(tokenizer, head_dim=WIDTH // HEADS, sliding_window=None)
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        vision_feature_layer=-1,
        **merged,
        **special_ids(tokenizer),
    )
    edge = PATCH * merged.get("spatial_merge_size", 1)
    image_processor = transformers.PixtralImageProcessorPil(size={"longest_edge": 32}, patch_size=edge)
    processor = pixtral_processor()(
        image_processor,
        tokenizer,
        patch_size=PATCH,
        spatial_merge_size=merged.get("spatial_merge_size", 1),
        chat_template=tokenizer.chat_template,
    )
    return finish(getattr(transformers, f"{name}ForConditionalGeneration")(config), processor)


# Gemma 4

GEMMA4_SPECIALS = {
    "image_token": "<|image|>",
    "boi_token": "<|image>",
    "eoi_token": "<image|>",
    "audio_token": "<|audio|>",
    "boa_token": "<|audio>",
    "eoa_token": "<audio|>",
}


def build_gemma4(**options: Any) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Gemma 4: images of up to 70 tokens of 2 x 2 patches, as few as the processor allows. Options are of the text."""
    tokenizer = build_tokenizer(GEMMA4_SPECIALS, "<|image|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|video|>"]})
    ids = {name: tokenizer.convert_tokens_to_ids(word) for name, word in GEMMA4_SPECIALS.items()}
    vision = {key: value for key, value in siglip_options(32).items() if key not in ("vision_use_head", "image_size")}
    layer_types = ["sliding_attention", "full_attention"]
    text = text_options(
        tokenizer,
        head_dim=WIDTH // HEADS,
        global_head_dim=WIDTH // HEADS,
        layer_types=layer_types,
        vocab_size_per_layer_input=len(tokenizer),
        hidden_size_per_layer_input=8,
        use_bidirectional_attention="vision",
        final_logit_softcapping=30.0,
    )
    config = transformers.Gemma4Config(
        vision_config={
            **vision,
            "num_key_value_heads": HEADS,
            "head_dim": WIDTH // HEADS,
            "pooling_kernel_size": 2,
            "position_embedding_size": 256,
        },
        text_config=text | options,
        audio_config=None,
        image_token_id=ids["image_token"],
        boi_token_id=ids["boi_token"],
        eoi_token_id=ids["eoi_token"],
        audio_token_id=ids["audio_token"],
        video_token_id=tokenizer.convert_tokens_to_ids("<|video|>"),
        **special_ids(tokenizer),
    )
    image_processor = transformers.Gemma4ImageProcessorPil(patch_size=PATCH, max_soft_tokens=70, pooling_kernel_size=2)
    processor = images_only(transformers.Gemma4Processor)(
        image_processor, tokenizer, chat_template=tokenizer.chat_template
    )
    return finish(transformers.Gemma4ForConditionalGeneration(config), processor)


# Ovis 2

OVIS_SPECIALS = {
    "image_token": IMAGE,
    "atom_token": "<IMG_ATOM>",
    **{f"{name}_token": f"<IMG_{name.upper()}>" for name in ("start", "grid", "col", "row", "end")},
}


def build_ovis2() -> tuple[PreTrainedModel, ProcessorMixin]:
    """Ovis 2: crops of 16 px, four by four patches, merged two by two; a larger image has a thumbnail before them."""
    tokenizer = build_tokenizer(OVIS_SPECIALS, IMAGE)
    ids = [tokenizer.convert_tokens_to_ids(word) for word in list(OVIS_SPECIALS.values())[1:]]
    vision = {key: value for key, value in siglip_options(16).items() if key != "vision_use_head"}
    config = transformers.Ovis2Config(
        vision_config={**vision, "hidden_stride": 2, "vocab_size": 32},
        text_config=transformers.Qwen2Config(**text_options(tokenizer)),
        image_token_id=ids[0],
        visual_indicator_token_ids=ids[1:],
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        tie_word_embeddings=False,
        **special_ids(tokenizer),
    )
    image_processor = transformers.Ovis2ImageProcessorPil(
        size={"height": 16, "width": 16}, crop_to_patches=True, max_patches=4
    )
    processor = transformers.Ovis2Processor(
        image_processor, tokenizer, image_seq_length=4, chat_template=tokenizer.chat_template
    )
    return finish(transformers.Ovis2ForConditionalGeneration(config), processor)


# LFM2-VL

LFM2_SPECIALS = {
    "image_token": IMAGE,
    "image_start_token": "<|image_start|>",
    "image_end_token": "<|image_end|>",
    "image_thumbnail_token": "<|img_thumbnail|>",
    **{f"tile_{row}_{column}": f"<|img_row_{row}_col_{column}|>" for row in (1, 2) for column in (1, 2)},
}
LFM2_SIZES = {"tile_size": 16, "max_image_tokens": 8, "min_image_tokens": 4, "max_pixels_tolerance": 1.0}


class TileOptions(transformers.Siglip2ImageProcessorPil.valid_kwargs, total=False):
    return_row_col_info: bool


class TilesWithoutTorchvision(transformers.Siglip2ImageProcessorPil):
    """What `Lfm2VlImageProcessor` makes of images whose sides are multiples of 8 px, without torchvision: one of more
    than eight tokens becomes two by two tiles of 16 px and a thumbnail."""

    valid_kwargs = TileOptions
    downsample_factor, encoder_patch_size, tile_size, use_thumbnail = 2, PATCH, 16, True

    def preprocess(self, images, **options):
        tiles, found = [], {"image_rows": [], "image_cols": [], "image_sizes": []}
        edge = PATCH * self.downsample_factor
        for image in make_flat_list_of_images(images):
            high, wide = image.height // edge, image.width // edge
            small = (high, wide) if high * wide <= 8 else (2, 2)
            parts = 1 if high * wide <= 8 else 2
            if parts == 2:
                whole = image.resize((2 * self.tile_size, 2 * self.tile_size))
                corners = [(x * self.tile_size, y * self.tile_size) for y in range(2) for x in range(2)]
                tiles += [whole.crop((x, y, x + self.tile_size, y + self.tile_size)) for x, y in corners]
            tiles.append(image.resize((small[1] * edge, small[0] * edge)))
            found["image_rows"].append(parts)
            found["image_cols"].append(parts)
            found["image_sizes"].append([small[0] * edge, small[1] * edge])
        return super().preprocess(tiles, do_resize=False, return_tensors="pt") | found


def build_lfm2_vl(image_processor: BaseImageProcessor | None = None) -> tuple[PreTrainedModel, ProcessorMixin]:
    """LFM2-VL: tokens of two by two patches of 4 px; a layer that convolves, and one that attends.

    Its own image processor needs torchvision; by default one that cuts alike.
    """
    tokenizer = build_tokenizer(LFM2_SPECIALS, IMAGE)
    vision = {key: value for key, value in siglip_options(16).items() if key != "image_size"}
    text = text_options(
        tokenizer, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False, tie_word_embeddings=False
    )
    config = transformers.Lfm2VlConfig(
        vision_config=transformers.Siglip2VisionConfig(**vision, num_patches=16),
        text_config=transformers.Lfm2Config(**text),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        projector_hidden_size=WIDTH,
        tie_word_embeddings=False,
        **special_ids(tokenizer),
    )
    if image_processor is None:
        image_processor = TilesWithoutTorchvision(patch_size=PATCH, max_num_patches=32)
    processor = transformers.Lfm2VlProcessor(image_processor, tokenizer, chat_template=tokenizer.chat_template)
    return finish(transformers.Lfm2VlForConditionalGeneration(config), processor)


# Families that the tests of other subjects leave out, most of which share the code of one above.
RELATIVES: dict[str, Tiny] = {
    "chain_of_sight": Tiny(lambda: build_llava(config_class=ChainOfSightConfig), ChainOfSightForConditionalGeneration),
    "qwen3_vl_moe": Tiny(lambda: build_qwen("3_moe"), transformers.Qwen3VLMoeForConditionalGeneration),
    "qwen3_5": Tiny(lambda: build_qwen("3_5"), transformers.Qwen3_5ForConditionalGeneration),
    "qwen3_5_moe": Tiny(lambda: build_qwen("3_5_moe"), transformers.Qwen3_5MoeForConditionalGeneration),
    "glm4v": Tiny(lambda: build_glm("Glm4v"), transformers.Glm4vForConditionalGeneration),
    "glm46v": Tiny(lambda: build_glm("Glm46V"), transformers.Glm46VForConditionalGeneration),
    "glm4v_moe": Tiny(lambda: build_glm("Glm4vMoe"), transformers.Glm4vMoeForConditionalGeneration),
    "mistral3": Tiny(lambda: build_pixtral("Mistral3"), transformers.Mistral3ForConditionalGeneration),
    "gemma4": Tiny(build_gemma4, transformers.Gemma4ForConditionalGeneration),
    "ovis2": Tiny(build_ovis2, transformers.Ovis2ForConditionalGeneration),
    "lfm2_vl": Tiny(build_lfm2_vl, transformers.Lfm2VlForConditionalGeneration),
}

# Families that vLLM's plug-in prunes.
SERVED: dict[str, Tiny] = FAMILIES | {name: RELATIVES[name] for name in ("glm4v",)}


# Videos. The video processors need torchvision, so what they would return is put together here.


def video_samples(name: str, model: PreTrainedModel, processor: ProcessorMixin) -> list[dict]:
    """Four samples as lists: a video, an image then a video, text only, a video then an image.

    Each is `ids`, `types` (0 text, 1 image, 2 video), and the tensors of its images and videos.
    """
    word = processor.tokenizer.convert_tokens_to_ids
    text = [word(item) for item in ("how", "many", "digits", "?")]
    image_id, video_id = model.config.image_token_id, model.config.video_token_id
    generator = torch.Generator().manual_seed(7)

    def media(kind: str, frames: int) -> tuple[list[int], dict]:
        """Placeholder ids, markers included, and tensors."""
        if name == "llava_onevision":
            if kind == "video":
                pixels = torch.randn(1, 2, 3, 16, 16, generator=generator)
                return [video_id] * (2 * 4 + 1), {"pixel_values_videos": pixels}
            pixels = torch.randn(1, 3, 3, 16, 16, generator=generator)
            count = 16 + 4 * (8 + 1)
            tensors = {"image_sizes": torch.tensor([[16, 32]]), "batch_num_images": torch.tensor([1])}
            return [image_id] * count, {"pixel_values": pixels, **tensors}
        start, end = word("<|vision_start|>"), word("<|vision_end|>")
        grid = torch.tensor([[frames, 4, 6]])
        patches = torch.randn(int(grid.prod()), 3 * 2 * PATCH * PATCH, generator=generator)
        if kind == "image":
            return [start, *[image_id] * 6, end], {"pixel_values": patches, "image_grid_thw": grid}
        tensors = {"pixel_values_videos": patches, "video_grid_thw": grid}
        if name == "qwen3_vl":
            return [token for _ in range(frames) for token in (word("1"), start, *[video_id] * 6, end)], tensors
        if name == "qwen2_5_vl":
            tensors["second_per_grid_ts"] = torch.tensor([0.5])
        return [start, *[video_id] * 6 * frames, end], tensors

    samples = []
    for kinds in (("video",), ("image", "video"), (), ("video", "image")):
        ids, tensors = [word(START), word(USER)], {}
        for number, kind in enumerate(kinds):
            tokens, given = media(kind, 1 if kind == "image" else 3 - number)
            ids += [*tokens, *text[: number + 2]]
            tensors |= given
        ids += [*text, word(ASSISTANT)]
        types = [1 if token == image_id else 2 if token == video_id else 0 for token in ids]
        samples.append({"ids": ids, "types": types, "tensors": tensors})
    return samples


def collate_samples(samples: list[dict], pad_id: int, side: str) -> dict[str, torch.Tensor]:
    """Processor outputs of samples of `video_samples`."""
    length = max(len(sample["ids"]) for sample in samples)

    def padded(values: list[int], fill: int) -> list[int]:
        padding = [fill] * (length - len(values))
        return [*values, *padding] if side == "right" else [*padding, *values]

    batch = {
        "input_ids": torch.tensor([padded(sample["ids"], pad_id) for sample in samples]),
        "attention_mask": torch.tensor([padded([1] * len(sample["ids"]), 0) for sample in samples]),
        "mm_token_type_ids": torch.tensor([padded(sample["types"], 0) for sample in samples]),
    }
    for tensor_name in dict.fromkeys(key for sample in samples for key in sample["tensors"]):
        batch[tensor_name] = torch.cat([s["tensors"][tensor_name] for s in samples if tensor_name in s["tensors"]])
    if "batch_num_images" in batch:
        batch.pop("mm_token_type_ids")
        batch["batch_num_images"] = torch.tensor([int("pixel_values" in sample["tensors"]) for sample in samples])
    elif "pixel_values_videos" in batch and batch["pixel_values_videos"].dim() == 5:
        batch.pop("mm_token_type_ids")
    return batch


WITH_VIDEO = ("llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")


class VideoCase(Case):
    """The same with batches of videos and images, in either order; every word is learned."""

    @cached_property
    def samples(self) -> list[dict]:
        return video_samples(self.name, self.model, self.processor)

    @cached_property
    def batch(self) -> dict[str, Any]:
        batch = collate_samples(self.samples, 0, "right")
        words = batch["attention_mask"].bool() & ~self.family.placeholder(batch["input_ids"])
        return {**batch, "labels": batch["input_ids"].masked_fill(~words, -100)}

    def prompts(self, rows: Iterable[int] = range(4)) -> dict[str, Any]:
        return collate_samples([self.samples[row] for row in rows], 0, "left")
