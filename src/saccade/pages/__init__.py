"""`saccade report`: one page about a run or a sweep, such as the demo, with pictures."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from saccade.errors import SaccadeError
from saccade.files import check_writable, reading
from saccade.pages.page import PAGE_FILE, RECORD_FILE, Page
from saccade.pages.run import run_page
from saccade.pages.source import is_sweep, read_json
from saccade.pages.sweep import sweep_page

__all__ = ["write_report"]


def write_report(
    folder: Path,
    output: Path | None = None,
    overwrite: bool = False,
    make: Callable[[Path, Path], Page] | None = None,
) -> Path:
    """Write the page about a run or a sweep, with pictures and JSON, and return the page's path.

    Args:
        output: the folder to write to; by default `report` inside `folder`.
        overwrite: whether to replace an existing report.
        make: makes the page, given the folder and one to draw in; by default chosen by what the folder contains.

    Raises:
        SaccadeError: if `folder` contains nothing to report or something half-written, or `output` contains a report
            or other files, or cannot be written.
    """
    make = make or (sweep_page if is_sweep(folder) else run_page)
    output = folder / "report" if output is None else output
    before = _check_output(output, overwrite)
    # Drawn elsewhere, so that a report that fails leaves nothing behind.
    with TemporaryDirectory(prefix="saccade-report-") as workshop:
        with reading(f"folder={str(folder)!r}: a file in it is not what Saccade writes"):
            page = make(folder, Path(workshop))
        path = page.write(output)
    for name in before - {entry["file"] for entry in page.pictures}:
        (output / name).unlink(missing_ok=True)
    return path


def _check_output(output: Path, overwrite: bool) -> set[str]:
    """The names of the pictures of the report that is replaced."""
    check_writable(output, "output", folder=True)
    if (output / PAGE_FILE).exists() and not overwrite:
        raise SaccadeError(f"output={str(output)!r} contains a report: give another --output, or --overwrite")
    if not (output / PAGE_FILE).exists():
        if output.is_dir() and any(not path.name.startswith(".") for path in output.iterdir()):
            raise SaccadeError(f"output={str(output)!r} is a folder with other files: give a new one")
        return set()
    if not (output / RECORD_FILE).is_file():
        return set()
    # Only names inside this folder, whatever the record says.
    pictures = read_json(output / RECORD_FILE).get("pictures", [])
    return {Path(entry["file"]).name for entry in pictures if str(entry.get("file", "")).endswith(".png")}
