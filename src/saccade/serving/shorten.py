"""What an engine needs to know about a single image: the tokens that represent it in a prompt, and their features.

Engines process each image once, whatever prompts it appears in, and write its placeholders into a prompt before the
vision tower has run. So the tokens of one image, including markers between its crops, are shortened as if they were a
whole prompt, by the same code as any other prompt: first in outline, without features, and then with them.

Shapes: B images of L tokens each, of which S remain; D is the width of the language model, A the number of position
axes.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from saccade.errors import SaccadeError
from saccade.families import Encoded, Family
from saccade.pruning import ModeInputs, Pruner, prune
from saccade.reducers import FROM_WORDS, PruningConfig, get_reducer, list_reducers
from saccade.tokens import Role

FIELDS = ("pixel_values", "pixel_attention_mask", "image_sizes", "image_grid_thw")
"""Outputs of processors for an image that families read."""


@dataclass(frozen=True)
class Outline:
    """The tokens that represent an image, as far as they are known before the vision tower has run.

    Args:
        ids: the S token ids.
        visual: bool `(S,)`, true for those that get features: kept tokens and isolator rows.
        positions: long `(A, S)`, counted from the image's first token. Those of visual tokens are not known yet.
        length: number of positions that the image occupies; the next token has this position.
    """

    ids: list[int]
    visual: Tensor
    positions: Tensor
    length: int


@dataclass(frozen=True)
class Features:
    """The features and positions of an image's visual tokens.

    Args:
        rows: `(n, D)`, or `(n, D * layers)` if features also enter deeper layers of the language model.
        positions: long `(A, n)`, counted from the image's first token.
    """

    rows: Tensor
    positions: Tensor


class Shortener:
    """Shortens images one by one.

    Args:
        family: the model's family; that of a model without weights (`saccade.serving.tower.bare_family`) is enough
            for outlines.
        config: how tokens are reduced.
        isolator: the rows `(l, D)` to put before each image, or None.

    Raises:
        SaccadeError: if an engine cannot reduce tokens in this way.
    """

    def __init__(self, family: Family, config: PruningConfig, isolator: Tensor | None = None) -> None:
        check_serves(family, config, isolator is not None)
        self.family = family
        self.pruner = Pruner(config, isolator)
        # Every reducer leaves as many tokens as the budget says, and an outline does not depend on which ones.
        any_tokens = self.pruner.reducer if config.reducer == "none" else get_reducer("uniform")
        blank = None if isolator is None else torch.zeros(isolator.shape[0], 1)
        self.blank = Pruner(config, blank, any_tokens)

    def outline(self, ids: Tensor, image: Mapping[str, Tensor]) -> Outline:
        """The shortened placeholders of an image.

        Args:
            ids: long `(L,)`, the tokens that represent it before any are dropped.
            image: the processor's outputs for it, by the names in `FIELDS`.

        Raises:
            SaccadeError: if the tokens do not match the image.
        """
        inputs = batch_of(self.family, [ids], [image])
        laid = prune(self.family, inputs, self.blank, _as_laid, encoded=_without_features(self.family, inputs))
        positions = _positions(laid)[:, 0]
        return Outline(
            ids=laid.inputs["input_ids"][0].tolist(),
            visual=_visual(laid)[0],
            positions=positions,
            length=int(self.family.full_positions(inputs).max()) + 1,
        )

    @torch.no_grad()
    def features(self, ids: Sequence[Tensor], images: Sequence[Mapping[str, Tensor]]) -> list[Features]:
        """The visual tokens of each image, in order. The tower runs once per shape of image.

        Args:
            ids: see `outline`.
            images: see `outline`, on the model's device.
        """
        alike: dict[Any, list[int]] = {}
        for number, (tokens, image) in enumerate(zip(ids, images, strict=True)):
            shapes = tuple((name, tuple(value.shape)) for name, value in sorted(image.items()))
            alike.setdefault((tokens.shape, shapes), []).append(number)
        found: dict[int, Features] = {}
        for numbers in alike.values():
            inputs = batch_of(self.family, [ids[n] for n in numbers], [images[n] for n in numbers])
            laid = prune(self.family, inputs, self.pruner, _as_laid)
            visual, positions = _visual(laid), _positions(laid)
            counts = visual.sum(dim=1).tolist()
            rows = visual_rows(laid.inputs["mm_encoder_outputs"]["image"]).split(counts)
            for sample, number in enumerate(numbers):
                found[number] = Features(rows[sample], positions[:, sample, visual[sample]])
        return [found[number] for number in range(len(images))]


def check_serves(family: Family, config: PruningConfig, isolator: bool) -> None:
    """Refuse settings that need more than one image, or the tower's output, to know how many tokens an image keeps.

    Raises:
        SaccadeError: naming the option, and what can be served.
    """
    if config.adaptive:
        raise SaccadeError(
            "adaptive=True cannot be served: an engine counts the tokens of an image before its tower has run; leave "
            "it out, so that every image keeps the same number of tokens"
        )
    if config.fit_length is not None:
        raise SaccadeError(
            f"fit_length={config.fit_length} cannot be served: an engine reduces each image separately, whatever "
            "else the prompt contains; remove it from the folder's pruning_config.json, or serve all tokens"
        )
    if config.patch_tolerance is not None:
        raise SaccadeError(
            f"patch_tolerance={config.patch_tolerance} cannot be served: an engine counts the tokens of an image by "
            "its size, whatever the image shows; remove it from the folder's pruning_config.json"
        )
    if config.budget == "sample":
        raise SaccadeError(
            "budget='sample' cannot be served: an engine reduces each image separately, whatever other images the "
            "prompt contains; use 'image' or 'crop'"
        )
    if config.budget == "image" and family.text_between_crops:
        raise SaccadeError(
            f"budget='image' cannot be served for {family.name}: there is text between the crops of an image, and how "
            "many tokens each crop keeps is not known before the tower has run; use 'crop'"
        )
    if family.text_between_lines:
        raise SaccadeError(
            f"{family.name}: cannot be served, since there is text between the lines of an image's tokens, and how "
            "many tokens each line keeps is not known before the tower has run; serve all tokens"
        )
    if config.needs.fields & FROM_WORDS:
        raise SaccadeError(
            f"reducer={config.reducer!r} cannot be served: it reads the question, and an engine encodes an image once "
            f"for all questions; use one of {', '.join(serving_reducers(family))}"
        )
    if isolator and family.bidirectional_image_attention:
        raise SaccadeError(
            f"isolator: cannot be served for {family.name}, since engines let all rows of an image attend to one "
            "another, while isolator rows must be attended to causally, as text is; leave it out"
        )
    family.check_gives(config.needs)


def serving_reducers(family: Family) -> list[str]:
    """The reducers that can be served with their default options."""
    names = []
    for name in list_reducers():
        try:
            needs = PruningConfig(reducer=name).needs
            family.check_gives(needs)
        except (SaccadeError, TypeError):
            continue
        if not needs.fields & FROM_WORDS:
            names.append(name)
    return names


def batch_of(family: Family, ids: Sequence[Tensor], images: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Processor outputs of a batch whose samples each consist of one of these images.

    Args:
        ids: long `(L,)` per image, all of the same length.
        images: the fields of each image, all of the same shapes.
    """
    input_ids = torch.stack(tuple(ids))
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    if family.uses_mrope:
        inputs["mm_token_type_ids"] = family.placeholder(input_ids).int()
    for name in images[0]:
        values = [image[name] for image in images]
        joined = name == "pixel_values" and family.joins_pixels
        inputs[name] = torch.cat(values) if joined else torch.stack(values)
    # On the device of the pixels, since places and features are combined in one tensor.
    device = inputs["pixel_values"].device
    return {name: value.to(device) for name, value in inputs.items()}


