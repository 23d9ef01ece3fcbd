"""A self-contained HTML page with embedded pictures, for phones too, light and dark, usable offline.

The markup is in templates/, which escape whatever they are given; only what the functions here return is treated as
HTML.
"""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from PIL import Image

from saccade.report.tables import is_numeric, table_cells

TEMPLATES = Environment(loader=PackageLoader("saccade.report"), autoescape=True, keep_trailing_newline=True)
BLOCKS: Any = TEMPLATES.get_template("blocks.html").module


def page(title: str, lead: str, sections: Mapping[str, Sequence[Markup]], footer: str) -> str:
    """The whole document.

    Args:
        title: plain text, the title of window and page.
        lead: plain text under the title.
        sections: heading (plain text) to blocks made by the functions below. Empty ones are left out.
        footer: plain text.
    """
    shown = [(_anchor(heading), heading, blocks) for heading, blocks in sections.items() if blocks]
    return TEMPLATES.get_template("page.html").render(title=title, lead=lead, sections=shown, footer=footer)


def paragraph(words: str) -> Markup:
    """A paragraph of plain text."""
    return BLOCKS.paragraph(words)


def command(words: str, shell: str) -> Markup:
    """A paragraph of plain text followed by a command in a box that scrolls sideways."""
    return BLOCKS.command(words, shell)


def warning(words: str) -> Markup:
    """A paragraph of plain text that stands out."""
    return BLOCKS.warning(words)


def tiles(values: Mapping[str, Any]) -> Markup:
    """The most important numbers with their names; None values are left out."""
    return BLOCKS.tiles(values)


def fold(summary: str, *blocks: Markup) -> Markup:
    """Blocks that are hidden until a line of plain text is clicked."""
    return BLOCKS.fold(summary, blocks)


def picture(path: Path, alt: str, caption: str = "", wide: bool = False) -> Markup:
    """A PNG embedded in the page.

    Args:
        alt: description for readers who cannot see it.
        caption: plain text under it.
        wide: whether it keeps a readable width and scrolls sideways in its own box.
    """
    with Image.open(path) as image:
        size = image.size
    return BLOCKS.picture(base64.b64encode(path.read_bytes()).decode(), size, alt, caption, wide)


def gallery(pictures: Sequence[Markup], large: bool = False) -> Markup:
    """Pictures side by side, as many as fit; `large` ones at most two."""
    return BLOCKS.gallery(pictures, large)


def html_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], caption: str, wrap: bool = False) -> Markup:
    """A table in a box that scrolls sideways. Columns of numbers are right-aligned.

    Args:
        caption: what the table shows.
        wrap: whether long words, such as paths, break rather than widen the table.

    Raises:
        ValueError: if a row does not have one cell per column.
    """
    numeric = [is_numeric([row[number] for row in rows]) for number in range(len(columns))]
    return BLOCKS.table(columns, table_cells(columns, rows), numeric, caption, wrap)


def _anchor(heading: str) -> str:
    return "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in heading.lower())
