"""The visual tokens of each image as one row, regardless of the number of crops; which of them are retained, and which
remain to be skipped.

Shapes: G images (blocks of placeholders) of M visual tokens, R feature rows of N; P placeholders.
"""

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from saccade.errors import SaccadeError
from saccade.families import Encoded, Family
from saccade.reducers.common import mask_to_index
from saccade.skip_vision.config import SkipVisionConfig, amount_of
from saccade.tokens import Places, Reduction, VisualContext

PER_TOKEN = ("encoder_features", "saliency", "keys", "relevance", "word_relevance", "protected")


@dataclass(frozen=True)
class Blocks:
    """The visual tokens of each block, see [`Places`].

    Args:
        token: long `(G, M)`, indices of the block's tokens among all valid tokens of the context; -1 at the end.
        feature_row: long `(G, M)`, the context's row that each token belongs to; -1 at the end.
    """

    token: Tensor
    feature_row: Tensor

    @classmethod
    def of(cls, places: Places) -> "Blocks":
        """The blocks of a batch."""
        count = torch.bincount(places.block) if len(places) else places.block
        number = torch.arange(len(places), device=places.block.device)
        shape = (count.numel(), int(count.max()) if count.numel() else 1)

        def spread(values: Tensor) -> Tensor:
            empty = torch.full(shape, -1, dtype=torch.long, device=values.device)
            return empty.index_put((places.block, number - places.start), values)

        return cls(spread(number), spread(places.feature_row))

    @property
    def valid(self) -> Tensor:
        """bool `(G, M)`, false on padding."""
        return self.token >= 0

    def gather(self, values: Tensor, context: VisualContext) -> Tensor:
        """Values `(R, N, ...)` of the context's tokens as `(G, M, ...)`, zero or false on padding; differentiable."""
        flat = values.flatten(0, 1) if context.dense else values[context.valid]
        if flat.shape[0] == 0:
            return flat.new_zeros(*self.token.shape, *values.shape[2:])
        picked = flat[self.token.clamp(min=0)]
        return picked.masked_fill(~self.valid.reshape(*self.token.shape, *[1] * (values.dim() - 2)), 0)


def block_context(encoded: Encoded, blocks: Blocks) -> VisualContext:
    """A context with one row per block, `(G, M, ...)`, regardless of the number of crops."""
    context = encoded.context
    if blocks.token.shape == context.shape[:2] and torch.equal(blocks.valid, context.valid):
        return context
    extras = {
        name: blocks.gather(getattr(context, name), context)
        for name in PER_TOKEN
        if getattr(context, name) is not None
    }
    first = blocks.feature_row[:, 0]
    return VisualContext(
        features=blocks.gather(context.features, context),
        valid=blocks.valid,
        grid=torch.tensor(_grids(context, blocks), device=context.grid.device).reshape(-1, 3),
        seed=None if context.seed is None else context.seed[first],
        words=None if context.words is None else context.words[first],
        **extras,
    )


def _grids(context: VisualContext, blocks: Blocks) -> list[tuple[int, int, int]]:
    """Frames, rows and columns of each block: crops of equal shape count as frames, others form one line."""
    grids = [tuple(grid) for grid in context.grid.tolist()]
    found = []
    for rows in blocks.feature_row.tolist():
        shapes = [grids[row] for row in dict.fromkeys(rows) if row >= 0]
        if len(set(shapes)) == 1:
            frames, height, width = shapes[0]
            found.append((frames * len(shapes), height, width))
        else:
            found.append((1, 1, sum(math.prod(shape) for shape in shapes)))
    return found


@dataclass
class Split:
    """The two groups of each image.

    Args:
        retained: the retained tokens, selected or pooled.
        pooled: bool `(G, K)`, which of them the first summary token is computed from.
        rest: bool `(G, M)`, the tokens that remain to be skipped.
        base: for each image, the number of tokens that a share of skipped tokens refers to.
    """

    retained: Reduction
    pooled: Tensor
    rest: Tensor
    base: list[int]


def split_tokens(
    family: Family, config: SkipVisionConfig, encoded: Encoded, blocks: Blocks, context: VisualContext
) -> Split:
    """Split the tokens of each block of `context`, see `block_context`."""
    if config.split == "thumbnail":
        return _by_thumbnail(family, encoded, blocks, context)
    if config.split == "scale":
        return _by_own_scales(blocks, context) if family.has_scales else _by_scale(config, context)
    sizes = context.valid.sum(dim=1).tolist()
    budgets = [max(1, amount_of(config.retained, size)) for size in sizes]
    image = context.valid if context.protected is None else context.valid & ~context.protected
    offered = context
    if context.protected is not None:
        offered = context.replace(valid=image, protected=None)
    keep = budgets[0] if len(set(budgets)) == 1 else torch.tensor(budgets, device=image.device)
    index = config.split_reducer()(offered, keep).index
    chosen = torch.zeros(image.shape[0], image.shape[1] + 1, dtype=torch.bool, device=image.device)
    chosen = chosen.scatter(1, torch.where(index >= 0, index, image.shape[1]), True)[:, :-1]
    # A budget that covers the whole image includes its newlines, which reducers never see.
    whole = torch.tensor([budget >= size for budget, size in zip(budgets, sizes, strict=True)], device=image.device)
    return _chosen(context, chosen | (context.valid & whole.unsqueeze(1)), sizes)


