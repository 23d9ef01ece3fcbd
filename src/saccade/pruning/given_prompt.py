"""`generate` on a prompt that was shortened or rearranged, while its caller sees only the prompt that was given."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput

from saccade.pruning.patching import call_original


def mask_of(model: nn.Module, given: Mapping[str, Any]) -> Tensor | None:
    """The mask among the arguments of `generate`, or the one that the stock model infers from padding, if any."""
    mask, ids = given.get("attention_mask"), given.get("input_ids")
    if mask is not None or ids is None:
        return mask
    padding, end = (_setting(name, given, model) for name in ("pad_token_id", "eos_token_id"))
    ends = [] if end is None else torch.as_tensor(end).flatten().tolist()
    return None if padding is None or padding in ends else (ids != padding).long()


def generate_on(model: nn.Module, given: Tensor, rearranged: dict[str, Any]) -> Any:
    """The stock `generate` on another prompt than the given one, `(B, P)`, which its output begins with."""
    length = rearranged["input_ids"].shape[1]
    _count_from(length - given.shape[1], model, rearranged)
    _show_given(given, length, model, rearranged)
    output = call_original(model, method="generate", **rearranged)
    if isinstance(output, ModelOutput):
        output.sequences = with_given_prompt(output.sequences, given, length)
        return output
    return with_given_prompt(output, given, length)


def with_given_prompt(sequences: Tensor, given: Tensor, length: int) -> Tensor:
    """Replace the prompt of `length` tokens in what `generate` returned, `(B', length + n)`, by the given one
    `(B, T)`.

    If there are several sequences per prompt, they are consecutive.
    """
    several = sequences.shape[0] // given.shape[0]
    return torch.cat((given.repeat_interleave(several, dim=0), sequences[:, length:]), dim=1)


def _count_from(change: int, model: nn.Module, given: dict[str, Any]) -> None:
    """Adjust limits on the total length, so that they allow as many new tokens as with the original prompt."""
    names = ("max_length", "min_length")
    for name in names:
        if given.get(name) is not None:
            given[name] += change
    limits = {name: _setting(name, given, model) for name in names if given.get(name) is None}
    if _setting("max_new_tokens", given, model) is not None:
        limits.pop("max_length", None)
    limits = {name: value + change for name, value in limits.items() if value}
    if given.get("generation_config") is None:
        given.update(limits)
    else:
        given["generation_config"] = copy.deepcopy(given["generation_config"])
        for name, value in limits.items():
            setattr(given["generation_config"], name, value)


def _setting(name: str, given: Mapping[str, Any], model: nn.Module) -> Any:
    """What `generate` takes as a setting: a keyword, or what the config that it is given says, or the model's."""
    configs = (given.get("generation_config"), model.generation_config)
    values = (given.get(name), *(getattr(config, name, None) for config in configs))
    return next((value for value in values if value is not None), None)


def _show_given(given: Tensor, length: int, model: nn.Module, arguments: dict[str, Any]) -> None:
    """Let the caller's own functions see the given prompt `(B, P)` in place of the other one of `length` tokens."""
    for name, shown in (("stopping_criteria", _ShownCriterion), ("logits_processor", _ShownProcessor)):
        if arguments.get(name):
            seen = [shown(function, given, length) for function in arguments[name]]
            arguments[name] = type(arguments[name])(seen)
    if arguments.get("streamer") is not None:
        arguments["streamer"] = _ShownStreamer(arguments["streamer"], given)
    allowed = arguments.get("prefix_allowed_tokens_fn")
    if allowed is not None:
        beams, several = (_setting(name, arguments, model) for name in ("num_beams", "num_return_sequences"))
        # All beams of a prompt share its number; sampled sequences are numbered one by one.
        several = 1 if (beams or 1) > 1 else several or 1
        arguments["prefix_allowed_tokens_fn"] = lambda number, ids: allowed(
            number, torch.cat((given[number // several], ids[length:]))
        )


class _Shown:
    """A function of the caller's that sees the prompt as it was given."""

    def __init__(self, function: Any, given: Tensor, length: int) -> None:
        self._function, self._given, self._length = function, given, length

    def __getattr__(self, name: str) -> Any:
        return getattr(self._function, name)

    def _whole(self, input_ids: Tensor) -> Tensor:
        return with_given_prompt(input_ids, self._given, self._length)


class _ShownCriterion(_Shown, StoppingCriteria):
    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Any:
        return self._function(self._whole(input_ids), scores, **kwargs)


class _ShownProcessor(_Shown, LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self._function(self._whole(input_ids), scores)


class _ShownStreamer(BaseStreamer):
    """A streamer whose first tokens are the prompt as it was given."""

    def __init__(self, streamer: BaseStreamer, given: Tensor) -> None:
        self._streamer, self._given = streamer, given

    def put(self, value: Tensor) -> None:
        self._streamer.put(value if self._given is None else self._given.to(value.device))
        self._given = None

    def end(self) -> None:
        self._streamer.end()
