"""Tensors on disk by key, in a folder that several processes fill at once without locks.

An entry is a file of its own, written aside and renamed, so that it is there whole or not at all. It begins with a
checksum of the rest: what a crash or a bad disk left is told from what was written, and counts as missing.
"""

import hashlib
import logging
import os
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from saccade.files import atomic_path

logger = logging.getLogger(__name__)

SUFFIX = ".features"
SLACK = 64
"""A process looks at the folder's size again when it has written so-many-th of the bound."""
DIGEST_BYTES = 16


def digest(*parts: bytes | memoryview) -> str:
    """What names content: 32 hexadecimal digits of BLAKE2b over `parts`, one behind the other."""
    found = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        found.update(part)
    return found.hexdigest()


class Store:
    """Entries of named tensors, of which no more are added once the folder is full.

    Nothing is dropped to make room: what training reads comes around once an epoch, and dropping the oldest would drop
    each entry just before it is read.

    Args:
        folder: what the bound is of, with whatever other stores and runs put there.
        max_bytes: the bound. Each process that writes may go beyond it by a 64th of it and one entry.
    """

    def __init__(self, folder: Path, max_bytes: float) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self.stopped = False
        """Whether this process has stopped adding entries: the folder is full, or cannot be written."""
        self._counted: int | None = None
        self._written = 0
        self._lock = threading.Lock()

    def path(self, shelf: str, key: str) -> Path:
        """Where the entry `key` of the subfolder `shelf` is, or would be."""
        return self.folder / shelf / key[:2] / f"{key}{SUFFIX}"

    def read(self, shelf: str, key: str) -> dict[str, Tensor] | None:
        """The tensors of an entry, on the CPU; None if there is none, or none that is whole."""
        try:
            content = memoryview(self.path(shelf, key).read_bytes())
        except OSError:
            return None
        checksum, body = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
        if bytes.fromhex(digest(body)) != checksum:
            return None
        with suppress(SafetensorError):
            return load(bytes(body))
        return None

    def write(self, shelf: str, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Add an entry of tensors on the CPU, unless the folder is full. A disk that refuses costs one warning."""
        if self.stopped:
            return
        body = save({name: tensor.contiguous() for name, tensor in tensors.items()})
        try:
            if not self._has_room(DIGEST_BYTES + len(body)):
                return
            # Not waited for until it is on disk: after a power cut the checksum tells.
            with atomic_path(self.path(shelf, key), flush=False) as partial, partial.open("wb") as file:
                file.write(bytes.fromhex(digest(body)))
                file.write(body)
        except OSError as error:
            self._stop(f"cannot be written ({error.strerror or error})")

    def _has_room(self, size: int) -> bool:
        """Whether an entry of `size` bytes may still be added; it is then counted."""
        with self._lock:
            if self._counted is None:
                self._counted = folder_bytes(self.folder)
            elif self._written >= self.max_bytes // SLACK:
                # What other threads have counted may not lie there yet.
                self._counted = max(folder_bytes(self.folder), self._counted + self._written)
                self._written = 0
            if self._counted + self._written + size <= self.max_bytes:
                self._written += size
                return True
        self._stop(f"is full (feature_cache_gib={self.max_bytes / 2**30:g})")
        return False

    def _stop(self, why: str) -> None:
        with self._lock:
            # Threads that write side by side may all meet the same full disk.
            before, self.stopped = self.stopped, True
        if not before:
            logger.warning(
                "feature_cache=%r %s: no more features are stored in this run, those that are there are still read",
                str(self.folder),
                why,
            )


def folder_bytes(folder: Path) -> int:
    """Bytes of all files under a folder; 0 if there is none."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            # Another process may have renamed it since.
            with suppress(FileNotFoundError):
                total += os.stat(os.path.join(parent, name)).st_size
    return total
