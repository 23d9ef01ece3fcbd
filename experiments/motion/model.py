"""A LLaVA-OneVision that sees clips, of the embedded model's tower and language model."""

from pathlib import Path

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
)

from experiments.motion.clips import LANE, LANES
from saccade.data.scenes import PATCH_SIZE
from saccade.tiny import load_tiny
from saccade.tiny.vocabulary import IMAGE, build_tokenizer
from saccade.training.assemble import middle_positions

VIDEO = "<video>"
SIDE = LANE * LANES
"""Pixels of a frame per side: 6 x 6 patches, which the stock class pools to 3 x 3 tokens."""


def build_motion_model(seed: int = 0) -> tuple[LlavaOnevisionForConditionalGeneration, LlavaOnevisionProcessor]:
    """The model and its processor. Tower and language model have the embedded weights, the projector is random.

    Args:
        seed: of the projector and of the token that stands for a clip.

    Raises:
        ImportError: without torchvision, which the stock processor of clips needs.
    """
    tiny, tiny_processor = load_tiny()
    tokenizer = build_tokenizer({"image_token": IMAGE, "video_token": VIDEO})
    config = LlavaOnevisionConfig(
        vision_config=CLIPVisionConfig(**{**tiny.config.vision_config.to_dict(), "image_size": SIDE}),
        text_config=LlamaConfig(**{**tiny.config.text_config.to_dict(), "vocab_size": len(tokenizer)}),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        video_token_index=tokenizer.convert_tokens_to_ids(VIDEO),
        image_grid_pinpoints=[[SIDE, SIDE]],
        vision_feature_layer=tiny.config.vision_feature_layer,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        **{name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaOnevisionForConditionalGeneration(config)
    weights = model.state_dict()
    for name, value in tiny.state_dict().items():
        if name.endswith("position_embedding.weight"):
            weights[name] = middle_positions(value, SIDE // PATCH_SIZE)
        elif "multi_modal_projector" not in name:
            # The vocabulary has grown by the token of a clip.
            weights[name][: len(value)] = value
    model.load_state_dict(weights)
    normalised = {name: getattr(tiny_processor.image_processor, name) for name in ("image_mean", "image_std")}
    size = {"height": SIDE, "width": SIDE}
    processor = LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessorPil(size=size, image_grid_pinpoints=[[SIDE, SIDE]], **normalised),
        video_processor=LlavaOnevisionVideoProcessor(size=size, **normalised),
        tokenizer=tokenizer,
        chat_template=with_videos(tokenizer.chat_template, f"image {VIDEO}"),
        num_image_tokens=(SIDE // PATCH_SIZE) ** 2,
        vision_feature_select_strategy="default",
    )
    return model.eval(), processor


def save_motion_model(folder: Path) -> None:
    """Write model and processor as a Hugging Face folder, if it is not there yet."""
    if not folder.is_dir():
        model, processor = build_motion_model()
        aside = folder.with_name(f".{folder.name}")
        model.save_pretrained(aside)
        processor.save_pretrained(aside)
        aside.rename(folder)


def with_videos(template: str, place: str) -> str:
    """The embedded model's chat template, with `place` for each video."""
    text = "{% else %}{{ ' ' + part['text'] }}{% endif %}"
    assert template.count(text) == 1
    return template.replace(text, f"{{% elif part['type'] == 'video' %}}{{{{ '{place}' }}}}{text}")
