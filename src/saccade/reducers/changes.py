"""Tokens that did not change since they were last kept are dropped."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from saccade.reducers.common import check_number, mask_to_index, row_budget
from saccade.reducers.frames import STEPS, Frames, reducer_within, selected
from saccade.reducers.registry import register_reducer
from saccade.tokens import Reduction, VisualContext


@register_reducer("changes")
@dataclass(frozen=True)
class Changes:
    """Keeps the first frame of a clip, and of later frames the tokens that changed.

    The token at place i of frame t is kept if its cosine distance to the token at i of the last frame in which that
    was kept exceeds a threshold: d(x[t, i], x[s, i]) > h, with s the last such frame before t, or the first frame.
    Bisection finds an h with which at most the budget is kept, while a step below it keeps more. What is left of the
    budget goes to the tokens with the largest distance among the others, so that its number is exact.

    The first frame is whole if that takes no more than a share `first` of the budget, and otherwise gets this share,
    chosen by another reducer. Rows of one frame, such as images, are left to that reducer.

    It compares the frames that share a budget: set `budget` to "image", or "sample". With "crop", each frame is a row.

    Args:
        first: largest share of the budget that the first frame takes, in (0, 1].
        within: the reducer that chooses in a frame of which not all tokens are kept; one that selects.
    """

    first: float = 0.5
    within: str = "divprune"

    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        check_number("changes", "first", self.first, "(0, 1]")
        object.__setattr__(self, "needs", reducer_within("changes", self.within).needs)

    @torch.no_grad()
    def __call__(self, context: VisualContext, keep: int | Tensor) -> Reduction:
        """Index `(B, K)` of the kept tokens. Time O(P T^2 D) per row for T frames of P tokens."""
        reducer = reducer_within("changes", self.within)
        frames = Frames.of(context)
        if frames is None:
            return selected("changes", self.within, reducer(context, keep))
        budget = row_budget(context, keep)
        wanted = budget.counts.tolist()
        whole = zip(wanted, frames.counts, frames.sizes, strict=True)
        first = [self._first(*numbers) for numbers in whole]
        device = context.features.device
        counted = torch.arange(frames.place.shape[1], device=device) == 0
        rows = frames.contexts(context, counted.expand(len(wanted), -1))
        per_frame = torch.zeros(len(wanted), len(counted), dtype=torch.long)
        per_frame[:, 0] = torch.tensor(first)
        kept = frames.units.kept(selected("changes", self.within, reducer(rows, per_frame.flatten())))
        for row, (count, more) in enumerate(zip(frames.counts, wanted, strict=True)):
            if count > 1 and more > first[row]:
                changed = changed_tokens(frames.distances(context, row), more - first[row])  # (T, P)
                place = frames.place[row, :count, : frames.sizes[row]]
                kept[row, place[changed.to(device)]] = True
        return Reduction(mask_to_index(kept, budget.width), dense=budget.uniform)

    def _first(self, keep: int, frames: int, size: int) -> int:
        """How many tokens of the first frame to keep."""
        if frames == 1:
            return keep
        share = size if size <= self.first * keep else max(1, int(self.first * keep))
        # Later frames cannot take more than they have.
        return min(size, keep, max(share, keep - (frames - 1) * size))


def changed_tokens(distance: Tensor, count: int) -> Tensor:
    """The `count` tokens after the first frame that changed most since the last kept one: bool `(T, P)`.

    Args:
        distance: long `(P, T, T)`, of `Frames.distances`.
    """
    low, high = -1, 2 * STEPS + 2
    best = _above(distance, high)
    while high - low > 1:
        middle = (low + high) // 2
        kept, since = _above(distance, middle)
        if int(kept.sum()) <= count:
            high, best = middle, (kept, since)
        else:
            low = middle
    kept, since = best
    left = count - int(kept.sum())
    if left > 0:
        score = since.masked_fill(kept, -1)
        score[0] = -1
        # Stable: of equal distances the first stays.
        order = score.flatten().sort(descending=True, stable=True).indices[:left]
        kept.view(-1)[order] = True
    return kept


def _above(distance: Tensor, threshold: int) -> tuple[Tensor, Tensor]:
    """Which tokens a threshold keeps, bool `(T, P)`, and how far each is from the last kept one, long `(T, P)`."""
    places, count, _ = distance.shape
    kept = torch.zeros(count, places, dtype=torch.bool, device=distance.device)
    since = torch.zeros(count, places, dtype=torch.long, device=distance.device)
    last = torch.zeros(places, dtype=torch.long, device=distance.device)
    for frame in range(1, count):
        since[frame] = distance[:, frame].gather(1, last.unsqueeze(1)).squeeze(1)
        kept[frame] = since[frame] > threshold
        last = torch.where(kept[frame], frame, last)
    return kept, since