def _chosen(context: VisualContext, chosen: Tensor, base: list[int]) -> Split:
    """The split that retains the tokens `chosen`, bool `(G, M)`, unchanged."""
    counts = chosen.sum(dim=1)
    width = int(counts.max()) if counts.numel() else 0
    uniform = bool((counts == width).all())
    index = mask_to_index(chosen, width)
    return Split(Reduction(index, dense=uniform), index >= 0, context.valid & ~chosen, base)


def _by_thumbnail(family: Family, encoded: Encoded, blocks: Blocks, context: VisualContext) -> Split:
    rows = blocks.feature_row
    if any(encoded.videos):
        videos = torch.tensor(encoded.videos, device=rows.device)
        if bool(videos[rows[:, 0]].any()):
            raise SaccadeError("split='thumbnail': a video has none; use split='scale' or the name of a reducer")
    if family.thumbnail == 0:
        number = rows[:, :1]
    else:
        number = rows.amax(dim=1, keepdim=True)
    chosen = (rows == number) & context.valid
    return _chosen(context, chosen, chosen.sum(dim=1).tolist())


def _by_own_scales(blocks: Blocks, context: VisualContext) -> Split:
    """All scales but the finest are retained; a share of skipped tokens refers to the finest."""
    rows = blocks.feature_row
    finest = rows.amax(dim=1, keepdim=True)
    split = _chosen(context, context.valid & (rows < finest), (rows == finest).sum(dim=1).tolist())
    # As published, the first summary is pooled over the finest of the retained scales.
    return replace(split, pooled=split.pooled & (rows.gather(1, split.retained.index.clamp(min=0)) == finest - 1))


def _by_scale(config: SkipVisionConfig, context: VisualContext) -> Split:
    grids = [tuple(grid) for grid in context.grid.tolist()]
    image = context.valid if context.protected is None else context.valid & ~context.protected
    for (frames, height, width), cells in zip(grids, image.sum(dim=1).tolist(), strict=True):
        if frames != 1 or height * width != cells or (height == 1 and width > config.scales[0]):
            raise SaccadeError(
                f"split='scale' needs one picture per image, but here are {frames} of {height} x {width} tokens: "
                "use split='thumbnail' for crops, or the name of a reducer"
            )
    pyramids = {grid: _pyramid(grid[1], grid[2], config.scales) for grid in set(grids)}
    most = max((weight.shape[0] for weight, _, _ in pyramids.values()), default=0)
    rows, tokens = image.shape
    weight = torch.zeros(rows, most, tokens, device=image.device)
    index = torch.full((rows, most), -1, dtype=torch.long, device=image.device)
    finest = torch.zeros(rows, most, dtype=torch.bool, device=image.device)
    for row, grid in enumerate(grids):
        pooling, center, is_finest = (value.to(image.device) for value in pyramids[grid])
        cells = image[row].nonzero().squeeze(1)  # (h * w,)
        count = pooling.shape[0]
        weight[row, :count, cells] = pooling
        index[row, :count] = cells[center]
        finest[row, :count] = is_finest
    # As published, the first summary is pooled over the finest of the retained scales.
    return Split(Reduction(index, weight), finest, context.valid, context.valid.sum(dim=1).tolist())


def _pyramid(height: int, width: int, windows: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Scales of a grid: pooling weights `(K, h * w)`, the central cell of each window, whether its scale is the
    finest.

    Windows of side w split n cells into ceil(n / w) pieces, of w cells each if w divides n.
    """
    weights, centers, finest = [], [], []
    for window in windows:
        for top, bottom in _pieces(height, window):
            for left, right in _pieces(width, window):
                weight = torch.zeros(height, width)
                weight[top:bottom, left:right] = 1 / ((bottom - top) * (right - left))
                weights.append(weight.flatten())
                centers.append((top + bottom - 1) // 2 * width + (left + right - 1) // 2)
                finest.append(window == windows[-1])
    return torch.stack(weights), torch.tensor(centers), torch.tensor(finest)


def _pieces(length: int, window: int) -> list[tuple[int, int]]:
    count = math.ceil(length / window)
    borders = [number * length // count for number in range(count + 1)]
    return list(pairwise(borders))
