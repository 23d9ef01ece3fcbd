"""`apply_pruning`: patch a stock model in place so that it prunes its inputs, until `remove()`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from saccade.errors import SaccadeError
from saccade.families import Family, get_family
from saccade.interfaces import by_name
from saccade.pruning.cache import Turn, cache_of, last_position, next_positions, noting, remember, turn_of
from saccade.pruning.given_prompt import generate_on, mask_of
from saccade.pruning.patching import (
    HANDLE,
    PER_IMAGE,
    call_original,
    patch_as_stock,
    sort_arguments,
    unpatch,
)
from saccade.pruning.prune_inputs import isolator_rows, prune_inputs, pruning_config
from saccade.reducers import FROM_WORDS, PruningConfig

ENCODED = "mm_encoder_outputs"


class Pruning:
    """A model that prunes, as `apply_pruning` returns it.

    Args:
        family: the stock model's family.
        config: how visual tokens are reduced.
        isolator: the rows `(l, D)` to put before each image, or None.
    """

    def __init__(self, family: Family, config: PruningConfig, isolator: Tensor | None) -> None:
        self.family = family
        self.config = config
        self.isolator = isolator

    @property
    def model(self) -> nn.Module:
        """The stock model."""
        return self.family.model

    def remove(self) -> None:
        """Restore the model. Does nothing the second time."""
        if self.model.__dict__.get(HANDLE) is self:
            unpatch(self.model)
            del self.model.__dict__[HANDLE]

    def __enter__(self) -> "Pruning":
        return self

    def __exit__(self, *about: object) -> None:
        self.remove()

    def takes(self, given: Mapping[str, Any]) -> bool:
        """Whether the arguments of a call contain images that are not encoded yet."""
        return given.get(ENCODED) is None and self.family.has_images(given)

    @torch.compiler.disable
    def shorten(self, given: dict[str, Any], padding_side: str) -> dict[str, Any]:
        """The arguments of a call with their prompt replaced by a shorter one."""
        inputs, others = sort_arguments(self.family, given)
        inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
        shorter = prune_inputs(self.model, inputs, self.config, padding_side=padding_side, isolator=self.isolator)
        return {**others, **shorter}

    def per_token(self, shorter: Mapping[str, Any]) -> dict[str, Tensor]:
        """What a later turn needs of the inputs of a shorter prompt."""
        names = ("input_ids", "attention_mask", "position_ids", *self.family.token_inputs)
        return {name: shorter[name] for name in names if shorter.get(name) is not None}

    def go_on(self, given: dict[str, Any], turn: Turn) -> dict[str, Any]:
        """The arguments of a call with a further turn of text, after the prompt that the cache holds in its place.

        Raises:
            SaccadeError: if the conversation does not begin with that prompt.
        """
        ids, length = given.get("input_ids"), turn.given.shape[1]
        if ids is not None:
            turn = turn.repeated(len(ids) // len(turn.given))
        if ids is None or ids[:, :length].shape != turn.given.shape or not torch.equal(ids[:, :length], turn.given):
            raise SaccadeError(
                "input_ids: a further turn on the cache of a pruned prompt begins with that prompt as given; pass "
                "the ids of the whole conversation, or leave the cache out"
            )
        mask = given.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        further = {"input_ids": ids[:, length:], "attention_mask": mask[:, length:]}
        for name, fill in self.family.token_inputs.items():
            known = given.get(name)
            further[name] = torch.full_like(further["input_ids"], fill) if known is None else known[:, length:]
        positions = turn.shorter["position_ids"]  # (B, S), or (A, B, S)
        further["position_ids"] = next_positions(
            last_position(positions), further["attention_mask"], positions.shape[:-2]
        )
        joined = {name: torch.cat((kept, further[name]), dim=-1) for name, kept in turn.shorter.items()}
        return {**given, **joined}

    def go_on_with_images(self, given: dict[str, Any], turn: Turn, cached: int) -> dict[str, Any]:
        """The arguments of a call with a further turn, whose images are the only ones given, after `cached` tokens.

        Raises:
            SaccadeError: as `go_on`, and if an image's tokens depend on what else the conversation contains.
        """
        reason = self._reduces_together()
        if reason is not None:
            raise SaccadeError(
                f"images of a further turn: with {reason}, which tokens of an image stay depends on the rest of the "
                "conversation; pass all of it without the cache, or a further turn of text without images"
            )
        images = {*self.family.vision_inputs, *PER_IMAGE} - self.family.token_inputs.keys()
        whole = self.go_on({name: value for name, value in given.items() if name not in images}, turn)
        known = {name: whole[name][..., :cached] for name in turn.shorter}
        new = {name: whole[name][..., cached:] for name in turn.shorter if name != "position_ids"}
        new |= {name: given[name] for name in images if given.get(name) is not None}
        if "mm_token_type_ids" in new:
            new["mm_token_type_ids"] = new["mm_token_type_ids"][:, -new["input_ids"].shape[1] :]
        shorter = self.shorten(new, "left")
        shorter["position_ids"] = last_position(known["position_ids"]) + 1 + shorter["position_ids"]
        joined = {name: torch.cat((value, shorter[name]), dim=-1) for name, value in known.items()}
        return {**whole, **shorter, **joined}

    def _reduces_together(self) -> str | None:
        """What makes the tokens that stay of an image depend on more than the image; None if nothing does."""
        config = self.config
        if self.family.bidirectional_image_attention:
            return f"attention in both directions ({self.family.name})"
        for name, value in (("adaptive", config.adaptive), ("fit_length", config.fit_length)):
            if value:
                return f"{name}={value!r}"
        if config.budget == "sample":
            return "budget='sample'"
        return f"reducer={config.reducer!r}" if config.needs.fields & FROM_WORDS else None


def apply_pruning(model: nn.Module, config: PruningConfig | str | Path | None = None, **options: Any) -> Pruning:
    """Patch a stock model in place so that it prunes visual tokens: `generate` takes processor outputs as before.

    The output of `generate` starts with the original prompt, as with the stock model, so callers need no change:
    pipelines, lmms-eval's stock models and `transformers serve` prune too. So does a plain `forward` on processor
    outputs; its logits are those of the shorter sequence, padded on the left if every row of the batch ends with a
    real token, else on the right. Later calls on the cache that it returns go on at the right positions.

    Args:
        model: a stock model of a known family, PEFT-wrapped or not.
        config: how tokens are reduced, or the folder of a trained model, which says how it was trained.
        options: fields of [`PruningConfig`] that override the config's.

    Returns:
        The handle: `remove()` restores the model; used as a context manager, it does so at the end of the block.

    Raises:
        SaccadeError: on an unknown family or option, an isolator of the wrong width, a reducer whose needs the model
            cannot provide, or a model that already prunes or skips.
    """
    config = pruning_config(config, **options)
    family = get_family(model)
    if HANDLE in family.model.__dict__:
        raise SaccadeError("model: it prunes or skips already; call `remove()` on what switched that on first")
    family.check_gives(config.needs)
    rows = isolator_rows(family, config.isolator)
    isolator = None if rows is None else rows.detach()
    pruning = Pruning(family, config, isolator)
    stock = family.model
    patch_as_stock(stock, _forward)
    patch_as_stock(stock, _generate, "generate")
    # `generate_batch` and the server of transformers go through it as well.
    if hasattr(stock, "init_continuous_batching"):
        patch_as_stock(stock, _init_continuous_batching, "init_continuous_batching")
    stock.__dict__[HANDLE] = pruning
    return pruning


def _forward(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The stock forward, on fewer tokens if there are images that are not encoded yet."""
    pruning: Pruning = model.__dict__[HANDLE]
    kwargs = by_name(model.forward, args, kwargs)
    cache = cache_of(kwargs)
    if not pruning.takes(kwargs):
        turn = turn_of(cache) if kwargs.get("position_ids") is None else None
        return call_original(model, **(kwargs if turn is None else turn.step(kwargs, cache)))
    if kwargs.get("labels") is not None:
        raise SaccadeError(
            "labels: a model that prunes in place does not train; use DualSpeedTrainer, or call `remove()` first"
        )
    if cache is not None and int(cache.get_seq_length()):
        raise SaccadeError(
            "images after tokens that the key-value cache holds: pass the whole conversation and the cache to "
            "`generate`, or all of it to `forward` without the cache"
        )
    mask = kwargs.get("attention_mask")
    ends = mask is None or bool(mask[:, -1].all())
    shorter = pruning.shorten(kwargs, "left" if ends else "right")
    with noting(cache):
        output = call_original(model, **shorter)
    cache = cache_of(output) if cache is None else cache
    if cache is not None:
        remember(cache, kwargs["input_ids"], pruning.per_token(shorter))
    return output


