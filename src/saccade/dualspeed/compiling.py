"""`torch_compile`: compile the decoder layers one by one, since the code around them depends on the data."""

import torch

from saccade.errors import SaccadeError, one_of
from saccade.families import Family

RECOMPILE_LIMIT = 64
"""How many kinds of passes get their own compiled code."""


def check_compiling(backend: str | None, mode: str | None) -> None:
    """Check the options of `torch_compile`."""
    backends = torch._dynamo.list_backends(exclude_tags=())
    if backend is not None and backend not in backends:
        raise SaccadeError(f"torch_compile_backend={backend!r} is unknown: {one_of(backend, backends)}")
    modes = torch._inductor.list_mode_options()
    if mode is not None and mode not in modes:
        raise SaccadeError(f"torch_compile_mode={mode!r} is unknown: {one_of(mode, modes)}")


def compile_layers(family: Family, backend: str | None = None, mode: str | None = None) -> None:
    """Compile each decoder layer in place, for sequences of any length. Names of weights do not change.

    Passes that differ only in length share compiled code. Passes with and without gradient, in training and
    evaluation, with and without a mask, of one row and of several are compiled separately.
    """
    # Beyond the limit, torch permanently runs new variants uncompiled; LoRA plus an evaluation exceed the default of
    # 8.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    for layer in family.language_layers:
        layer.compile(backend=backend or "inductor", mode=mode, dynamic=True)
