"""Prefill time, decoding time and cache size with all visual tokens, with pruned ones, and with skipped ones."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, PreTrainedModel

from benchmarks.shapes import build_shape, get_shape, shape_config
from benchmarks.steps import seconds_on
from saccade.errors import SaccadeError
from saccade.families import get_family
from saccade.interfaces import by_name, changed
from saccade.pruning import Pruner, prune, prune_inputs
from saccade.pruning.cache import cache_of
from saccade.reducers import PruningConfig
from saccade.skip_vision import SkipVisionConfig, apply_skip_vision
from saccade.skip_vision.cache import cache_name
from saccade.tokens import Role

MEASURED = ("tiny", "llava-1.5-7b", "llama3-8b")
FULL, PRUNE, SKIP = "full", "prune", "skip"


@dataclass
class Generation:
    """Measurements of generating from one kind of prompt.

    Args:
        prompt_rows: number of prompt rows, by kind.
        prefill: seconds from encoded images to the first token, per repeat.
        decode: seconds per generated token, per repeat.
        layout: seconds to choose, merge and lay out the tokens of encoded images, per repeat; empty for full prompts.
        cache_peak: bytes of keys and values when the last layer has read the prompt.
        cache: bytes of keys and values once skipped rows are dropped.
    """

    prompt_rows: dict[str, int]
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    layout: list[float] = field(default_factory=list)
    cache_peak: int = 0
    cache: int = 0


def generation_model(
    name: str,
    layers: int | None = None,
    width: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> PreTrainedModel:
    """A LLaVA of this shape with random weights. A pure language model gets a small tower of 24 x 24 patches.

    Raises:
        SaccadeError: if the shape is not in `MEASURED`, or cannot be cut to this size.
    """
    get_shape(name)
    if name not in MEASURED:
        raise SaccadeError(f"shape={name!r} cannot be measured yet: choose one of {', '.join(MEASURED)}")
    config = shape_config(name, layers, width)
    if not isinstance(config, LlamaConfig):
        return build_shape(name, layers, width, dtype, device)
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=336,
        patch_size=14,
    )
    whole = LlavaConfig(
        vision_config=vision, text_config=config, image_token_id=config.vocab_size - 1, tie_word_embeddings=False
    )
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        return LlavaForConditionalGeneration._from_config(whole, dtype=dtype).eval()


@torch.no_grad()
def measure_generation(
    model: PreTrainedModel,
    config: SkipVisionConfig,
    pruning: PruningConfig,
    images: int = 1,
    text_tokens: int = 60,
    new_tokens: int = 16,
    repeats: int = 5,
) -> dict[str, Generation]:
    """Time a prompt with all tokens, pruned, and with skipping, in alternation, after one warm-up run each.

    Images are encoded once, outside the timed section. All take turns, so that other load affects them equally.

    Args:
        model: a LLaVA without skipping.
        config: how tokens are skipped.
        pruning: how tokens are pruned.
        images: images in the prompt.
        new_tokens: tokens generated per repeat.
        repeats: timed repeats of each variant.

    Returns:
        Measurements by name: `full`, `prune` and `skip`.

    Raises:
        SaccadeError: on a count below 1, or a model that does not support skipping.
    """
    counts = {"images": images, "text_tokens": text_tokens, "new_tokens": new_tokens, "repeats": repeats}
    for name, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise SaccadeError(f"{name}={value!r}: give 1 or more")
    inputs = _prompt(model, images, text_tokens)
    family = get_family(model)
    pruner = Pruner(pruning)
    encoded, to_prune = family.encode(inputs, config.needs), family.encode(inputs, pruner.needs)

    def pruned() -> dict[str, Any]:
        return prune(family, inputs, pruner, lambda laid: laid.inputs, encoded=to_prune, padding_side="left")

    full = prune_inputs(model, inputs, reducer="none", prune_ratio=0.0)
    found = {name: Generation({}) for name in (FULL, PRUNE, SKIP)}
    for turn in range(repeats + 1):
        for name, result in found.items():
            warm = turn == 0
            skip = apply_skip_vision(model, config) if name == SKIP else None
            try:
                prepared = full
                if name != FULL:
                    seconds, prepared = _timed(
                        model, pruned if skip is None else partial(skip.prepare, inputs, encoded=encoded)
                    )
                    if not warm:
                        result.layout.append(seconds)
                if warm:
                    result.prompt_rows = _prompt_rows(name, prepared, text_tokens)
                _turn(model, prepared, new_tokens, result, warm)
            finally:
                if skip is not None:
                    skip.remove()
    return found


def cache_size(cache: Any) -> int:
    """Bytes of the keys and values that a cache stores."""
    return sum(x.nbytes for layer in cache.layers if layer.is_initialized for x in (layer.keys, layer.values))


def _prompt_rows(name: str, prepared: dict[str, Any], text_tokens: int) -> dict[str, int]:
    """Number of rows of a prompt, by kind."""
    if name != SKIP:
        visual = prepared["input_ids"].shape[1] - text_tokens
        return {"text": text_tokens, "visual" if name == FULL else "kept": visual}
    roles = (role for role in Role if role not in (Role.PADDING, Role.ANSWER, Role.ISOLATOR))
    return {role.name.lower(): int((prepared["skip_roles"] == role).sum()) for role in roles}


def _turn(model: PreTrainedModel, prepared: dict[str, Any], new_tokens: int, result: Generation, warm: bool) -> None:
    """Read the prompt and generate tokens: the warm-up run records cache sizes, the others record times."""
    handle = None
    if warm:

        def look(module: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            cache = cache_of(by_name(module.forward, args, kwargs))
            if cache is None:
                raise changed(f"{type(module).__name__} is called without a key-value cache")
            result.cache_peak = cache_size(cache)

        handle = get_family(model).language_layers[-1].self_attn.register_forward_hook(look, with_kwargs=True)
    seconds, output = _timed(model, lambda: model(**prepared, use_cache=True, logits_to_keep=1))
    if handle is not None:
        handle.remove()
        result.cache = cache_size(cache_of(output))
    else:
        result.prefill.append(seconds)
    given = {cache_name(model.forward): cache_of(output)}

    def write() -> Tensor:
        token = output.logits[:, -1].argmax(dim=-1, keepdim=True)
        for _ in range(new_tokens):
            logits = model(input_ids=token, **given, use_cache=True, logits_to_keep=1).logits
            token = logits[:, -1].argmax(dim=-1, keepdim=True)
        return token

    seconds, _ = _timed(model, write)
    if not warm:
        result.decode.append(seconds / new_tokens)


def _timed(model: PreTrainedModel, work: Callable[[], Any]) -> tuple[float, Any]:
    start = seconds_on(model.device)
    done = work()
    return seconds_on(model.device) - start, done


def _prompt(model: PreTrainedModel, images: int, text_tokens: int) -> dict[str, Tensor]:
    """Random token ids `(1, L)` with all images first, and random pixels."""
    config = model.config
    vision = config.vision_config
    placeholder = config.image_token_id
    tokens = images * (vision.image_size // vision.patch_size) ** 2
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.get_text_config().vocab_size - 1, (1, text_tokens), generator=generator)
    ids = ids + (ids >= placeholder)
    ids = torch.cat((torch.full((1, tokens), placeholder), ids), dim=1)
    pixels = torch.randn(images, 3, vision.image_size, vision.image_size, generator=generator)
    return {
        "input_ids": ids.to(model.device),
        "attention_mask": torch.ones_like(ids, device=model.device),
        "pixel_values": pixels.to(model.device, model.dtype),
    }
