"""Modules that run on a subset of rows: feed-forward networks, and query and output projections of the last attention.

The subset is passed down the stock forward as a keyword argument of each call. Attention removes it and stores it for
the later modules of the same layer. Gradient checkpointing replays a layer with its original keyword arguments, and
therefore with the right rows, even if other forward passes came in between.
"""

import threading
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from saccade.errors import SaccadeError, kind_of
from saccade.interfaces import changed, installed, known_range
from saccade.pruning.patching import call_original, patch

ROWS_KEYWORD = "skip_rows"
STATE = "_saccade_rows"
"""Attribute for the rows of the current call, by thread since several may run it; the modules of a layer share it."""


class KeptRows:
    """The rows of a batch that are not skipped in one call: long `(M,)`, their indices among all `B * L`.

    Not a dataclass, since engines copy dataclasses when they pass them on.
    """

    def __init__(self, index: Tensor) -> None:
        self.index = index
        self.reached: set[int] = set()
        """The ids of the modules that received these rows."""


def attention_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Remove the rows from the keyword arguments and store them for the later modules of the layer."""
    rows = kwargs.pop(ROWS_KEYWORD, None)
    by_thread, here = module.__dict__[STATE], threading.get_ident()
    by_thread.pop(here, None)
    if rows is not None:
        by_thread[here] = rows
        rows.reached.add(id(module))
    return call_original(module, *args, **kwargs)


def attention_of_unskipped_layer(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Remove the rows from the keyword arguments: no module of this layer uses them."""
    kwargs.pop(ROWS_KEYWORD, None)
    return call_original(module, *args, **kwargs)


def kept_rows_forward(module: nn.Module, x: Tensor) -> Tensor:
    """Run on the kept rows of `x` `(B, L, D)`; the others become zeros: `(B, L, D')`."""
    rows = module.__dict__[STATE].get(threading.get_ident())
    if rows is None:
        return call_original(module, x)
    rows.reached.add(id(module))
    index = rows.index.to(x.device)
    kept = x.flatten(0, 1).index_select(0, index)
    output = call_original(module, kept.unsqueeze(0)).squeeze(0)  # (M, D')
    whole = output.new_zeros(x.shape[0] * x.shape[1], output.shape[-1]).index_copy(0, index, output)
    return whole.unflatten(0, x.shape[:2])


def check_rows_arrived(rows: KeptRows, modules: Iterable[nn.Module], language: nn.Module) -> None:
    """Check after a call of the language model that each of the modules received the kept rows.

    Raises:
        SaccadeError: if one did not.
    """
    for module in modules:
        if id(module) not in rows.reached:
            if all(module is not other for other in language.modules()):
                raise SaccadeError(
                    f"{type(module).__name__}: this module of the language model was replaced after "
                    "`apply_skip_vision`, as by `merge_and_unload()`; call `remove()` before, and "
                    "`apply_skip_vision` again after"
                )
            raise changed(
                f"the language model's forward did not pass {ROWS_KEYWORD!r} on to {type(module).__name__}, or did "
                "not call it: nothing would be skipped"
            )


def patch_layers(layers: nn.ModuleList, chosen: range) -> list[nn.Module]:
    """Patch the layers with indices in `chosen` to run their feed-forward networks on kept rows only.

    The output of skipped rows in the last layer is never used: if it is chosen, its query and output projections skip
    them too, provided that they have the usual names.

    Returns:
        Every module that was patched.
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
        state: dict[int, KeptRows] = {}
        for module, forward in (
            (layer.self_attn, attention_forward),
            *((part, kept_rows_forward) for part in partial),
        ):
            patch(module, forward)
            module.__dict__[STATE] = state
            patched.append(module)
    return patched


def last_projections(attention: nn.Module) -> list[nn.Module]:
    """The projections that skipped rows of the last layer do not need; empty if there is a fused qkv projection."""
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    if not all(isinstance(getattr(attention, name, None), nn.Module) for name in names):
        return []
    return [attention.q_proj, attention.o_proj]


def check_layer(number: int, layer: nn.Module) -> None:
    """Check that leaving out this layer's feed-forward network leaves the residual stream unchanged."""
    for name in ("self_attn", "mlp"):
        if not isinstance(getattr(layer, name, None), nn.Module):
            raise SaccadeError(
                f"layer {number} of the language model is {kind_of(layer)} without {name!r}: Skip-Vision "
                "needs decoder layers with self_attn and mlp, as those of Llama, Mistral, Qwen and Gemma are in "
                f"transformers {known_range('transformers')} (here it is {installed('transformers')})"
            )
    for name, module in layer.named_children():
        if name.startswith("post_feedforward") and getattr(module, "bias", None) is not None:
            raise SaccadeError(
                f"layer {number} of the language model has a {name!r} with a bias, which changes the "
                "zeros of skipped rows: Skip-Vision needs an RMSNorm there"
            )
