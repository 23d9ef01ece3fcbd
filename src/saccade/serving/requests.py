"""Requests for an engine without the plug-in, which carry the features of the kept tokens instead of images."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from saccade.errors import SaccadeError
from saccade.families import Family, get_family
from saccade.prompt_start import needs_start, start_alone
from saccade.pruning import ModeIsolator, Pruner, prune, pruning_config
from saccade.pruning.prune_inputs import isolator_rows
from saccade.reducers import PruningConfig
from saccade.serving.shorten import check_serves, visual_rows

TAKES_ROWS = ("llava", "llava_next", "llava_onevision", "internvl")
"""Values of `config.model_type` for which engines write one placeholder per row of features."""


@dataclass(frozen=True)
class PreparedRequest:
    """A prompt, and its images as rows of features, preceded by the isolator rows if there are any.

    Args:
        prompt_token_ids: the prompt's tokens, with one placeholder per image.
        rows: `(k, D)` per image, on the CPU.
        image_token_ids: per image, the tokens that it has in the sequence: a placeholder for each of its rows, between
            the markers that the processor puts around an image, if any.
        placeholder_id: the token that stands for a row.
    """

    prompt_token_ids: list[int]
    rows: tuple[Tensor, ...]
    image_token_ids: tuple[list[int], ...]
    placeholder_id: int

    @property
    def offline(self) -> dict[str, Any]:
        """The request as `vllm.LLM.generate` takes it, for an engine created with `enable_mm_embeds=True`."""
        data = {"multi_modal_data": {"image": list(self.rows)}} if self.rows else {}
        return {"prompt_token_ids": self.prompt_token_ids, **data}

    @property
    def parts(self) -> list[dict[str, str]]:
        """Content parts of a chat message, one per image, to be put before the text.

        The server is started with `--enable-mm-embeds`.
        """
        return [{"type": "image_embeds", "image_embeds": encoded(rows)} for rows in self.rows]

    @property
    def sglang(self) -> dict[str, Any]:
        """The request as SGLang's documentation describes it for `Engine.generate`; not run with SGLang.

        SGLang takes one item of this format for all images of a prompt, and the places of each image in it: the
        indices of its first and its last token.
        """
        if not self.rows:
            return {"input_ids": self.prompt_token_ids}
        images, ids, places = iter(self.image_token_ids), [], []
        for token in self.prompt_token_ids:
            if token != self.placeholder_id:
                ids.append(token)
                continue
            tokens = next(images)
            first = len(ids) + tokens.index(token)
            places.append((first, first + tokens.count(token) - 1))
            ids += tokens
        item = {"format": "precomputed_embedding", "feature": torch.cat(self.rows), "offsets": places}
        return {"input_ids": ids, "image_data": [item]}


def encoded(rows: Tensor) -> str:
    """A tensor in the base64 of its `torch.save` file, which vLLM's servers read."""
    written = io.BytesIO()
    torch.save(rows.clone(), written)
    return base64.b64encode(written.getvalue()).decode()


@torch.no_grad()
def vllm_request(
    model: nn.Module,
    processor: Any,
    images: Image.Image | Sequence[Image.Image],
    prompt: str,
    config: PruningConfig | str | Path | None = None,
    *,
    isolator: ModeIsolator | Tensor | str | Path | None = None,
    **options: Any,
) -> PreparedRequest:
    """Encode and reduce images in this process, and prepare a request for vLLM without the plug-in.

    Args:
        model: a stock model, or the part of one that `saccade.serving.tower.tower_family` loads.
        processor: the model's.
        images: one per placeholder of the prompt, in order.
        prompt: the prompt as rendered by the chat template.
        config: how tokens are reduced, or the folder of a trained model.
        isolator: the mode isolator to put before each image: its rows `(l, D)`, or where it was saved. The default
            is that of the config.
        options: fields of [`PruningConfig`] that override the config's.

    Raises:
        SaccadeError: if the family or a setting needs the plug-in, or if the numbers of images and of placeholders
            differ.
    """
    config = pruning_config(config, **options)
    family = get_family(model)
    _check(family, config)
    images = [images] if isinstance(images, Image.Image) else list(images)
    tokenizer = processor.tokenizer
    ids = tokenizer(prompt, add_special_tokens=needs_start(start_alone(tokenizer), prompt))["input_ids"]
    count = ids.count(family.placeholder_id)
    if count != len(images):
        raise SaccadeError(f"prompt has {count} image placeholders, and {len(images)} images were given")
    pruner = Pruner(config, isolator_rows(family, config.isolator if isolator is None else isolator))
    token = tokenizer.convert_ids_to_tokens(family.placeholder_id)
    rows, tokens = [], []
    for image in images:
        # One at a time, as an engine sees it.
        inputs = processor(images=[image], text=token, return_tensors="pt", add_special_tokens=False)
        inputs = {name: value.to(_parameter(family).device) for name, value in inputs.items()}
        inputs["pixel_values"] = inputs["pixel_values"].to(_parameter(family).dtype)
        laid = prune(family, inputs, pruner, lambda laid: laid.inputs)
        rows.append(visual_rows(laid["mm_encoder_outputs"]["image"]).cpu())
        tokens.append(laid["input_ids"][0].tolist())
    return PreparedRequest(ids, tuple(rows), tuple(tokens), family.placeholder_id)


def _check(family: Family, config: PruningConfig) -> None:
    kind = family.model.config.model_type
    if kind not in TAKES_ROWS:
        raise SaccadeError(
            f"model_type={kind!r}: vLLM accepts any number of feature rows for {', '.join(TAKES_ROWS)} only; serve "
            "the folder with the plug-in (docs/serve.md)"
        )
    if config.positions != "compact":
        raise SaccadeError(
            f"positions={config.positions!r}: vLLM counts the positions of a prepared request from zero; serve the "
            "folder with the plug-in (docs/serve.md)"
        )
    check_serves(family, config, isolator=False)


def _parameter(family: Family) -> Tensor:
    """A parameter of the tower, for its device and dtype."""
    return next(family.vision_tower.parameters())
