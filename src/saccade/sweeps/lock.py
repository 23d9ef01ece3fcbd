"""One sweep at a time in a folder."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from saccade.errors import SaccadeError

LOCK_FILE = ".lock"


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold `folder`, which is made, until the block or the process ends, in whatever way.

    Raises:
        SaccadeError: if another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise SaccadeError(
                f"another sweep is at work in {folder}: wait for it, or give another --output"
            ) from error
        yield
