"""Whether files that are read for hours are still those that were opened."""

import time
from collections.abc import Iterable
from pathlib import Path

from saccade.errors import SaccadeError

_Stamp = tuple[int, int, int, int]


class FileStamps:
    """Sizes and times of files as they were opened.

    Rows are found by their place in a mapped file: after it is rewritten a place holds some other row, or the end of a
    file that became shorter, which kills the process that looks.

    Args:
        paths: the files.
        every_seconds: look again after so long; 0 looks each time.
    """

    def __init__(self, paths: Iterable[str | Path], every_seconds: float = 0.0) -> None:
        self.stamps = {Path(path): _stamp(Path(path)) for path in paths}
        self.every_seconds = every_seconds
        self._looked = time.monotonic()

    @property
    def nbytes(self) -> int:
        """Bytes of all files when they were opened."""
        return sum(stamp[0] for stamp in self.stamps.values() if stamp is not None)

    def check(self) -> None:
        """Look whether the files are as they were.

        Raises:
            SaccadeError: naming one that is not.
        """
        if self.every_seconds:
            now = time.monotonic()
            if now - self._looked < self.every_seconds:
                return
            self._looked = now
        for path, stamp in self.stamps.items():
            if _stamp(path) != stamp:
                raise SaccadeError(
                    f"{path} was changed while it was being read: put it back or start anew, and leave data files "
                    "alone until the run has ended"
                )


def _stamp(path: Path) -> _Stamp | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ino, found.st_dev
