"""The tiny LLaVA and its processor: built in code, saved and loaded as an ordinary Hugging Face folder."""

import os
import shutil
from pathlib import Path

import torch
from transformers import (
    AutoProcessor,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from saccade.data.scenes import PATCH_SIZE
from saccade.tiny.vocabulary import CHAT_TEMPLATE, END, IMAGE, PAD, START, build_tokenizer

GRID = 12
"""Patches of an image per side."""
VISION_WIDTH, VISION_LAYERS = 96, 4
TEXT_WIDTH, TEXT_LAYERS = 96, 4
TEXT_MLP = 256


def build_tiny_processor() -> LlavaProcessor:
    """The processor of a tiny LLaVA that sees 12 x 12 patches of 8 px; any image is resized to that square."""
    image_processor = CLIPImageProcessorPil(
        size={"height": GRID * PATCH_SIZE, "width": GRID * PATCH_SIZE},
        do_center_crop=False,
        image_mean=[0.35] * 3,
        image_std=[0.25] * 3,
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=build_tokenizer(),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
        num_additional_image_tokens=1,
    )


def build_tiny_llava(processor: LlavaProcessor, seed: int = 0) -> LlavaForConditionalGeneration:
    """A tiny LLaVA with random weights in float32, in evaluation mode; it has 144 visual tokens per image.

    Args:
        processor: from `build_tiny_processor`; its tokenizer gives the vocabulary and the special ids.
        seed: seed of the weights; the global random state is not changed.
    """
    tokenizer = processor.tokenizer
    ids = {name: tokenizer.convert_tokens_to_ids(word) for name, word in (("pad", PAD), ("bos", START), ("eos", END))}
    vision = CLIPVisionConfig(
        hidden_size=VISION_WIDTH,
        intermediate_size=2 * VISION_WIDTH,
        num_hidden_layers=VISION_LAYERS,
        num_attention_heads=4,
        image_size=GRID * PATCH_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=VISION_WIDTH,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=TEXT_MLP,
        num_hidden_layers=TEXT_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        pad_token_id=ids["pad"],
        bos_token_id=ids["bos"],
        eos_token_id=ids["eos"],
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=GRID * GRID,
        pad_token_id=ids["pad"],
        bos_token_id=ids["bos"],
        eos_token_id=ids["eos"],
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    return model.eval()


def tiny_checkpoint() -> Path:
    """The folder of the pretrained tiny LLaVA shipped in the package, for `from_pretrained`."""
    return Path(__file__).parent / "checkpoint"


def load_tiny(dtype: torch.dtype = torch.float32) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The shipped tiny LLaVA: tower and language model pretrained, projector random.

    Args:
        dtype: dtype of the weights.
    """
    folder = tiny_checkpoint()
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    return model.eval(), AutoProcessor.from_pretrained(folder)


def save_tiny(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: str | os.PathLike) -> Path:
    """Write model (float16) and processor as one Hugging Face folder, under a temporary name that is then renamed.

    The model itself is not changed. Returns the folder.
    """
    folder = Path(folder)
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    half = build_tiny_llava(processor)
    half.load_state_dict(model.state_dict())
    half.half().save_pretrained(aside)
    processor.save_pretrained(aside)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(aside, folder)
    return folder
