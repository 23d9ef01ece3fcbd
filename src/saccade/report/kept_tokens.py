"""Pictures of which visual tokens a reducer keeps, and what it merges into them."""

import math
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from saccade.errors import SaccadeError
from saccade.files import atomic_path

Panel = tuple[str, Tensor, Tensor | None]

GAP, TITLE_HEIGHT, PANELS_A_ROW = 16, 30, 4
PAPER, INK, OUTLINE = (255, 255, 255), (40, 40, 40), (255, 214, 10)
DARKENED = 0.28  # brightness of a dropped patch: still recognisable, but clearly dropped
TINT = 0.45  # how much of a merged region's colour covers the image
# Okabe and Ito's colours without black, which would look like dropped patches.
REGION_COLORS = [
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167),
]  # fmt: skip


def draw_kept_tokens(
    image: Image.Image,
    panels: Sequence[Panel],
    grid: tuple[int, int],
    path: str | os.PathLike[str],
    *,
    patch_labels: Mapping[int, str] | None = None,
    panel_width: int = 336,
) -> None:
    """Draw `image` once per panel, with kept patches clear and outlined and dropped ones dark, side by side in one
    PNG.

    For a merge, every patch has the colour of the output token in which it has the largest weight, neighbouring
    regions have different colours, and the outlined patch of a region is the token that the others are merged into.

    Args:
        image: the picture that the tokens come from.
        panels: each a title, the index of one row of a `Reduction`, long `(K,)` with -1 for padding, and its weight
            `(K, N)` or None.
        grid: rows and columns of tokens.
        path: the file to write.
        patch_labels: short texts to write on patches, by token index.
        panel_width: pixels per panel, rounded so that each patch has a whole number of pixels.

    Raises:
        SaccadeError: if there are no panels, or an index or a weight does not match the grid.
    """
    if not panels:
        raise SaccadeError("panels=[] is empty: give at least one (title, index, weight)")
    rows, columns = grid
    side = max(4, round(panel_width / columns))
    size = (side * columns, side * rows)
    enlarged = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    across = min(PANELS_A_ROW, len(panels))
    down = math.ceil(len(panels) / across)
    sheet = Image.new("RGB", (GAP + across * (size[0] + GAP), GAP + down * (TITLE_HEIGHT + size[1] + GAP)), PAPER)
    pen = ImageDraw.Draw(sheet)
    for number, (title, index, weight) in enumerate(panels):
        kept = _checked_index(title, index, rows * columns)
        left = GAP + (number % across) * (size[0] + GAP)
        top = GAP + (number // across) * (TITLE_HEIGHT + size[1] + GAP)
        pen.text((left, top), _shorten(title, size[0]), font=_font(17), fill=INK)
        regions = _regions(title, index, weight, rows * columns)
        panel = _draw_panel(enlarged, kept, regions, grid, side, patch_labels or {})
        sheet.paste(panel, (left, top + TITLE_HEIGHT))
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG", optimize=True)


def _checked_index(title: str, index: Tensor, tokens: int) -> list[int]:
    if index.dim() != 1:
        raise SaccadeError(f"panel {title!r}: index has shape {tuple(index.shape)}, give one row of it, (K,)")
    kept = [token for token in index.tolist() if token >= 0]
    if kept and max(kept) >= tokens:
        raise SaccadeError(f"panel {title!r}: index contains {max(kept)}, but the grid has {tokens} tokens")
    return kept


def _regions(title: str, index: Tensor, weight: Tensor | None, tokens: int) -> list[int] | None:
    """For a merge, the kept token that each token is merged into, -1 if none."""
    if weight is None:
        return None
    if tuple(weight.shape) != (len(index), tokens):
        raise SaccadeError(
            f"panel {title!r}: weight has shape {tuple(weight.shape)}, expected {(len(index), tokens)} (K, N)"
        )
    strongest, output = weight.detach().float().abs().max(dim=0)
    return torch.where(strongest > 0, index.to(output.device)[output], -1).tolist()


def _draw_panel(
    image: Image.Image,
    kept: Sequence[int],
    regions: Sequence[int] | None,
    grid: tuple[int, int],
    side: int,
    labels: Mapping[int, str],
) -> Image.Image:
    rows, columns = grid
    dark = Image.blend(Image.new("RGB", image.size), image, DARKENED)
    panel = dark.copy()
    colors = _region_colors(regions, grid) if regions else {}
    stays = set(kept)
    for token in range(rows * columns):
        box = _box(token, columns, side)
        if regions and regions[token] >= 0:
            tint = Image.new("RGB", (side, side), colors[regions[token]])
            panel.paste(Image.blend(image.crop(box), tint, TINT), box)
        elif token in stays:
            panel.paste(image.crop(box), box)
    pen = ImageDraw.Draw(panel)
    if regions:
        _draw_borders(pen, regions, grid, side)
    for token in stays:
        left, top, right, bottom = _box(token, columns, side)
        pen.rectangle((left, top, right - 1, bottom - 1), outline=OUTLINE, width=2 if side >= 14 else 1)
    for token, text in labels.items():
        left, top, right, bottom = _box(token, columns, side)
        place = ((left + right) / 2, (top + bottom) / 2)
        font = _font(max(8, round(side * 0.5)))
        pen.text(place, text, font=font, anchor="mm", fill=PAPER, stroke_width=2, stroke_fill=INK)
    return panel


def _box(token: int, columns: int, side: int) -> tuple[int, int, int, int]:
    left, top = token % columns * side, token // columns * side
    return left, top, left + side, top + side


def _region_colors(regions: Sequence[int], grid: tuple[int, int]) -> dict[int, tuple[int, int, int]]:
    """A colour per region, different from neighbouring regions as far as there are enough colours."""
    neighbours: dict[int, set[int]] = {region: set() for region in dict.fromkeys(regions) if region >= 0}
    for one, other in _adjacent(grid):
        first, second = regions[one], regions[other]
        if first != second and first >= 0 and second >= 0:
            neighbours[first].add(second)
            neighbours[second].add(first)
    chosen: dict[int, int] = {}
    used = [0] * len(REGION_COLORS)
    for region in sorted(neighbours, key=lambda region: -len(neighbours[region])):
        beside = {chosen[other] for other in neighbours[region] if other in chosen}
        free = [number for number in range(len(REGION_COLORS)) if number not in beside] or range(len(REGION_COLORS))
        chosen[region] = min(free, key=lambda number: used[number])
        used[chosen[region]] += 1
    return {region: REGION_COLORS[number] for region, number in chosen.items()}


def _adjacent(grid: tuple[int, int]) -> list[tuple[int, int]]:
    """The pairs of tokens that share an edge, the left or upper one first."""
    rows, columns = grid
    beside = [(row * columns + at, row * columns + at + 1) for row in range(rows) for at in range(columns - 1)]
    below = [(row * columns + at, (row + 1) * columns + at) for row in range(rows - 1) for at in range(columns)]
    return beside + below


def _draw_borders(pen: ImageDraw.ImageDraw, regions: Sequence[int], grid: tuple[int, int], side: int) -> None:
    columns = grid[1]
    for one, other in _adjacent(grid):
        if regions[one] == regions[other]:
            continue
        left, top, right, bottom = _box(other, columns, side)
        end = (left, bottom) if other == one + 1 and other % columns else (right, top)
        pen.line(((left, top), end), fill=INK, width=1)


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _shorten(title: str, width: int) -> str:
    """`title`, truncated with an ellipsis if it is wider than its panel."""
    font = _font(17)
    if font.getlength(title) <= width:
        return title
    while title and font.getlength(title + "…") > width:
        title = title[:-1]
    return title.rstrip() + "…"
