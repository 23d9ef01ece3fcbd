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
from saccade.reducers.shared_budget import Units
from saccade.skip_vision.config import SkipVisionConfig, amount_of
from saccade.tokens import Reduction, VisualContext


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
    family: Family, config: SkipVisionConfig, encoded: Encoded, blocks: Units, context: VisualContext
) -> Split:
    """Split the tokens of each image: a row of `context`, which has those of a block of placeholders."""
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


def _by_thumbnail(family: Family, encoded: Encoded, blocks: Units, context: VisualContext) -> Split:
    rows = blocks.row
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


def _by_own_scales(blocks: Units, context: VisualContext) -> Split:
    """All scales but the finest are retained; a share of skipped tokens refers to the finest."""
    rows = blocks.row
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
