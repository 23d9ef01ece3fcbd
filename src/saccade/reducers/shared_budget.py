"""Rows that share a budget, joined for the reducer and split again afterwards.

Shapes: B feature rows of N tokens; U units of M tokens, of which K are kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from saccade.errors import SaccadeError
from saccade.reducers.common import mask_to_index
from saccade.tokens import PER_ROW, Reduction, VisualContext


@dataclass(frozen=True)
class Units:
    """Tokens of rows, rearranged by unit: an image or a sample that shares a budget, a frame, a block of placeholders.

    Args:
        place: long `(U, M)`, the flat index `b * N + n` of each of a unit's tokens, then -1.
        first: long `(U,)`, the first row of each unit.
        shape: `(B, N)`.
    """

    place: Tensor
    first: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, context: VisualContext, per: str) -> "Units":
        """The units of `context` that share a budget: its groups for "image", its samples for "sample".

        Raises:
            SaccadeError: if the context does not say which sample its rows belong to.
        """
        owner = context.group if per == "image" else context.sample
        if owner is None:
            raise SaccadeError("budget='sample': the context does not say which sample each row belongs to")
        rows = context.shape[0]
        names, unit = owner.unique(return_inverse=True)
        first = torch.full((len(names),), rows, device=owner.device)
        first.scatter_reduce_(0, unit, torch.arange(rows, device=owner.device), "amin")
        return cls.of_tokens(context, unit.unsqueeze(1).expand_as(context.valid)[context.valid], first)

    @classmethod
    def of_tokens(cls, context: VisualContext, unit: Tensor, first: Tensor | None = None) -> "Units":
        """The units that each valid token belongs to, in row order: `unit`, long `(P,)`.

        Args:
            first: the first row of each unit; left out if every unit has a token.
        """
        rows, tokens, _ = context.shape
        numbers = torch.arange(rows * tokens, device=unit.device)[context.valid.reshape(-1)]
        order = unit.sort(stable=True)
        counts = torch.bincount(order.values, minlength=0 if first is None else len(first))
        rank = torch.arange(len(numbers), device=unit.device) - (counts.cumsum(0) - counts)[order.values]
        place = torch.full((len(counts), int(counts.max()) if len(counts) else 1), -1, device=unit.device)
        place[order.values, rank] = numbers[order.indices]
        return cls(place, place[:, 0] // max(tokens, 1) if first is None else first, (rows, tokens))

    @property
    def row(self) -> Tensor:
        """long `(U, M)`, the row of each token; -1 after a unit's tokens."""
        return torch.where(self.place >= 0, self.place // max(self.shape[1], 1), -1)

    def join(self, x: Tensor) -> Tensor:
        """Values of tokens `(B, N, ...)` as `(U, M, ...)`, padded with zeros; differentiable."""
        missing = (self.place < 0).reshape(*self.place.shape, *[1] * (x.dim() - 2))
        if x.numel() == 0:
            return x.new_zeros(*self.place.shape, *x.shape[2:])
        return x.flatten(0, 1)[self.place.clamp(min=0)].masked_fill(missing, 0)

    def context(self, context: VisualContext, grid: Tensor | None = None) -> VisualContext:
        """`context` with one row per unit.

        Args:
            grid: long `(U, 3)`. If omitted, rows of the same shape are the frames of one grid, and rows of different
                shapes one line.
        """
        valid = self.place >= 0
        values = {name: getattr(context, name) for name in (entry.name for entry in fields(context) if entry.init)}
        given = {name: value for name, value in values.items() if value is not None and name != "valid"}
        per_row = {name: given[name][self.first] for name in ("sample", "seed", "words") if name in given}
        if context.video is not None:
            per_row["video"] = (context.video[self.row.clamp(min=0)] | (self.place < 0)).all(dim=1)
        joined = {name: self.join(value) for name, value in given.items() if name not in PER_ROW}
        grid = self._grid(context) if grid is None else grid
        return VisualContext(**joined, **per_row, valid=None if bool(valid.all()) else valid, grid=grid)

    def _grid(self, context: VisualContext) -> Tensor:
        shapes = context.grid.tolist()
        grids: list[Sequence[int]] = []
        for rows in ([shapes[row] for row in dict.fromkeys(line) if row >= 0] for line in self.row.tolist()):
            if len({(height, width) for _, height, width in rows}) == 1:
                grids.append((sum(frames for frames, _, _ in rows), *rows[0][1:]))
            else:
                grids.append((1, 1, sum(frames * height * width for frames, height, width in rows)))
        return torch.tensor(grids, dtype=torch.long, device=context.grid.device).reshape(-1, 3)

    def numbers(self, reduction: Reduction) -> Tensor:
        """The flat index of each token that a reduction of the units keeps: long `(U, K)`, B * N on padding."""
        place = self.place.gather(1, reduction.index.clamp(min=0))
        return torch.where(reduction.valid, place, self.shape[0] * self.shape[1])

    def kept(self, reduction: Reduction) -> Tensor:
        """Which tokens of the rows a reduction of the units keeps: bool `(B, N)`."""
        rows, tokens = self.shape
        kept = torch.zeros(rows * tokens + 1, dtype=torch.bool, device=self.place.device)
        kept[self.numbers(reduction).reshape(-1)] = True
        return kept[:-1].reshape(rows, tokens)

    def split(self, reduction: Reduction) -> Reduction:
        """Convert a `reduction` of the units to one of the rows."""
        kept = self.kept(reduction)
        index = mask_to_index(kept, int(kept.sum(dim=1).max()))
        lost = reduction.lost
        if lost is not None:
            lost = lost.new_zeros(len(kept)).scatter_(0, self.first, lost)
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
        number = self.units.numbers(self.joint).reshape(-1)
        output = torch.zeros(rows * tokens + 1, dtype=torch.long, device=device)
        output[number] = torch.arange(len(number), device=device)
        own = self.index.clamp(min=0) + tokens * torch.arange(rows, device=device).unsqueeze(1)
        return values.flatten(0, 1)[output[own]].masked_fill(~self.valid.unsqueeze(-1), 0)
