"""Benchmark batches: random pixels and words, with a model's shapes and a data mixture's text lengths."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from saccade.errors import SaccadeError
from saccade.families import Family
from saccade.tokens import IGNORE_INDEX
from saccade.training.length_table import TextLength

QWEN_PATCHES = 48
"""Patches along each edge of a Qwen-VL image: 672 x 672 px, 576 visual tokens after merging."""


def image_inputs(family: Family, images: int, generator: torch.Generator) -> tuple[dict[str, Tensor], int]:
    """Processor outputs of random images, and the number of visual tokens of each.

    Raises:
        SaccadeError: for a model family without benchmark images.
    """
    config = family.model.config
    vision = config.vision_config
    if config.model_type == "llava":
        side = vision.image_size
        pixels = torch.randn(images, 3, side, side, generator=generator)
        return {"pixel_values": pixels}, (side // vision.patch_size) ** 2
    if config.model_type == "llava_next":
        side, patches = vision.image_size, vision.image_size // vision.patch_size
        pixels = torch.randn(images, 5, 3, side, side, generator=generator)
        sizes = torch.full((images, 2), 2 * side)
        return {"pixel_values": pixels, "image_sizes": sizes}, patches**2 + 2 * patches * (2 * patches + 1)
    if config.model_type in ("qwen2_vl", "qwen2_5_vl"):
        edge, side = QWEN_PATCHES, QWEN_PATCHES // vision.spatial_merge_size
        width = getattr(vision, "in_channels", 3) * vision.temporal_patch_size * vision.patch_size**2
        pixels = torch.randn(images * edge * edge, width, generator=generator)
        return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, edge, edge]] * images)}, side**2
    raise SaccadeError(f"model_type={config.model_type!r}: no benchmark images; use llava, llava_next or qwen2_5_vl")


def make_batch(family: Family, texts: Sequence[TextLength], seed: int) -> dict[str, Any]:
    """A padded training batch with one image before each text, on the model's device and in its dtype.

    Args:
        texts: text lengths, one per sample.

    Returns:
        What a processor and a collator produce: `input_ids`, `attention_mask`, `labels`, and the image inputs.
    """
    generator = torch.Generator().manual_seed(seed)
    model = family.model
    images, visual = image_inputs(family, len(texts), generator)
    vocabulary = model.config.get_text_config().vocab_size
    special = {family.placeholder_id, *_special_ids(model.config)}
    words = torch.tensor([word for word in range(min(vocabulary, 4096)) if word not in special])

    def draw(count: int) -> Tensor:
        return words[torch.randint(len(words), (count,), generator=generator)]

    placeholders = torch.full((visual,), family.placeholder_id)
    rows, labels = [], []
    for text in texts:
        ids, targets = [draw(1), placeholders], [torch.full((visual + 1,), IGNORE_INDEX)]
        for question, answer in text.turns:
            said = draw(answer)
            ids += [draw(question), said]
            targets += [torch.full((question,), IGNORE_INDEX), said]
        rows.append(torch.cat(ids))
        labels.append(torch.cat(targets))
    pad = torch.nn.utils.rnn.pad_sequence
    batch: dict[str, Any] = {
        "input_ids": pad(rows, batch_first=True, padding_value=int(words[0])),
        "attention_mask": pad([torch.ones_like(row) for row in rows], batch_first=True),
        "labels": pad(labels, batch_first=True, padding_value=IGNORE_INDEX),
        **images,
    }
    batch["pixel_values"] = batch["pixel_values"].to(model.dtype)
    if family.uses_mrope:
        batch["mm_token_type_ids"] = family.placeholder(batch["input_ids"]).long()
    return {name: value.to(model.device) for name, value in batch.items()}


def label_count(batch: Mapping[str, Any]) -> int:
    """Number of label tokens that count in the shifted loss."""
    return int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())


def _special_ids(config: Any) -> set[int]:
    names = ("pad_token_id", "bos_token_id", "eos_token_id", "image_token_id", "video_token_id")
    names += ("vision_start_token_id", "vision_end_token_id")
    found = {getattr(part, name, None) for part in (config, config.get_text_config()) for name in names}
    return {value for value in found if isinstance(value, int)}
