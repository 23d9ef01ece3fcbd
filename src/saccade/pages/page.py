"""A self-contained HTML page with embedded pictures, for phones too, light and dark, usable offline.

The markup is in templates/, which escape whatever they are given; only what their macros return is treated as HTML.
"""

import base64
import shutil
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from PIL import Image

from saccade.files import atomic_path, write_json_atomically, write_text_atomically
from saccade.report.environment import environment, environment_lines
from saccade.report.plots import short_name
from saccade.report.tables import is_numeric, table_cells

PAGE_FILE, RECORD_FILE = "report.html", "report.json"
TEMPLATES = Environment(loader=PackageLoader("saccade.pages"), autoescape=True, keep_trailing_newline=True)
blocks: Any = TEMPLATES.get_template("blocks.html").module
"""Macros that return blocks of HTML: `paragraph(words)`, `warning(words)`, `command(words, shell)`,
`fold(summary, blocks)`, `gallery(pictures)` and `cards(entries)`, of triples of name, value and a remark."""
WIDE = 4
"""On a phone, rows of a table with more columns than these become lines "column: value"."""


class Page:
    """One report.

    Args:
        workshop: the folder in which its pictures are drawn.
        kind: what it is about: "run", "sweep" or "demo".
        source: the folder that it describes; its name is in every picture's name.
        finding: the first line of the page; `lead` is the sentence below it.
    """

    def __init__(self, workshop: Path, kind: str, source: Path, finding: str, lead: str) -> None:
        self.workshop, self.finding, self.lead = workshop, finding, lead
        self.name = source.resolve().name
        self.sections: dict[str, list[Markup]] = {}
        self.pictures: list[dict[str, str]] = []
        self.record: dict[str, Any] = {
            "title": self.name,
            "kind": kind,
            "folder": str(source.resolve()),
            "finding": finding,
        }

    def add(self, heading: str, *found: Markup) -> None:
        """Append blocks of HTML under a heading."""
        self.sections.setdefault(heading, []).extend(found)

    def draw(
        self, file: str, alt: str, caption: str, plot: Callable[..., Any], *arguments: Any, **options: Any
    ) -> Markup:
        """Draw a picture with `plot(*arguments, path, **options)`, and return it as a block.

        `file` gets the page's name in front; `alt` is for readers who cannot see the picture.
        """
        file = f"{_plain(self.name)}-{file}"
        plot(*arguments, self.workshop / file, **options)
        self.pictures.append({"file": file, "alt": alt, "caption": caption})
        with Image.open(self.workshop / file) as image:
            size = image.size
        data = base64.b64encode((self.workshop / file).read_bytes()).decode()
        return blocks.picture(data, size, alt, caption)

    def title_of(self, what: str) -> str:
        """The title of a plot, which names the run or the sweep."""
        return f"{short_name(self.name)}: {what}"

    def add_environment(
        self,
        found: Sequence[Mapping[str, Any]],
        days: Sequence[str],
        caption: str = "The training took place here.",
    ) -> None:
        """Add where the runs took place: what `environment` returned in each, and the days when they ended."""
        heading = "Environment"
        values: dict[str, dict[str, None]] = {}
        for name, text in (pair for one in found for pair in environment_lines(dict(one))):
            values.setdefault(name, {})[text] = None
        rows = [[name, "; ".join(texts)] for name, texts in values.items()]
        rows += [["finished", "; ".join(dict.fromkeys(days))]] if days else []
        if not found:
            self.add(heading, blocks.paragraph("Neither machine nor versions of this run were recorded."))
        if rows:
            self.add(heading, html_table(("name", "value"), rows, caption))
        for text in dict.fromkeys(text for one in found for text in one.get("warnings", [])):
            self.add(heading, blocks.warning(text))
        self.record |= {"environment": list(found), "finished": list(dict.fromkeys(days))}

    def html(self, footer: str) -> str:
        """The whole document; sections without blocks are left out."""
        shown = [(_plain(heading.lower()), heading, found) for heading, found in self.sections.items() if found]
        values = {"finding": self.finding, "lead": self.lead, "name": self.name, "footer": footer}
        return TEMPLATES.get_template("page.html").render(sections=shown, **values)

    def write(self, output: Path) -> Path:
        """Write the page, its pictures and its content as JSON to the folder `output`, and return the page's path.

        Raises:
            OSError: if a file cannot be written.
        """
        here = environment()
        version, commit = here["packages"]["saccade"] or "", (here["commit"] or "")[:8]
        footer = f"Made on {date.today().isoformat()} by saccade {version}{f' at {commit}' if commit else ''} from "
        footer += f"{self.record['folder']}. The pictures and {RECORD_FILE} are next to this page."
        text = self.html(footer)
        for entry in self.pictures:
            with atomic_path(output / entry["file"]) as picture:
                shutil.copyfile(self.workshop / entry["file"], picture)
        write_json_atomically(output / RECORD_FILE, {**self.record, "pictures": self.pictures, "made": footer})
        return write_text_atomically(output / PAGE_FILE, text)


def html_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], caption: str) -> Markup:
    """A table that fits: words wrap, and on a phone the rows of a wide one become blocks. Numbers are right-aligned.

    Raises:
        ValueError: if a row does not have one cell per column.
    """
    numeric = [is_numeric([row[number] for row in rows]) for number in range(len(columns))]
    return blocks.table(columns, table_cells(columns, rows), numeric, caption, len(columns) > WIDE)


def settings_table(values: Mapping[str, Any], caption: str) -> Markup:
    """Names and values of options, as a block."""
    return html_table(("option", "value"), [[name, option_text(values[name])] for name in sorted(values)], caption)


def option_text(value: Any) -> str:
    """An option's value in words."""
    if isinstance(value, dict):
        return ", ".join(f"{name}: {option_text(one)}" for name, one in value.items()) or "none"
    if isinstance(value, list):
        return "; ".join(map(option_text, value)) or "none"
    return "none" if value is None else str(value)


def _plain(text: str) -> str:
    """Letters and digits, for names of files and anchors."""
    return "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in text)
