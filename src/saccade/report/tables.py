"""Tables, for the terminal and for Markdown."""

from collections.abc import Sequence
from typing import IO, Any

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

# Without a terminal there is no width to fit, and a table squeezed into 80 columns is useless for `grep`.
WIDTH_OFF_TERMINAL = 160


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], file: IO[str] | None = None
) -> None:
    """Print a table to `file`, by default the standard output. Columns of numbers are right-aligned.

    No word breaks: on a terminal too narrow for the longest word of each column, every row is a block of lines
    "column  value" instead.

    Raises:
        ValueError: if a row does not have one cell per column.
    """
    cells = table_cells(columns, rows)
    console = Console(file=file)
    if not console.is_terminal:
        console = Console(file=file, width=WIDTH_OFF_TERMINAL)
    texts = [[column, *(row[number] for row in cells)] for number, column in enumerate(columns)]
    least = [max(cell_len(word) for text in column for word in text.split() or [""]) for column in texts]
    most = [max(cell_len(line) for text in column for line in text.split("\n")) for column in texts]
    # Rich sets a blank on both sides of the line between two columns, and that line is a blank here.
    spare, wanted = console.width - 3 * (len(columns) - 1) - sum(least), sum(most) - sum(least)
    if spare < 0 and len(columns) > 2:
        for row in cells:
            print_table(title, ["", ""], list(zip(columns, row, strict=True)), file)
            console.print()
            title = ""
        return
    look = {"box": SIMPLE_HEAD, "pad_edge": False, "show_edge": False, "show_header": any(columns)}
    if title:  # not the table's own, which would be no wider than the table
        console.print(Text(title, style="bold"))
    table = Table(**look)
    for number, column in enumerate(columns):
        align = "right" if is_numeric([row[number] for row in rows]) else "left"
        width = least[number] + (most[number] - least[number]) * spare // wanted if 0 <= spare < wanted else None
        table.add_column(Text(column), justify=align, overflow="fold", width=width)
    for row in cells:
        # As `Text`, since rich would read square brackets in a plain string as markup.
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A GitHub table, ending in a newline. Columns of numbers are right-aligned.

    Raises:
        ValueError: if a row does not have one cell per column.
    """
    cells = table_cells(columns, rows)
    rules = ["---:" if is_numeric([row[number] for row in rows]) else "---" for number in range(len(columns))]
    lines = [list(columns), rules, *cells]
    return "".join("| " + " | ".join(_escape(cell) for cell in line) + " |\n" for line in lines)


def table_cells(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[list[str]]:
    """The cells as text.

    Raises:
        ValueError: if a row does not have one cell per column.
    """
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"a row of {len(row)} cells in a table of {len(columns)} columns: {row!r}")
    return [[_text(value) for value in row] for row in rows]


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (set, frozenset)):
        return ", ".join(sorted(str(entry) for entry in value)) or "-"
    return str(value)


def is_numeric(values: Sequence[Any]) -> bool:
    """Whether a column contains only numbers, as numbers or as text such as "12.5 %" and "1.9x"."""
    known = [str(value).strip().rstrip("%sx") for value in values if value is not None]
    try:
        return bool([float(text) for text in known])
    except ValueError:
        return False


def _escape(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")
