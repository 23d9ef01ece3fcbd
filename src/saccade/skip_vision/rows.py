"""Modules that run on some rows only: the feed-forward networks, and the queries and outputs of the last attention.

Which rows those are comes down the stock forward as a keyword argument of each call. Attention takes it out and leaves
it where the modules behind it in the same layer find it; gradient checkpointing, which replays a layer with the
keyword arguments it had, so replays it with its own rows, however many forwards came between.
"""

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from saccade.errors import SaccadeError
from saccade.interfaces import changed, installed, known_range
from saccade.pruning.patching import call_original, patch

ROWS_KEYWORD = "skip_rows"
STATE = "_saccade_rows"


class KeptRows:
    """The rows of a batch that are not skipped, in one call.

    Not a dataclass: engines copy those when they hand them down.

    Args:
        index: long `(M,)`, their numbers among all `B * L`.
    """

    def __init__(self, index: Tensor) -> None:
        self.index = index
        self.reached: set[int] = set()
        """The ids of the modules that were given these rows."""


@dataclass
class LayerState:
    """What the modules of one decoder layer share during a call, by thread: several may run the layer at once."""

    by_thread: dict[int, KeptRows] = field(default_factory=dict)

    @property
    def rows(self) -> KeptRows | None:
        """What the layer's attention was given in the call that this thread is in."""
        return self.by_thread.get(threading.get_ident())

    @rows.setter
    def rows(self, rows: KeptRows | None) -> None:
        if rows is None:
            self.by_thread.pop(threading.get_ident(), None)
        else:
            self.by_thread[threading.get_ident()] = rows


def attention_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Take the rows out of the keyword arguments, for the modules behind this one in the layer."""
    rows = module.__dict__[STATE].rows = kwargs.pop(ROWS_KEYWORD, None)
    if rows is not None:
        rows.reached.add(id(module))
    return call_original(module, *args, **kwargs)


def attention_of_unskipped_layer(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Take the rows out of the keyword arguments: no module of this layer wants them."""
    kwargs.pop(ROWS_KEYWORD, None)
    return call_original(module, *args, **kwargs)


def kept_rows_forward(module: nn.Module, x: Tensor) -> Tensor:
    """Run on the kept rows of `x` `(B, L, D)`; the others come out as zeros: `(B, L, D')`."""
    rows = module.__dict__[STATE].rows
    if rows is None:
        return call_original(module, x)
    rows.reached.add(id(module))
    index = rows.index.to(x.device)
    kept = x.flatten(0, 1).index_select(0, index)
    output = call_original(module, kept.unsqueeze(0)).squeeze(0)  # (M, D')
    whole = output.new_zeros(x.shape[0] * x.shape[1], output.shape[-1]).index_copy(0, index, output)
    return whole.unflatten(0, x.shape[:2])


def check_rows_arrived(rows: KeptRows, modules: Iterable[nn.Module]) -> None:
    """Check after a call that handed rows down that each of the modules was given them and ran on them.

    Raises:
        SaccadeError: naming a module that was not reached, which has run on all rows instead.
    """
    for module in modules:
        if id(module) not in rows.reached:
            raise changed(
                f"the language model's forward did not hand {ROWS_KEYWORD!r} down to {type(module).__name__}, or did "
                "not call it: nothing would be skipped"
            )


def patch_layers(layers: nn.ModuleList, chosen: range) -> list[nn.Module]:
    """Let the layers numbered `chosen` run their feed-forward networks on kept rows only.

    Skipped rows of the last layer end there: if it is chosen, they get no queries and no output projection either,
    where attention has projections of the usual names.

    Returns:
        Every module that was patched.

    Raises:
        SaccadeError: if a layer is not made of attention and a feed-forward network whose zeros stay zeros.
    """
    for number, layer in enumerate(layers):
        check_layer(number, layer)
    patched = []
    for number, layer in enumerate(layers):
        if number not in chosen:
            patch(layer.self_attn, attention_of_unskipped_layer)
            patched.append(layer.self_attn)
            continue
        partial = [layer.mlp]
        if number == len(layers) - 1:
            partial += last_projections(layer.self_attn)
        state = LayerState()
        for module, forward in (
            (layer.self_attn, attention_forward),
            *((part, kept_rows_forward) for part in partial),
        ):
            patch(module, forward)
            module.__dict__[STATE] = state
            patched.append(module)
    return patched


def last_projections(attention: nn.Module) -> list[nn.Module]:
    """What skipped rows of the last layer can do without: none where queries, keys and values are one projection."""
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    if not all(isinstance(getattr(attention, name, None), nn.Module) for name in names):
        return []
    return [attention.q_proj, attention.o_proj]


def check_layer(number: int, layer: nn.Module) -> None:
    """Check that skipping is what leaving out the feed-forward network of this layer means.

    Raises:
        SaccadeError: if the layer is built otherwise.
    """
    for name in ("self_attn", "mlp"):
        if not isinstance(getattr(layer, name, None), nn.Module):
            raise SaccadeError(
                f"layer {number} of the language model is a {type(layer).__name__} without {name!r}: Skip-Vision "
                "needs decoder layers with self_attn and mlp, as those of Llama, Mistral, Qwen and Gemma are in "
                f"transformers {known_range('transformers')} (here it is {installed('transformers')})"
            )
    for name, module in layer.named_children():
        if name.startswith("post_feedforward") and getattr(module, "bias", None) is not None:
            raise SaccadeError(
                f"layer {number} of the language model has a {name!r} with a bias, which makes something of the "
                "zeros of skipped rows: Skip-Vision needs an RMSNorm there"
            )
