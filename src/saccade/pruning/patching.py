"""Replace methods of a module in place, and restore them.

A patched method is bound to its module, and shared state is kept in module attributes, so that a deep copy of the
model, or one that was pickled, is patched too and independent of the original.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any
from uuid import uuid4

from torch import Tensor, nn

from saccade.errors import SaccadeError
from saccade.families import Family

ORIGINALS = "_saccade_originals"
CALLS = "_saccade_calls"
"""Attribute for what wrappers around patched methods call, by key."""
HANDLE = "_saccade_in_place"
"""Attribute for the handle of the active patch: a model prunes or skips, not both."""
PER_IMAGE = (
    *("image_sizes", "image_sizes_videos", "batch_num_images", "image_grid_thw", "video_grid_thw"),
    *("second_per_grid_ts", "mm_token_type_ids"),
)
"""Processor outputs that describe images and videos and are consumed along with them."""


def patch(module: nn.Module, function: Callable[..., Any], name: str = "forward") -> None:
    """Replace the module's method `name` by `function`, of a module's own level, which receives the module and the
    arguments."""
    key = uuid4().hex
    state = {"active": True, "before": module.__dict__.get(name), "key": key}
    # Not a bound method: pickle would look it up by its name, and find the stock one.
    patched = partial(_patched, state, function, module, name)
    # As of a method: accelerate binds its wrapper of this to the module, and a deep copy's is then bound to the copy.
    patched.__func__ = partial(_call, key)
    module.__dict__.setdefault(CALLS, {})[key] = patched
    module.__dict__.setdefault(ORIGINALS, {})[name] = patched
    setattr(module, name, patched)


def _call(key: str, module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
    return module.__dict__[CALLS][key](*args, **kwargs)


def _patched(
    state: Mapping[str, Any],
    function: Callable[..., Any],
    module: nn.Module,
    name: str,
    /,
    *args: Any,
    **kwargs: Any,
) -> Any:
    # Wrappers that were put around it since, such as accelerate's, still call it once the model is restored.
    if not state["active"]:
        return _original(state, module, name)(*args, **kwargs)
    return function(module, *args, **kwargs)


def _original(state: Mapping[str, Any], module: nn.Module, name: str) -> Callable[..., Any]:
    before: Callable[..., Any] | None = state["before"]
    return partial(getattr(type(module), name), module) if before is None else before


def patch_as_stock(module: nn.Module, function: Callable[..., Any], name: str = "forward", *more: str) -> None:
    """`patch`, with the signature of the stock method and `more` keywords: generate and trainers read it."""
    stock = getattr(module, name)
    named = inspect.signature(stock).parameters
    # A wrapper that stayed around an earlier patch still names its keywords.
    new = [keyword for keyword in more if keyword not in named]
    keywords = [inspect.Parameter(keyword, inspect.Parameter.KEYWORD_ONLY, default=None) for keyword in new]
    # Without annotations, of which not all can be pickled.
    bare = [entry.replace(annotation=inspect.Parameter.empty) for entry in named.values()]
    rest = [entry for entry in bare if entry.kind is entry.VAR_KEYWORD]
    patch(module, function, name)
    patched = module.__dict__[name]
    entries = [entry for entry in bare if entry not in rest] + keywords + rest
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    for call, described in ((patched, entries), (patched.__func__, [own, *entries])):
        call.__name__, call.__qualname__, call.__doc__ = stock.__name__, stock.__qualname__, stock.__doc__
        call.__signature__ = inspect.Signature(described)


def unpatch(module: nn.Module) -> None:
    """Undo every `patch` of a module. A wrapper that was put around it since stays, and calls what was before."""
    for name, patched in module.__dict__.pop(ORIGINALS).items():
        state = patched.args[0]
        state["active"] = False
        if module.__dict__.get(name) is not patched:
            continue
        del module.__dict__[name], module.__dict__[CALLS][state["key"]]
        if state["before"] is not None:
            setattr(module, name, state["before"])
    if not module.__dict__[CALLS]:
        del module.__dict__[CALLS]


def call_original(module: nn.Module, *args: Any, method: str = "forward", **kwargs: Any) -> Any:
    """Call the module's method as it was before it was patched."""
    state = module.__dict__[ORIGINALS][method].args[0]
    return _original(state, module, method)(*args, **kwargs)


def sort_arguments(family: Family, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the processor returned, and the other arguments of a call of `forward` or `generate`.

    Raises:
        SaccadeError: if `input_ids` are missing, or something is given that does not fit another number of tokens.
    """
    for name in ("position_ids", "inputs_embeds"):
        if given.get(name) is not None:
            raise SaccadeError(f"{name}: visual tokens are dropped or moved, pass 'input_ids' and leave {name} out")
    if isinstance(given.get("logits_to_keep"), Tensor):
        raise SaccadeError(
            "logits_to_keep: the places of a tensor are those of the prompt as given, which changes: give a number, "
            "which counts from the end, or select from all logits"
        )
    if given.get("input_ids") is None:
        raise SaccadeError("inputs has no 'input_ids': pass what the processor returned with return_tensors='pt'")
    names = {"input_ids", "attention_mask", *family.vision_inputs, *family.token_inputs, *PER_IMAGE}
    inputs = {name: value for name, value in given.items() if name in names and value is not None}
    # None among the others says something: `top_k=None` unsets what the model's generation_config has.
    others = names | {"position_ids", "inputs_embeds"}
    return inputs, {name: value for name, value in given.items() if name not in others}
