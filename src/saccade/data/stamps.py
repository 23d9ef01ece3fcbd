"""Detect changes of files that are read for hours."""

import time
from collections.abc import Iterable
from pathlib import Path

from saccade.errors import SaccadeError

_Stamp = tuple[int, int, int, int]


class FileStamps:
    """Sizes and times of files when they were opened.

    Rows are located by their offset in a memory-mapped file. If the file is rewritten, an offset points to another
    row, or beyond the end of a shorter file, and reading there kills the process.

    Args:
        paths: the files.
        every_seconds: minimum time between two checks; 0 checks every time.
    """

    def __init__(self, paths: Iterable[str | Path], every_seconds: float = 0.0) -> None:
        self.stamps = {Path(path): _stamp(Path(path)) for path in paths}
        self.every_seconds = every_seconds
        self._looked = time.monotonic()

    @property
    def nbytes(self) -> int:
        """Total size in bytes when the files were opened."""
        return sum(stamp[0] for stamp in self.stamps.values() if stamp is not None)

    def check(self) -> None:
        """Check that the files have not changed.

        Raises:
            SaccadeError: if one has; the message names it.
        """
        if self.every_seconds:
            now = time.monotonic()
            if now - self._looked < self.every_seconds:
                return
            self._looked = now
        for path, stamp in self.stamps.items():
            if _stamp(path) != stamp:
                raise SaccadeError(
                    f"{path} was changed while it was being read: restore it or start again, and do not touch "
                    "data files until the run has ended"
                )


def _stamp(path: Path) -> _Stamp | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ino, found.st_dev