def _without_features(family: Family, inputs: Mapping[str, Tensor]) -> Encoded:
    """The encoding of an image with unknown features: its rows, grids and newlines, with features of width 1."""
    count = int(family.placeholder(inputs["input_ids"]).sum())
    pixels = inputs["pixel_values"]
    rows = pixels.shape[0] if pixels.dim() == 4 else 1  # other layouts are cut into crops by the model itself
    if count == 0 or count % rows:
        raise SaccadeError(f"an image of {rows} crops has {count} placeholders, which is not a multiple of {rows}")
    blank = SimpleNamespace(pooler_output=torch.zeros(rows, count // rows, 1), deepstack_features=[])
    # A copy that shares everything else: other threads encode images with the same model.
    blind = copy.copy(family)
    blind.model = copy.copy(family.model)
    blind.model.get_image_features = lambda *_, **__: blank
    return blind.encode(inputs)


def _as_laid(laid: ModeInputs) -> ModeInputs:
    return laid


def _visual(laid: ModeInputs) -> Tensor:
    """bool `(B, S)`, true for tokens that get features."""
    role = laid.spliced.role
    return (role == Role.RETAINED) | (role == Role.ISOLATOR)


def _positions(laid: ModeInputs) -> Tensor:
    """Long `(A, B, S)`."""
    positions = laid.inputs["position_ids"]
    return positions if positions.dim() == 3 else positions.unsqueeze(0)


def visual_rows(output: Any) -> Tensor:
    """The features of a batch's visual tokens in the order of the prompts, `(T, D * layers)`."""
    layers = [output.pooler_output, *(getattr(output, "deepstack_features", None) or ())]
    width = layers[0][0].shape[-1]
    return torch.cat([torch.cat([row.reshape(-1, width) for row in layer]) for layer in layers], dim=-1)
