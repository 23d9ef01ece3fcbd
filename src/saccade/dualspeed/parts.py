"""Run the language passes of a micro-batch a few samples at a time, after encoding its images once.

Shapes: B samples, L tokens, R feature rows of N visual tokens.

A worked example: four samples, three at a time, a scale of 1. The tower encodes the four images once, f = tower(x).

    part 1, samples 0 to 2    leaf = f[0:3].detach(); loss1(leaf).backward() accumulates gradients in the language
                              model's parameters and in leaf.grad, and frees the part's activations
    part 2, sample 3          loss2(f[3:4]) keeps its graph, for the caller's backward pass
    carried                   c = sum(f[0:3] * leaf.grad), minus its own value: zero, with the gradient leaf.grad at f

The caller's `(loss1 + loss2 + c).backward()`, where loss1 no longer has a graph, then runs the backward pass of the
language model for sample 3 only, and those of projector and tower once for all four with the gradients of both parts.
The result is that of one pass over all four.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from saccade.families import Encoded, Family
from saccade.families.text_relevance import row_samples


@dataclass(frozen=True)
class InParts:
    """How to split a micro-batch.

    Args:
        samples: maximum number of samples per part.
        backward: runs the backward pass of a part's loss; the last part's is left to the caller.
        scale: factor that the caller applies to the loss before its own backward pass.
    """

    samples: int
    backward: Callable[[Tensor], None]
    scale: float = 1.0


@dataclass
class Part:
    """A micro-batch, or some samples of one: its images' encoding, if it has any, other inputs, and labels."""

    encoded: Encoded | None
    text: Mapping[str, Any]
    labels: Tensor


@dataclass
class MicroBatches:
    """A micro-batch split into parts.

    The features of all parts but the last are detached from the graph of projector and vision tower. The backward pass
    of that graph then runs once, with the accumulated gradients of the parts: see `carried`.
    """

    family: Family
    whole: Part
    _left: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def parts(self, samples: int) -> Iterator[tuple[Part, bool]]:
        """The parts in order, and whether each is the last one."""
        whole, owners = self.whole, []
        count = whole.labels.shape[0]
        if whole.encoded is not None:
            owners = row_samples(whole.encoded.context, self.family.placeholder(whole.text["input_ids"])).tolist()
        text = self._per_token()
        for start in range(0, count, samples):
            stop = min(start + samples, count)
            rows = [number for number, owner in enumerate(owners) if start <= owner < stop]
            last = stop == count
            encoded = self._encoded(slice(rows[0], rows[-1] + 1), cut=not last) if rows else None
            some = {name: value[..., start:stop, :] for name, value in text.items()}
            yield Part(encoded, some, whole.labels[start:stop]), last

    def carried(self, scale: float) -> Tensor | float:
        """A zero whose gradient is the accumulated gradient at the parts' features, divided by `scale`."""
        total = 0.0
        for features, leaf in self._left:
            if leaf.grad is not None:
                total = total + (features * (leaf.grad / scale)).sum()
        return total - total.detach() if isinstance(total, Tensor) else total

    def _per_token(self) -> dict[str, Tensor]:
        """Inputs `(..., B, L)`, with positions, since a part's positions cannot be computed from all images' grids."""
        given = self.whole.text
        shape = given["input_ids"].shape
        text = {name: value for name, value in given.items() if isinstance(value, Tensor) and value.shape == shape}
        if self.family.uses_mrope:
            text["position_ids"] = self.family.full_positions(given)
        return text

    def _encoded(self, rows: slice, cut: bool) -> Encoded:
        whole = self.whole.encoded
        layers = (whole.context.features, *whole.deepstack_features)
        features, *deepstack = (self._features(x[rows], cut) for x in layers)
        context = whole.context.select_rows(rows).replace(features=features)
        markers = None if whole.markers is None else self._features(whole.markers, cut)
        part = Encoded(context, {}, tuple(deepstack), whole.videos[rows], markers)
        if not whole.outputs:
            return part
        valid = [[row[keep] for row, keep in zip(x, context.valid, strict=True)] for x in (features, *deepstack)]
        return replace(part, outputs=self.family.wrap_features(valid[0], part, valid[1:]))

    def _features(self, features: Tensor, cut: bool) -> Tensor:
        if not (cut and features.requires_grad):
            return features
        leaf = features.detach().requires_grad_()
        self._left.append((features, leaf))
        return leaf
