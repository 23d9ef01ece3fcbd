"""Stopping a vision tower at the layer whose output the model uses."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def unused_layers_passed_over(tower: nn.Module, feature_layer: int | list[int] | None) -> Iterator[None]:
    """Let the layers behind the last used one hand on what they get, while the tower runs.

    LLaVA takes the features before CLIP's last layer, and the stock model runs that layer for nothing. The layers stay
    where they are, so that the numbers of hidden states do not change, nor what engines know of the modules.

    Args:
        tower: of the CLIP or SigLIP kind; others run as they are.
        feature_layer: `vision_feature_layer` of the model's configuration.
    """
    layers = getattr(getattr(tower, "encoder", None), "layers", None)
    if layers is None or feature_layer is None:
        yield
        return
    states = len(layers) + 1  # hidden_states[n] comes out of layer n - 1, hidden_states[0] out of the embeddings
    numbers = [feature_layer] if isinstance(feature_layer, int) else feature_layer
    unused = list(layers)[max(number % states for number in numbers) :]
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
