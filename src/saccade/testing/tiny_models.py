"""Parts of tiny models, and rows to train and query them: built in code, offline, without torchvision."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image
from transformers import PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin

from saccade.tiny.vocabulary import build_tokenizer as build_tokenizer

WIDTH, LAYERS, HEADS, PATCH = 32, 2, 2, 4


@dataclass(frozen=True)
class Tiny:
    """How to build a family's tiny model, and how it differs from others.

    Args:
        build: returns the model and its processor.
        model_class: the stock class that loads a saved model.
    """

    build: Callable[[], tuple[PreTrainedModel, ProcessorMixin]]
    model_class: type[PreTrainedModel]


def finish(model: PreTrainedModel, processor: ProcessorMixin) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Draw weights wide enough for tokens to differ: at 0.02, a model of width 32 is almost linear and constant."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model.eval(), processor


def special_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Pad, start and end ids, as configs take them."""
    return {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def text_options(tokenizer: PreTrainedTokenizerFast, **options) -> dict:
    """Options that every text config shares."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "max_position_embeddings": 2048,
        **special_ids(tokenizer),
        **options,
    }


def siglip_options(image_size: int) -> dict:
    """Options of a SigLIP tower."""
    return {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "image_size": image_size,
        "patch_size": PATCH,
        "vision_use_head": False,
    }


def noise_image(width: int, height: int, seed: int) -> Image.Image:
    """An image of random pixels."""
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8).numpy())


def mixed_rows() -> list[dict]:
    """Four samples: one image, two images of different sizes in two turns, text only, an image and a longer answer."""

    def turns(*texts: str) -> list[dict]:
        return [{"role": "assistant" if number % 2 else "user", "content": text} for number, text in enumerate(texts)]

    return [
        {"images": [noise_image(32, 16, 1)], "messages": turns("<image>\nhow many digits ?", "2")},
        {
            "images": [noise_image(24, 24, 2), noise_image(16, 32, 3)],
            "messages": turns("<image>\nread the digits .", "3 4", "what is the maximum ? <image>", "7"),
        },
        {"images": [], "messages": turns("3 plus 4", "7")},
        {"images": [noise_image(32, 32, 4)], "messages": turns("is there a 5 ? <image>", "yes , above the 3 .")},
    ]
