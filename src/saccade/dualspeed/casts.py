"""LoRA under autocast, without a copy of each layer's input that autocast undoes.

PEFT casts the input of a layer to the dtype of its adapters, which train in float32. Under autocast the next product
casts it back, without loss: two copies per layer, forward and backward, and in place of one tensor that the
projections share, each keeps its own for the backward pass. PEFT's quantized layers leave the cast out in the same
way.
"""

from functools import partial

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn

from saccade.interfaces import check_methods

CAST = "_cast_input_dtype"


def spare_casts(model: nn.Module) -> None:
    """Leave out, in all LoRA layers of `model`, casts that autocast would undo.

    Results stay the same to the bit, except that with dropout on a GPU another mask may be drawn. Nothing changes
    without autocast, with adapters that do more than two products, such as DoRA's, and where dropout is active on a
    CPU, which would round the factor of what it keeps to the dtype of the input.

    Raises:
        SaccadeError: if the installed PEFT casts elsewhere.
    """
    check_methods(Linear, (CAST,), "peft")
    for layer in model.modules():
        if type(layer) is Linear:
            # Not a bound method, which a model saved as a whole could not be loaded with.
            setattr(layer, CAST, partial(_cast_unless_undone, layer))


def _cast_unless_undone(layer: Linear, x: Tensor, dtype: torch.dtype) -> Tensor:
    kind = x.device.type
    undone = torch.is_autocast_enabled(kind) and x.dtype == torch.get_autocast_dtype(kind)
    if undone and not getattr(layer, "lora_variant", None) and not (kind == "cpu" and _drops(layer)):
        return x
    return Linear._cast_input_dtype(layer, x, dtype)


def _drops(layer: Linear) -> bool:
    return layer.training and any(getattr(dropout, "p", 0.0) > 0 for dropout in layer.lora_dropout.values())
