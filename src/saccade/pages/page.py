"""A page under construction: its sections, its pictures, and its content as plain values."""

import os
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from markupsafe import Markup

from saccade.files import write_json_atomically, write_text_atomically
from saccade.report.environment import environment, environment_lines
from saccade.report.html import html_table, page, paragraph, picture, warning

PAGE_FILE, RECORD_FILE = "report.html", "report.json"


class Page:
    """One report.

    Args:
        workshop: the folder in which its pictures are drawn.
        title: title of the page.
        kind: what it is about: "run", "sweep" or "demo".
        source: the folder that it describes.
    """

    def __init__(self, workshop: Path, title: str, kind: str, source: Path) -> None:
        self.workshop = workshop
        self.title = title
        self.lead = ""
        self.sections: dict[str, list[Markup]] = {}
        self.pictures: list[dict[str, str]] = []
        self.record: dict[str, Any] = {"title": title, "kind": kind, "folder": str(source.resolve())}

    def add(self, heading: str, *blocks: Markup) -> None:
        """Append blocks of HTML under a heading."""
        self.sections.setdefault(heading, []).extend(blocks)

    def draw(
        self,
        file: str,
        alt: str,
        caption: str,
        plot: Callable[..., None],
        *arguments: Any,
        wide: bool = False,
        **options: Any,
    ) -> Markup:
        """Draw a picture with `plot(*arguments, path, **options)`, and return it as a block."""
        plot(*arguments, self.workshop / file, **options)
        return self.show(file, alt, caption, wide)

    def show(self, file: str, alt: str, caption: str, wide: bool = False) -> Markup:
        """An existing picture, as a block."""
        self.pictures.append({"file": file, "alt": alt, "caption": caption})
        return picture(self.workshop / file, alt, caption, wide)

    def add_environment(
        self,
        found: Sequence[Mapping[str, Any]],
        days: Sequence[str],
        caption: str = "Where the training took place",
    ) -> None:
        """Add where the runs took place.

        Args:
            found: what `environment` returned in each run; empty if it was not recorded.
            days: when the runs ended.
            caption: caption of the table.
        """
        heading = "Environment"
        if not found:
            self.add(heading, paragraph("Neither machine nor versions of this run were recorded."))
        values: dict[str, dict[str, None]] = {}
        for one in found:
            for name, text in environment_lines(dict(one)):
                values.setdefault(name, {})[text] = None
        rows = [[name, "; ".join(texts)] for name, texts in values.items()]
        if days:
            rows.append(["finished", "; ".join(dict.fromkeys(days))])
        if rows:
            self.add(heading, html_table(("name", "value"), rows, caption, wrap=True))
        for text in dict.fromkeys(text for one in found for text in one.get("warnings", [])):
            self.add(heading, warning(text))
        self.record["environment"] = list(found)
        self.record["finished"] = list(dict.fromkeys(days))

    def write(self, output: Path) -> Path:
        """Write the page, its pictures and its content as JSON to `output`, and return the page's path.

        Args:
            output: a folder on the same file system as the workshop.

        Raises:
            OSError: if a file cannot be written.
        """
        here = environment()
        version, commit = here["packages"]["saccade"] or "", (here["commit"] or "")[:8]
        footer = f"Made on {date.today().isoformat()} by saccade {version}{f' at {commit}' if commit else ''} from "
        footer += f"{self.record['folder']}. The pictures and {RECORD_FILE} are next to this page."
        text = page(self.title, self.lead, self.sections, footer)
        for entry in self.pictures:
            os.replace(self.workshop / entry["file"], output / entry["file"])
        write_json_atomically(output / RECORD_FILE, {**self.record, "pictures": self.pictures, "made": footer})
        return write_text_atomically(output / PAGE_FILE, text)
