"""Lines of text that fit a terminal."""

import shutil
import sys
import textwrap


def room() -> int | None:
    """The columns of the terminal that the standard output is, None if it is none."""
    return shutil.get_terminal_size().columns - 1 if sys.stdout.isatty() else None


def wrapped(text: str, indent: int = 0) -> str:
    """`text` in lines that fit the terminal, without breaking a word; as it is if the output is none.

    Args:
        indent: of all lines but the first.
    """
    columns = room()
    if columns is None:
        return text
    return textwrap.fill(
        text, columns, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )  # fmt: skip