def _generate(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The stock `generate`, on fewer tokens; its output contains the original prompt."""
    pruning: Pruning = model.__dict__[HANDLE]
    kwargs = by_name(model.generate, args, kwargs)
    if kwargs.get("inputs") is not None:
        kwargs["input_ids"] = kwargs.pop("inputs")
    kwargs["attention_mask"] = mask_of(model, kwargs)
    cache = cache_of(kwargs)
    turn = turn_of(cache)
    if not pruning.takes(kwargs):
        if turn is None:
            return call_original(model, method="generate", **kwargs)
        return generate_on(model, kwargs.get("input_ids"), pruning.go_on(kwargs, turn))
    if kwargs.get("assistant_model") is not None:
        raise SaccadeError("assistant_model: an assistant would need a separate, shorter prompt; leave it out")
    given, cached = kwargs.get("input_ids"), 0 if cache is None else cache.get_seq_length()
    if cached and turn is None:
        name = next(name for name, value in kwargs.items() if value is cache)
        raise SaccadeError(
            f"{name}: it holds a conversation that did not begin with pruned images; pass all of it without the cache"
        )
    shorter = pruning.go_on_with_images(kwargs, turn, cached) if cached else pruning.shorten(kwargs, "left")
    with noting(cache):
        output = generate_on(model, given, shorter)
    if cache is None and isinstance(output, ModelOutput):
        cache = cache_of(output)
    if cache is not None:
        remember(cache, given, pruning.per_token(shorter))
    return output


def _init_continuous_batching(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    raise SaccadeError(
        "init_continuous_batching: continuous batching reads text only, and would leave the images out; use generate, "
        "or serve the model with vLLM (docs/serve.md)"
    )
