"""A sheet to draw on in rows of patches, which remembers what stands where."""

from collections.abc import Sequence

from PIL import Image, ImageDraw

from experiments.smol.fonts import Font, load_font, text_width
from experiments.smol.tasks.base import PATCH, Region

Colour = tuple[int, int, int]
MARGIN = 2
"""Pixels between the edge of a patch and the words that begin in it."""


class Page:
    """An RGB image of `grid` by `grid` patches.

    Args:
        grid: patches per side.
        paper: the colour of the sheet.
        font: of all that is written on it.
    """

    def __init__(self, grid: int, paper: Colour, font: Font) -> None:
        self.side = grid * PATCH
        self.image = Image.new("RGB", (self.side, self.side), paper)
        self.draw = ImageDraw.Draw(self.image)
        self.font = font
        self.regions: list[Region] = []
        self.written: list[str] = []
        """Every line."""

    def write(self, text: str, x: float, row: float, size: int, ink: Colour, rows: int = 1) -> tuple[int, int]:
        """Write one line, centred in `rows` rows of patches from `row` on.

        Returns:
            The first and the last pixel across, the last one exclusive.

        Raises:
            ValueError: if it does not fit on the sheet, which is for whoever lays it out to see to.
        """
        font = load_font(self.font, size)
        ascent, descent = font.getmetrics()
        width = text_width(self.font, size, text)
        if x < 0 or x + width > self.side:
            raise ValueError(f"{text!r} at {x} is {width:.0f} pixels wide, on a sheet of {self.side}")
        top = (row + rows / 2) * PATCH - (ascent + descent) / 2
        self.draw.text((x, round(top)), text, fill=ink, font=font)
        self.written.append(text)
        return round(x), round(x + width)

    def write_region(self, text: str, column: int, row: int, size: int, ink: Colour, rows: int = 1) -> None:
        """Write one line from a column of patches on, and remember it without a colon at its end.

        Raises:
            ValueError: as `write`.
        """
        left, right = self.write(text, column * PATCH + MARGIN, row, size, ink, rows)
        self.mark(left, row, right, text.rstrip(":"), rows)

    def write_all(self, words: Sequence[str], x: float, row: int, size: int, ink: Colour) -> int:
        """Write as many words as fit into the rest of a row; returns their number."""
        count, end = 0, x
        for word in words:
            # With the space before it, and a pixel for what stands out of a letter's own width.
            end += text_width(self.font, size, f" {word}")
            if end + 1 > self.side:
                break
            count += 1
        if count:
            self.write(" ".join(words[:count]), x, row, size, ink)
        return count

    def mark(self, left: float, row: float, right: float, text: str, rows: float = 1) -> None:
        """Remember what stands between two pixels across, in `rows` rows of patches from `row` on."""
        self.regions.append(Region((round(left), round(row * PATCH), round(right), round((row + rows) * PATCH)), text))
