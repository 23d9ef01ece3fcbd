"""Pictures of which visual tokens a reducer keeps, and what it merges into them."""

import math
import os
from collections.abc import Sequence
from functools import lru_cache
from itertools import cycle

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from saccade.errors import SaccadeError
from saccade.files import atomic_path

Panel = tuple[str, Tensor, Tensor | None]

GAP, TITLE_HEIGHT, LINE_HEIGHT, PANELS_PER_ROW = 16, 30, 24, 4
PAPER, INK, OUTLINE = (255, 255, 255), (40, 40, 40), (255, 214, 10)
DIMMED = 0.62  # brightness of a dropped patch: the picture stays recognisable
TINT = 0.45  # how much of a merged region's colour covers the image
# Okabe and Ito's colours without black, which would look like dropped patches.
REGION_COLORS = [
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167),
]  # fmt: skip
KEPT, DROPPED, MERGED = "kept token", "dropped", "merged into the outlined token of its colour"


def draw_kept_tokens(
    image: Image.Image,
    panels: Sequence[Panel],
    grid: tuple[int, int],
    path: str | os.PathLike[str],
    *,
    caption: str = "",
    panel_size: int = 336,
) -> None:
    """Write `kept_tokens_sheet` of the same arguments as PNG.

    Raises:
        SaccadeError: if there are no panels, or an index or a weight does not match the grid.
    """
    sheet = kept_tokens_sheet(image, panels, grid, caption=caption, panel_size=panel_size)
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG", optimize=True)


def kept_tokens_sheet(
    image: Image.Image,
    panels: Sequence[Panel],
    grid: tuple[int, int],
    *,
    caption: str = "",
    panel_size: int = 336,
) -> Image.Image:
    """Draw `image` once per panel at its aspect ratio, with kept patches outlined and dropped ones dimmed, side by
    side above a legend.

    For a merge, every patch has the colour of the output token in which it has the largest weight, a border
    divides neighbouring regions, and the outlined patch of a region is the token that the others are merged into.

    Args:
        image: the picture that the tokens come from.
        panels: each a title, the index of one row of a `Reduction`, long `(K,)` with -1 for padding, and its weight
            `(K, N)` or None. Behind the title stands how many of the tokens are kept.
        grid: rows and columns of tokens.
        caption: a line below the panels, such as the model that the tokens come from.
        panel_size: pixels of a panel's longer edge, rounded so that each patch has a whole number of pixels.

    Returns:
        The sheet, RGB.

    Raises:
        SaccadeError: if there are no panels, or an index or a weight does not match the grid.
    """
    if not panels:
        raise SaccadeError("panels=[] is empty: give at least one (title, index, weight)")
    rows, columns = grid
    cell = patch_size(image.size, grid, panel_size)
    size = (cell[0] * columns, cell[1] * rows)
    enlarged = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    across = min(PANELS_PER_ROW, len(panels))
    down = math.ceil(len(panels) / across)
    width = GAP + across * (size[0] + GAP)
    legend = _legend(any(weight is not None for _, _, weight in panels), width - 2 * GAP)
    lines = _wrap(caption, width - 2 * GAP)
    below = GAP + down * (TITLE_HEIGHT + size[1] + GAP)
    sheet = Image.new("RGB", (width, below + legend.height + LINE_HEIGHT * len(lines) + GAP), PAPER)
    pen = ImageDraw.Draw(sheet)
    for number, (title, index, weight) in enumerate(panels):
        kept = _checked_index(title, index, rows * columns)
        left = GAP + (number % across) * (size[0] + GAP)
        top = GAP + (number // across) * (TITLE_HEIGHT + size[1] + GAP)
        text = _shorten(title, f": {len(kept)} of {rows * columns}", size[0])
        pen.text((left, top), text, font=_font(17), fill=INK)
        regions = _regions(title, index, weight, rows * columns)
        panel = _draw_panel(enlarged, kept, regions, grid, cell)
        sheet.paste(panel, (left, top + TITLE_HEIGHT))
    sheet.paste(legend, (GAP, below))
    for number, line in enumerate(lines):
        pen.text((GAP, below + legend.height + LINE_HEIGHT * number), line, font=_font(14), fill=INK)
    return sheet


def patch_size(size: tuple[int, int], grid: tuple[int, int], panel_size: int) -> tuple[int, int]:
    """Width and height in pixels of a patch in a panel that shows a picture of `size` at its aspect ratio.

    Args:
        size: width and height of the picture.
        grid: rows and columns of tokens.
        panel_size: pixels of the panel's longer edge.
    """
    scale = panel_size / max(size)
    return tuple(max(4, round(scale * edge / count)) for edge, count in zip(size, reversed(grid), strict=True))


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
    cell: tuple[int, int],
) -> Image.Image:
    rows, columns = grid
    panel = Image.blend(Image.new("RGB", image.size), image, DIMMED)
    # In raster order: neighbouring regions mostly differ, and a border divides them where they do not.
    colors = dict(zip(sorted(set(regions or ()) - {-1}), cycle(REGION_COLORS), strict=False))
    stays = set(kept)
    for token in range(rows * columns):
        box = _box(token, columns, cell)
        if regions and regions[token] >= 0:
            tint = Image.new("RGB", cell, colors[regions[token]])
            panel.paste(Image.blend(image.crop(box), tint, TINT), box)
        elif token in stays:
            panel.paste(image.crop(box), box)
    pen = ImageDraw.Draw(panel)
    if regions:
        _draw_borders(pen, regions, grid, cell)
    for token in stays:
        left, top, right, bottom = _box(token, columns, cell)
        pen.rectangle((left, top, right - 1, bottom - 1), outline=OUTLINE, width=2 if min(cell) >= 14 else 1)
    return panel


