"""`torch_compile`: the decoder layers one by one, since what is around them depends on the data."""

import torch

from saccade.errors import SaccadeError
from saccade.families import Family

RECOMPILE_LIMIT = 64
"""Kinds of passes that get compiled code of their own."""


def check_compiling(backend: str | None, mode: str | None) -> None:
    """Check what `torch_compile` is given.

    Raises:
        SaccadeError: on a backend or a mode that torch does not know.
    """
    backends = torch._dynamo.list_backends(exclude_tags=())
    if backend is not None and backend not in backends:
        raise SaccadeError(f"torch_compile_backend={backend!r} is unknown: use one of {', '.join(backends)}")
    modes = torch._inductor.list_mode_options()
    if mode is not None and mode not in modes:
        raise SaccadeError(f"torch_compile_mode={mode!r} is unknown: use one of {', '.join(modes)}")


def compile_layers(family: Family, backend: str | None = None, mode: str | None = None) -> None:
    """Compile each decoder layer in place, for sequences of any length. Names of weights stay as they are.

    Passes that differ in lengths alone share the compiled code. With and without gradient, in training and evaluation,
    with and without a mask, of one row and of several, they have code of their own.

    Args:
        backend, mode: as for `torch.compile`.
    """
    # Past the limit, torch runs what is new uncompiled, for good; LoRA and an evaluation pass its default of 8.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    for layer in family.language_layers:
        layer.compile(backend=backend or "inductor", mode=mode, dynamic=True)
