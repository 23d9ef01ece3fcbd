"""Stopping a vision tower at the layer whose output the model uses."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from saccade.interfaces import changed, replaced_forward

KNOWN = ("clip_vision_model", "siglip_vision_model")
"""Values of a tower's `config.model_type` whose blocks are known to be `encoder.layers`."""

_PASSING = "_saccade_passing"
_lock = threading.Lock()


@dataclass
class _Passing:
    """What restores the layers of a tower that pass on what they get, and how many threads run the tower like this."""

    replaced: ExitStack
    users: int = 0


def _pass_on(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states


def used_layers(tower: nn.Module, feature_layer: int | list[int]) -> list[nn.Module] | None:
    """The blocks of a tower up to the one whose output is `hidden_states[feature_layer]`.

    Of several feature layers, the deepest counts. None if the tower has no such blocks; empty if the features are the
    embeddings.
    """
    used = used_states(tower, feature_layer)
    return None if used is None else list(tower_layers(tower))[: max(used)]


def tower_layers(tower: nn.Module) -> nn.ModuleList | None:
    """The blocks of a vision transformer, wherever in its module they are; None for other towers."""
    config = getattr(tower, "config", None)
    if getattr(config, "model_type", None) in KNOWN:
        if not hasattr(tower.encoder, "layers"):
            raise changed(f"{type(tower).__name__} ({config.model_type}) has no 'encoder.layers'")
        return tower.encoder.layers
    count = getattr(config, "num_hidden_layers", None)
    for module in tower.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and block_attention(module[0]) is not None:
            return module
    return None


def block_attention(block: nn.Module) -> nn.Module | None:
    """The attention of a block, which projects queries and keys separately; None if it has none."""
    attention = getattr(block, "self_attn", None) or getattr(block, "attention", None)
    return attention if hasattr(attention, "q_proj") and hasattr(attention, "k_proj") else None


def used_states(tower: nn.Module, feature_layer: int | list[int]) -> tuple[int, ...] | None:
    """The hidden states that a model with this `vision_feature_layer` reads, counted from 0; None for other towers."""
    layers = tower_layers(tower)
    if layers is None:
        return None
    states = len(layers) + 1  # hidden_states[n] is the output of layer n - 1, hidden_states[0] that of the embeddings
    numbers = [feature_layer] if isinstance(feature_layer, int) else feature_layer
    return tuple(dict.fromkeys(number % states for number in numbers))


def depths_below_features(tower: nn.Module, states: tuple[int, ...] | None) -> list[tuple[nn.Parameter, int]] | None:
    """A tower's parameters, and how far each stands below the features that a model reads; None for unknown towers.

    1 for the block that yields the features, one more for each block before it and for the embeddings; 0 for what
    comes after.

    Args:
        tower: a vision transformer.
        states: the hidden states that the model reads; None or empty for the output of the last block.
    """
    blocks = tower_layers(tower)
    if blocks is None:
        return None
    top = max(states) if states else len(blocks)
    number = {id(parameter): at for at, block in enumerate(blocks) for parameter in block.parameters()}
    depths, reached = [], -1
    for parameter in tower.parameters():  # embeddings, blocks, and what comes after them
        reached = number.get(id(parameter), len(blocks) if reached == len(blocks) - 1 else reached)
        depths.append((parameter, max(top - reached, 0)))
    return depths


@contextmanager
def unused_layers_passed_over(tower: nn.Module, feature_layer: int | list[int] | None) -> Iterator[None]:
    """Skip the layers after the last used one while the tower runs.

    LLaVA takes the features before CLIP's last layer, and the stock model runs that layer for nothing. The layers stay
    in the module tree, so neither the indices of hidden states nor what training engines know of the modules change.

    Args:
        tower: a vision transformer; other towers run unchanged.
        feature_layer: `vision_feature_layer` of the model's configuration.
    """
    used = None if feature_layer is None else used_layers(tower, feature_layer)
    if used is None:
        yield
        return
    # Several threads may run the tower at once: the first skips the layers, the last restores them.
    with _lock:
        passing = tower.__dict__.get(_PASSING)
        if passing is None:
            passing = tower.__dict__[_PASSING] = _Passing(ExitStack())
            for layer in list(tower_layers(tower))[len(used) :]:
                passing.replaced.enter_context(replaced_forward(layer, _pass_on))
        passing.users += 1
    try:
        yield
    finally:
        with _lock:
            passing.users -= 1
            if passing.users == 0:
                passing.replaced.close()
                del tower.__dict__[_PASSING]
