"""The tokens of clips by frame and place, for reducers that know time.

Shapes: B feature rows of N tokens; T frames of P tokens each.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.errors import SaccadeError
from saccade.reducers.common import float64_home
from saccade.reducers.registry import Reducer, get_reducer, list_reducers
from saccade.reducers.shared_budget import Units
from saccade.tokens import Reduction, VisualContext
from saccade.values import check_choice

STEPS = 2**20
"""Distances are rounded to steps of this many to one: the order in which a product sums cannot decide between two."""


@dataclass(frozen=True)
class Frames:
    """Which token of a row stands where in which frame.

    Args:
        place: long `(B, T, P)`, indices among a row's N tokens, -1 where a row has fewer frames or smaller ones.
        counts: for each row, its number of frames.
        sizes: for each row, the number of tokens of a frame.
        units: the same places, with a unit for each of the B * T frames.
    """

    place: Tensor
    counts: list[int]
    sizes: list[int]
    units: Units

    @classmethod
    def of(cls, context: VisualContext) -> "Frames | None":
        """The frames of each row's grid; None if no row has two. A row that is not of a video, or whose tokens do not
        fill its grid, has one.

        Reads the grids back to the host, unless they are known to have one frame each.
        """
        if context.single_frame or 0 in context.shape[:2]:
            return None
        available = context.valid.sum(dim=1)
        follow = torch.ones_like(available) if context.video is None else context.video.long()
        numbers = torch.cat((context.grid, available.unsqueeze(1), follow.unsqueeze(1)), dim=1).tolist()
        counts = [
            frames if follows and tokens and frames * high * wide == tokens else 1
            for frames, high, wide, tokens, follows in numbers
        ]
        sizes = [tokens // frames for (*_, tokens, _), frames in zip(numbers, counts, strict=True)]
        if max(counts) == 1:
            return None
        device = context.features.device
        order = context.valid.sort(dim=1, descending=True, stable=True).indices  # the valid tokens first
        frame = torch.arange(max(counts), device=device)[:, None]
        token = torch.arange(max(sizes), device=device)
        several, size = (torch.tensor(values, device=device)[:, None, None] for values in (counts, sizes))
        rank = frame * size + token  # (B, T, P)
        there = (frame < several) & (token < size)
        place = order.gather(1, rank.clamp(max=context.shape[1] - 1).flatten(1)).view_as(rank)
        row = torch.arange(len(counts), device=device)
        flat = (place + row[:, None, None] * context.shape[1]).masked_fill(~there, -1)
        units = Units(flat.flatten(0, 1), row.repeat_interleave(max(counts)), context.shape[:2])
        return cls(place.masked_fill(~there, -1), counts, sizes, units)

    def contexts(self, context: VisualContext, counted: Tensor) -> VisualContext:
        """`context` with a row for each frame: B * T rows of P tokens.

        Args:
            counted: bool `(B, T)`, false for frames whose tokens are all to be padding.
        """
        grid = context.grid.clone()
        grid[:, 0] = 1
        single = torch.tensor([count == 1 for count in self.counts], device=grid.device)
        # The whole row, whatever shape it has.
        grid[single] = context.grid[single]
        rows = self.units.context(context, grid.repeat_interleave(counted.shape[1], dim=0))
        seed = rows.seed
        if seed is not None:
            # With the clip's own seed in each frame, a random reducer would keep the same places in all of them.
            seed = seed + torch.arange(counted.shape[1], device=seed.device).repeat(counted.shape[0])
        return rows.replace(valid=rows.valid & counted.reshape(-1, 1), seed=seed)

    def distances(self, context: VisualContext, row: int) -> Tensor:
        """How far the tokens at a place are apart in any two frames: `STEPS` times 1 - cos, long `(P, T, T)`.

        Zero tokens have cosine 0 with all others. Non-finite components count as zero.
        """
        count, size = self.counts[row], self.sizes[row]
        place = self.place[row, :count, :size].transpose(0, 1)  # (P, T)
        x = float64_home(context.features[row])
        x = x[place.to(x.device)].double()
        x = torch.nn.functional.normalize(x.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0), dim=2)
        with torch.autocast(x.device.type, enabled=False):
            products = x @ x.transpose(1, 2)
        return ((1 - products) * STEPS).round().long()


def reducer_within(name: str, within: str) -> Reducer:
    """The reducer that chooses within a frame.

    Raises:
        SaccadeError: if it is unknown, or knows time itself.
    """
    known = [each for each in list_reducers() if each not in KNOW_TIME]
    check_choice(f"reducer {name!r}: within", within, known)
    return get_reducer(within)


KNOW_TIME = ("changes", "frames")
"""Reducers that compare the frames of a clip."""


def selected(name: str, within: str, reduction: Reduction) -> Reduction:
    """A reduction within frames.

    Raises:
        SaccadeError: if it merges tokens, which a selection over time cannot express.
    """
    if reduction.weight is not None:
        raise SaccadeError(
            f"reducer {name!r}: within={within!r} merges tokens: use one that selects, such as divprune"
        )
    return reduction
