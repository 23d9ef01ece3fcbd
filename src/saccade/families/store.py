"""A key-value store of tensors in a folder that several processes may fill at the same time, without locks.

Each entry is a separate file, written under a temporary name and renamed, so that it is either complete or absent. It
begins with a checksum of the rest: an entry damaged by a crash or a bad disk is detected and counts as missing.
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
"""A process measures the folder again after it has written 1/SLACK of the limit."""
DIGEST_BYTES = 16


def digest(*parts: bytes | memoryview) -> str:
    """The name of some content: 32 hexadecimal digits of BLAKE2b over the concatenated `parts`."""
    found = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        found.update(part)
    return found.hexdigest()


class Store:
    """Entries of named tensors; no more are added once the folder is full.

    Nothing is evicted to make room: training reads each entry once per epoch, so evicting the oldest would always drop
    an entry just before it is read.

    Args:
        folder: the folder that the limit applies to, including what other stores and runs put there.
        max_bytes: the limit. Each writing process may exceed it by 1/64 of it and one entry.
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
        """The path of the entry `key` of the subfolder `shelf`, whether it exists or not."""
        return self.folder / shelf / key[:2] / f"{key}{SUFFIX}"

    def read(self, shelf: str, key: str) -> dict[str, Tensor] | None:
        """The tensors of an entry, on the CPU; None if it is missing or damaged."""
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
        """Add an entry of tensors on the CPU, unless the folder is full. A disk error causes one warning."""
        if self.stopped:
            return
        body = save({name: tensor.contiguous() for name, tensor in tensors.items()})
        try:
            if not self._has_room(DIGEST_BYTES + len(body)):
                return
            # Not flushed to disk: after a power cut the checksum reveals damage.
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
                # Entries that other threads have counted may not be on disk yet.
                self._counted = max(folder_bytes(self.folder), self._counted + self._written)
                self._written = 0
            if self._counted + self._written + size <= self.max_bytes:
                self._written += size
                return True
        self._stop(f"is full (feature_cache_gib={self.max_bytes / 2**30:g})")
        return False

    def _stop(self, why: str) -> None:
        with self._lock:
            # Concurrent threads may all hit the same full disk; only the first warns.
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
