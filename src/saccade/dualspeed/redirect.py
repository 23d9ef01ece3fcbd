"""Run another method inside the forward of a wrapped model, so that the hooks of DDP, FSDP2 and ZeRO fire."""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from saccade.interfaces import changed

Result = TypeVar("Result")


def redirect_forward(
    wrapper: nn.Module, original: nn.Module, method: Callable[..., Result], *args: Any, **kwargs: Any
) -> Result:
    """Call `wrapper(*args, **kwargs)` with `method` in place of `original.forward`.

    Args:
        wrapper: the model as the engine wrapped it; `original` itself if it is not wrapped.
        original: the module whose `forward` the wrapper ends up calling.
        method: what to run instead; it may call `original`'s submodules, but not `original` itself.

    Raises:
        SaccadeError: if the wrapper does not end up calling `original.forward`.
    """
    results: list[Result] = []

    def forward(*inputs: Any, **options: Any) -> Result:
        results.append(method(*inputs, **options))
        return results[-1]

    had_own = "forward" in original.__dict__
    before = original.__dict__.get("forward")
    original.forward = forward
    try:
        output = wrapper(*args, **kwargs)
    finally:
        if had_own:
            original.forward = before
        else:
            del original.forward
    if not results:
        raise changed(f"{type(wrapper).__name__} did not call the forward of {type(original).__name__}", "accelerate")
    return output
