"""Stopping a vision tower at the layer whose output the model uses."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def used_layers(tower: nn.Module, feature_layer: int | list[int]) -> list[nn.Module] | None:
    """The blocks of a CLIP or SigLIP tower up to the one whose output is `hidden_states[feature_layer]`.

    Of several layers that is the last, the one nearest to the language model. None for other towers; empty where the
    features are those of the embeddings.
    """
    used = used_states(tower, feature_layer)
    return None if used is None else list(tower.encoder.layers)[: max(used)]


def used_states(tower: nn.Module, feature_layer: int | list[int]) -> tuple[int, ...] | None:
    """The hidden states that a model with this `vision_feature_layer` reads, counted from 0; None for other towers."""
    layers = getattr(getattr(tower, "encoder", None), "layers", None)
    if layers is None:
        return None
    states = len(layers) + 1  # hidden_states[n] comes out of layer n - 1, hidden_states[0] out of the embeddings
    numbers = [feature_layer] if isinstance(feature_layer, int) else feature_layer
    return tuple(dict.fromkeys(number % states for number in numbers))


@contextmanager
def unused_layers_passed_over(tower: nn.Module, feature_layer: int | list[int] | None) -> Iterator[None]:
    """Let the layers behind the last used one hand on what they get, while the tower runs.

    LLaVA takes the features before CLIP's last layer, and the stock model runs that layer for nothing. The layers stay
    where they are, so that the numbers of hidden states do not change, nor what engines know of the modules.

    Args:
        tower: of the CLIP or SigLIP kind; others run as they are.
        feature_layer: `vision_feature_layer` of the model's configuration.
    """
    used = None if feature_layer is None else used_layers(tower, feature_layer)
    if used is None:
        yield
        return
    unused = list(tower.encoder.layers)[len(used) :]
    before = [layer.__dict__.get("forward") for layer in unused]
    for layer in unused:
        layer.forward = _pass_on
    try:
        yield
    finally:
        for layer, forward in zip(unused, before, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward


def _pass_on(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states
