"""Encode, reduce, splice, run: the one path from a processed batch through a model on fewer visual tokens.

Pruned inference, every mode of training, its teacher, Skip-Vision and evaluation all go through `prune`.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from saccade.errors import SaccadeError
from saccade.families import Encoded, Family
from saccade.reducers import Needs
from saccade.tokens import Places, Spliced, VisualTokens, splice

Result = TypeVar("Result")

SIZES = ("image_sizes", "image_sizes_videos", "image_grid_thw", "video_grid_thw")
"""Processor outputs that a family needs to interpret pixels."""
WHOLE = "pass all that the processor returned with return_tensors='pt'"


class Method(Protocol):
    """A decision about each visual token of a batch: keep, merge, drop or skip it."""

    needs: Needs
    """What it needs beyond the features."""
    positions: str
    """"compact" or "original", see [`PruningConfig`]."""
    roles_keyword: str | None
    """The keyword by which the language model receives each token's role; None if it does not need roles."""

    @property
    def trainable_modules(self) -> tuple[nn.Module, ...]:
        """Saccade's own modules that receive a gradient through it."""
        ...

    def reduce(self, family: Family, encoded: Encoded, places: Places, text: Tensor) -> VisualTokens:
        """The tokens that now represent the images; `text`, long `(B,)`, counts each sample's other tokens."""
        ...

    def cost(self, role: Tensor) -> Tensor:
        """The cost of the decoder layers on sequences with these roles `(B, S)`, in full tokens: a scalar."""
        ...


@dataclass(frozen=True)
class ModeInputs:
    """What the language model runs on.

    Args:
        inputs: what the stock forward takes: ids, mask, positions, per-token extras, `mm_encoder_outputs`.
        labels: long `(B, S)` or None.
        tokens: scalar, the cost of the sequence: one per token, minus the share of the layers that tokens skip.
        spliced: where each token came from; None if the sequence is the full one.
        lost: long `(B,)`, how many visual tokens `fit_length` took off each sample's budget; None if all samples fit.
    """

    inputs: dict[str, Any]
    labels: Tensor | None
    tokens: Tensor
    spliced: Spliced | None = None
    lost: Tensor | None = None


def prune(
    family: Family,
    inputs: Mapping[str, Any],
    method: Method | None,
    run: Callable[[ModeInputs], Result],
    *,
    encoded: Encoded | None = None,
    labels: Tensor | None = None,
    padding_side: str = "right",
) -> Result:
    """Run a model on a batch whose visual tokens have been reduced by a method.

    Args:
        family: the model's family.
        inputs: processor outputs of the full batch; those of images are only read if `encoded` is None.
        method: decides about the visual tokens; None keeps all of them, as the stock model sees them.
        run: what to do with the shorter batch: a forward pass, a generation, or just return it.
        encoded: the images' features, if the caller has them, including what the method needs.
        labels: long `(B, L)` or None.
        padding_side: of the shorter batch, "right" or "left".

    Raises:
        SaccadeError: if text and images do not match, or the model cannot provide what the method needs.
    """
    with clear_errors():
        if encoded is None and family.has_images(inputs):
            encoded = family.encode(inputs, None if method is None else method.needs, labels=labels)
        if encoded is not None and (method is None or method.needs.patch_tolerance is None):
            encoded = encoded.with_all()
        if method is None:
            laid = _whole(inputs, encoded, labels)
        else:
            places, text = places_and_text(family, inputs, encoded)
            visual = None if encoded is None else method.reduce(family, encoded, places, text)
            laid = _splice(family, inputs, method, encoded, places, visual, labels, padding_side)
    return run(laid)


def places_and_text(family: Family, inputs: Mapping[str, Any], encoded: Encoded | None) -> tuple[Places, Tensor]:
    """Where the visual tokens of a batch stand, and how many other tokens each sample has: long `(B,)`.

    Raises:
        ValueError: if the number of placeholders differs from the number of visual tokens.
    """
    placeholder = family.placeholder(inputs["input_ids"])
    places = Places.of(placeholder, None if encoded is None else encoded.context)
    return places, inputs["attention_mask"].sum(dim=1) - placeholder.sum(dim=1)


def _whole(inputs: Mapping[str, Any], encoded: Encoded | None, labels: Tensor | None) -> ModeInputs:
    """The unchanged batch, with its images encoded."""
    images = {} if encoded is None else {"mm_encoder_outputs": encoded.outputs}
    return ModeInputs({**inputs, **images}, labels, inputs["attention_mask"].sum())


def _splice(
    family: Family,
    inputs: Mapping[str, Any],
    method: Method,
    encoded: Encoded | None,
    places: Places,
    visual: VisualTokens | None,
    labels: Tensor | None,
    padding_side: str,
) -> ModeInputs:
    """The batch with its placeholders replaced by the visual tokens that a method kept."""
    from_full = encoded is not None and (method.positions == "original" or family.uses_mrope)
    spliced = splice(
        inputs["input_ids"],
        inputs["attention_mask"],
        places,
        visual,
        position_ids=family.full_positions(inputs) if from_full else None,
        labels=labels,
        pad_id=family.pad_id,
        padding_side=padding_side,
    )
    positions = spliced.position_ids
    given = {
        "input_ids": spliced.input_ids,
        "attention_mask": spliced.attention_mask,
        # Text has the same position on every axis.
        "position_ids": positions.expand(3, -1, -1) if family.uses_mrope and positions.dim() == 2 else positions,
    }
    for name, fill in family.token_inputs.items():
        if inputs.get(name) is not None:
            given[name] = spliced.gather(inputs[name], fill)
    if method.roles_keyword is not None:
        given[method.roles_keyword] = spliced.role
    if visual is not None:
        features, *deepstack_features = visual.by_row()
        given["mm_encoder_outputs"] = family.wrap_features(features, encoded, deepstack_features)
    lost = None if visual is None else visual.lost
    return ModeInputs(given, spliced.labels, method.cost(spliced.role), spliced, lost)


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turn errors that families and the splice raise on bad inputs into clear messages."""
    try:
        yield
    except SaccadeError:
        raise
    except KeyError as error:
        if error.args[0] not in SIZES:
            raise
        raise SaccadeError(f"inputs has no {error}: {WHOLE}") from error
    except ValueError as error:
        raise SaccadeError(f"inputs: {error}; the text needs one image placeholder run for each image") from error
