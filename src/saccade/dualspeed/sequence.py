"""The sequence that a mode runs on, made of one encoding of the images.

Shapes: B samples, L tokens of the full batch, S of the mode's own sequence.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from saccade.families import Encoded, Family
from saccade.pruning import ModeIsolator, reduce, shorten
from saccade.reducers import Reducer, is_low_resolution
from saccade.skip_vision import SkipVisionConfig, SummaryHead
from saccade.skip_vision.language import ROLES_KEYWORD
from saccade.skip_vision.prepare import prepare
from saccade.tokens import Role, TokenBudget


@dataclass
class LaidOut:
    """What a pass runs on.

    Args:
        inputs: what the stock forward takes.
        labels: long `(B, S)`.
        tokens: scalar, tokens of the sequence; one that skips counts for the share of a layer that it runs.
    """

    inputs: dict[str, Any]
    labels: Tensor
    tokens: Tensor


class Sequence(Protocol):
    """How a mode turns an encoded batch into its sequence."""

    reducer: Reducer | None
    """What it needs an encoding for, or None if the features are enough."""
    budget: TokenBudget
    also: frozenset[str]
    """Needs beyond those of the reducer."""
    trains: tuple[nn.Module, ...]
    """Modules of ours that get a gradient from it."""

    def __call__(self, encoded: Encoded, text: Mapping[str, Any], labels: Tensor) -> LaidOut:
        """Lay out a batch of which `text` are the inputs less the images."""
        ...


@dataclass
class FullSequence:
    """All tokens, as the stock model sees them."""

    reducer: Reducer | None = None
    budget: TokenBudget = field(default_factory=lambda: TokenBudget(0.0))
    also: frozenset[str] = frozenset()
    trains: tuple[nn.Module, ...] = ()

    def __call__(self, encoded: Encoded | None, text: Mapping[str, Any], labels: Tensor) -> LaidOut:
        """The stock inputs; `encoded` is None where there are no images."""
        images = {} if encoded is None else {"mm_encoder_outputs": encoded.outputs}
        return LaidOut({**text, **images}, labels, text["attention_mask"].sum())


@dataclass
class PrunedSequence:
    """The tokens that a reducer keeps, the isolator before them.

    Args:
        positions: "compact" or "original".
        pad_id: id to pad shortened batches with.
        newlines: "keep" or "drop", for the newline tokens of anyres images.
    """

    family: Family
    reducer: Reducer
    budget: TokenBudget
    isolator: ModeIsolator | None
    positions: str
    pad_id: int
    newlines: str = "keep"
    also: frozenset[str] = frozenset()

    @property
    def trains(self) -> tuple[nn.Module, ...]:
        """The isolator, if there is one."""
        return () if self.isolator is None else (self.isolator,)

    def __call__(self, encoded: Encoded, text: Mapping[str, Any], labels: Tensor) -> LaidOut:
        """The shortened inputs."""
        short = shorten(
            self.family,
            encoded,
            {**text, "labels": labels},
            reduce(encoded.context, self.reducer, self.budget, self.newlines),
            isolator=None if self.isolator is None else self.isolator(),
            positions=self.positions,
            pad_id=self.pad_id,
        )
        return LaidOut(short.inputs, short.labels, short.inputs["attention_mask"].sum())


class SkippedSequence:
    """Retained, merged and summary tokens, of which the merged skip the feed-forward networks.

    Args:
        family: the model's family; Skip-Vision is applied to the model.
        config: which tokens are retained and which skipped.
        head: makes the summary tokens, or None.
    """

    def __init__(self, family: Family, config: SkipVisionConfig, head: SummaryHead | None) -> None:
        self.family = family
        self.config = config
        self.head = head
        self.reducer = config.split_reducer()
        self.budget = TokenBudget()
        self.also = config.merge_needs
        self.trains: tuple[nn.Module, ...] = () if head is None else (head,)
        self.share = skipped_share(family, config)

    def __call__(self, encoded: Encoded, text: Mapping[str, Any], labels: Tensor) -> LaidOut:
        """The inputs with the role of each token."""
        inputs = prepare(
            self.family, self.config, self.head, text, labels=labels, padding_side="right", encoded=encoded
        )
        labels = inputs.pop("labels")
        skipped = (inputs[ROLES_KEYWORD] == Role.SKIPPED).sum()
        tokens = inputs["attention_mask"].sum() - (1 - self.share) * skipped
        return LaidOut(inputs, labels, tokens)


def skipped_share(family: Family, config: SkipVisionConfig) -> float:
    """The share of the decoder layers' weights that a skipped token runs through."""
    skipping = range(len(family.language_layers))
    skipping = skipping if config.layers is None else range(*config.layers)
    run = total = 0
    for number, layer in enumerate(family.language_layers):
        weights = sum(parameter.numel() for parameter in layer.parameters())
        total += weights
        spared = sum(parameter.numel() for parameter in layer.mlp.parameters())
        run += weights - (spared if number in skipping else 0)
    return run / total


def is_of_small_images(sequence: Sequence) -> bool:
    """Whether a sequence is made of an encoding of its own, of smaller images."""
    return sequence.reducer is not None and is_low_resolution(sequence.reducer) and not sequence.budget.keeps_all
