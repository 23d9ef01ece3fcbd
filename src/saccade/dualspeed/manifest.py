"""The contents of a checkpoint: name, size and checksum of every file, written once all files are complete."""

import json
import os
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from saccade.files import write_json_atomically

MANIFEST_FILE = "manifest.json"
_CHUNK = 1 << 22
_THREADS = 8


def write_manifest(folder: Path) -> None:
    """List every file below `folder` in its `manifest.json`, after flushing them to disk.

    Raises:
        OSError: if a file cannot be read or written.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_FILE)
    sums = checksums(paths, flush=True)
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "crc32": sums[path]} for path in paths
    }
    write_json_atomically(folder / MANIFEST_FILE, {"files": files})


def read_manifest(folder: Path) -> dict[str, dict[str, Any]] | None:
    """The files that `folder` should contain, or None without a manifest, as in checkpoints of earlier versions.

    Raises:
        ValueError: if it is damaged.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    try:
        return {
            name: {"bytes": int(file["bytes"]), "crc32": str(file["crc32"])} for name, file in found["files"].items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a list of files") from error


def find_damage(folder: Path, files: dict[str, dict[str, Any]], thorough: bool) -> str | None:
    """The first file that differs from the manifest, and how; None if all match.

    Args:
        thorough: also compare checksums, which reads every file once; otherwise only names and sizes.
    """
    for name, file in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != file["bytes"]:
            return f"{name} has {path.stat().st_size:,} of {file['bytes']:,} bytes"
    if thorough:
        sums = checksums([folder / name for name in files])
        for name, file in files.items():
            if sums[folder / name] != file["crc32"]:
                return f"{name} is damaged: its checksum is not that of the file as it was written"
    return None


def checksums(paths: Iterable[Path], flush: bool = False) -> dict[Path, str]:
    """The CRC-32 of files, several at a time.

    CRC-32 is the fastest checksum of the standard library; it detects damage, not deliberate forgery.

    Args:
        flush: wait until each file's bytes are on disk.

    Raises:
        OSError: if a file cannot be read.
    """
    paths = list(paths)
    with ThreadPoolExecutor(max(1, min(_THREADS, len(paths)))) as pool:
        return dict(zip(paths, pool.map(lambda path: _checksum(path, flush), paths), strict=True))


def _checksum(path: Path, flush: bool) -> str:
    value, buffer = 0, bytearray(_CHUNK)
    with path.open("rb", buffering=0) as file:
        if flush:
            os.fsync(file.fileno())
        while count := file.readinto(buffer):
            value = zlib.crc32(memoryview(buffer)[:count], value)
    return f"{value:08x}"
