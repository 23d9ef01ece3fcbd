"""Cut each row's grid of tokens into k contiguous regions of nearly equal size.

Every quantity is an integer tensor computed on the device, so grids and budgets may differ from row to row without a
copy to the host.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.reducers.common import Budget, valid_rank
from saccade.tokens import VisualContext


@dataclass(frozen=True)
class Partition:
    """Regions of tokens, in the raster order of their central tokens.

    Args:
        region: long `(B, N)`, the region that a token belongs to; K on padding.
        size: long `(B, K)`, tokens in each region; 0 beyond a row's budget.
        center: long `(B, K)`, ascending, the token nearest the region's centroid (the first of equals); -1 beyond a
            row's budget.
    """

    region: Tensor
    size: Tensor
    center: Tensor


def partition(context: VisualContext, budget: Budget) -> Partition:
    """Cut row b into `budget.counts[b]` connected, disjoint regions that cover its valid tokens.

    Frames get equal shares of the regions; with fewer regions than frames, a region is a run of whole frames. A frame
    of h x w tokens is cut into horizontal bands, each with a share of the regions proportional to its rows. A path
    through a band's columns, alternately down and up, is cut into pieces that differ by at most one token. The number
    of bands is chosen to make the regions as square as possible; one that cuts the grid into equal rectangles is
    preferred if they are at most twice as long as wide. So 24 x 24 tokens become 64 regions of 3 x 3.

    The n valid tokens of a row are taken to fill its `context.grid` in raster order. If the grid does not hold n
    tokens, they are laid out as a square, or as a single line if n is not a square number.
    """
    rows, tokens, _ = context.shape
    rank = valid_rank(context)
    frames, height, width = _grid(context, budget)
    frame, y, x = rank // (height * width), rank // width % height, rank % width
    region = _region(frame, y, x, budget.counts.clamp(min=1).unsqueeze(1), frames, height, width)
    if not context.dense:
        region = region.masked_fill(~context.valid, budget.width)

    zeros = torch.zeros(rows, budget.width + 1, dtype=torch.long, device=rank.device)
    size = zeros.scatter_add(1, region, torch.ones_like(region))
    own_size = size.gather(1, region)
    distance = torch.zeros_like(region)
    for coordinate in (frame, y, x):
        total = zeros.scatter_add(1, region, coordinate.contiguous()).gather(1, region)
        distance = distance + (own_size * coordinate - total).square()
    far = torch.full_like(zeros, torch.iinfo(torch.long).max)
    nearest = far.scatter_reduce(1, region, distance, "amin").gather(1, region)
    position = torch.arange(tokens, device=rank.device)
    position = torch.where(distance == nearest, position, tokens)
    center = torch.full_like(zeros, tokens).scatter_reduce(1, region, position, "amin")

    center, order = center[:, : budget.width].sort(dim=1)
    new_name = torch.full_like(zeros, budget.width)
    new_name.scatter_(1, order, torch.arange(budget.width, device=rank.device).expand_as(order))
    return Partition(
        region=new_name.gather(1, region),
        size=size.gather(1, order),
        center=center if budget.uniform else center.masked_fill(center == tokens, -1),
    )


def path_places(context: VisualContext, budget: Budget, regions: int) -> Tensor:
    """A token's place on one path through all of its row: long `(B, N)`, meaningless on padding.

    The path leads through the bands that `partition` cuts a frame into for its share of `regions`, one after the
    other, to the right and back again, and through a band's columns alternately down and up, so that pieces of it are
    about as high as wide.
    """
    rank = valid_rank(context)
    frames, height, width = _grid(context, budget)
    frame, y, x = rank // (height * width), rank // width % height, rank % width
    bands = _bands((regions // frames).clamp(min=1), height, width, candidates=max(1, y.shape[1]))
    band, top, bottom = _band(y, bands, height)
    x = torch.where(band % 2 == 0, x, width - 1 - x)
    return frame * height * width + top * width + _along_band(y, x, top, bottom)


def _grid(context: VisualContext, budget: Budget) -> tuple[Tensor, Tensor, Tensor]:
    """Frames, rows and columns that the valid tokens fill, three long `(B, 1)`."""
    count = budget.available.unsqueeze(1)
    frames, height, width = context.grid.unsqueeze(2).unbind(1)
    fits = frames * height * width == count
    side = count.float().sqrt().round().long()
    is_square = side * side == count
    height = torch.where(fits, height, torch.where(is_square, side, 1))
    width = torch.where(fits, width, torch.where(is_square, side, count))
    return torch.where(fits, frames, 1).clamp(min=1), height.clamp(min=1), width.clamp(min=1)


def _region(
    frame: Tensor, y: Tensor, x: Tensor, count: Tensor, frames: Tensor, height: Tensor, width: Tensor
) -> Tensor:
    """The region of the token at (frame, y, x), three long `(B, N)`, out of `count` long `(B, 1)` regions."""
    segments = torch.minimum(count, frames)
    segment = frame * segments // frames
    before_segment = segment * count // segments
    in_segment = (segment + 1) * count // segments - before_segment

    bands = _bands(count // segments, height, width, candidates=max(1, y.shape[1]))
    _, top, bottom = _band(y, bands, height)
    before_band = (2 * in_segment * top + height) // (2 * height)
    in_band = (2 * in_segment * bottom + height) // (2 * height) - before_band

    step = _along_band(y, x, top, bottom)
    return before_segment + before_band + step * in_band // ((bottom - top) * width)


def _band(y: Tensor, bands: Tensor, height: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The band of row y of a frame, its first row, and the first row below it."""
    band = y * bands // height
    return band, (band * height + bands - 1) // bands, ((band + 1) * height + bands - 1) // bands


def _along_band(y: Tensor, x: Tensor, top: Tensor, bottom: Tensor) -> Tensor:
    """The place of (y, x) on the path through a band's columns, alternately down and up."""
    return x * (bottom - top) + torch.where(x % 2 == 0, y - top, bottom - 1 - y)


def _bands(count: Tensor, height: Tensor, width: Tensor, candidates: int) -> Tensor:
    """How many bands to cut a frame into for `count` regions: long `(B, 1)`.

    With r bands a region is about height / r tall and r * width / count wide.
    """
    bands = torch.arange(1, candidates + 1, device=count.device)
    elongation = torch.log2((bands * bands * width).float() / (count * height).float()).abs()
    columns = (count // bands).clamp(min=1)
    lattice = (count % bands == 0) & (height % bands == 0) & (width % columns == 0)
    # Rounded to thousandths, so that candidates that differ only by rounding tie, and the smaller wins on every
    # device.
    cost = ((elongation - lattice.float()) * 1000).round().long()
    # Each band needs a region: the thinnest has height // bands rows and at least that share of the regions.
    feasible = count * (height // bands) >= height
    cost = torch.where(feasible, cost, 1_000_000) * (candidates + 1) + bands
    return cost.amin(dim=1, keepdim=True) % (candidates + 1)
