"""Rows that share a budget, joined for the reducer and split again afterwards.

Shapes: B feature rows of N tokens; U units of M tokens, of which K are kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from saccade.errors import SaccadeError
from saccade.reducers.common import mask_to_index
from saccade.tokens import Reduction, VisualContext

NOT_PER_TOKEN = ("grid", "group", "sample", "seed", "valid", "words")


@dataclass(frozen=True)
class Units:
    """Which tokens of which rows each unit contains.

    Args:
        place: long `(U, M)`, the flat index `b * N + n` of each of a unit's valid tokens, in row order, then -1.
        first: long `(U,)`, the first row of each unit.
        shape: `(B, N)`.
    """

    place: Tensor
    first: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, context: VisualContext, per: str) -> "Units":
        """The units of `context`: its groups for "image", its samples for "sample".

        Raises:
            SaccadeError: if the context does not say which sample its rows belong to.
        """
        owner = context.group if per == "image" else context.sample
        if owner is None:
            raise SaccadeError("budget='sample': the context does not say which sample each row belongs to")
        rows, tokens, _ = context.shape
        device = context.features.device
        names, unit = owner.unique(return_inverse=True)
        numbers = torch.arange(rows * tokens, device=device)[context.valid.reshape(-1)]
        order = unit[numbers // tokens].sort(stable=True)
        counts = torch.bincount(order.values, minlength=len(names))
        width = int(counts.max())
        rank = torch.arange(len(numbers), device=device) - (counts.cumsum(0) - counts)[order.values]
        place = torch.full((len(names), width), -1, device=device)
        place[order.values, rank] = numbers[order.indices]
        first = torch.full((len(names),), rows, device=device)
        first.scatter_reduce_(0, unit, torch.arange(rows, device=device), "amin")
        return cls(place, first, (rows, tokens))

    def join(self, x: Tensor) -> Tensor:
        """Values of tokens `(B, N, ...)` as `(U, M, ...)`, padded with zeros; differentiable."""
        joined = x.flatten(0, 1)[self.place.clamp(min=0)]
        missing = (self.place < 0).reshape(*self.place.shape, *[1] * (x.dim() - 2))
        return joined.masked_fill(missing, 0)

    def context(self, context: VisualContext) -> VisualContext:
        """`context` with one row per unit."""
        names = [entry.name for entry in fields(context) if entry.init and entry.name not in NOT_PER_TOKEN]
        values = {name: getattr(context, name) for name in names}
        joined = {name: self.join(value) for name, value in values.items() if value is not None}
        full = bool((self.place >= 0).all())
        return VisualContext(
            **joined,
            valid=None if full else self.place >= 0,
            grid=self._grid(context),
            sample=None if context.sample is None else context.sample[self.first],
            seed=None if context.seed is None else context.seed[self.first],
            words=None if context.words is None else context.words[self.first],
        )

    def _grid(self, context: VisualContext) -> Tensor:
        """Rows of the same shape become the frames of one grid; rows of different shapes are joined into one line."""
        unit = torch.where(self.place >= 0, self.place // max(self.shape[1], 1), -1).tolist()
        shapes = context.grid.tolist()
        grids: list[Sequence[int]] = []
        for rows in ([shapes[row] for row in dict.fromkeys(line) if row >= 0] for line in unit):
            if len({(height, width) for _, height, width in rows}) == 1:
                grids.append((sum(frames for frames, _, _ in rows), *rows[0][1:]))
            else:
                grids.append((1, 1, sum(frames * height * width for frames, height, width in rows)))
        return torch.tensor(grids, device=context.grid.device)

    def split(self, reduction: Reduction) -> Reduction:
        """Convert a `reduction` of the units to one of the rows."""
        rows, tokens = self.shape
        number = self.place.gather(1, reduction.index.clamp(min=0))  # (U, K)
        number = torch.where(reduction.valid, number, rows * tokens)
        kept = torch.zeros(rows * tokens + 1, dtype=torch.bool, device=number.device)
        kept[number.reshape(-1)] = True
        kept = kept[:-1].reshape(rows, tokens)
        index = mask_to_index(kept, int(kept.sum(dim=1).max()))
        lost = reduction.lost
        if lost is not None:
            lost = lost.new_zeros(rows).scatter_(0, self.first, lost)
        if reduction.weight is None:
            return Reduction(index, lost=lost)
        before = reduction.before_projector
        return JointReduction(index, before_projector=before, lost=lost, units=self, joint=reduction)


@dataclass
class JointReduction(Reduction):
    """A merge across rows: an output token may combine tokens from any row of its unit.

    Args:
        units: which rows belong together.
        joint: the merge of the units. `weight` is None, since per-row weights cannot express it.
    """

    units: Units | None = None
    joint: Reduction | None = None

    @property
    def merged(self) -> Tensor:
        return self._by_row(self.joint.merged.unsqueeze(2)).squeeze(2)

    def apply(self, x: Tensor) -> Tensor:
        """Reduce `x` `(B, N, D)` to `(B, K, D)`; differentiable in `x`. Padding becomes zeros."""
        return self._by_row(self.joint.apply(self.units.join(x)))

    def _by_row(self, values: Tensor) -> Tensor:
        """Values of the units' tokens `(U, K', C)` rearranged by row: `(B, K, C)`, zeros on padding."""
        rows, tokens = self.units.shape
        device = values.device
        number = self.units.place.gather(1, self.joint.index.clamp(min=0))
        number = torch.where(self.joint.valid, number, rows * tokens).reshape(-1)
        output = torch.zeros(rows * tokens + 1, dtype=torch.long, device=device)
        output[number] = torch.arange(len(number), device=device)
        own = self.index.clamp(min=0) + tokens * torch.arange(rows, device=device).unsqueeze(1)
        return values.flatten(0, 1)[output[own]].masked_fill(~self.valid.unsqueeze(-1), 0)
