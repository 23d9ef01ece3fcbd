"""What distributed engines need: a step inside the wrapped model's forward, so that the hooks of DDP, FSDP2 and ZeRO
fire; the same modules on every rank; the classes of the layers to shard."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from PIL import Image
from torch import Tensor, nn

from saccade.data.chat import apply_chat_template
from saccade.data.conversation import used_columns
from saccade.interfaces import changed, replaced_forward
from saccade.tokens import IGNORE_INDEX

_SIDE = 64
BLANK_ROW = "blank_row"
"""The entry of a batch whose last row is not of the dataset, see `DummyImageCollator`."""
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

    with replaced_forward(original, forward):
        output = wrapper(*args, **kwargs)
    if not results:
        raise changed(f"{type(wrapper).__name__} did not call the forward of {type(original).__name__}", "accelerate")
    return output


@dataclass
class DummyImageCollator:
    """Adds one sample with a blank image and no labels to a batch without images.

    FSDP and ZeRO-3 gather a module's parameters from all ranks when it runs. A rank whose micro-batch is all text
    would run neither the vision tower nor a teacher, and the others would wait for it forever. The added sample goes
    through every module in every mode and, having no labels, contributes zero gradients. The entry `BLANK_ROW` says
    that it is there, so that it is not taken for a row of the dataset.
    """

    collate: Callable[[Sequence[dict[str, Any]]], dict[str, Any]]
    placeholder_id: int
    processor: Any

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collate(rows)
        # A batch without any usable record is empty, and ends the run.
        if "input_ids" not in batch or (batch["input_ids"] == self.placeholder_id).any():
            return batch
        batch = self.collate([*rows, self._sample(rows)])
        blank = (batch["input_ids"] == self.placeholder_id).any(dim=1)  # (B + 1,)
        batch["labels"] = batch["labels"].masked_fill(blank[:, None], IGNORE_INDEX)
        return {**batch, BLANK_ROW: True}

    def _sample(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """A sample with a blank image in the format of the rows, some of which may be unusable."""
        user, assistant = {"role": "user", "content": "."}, {"role": "assistant", "content": "."}
        images = [Image.new("RGB", (_SIDE, _SIDE))]
        prompts = [row["prompt"] for row in rows if "prompt" in used_columns(row)]
        if not prompts:
            return {"messages": [user, assistant], "images": images}
        if not isinstance(prompts[0], str):
            return {"prompt": [user], "completion": [assistant], "images": images}
        place = apply_chat_template(self.processor, [{**user, "content": [{"type": "image"}]}], tokenize=False)
        return {"prompt": place, "completion": ".", "images": images}


def layer_classes(model: nn.Module, language_layers: nn.ModuleList) -> list[str]:
    """The classes of a stock model's repeated layers, each of which becomes an FSDP unit.

    The model's own `_no_split_modules` may name classes that it does not contain, such as those of the text half of a
    CLIP tower, and accelerate fails on the first of them.
    """
    named = set(getattr(model, "_no_split_modules", None) or ())
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    found = {type(layer).__name__ for layers in lists for layer in layers if type(layer).__name__ in named}
    return sorted(found | {type(layer).__name__ for layer in language_layers})


def gathered(weight: Tensor) -> Tensor:
    """The full tensor of a parameter that an engine may have sharded. Every rank must call this."""
    if hasattr(weight, "full_tensor"):
        return weight.full_tensor()
    if hasattr(weight, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight]):
            return weight.detach().clone()
    return weight
