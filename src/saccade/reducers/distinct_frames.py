"""The most distinct frames of a clip keep more tokens."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from saccade.reducers.budget import share_out
from saccade.reducers.common import mask_to_index, row_budget
from saccade.reducers.frames import STEPS, Frames, reducer_within, selected
from saccade.reducers.registry import register_reducer
from saccade.tokens import Reduction, VisualContext


@register_reducer("frames")
@dataclass(frozen=True)
class DistinctFrames:
    """Gives each frame of a clip a share of its budget by how much it differs from those before it.

    The share of frame t is in proportion to the mean over earlier frames s of d(t, s), the mean over places i of
    1 - cos(x[t, i], x[s, i]); the first frame counts as much as the most distinct one. Shares are whole numbers by
    largest remainder, at least one token per frame; with a smaller budget than frames, the most distinct ones keep one
    token each. Another reducer chooses within a frame. Rows of one frame, such as images, are left to it.

    It compares the frames that share a budget: set `budget` to "image", or "sample". With "crop", each frame is a row.

    Args:
        within: the reducer that chooses within a frame; one that selects.
    """

    within: str = "divprune"

    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        object.__setattr__(self, "needs", reducer_within("frames", self.within).needs)

    @torch.no_grad()
    def __call__(self, context: VisualContext, keep: int | Tensor) -> Reduction:
        """Index `(B, K)` of the kept tokens. Time O(P T^2 D) per row for T frames of P tokens, and the reducer's."""
        reducer = reducer_within("frames", self.within)
        frames = Frames.of(context)
        if frames is None:
            return selected("frames", self.within, reducer(context, keep))
        budget = row_budget(context, keep)
        shares = torch.zeros(frames.place.shape[:2], dtype=torch.long)  # (B, T)
        for row, wanted in enumerate(budget.counts.tolist()):
            count = frames.counts[row]
            each = [wanted] if count == 1 else _shares(frames.distances(context, row), wanted, frames.sizes[row])
            shares[row, :count] = torch.tensor(each)
        rows = frames.contexts(context, (shares > 0).to(context.features.device))
        reduction = selected("frames", self.within, reducer(rows, shares.flatten()))
        return Reduction(mask_to_index(frames.units.kept(reduction), budget.width), dense=budget.uniform)


def _shares(distance: Tensor, keep: int, size: int) -> list[int]:
    """How many of `keep` tokens each frame gets, of `size` each."""
    between = distance.double().mean(dim=0) / STEPS  # (T, T)
    before = between.tril(diagonal=-1).sum(dim=1) / torch.arange(len(between), device=distance.device).clamp(min=1)
    weights = [round(weight, 6) for weight in before.clamp(min=0).tolist()]
    weights[0] = max(weights)
    if keep >= len(weights):
        return share_out(keep, weights, [size] * len(weights))
    chosen = sorted(range(len(weights)), key=lambda frame: (-weights[frame], frame))[:keep]
    return [int(frame in chosen) for frame in range(len(weights))]
