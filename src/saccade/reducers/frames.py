"""The tokens of clips by frame and place, for reducers that know time.

Shapes: B feature rows of N tokens; T frames of P tokens each.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from saccade.errors import SaccadeError, one_of
from saccade.reducers.registry import Reducer, get_reducer, list_reducers
from saccade.reducers.shared_budget import NOT_PER_TOKEN
from saccade.tokens import Reduction, VisualContext

STEPS = 2**20
"""Distances are rounded to steps of this many to one: the order in which a product sums cannot decide between two."""


@dataclass(frozen=True)
class Frames:
    """Which token of a row stands where in which frame.

    Args:
        place: long `(B, T, P)`, indices among a row's N tokens, -1 where a row has fewer frames or smaller ones.
        counts: for each row, its number of frames.
        sizes: for each row, the number of tokens of a frame.
    """

    place: Tensor
    counts: list[int]
    sizes: list[int]

    @classmethod
    def of(cls, context: VisualContext) -> "Frames | None":
        """The frames of each row's grid; None if no row has two. A row whose tokens do not fill its grid has one.

        Reads the grids back to the host, unless they are known to have one frame each.
        """
        if context.single_frame or 0 in context.shape[:2]:
            return None
        available = context.valid.sum(dim=1)
        numbers = torch.cat((context.grid, available.unsqueeze(1)), dim=1).tolist()
        counts = [frames if frames * high * wide == tokens and tokens else 1 for frames, high, wide, tokens in numbers]
        sizes = [tokens // frames for (*_, tokens), frames in zip(numbers, counts, strict=True)]
        if max(counts) == 1:
            return None
        device = context.features.device
        order = context.valid.sort(dim=1, descending=True, stable=True).indices  # the valid tokens first
        frame = torch.arange(max(counts), device=device)[:, None]
        token = torch.arange(max(sizes), device=device)
        several, size = (torch.tensor(values, device=device)[:, None, None] for values in (counts, sizes))
        rank = frame * size + token  # (B, T, P)
        there = (frame < several) & (token < size)
        rows = order.gather(1, rank.clamp(max=context.shape[1] - 1).flatten(1)).view_as(rank)
        return cls(rows.masked_fill(~there, -1), counts, sizes)

    def contexts(self, context: VisualContext, counted: Tensor | None = None) -> VisualContext:
        """`context` with a row for each frame: B * T rows of P tokens.

        Args:
            counted: bool `(B, T)`, false for frames whose tokens are all to be padding.
        """
        rows, frames, tokens = self.place.shape
        flat = self.place.flatten(1).clamp(min=0)
        valid = self.place >= 0
        if counted is not None:
            valid = valid & counted.unsqueeze(2)
        given = {entry.name: getattr(context, entry.name) for entry in fields(context) if entry.init}
        values = {}
        for name, value in given.items():
            if value is None or name in ("grid", "valid", "group"):
                continue
            if name in NOT_PER_TOKEN:
                values[name] = value.repeat_interleave(frames, dim=0)
                continue
            index = flat.reshape(*flat.shape, *[1] * (value.dim() - 2)).expand(-1, -1, *value.shape[2:])
            values[name] = value.gather(1, index).reshape(rows * frames, tokens, *value.shape[2:])
        grid = context.grid.clone()
        grid[:, 0] = 1
        single = torch.tensor([count == 1 for count in self.counts], device=grid.device)
        # The whole row, whatever shape it has.
        grid[single] = context.grid[single]
        return VisualContext(**values, valid=valid.flatten(0, 1), grid=grid.repeat_interleave(frames, dim=0))

    def kept(self, reduction: Reduction, tokens: int) -> Tensor:
        """A reduction of `contexts` as bool `(B, N)`: which tokens of each row are kept."""
        place = self.place.flatten(0, 1).gather(1, reduction.index.clamp(min=0))  # (B * T, K)
        place = torch.where(reduction.valid, place, tokens).reshape(self.place.shape[0], -1)
        mask = torch.zeros(len(place), tokens + 1, dtype=torch.bool, device=place.device)
        return mask.scatter_(1, place, True)[:, :tokens]

    def distances(self, context: VisualContext, row: int) -> Tensor:
        """How far the tokens at a place are apart in any two frames: `STEPS` times 1 - cos, long `(P, T, T)`.

        Zero tokens have cosine 0 with all others. Non-finite components count as zero.
        """
        count, size = self.counts[row], self.sizes[row]
        place = self.place[row, :count, :size].transpose(0, 1)  # (P, T)
        x = context.features[row]
        x = (x.cpu() if x.device.type == "mps" else x)[place.to(x.device)].double()
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
    if within not in known:
        raise SaccadeError(f"reducer {name!r}: within={within!r} is unknown: {one_of(within, known)}")
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