def _box(token: int, columns: int, cell: tuple[int, int]) -> tuple[int, int, int, int]:
    width, height = cell
    left, top = token % columns * width, token // columns * height
    return left, top, left + width, top + height


def _adjacent(grid: tuple[int, int]) -> list[tuple[int, int]]:
    """The pairs of tokens that share an edge, the left or upper one first."""
    rows, columns = grid
    beside = [(row * columns + at, row * columns + at + 1) for row in range(rows) for at in range(columns - 1)]
    below = [(row * columns + at, (row + 1) * columns + at) for row in range(rows - 1) for at in range(columns)]
    return beside + below


def _draw_borders(
    pen: ImageDraw.ImageDraw, regions: Sequence[int], grid: tuple[int, int], cell: tuple[int, int]
) -> None:
    columns = grid[1]
    for one, other in _adjacent(grid):
        if regions[one] == regions[other]:
            continue
        left, top, right, bottom = _box(other, columns, cell)
        end = (left, bottom) if other == one + 1 and other % columns else (right, top)
        pen.line(((left, top), end), fill=INK, width=1)


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _shorten(title: str, count: str, width: int) -> str:
    """`title` and `count`, the title truncated with an ellipsis if they are wider than their panel."""
    font = _font(17)
    if font.getlength(title + count) <= width:
        return title + count
    while title and font.getlength(title + "…" + count) > width:
        title = title[:-1]
    return title.rstrip() + "…" + count


def _wrap(text: str, width: int) -> list[str]:
    """`text` in lines that are at most `width` pixels wide, unless a word is wider."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and _font(14).getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _legend(merges: bool, width: int) -> Image.Image:
    """What outlined, dimmed and, if a panel merges, coloured patches mean, in as many lines as fit into `width`."""
    entries = [KEPT, *([MERGED] if merges else []), DROPPED]
    swatch, at, line, places = 16, 0, 0, []
    for entry in entries:
        needed = swatch + 8 + math.ceil(_font(14).getlength(entry))
        if at and at + needed > width:
            at, line = 0, line + 1
        places.append((at, line * LINE_HEIGHT))
        at += needed + 24
    legend = Image.new("RGB", (width, (line + 1) * LINE_HEIGHT), PAPER)
    pen = ImageDraw.Draw(legend)
    clear = (176, 190, 197)
    fills = {KEPT: clear, DROPPED: tuple(round(DIMMED * level) for level in clear), MERGED: REGION_COLORS[1]}
    for entry, (left, top) in zip(entries, places, strict=True):
        pen.rectangle((left, top, left + swatch, top + swatch), fill=fills[entry])
        if entry == KEPT:
            pen.rectangle((left, top, left + swatch, top + swatch), outline=OUTLINE, width=3)
        pen.text((left + swatch + 8, top), entry, font=_font(14), fill=INK)
    return legend
