"""Write files so that an incomplete one never looks complete."""

import difflib
import errno
import fcntl
import json
import logging
import math
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from saccade.errors import SaccadeError

logger = logging.getLogger(__name__)

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_TENSORS = (".safetensors", ".bin", ".saccade", ".pt", ".pth")
_PROBE_BYTES = 1 << 20
_held: set[Path] = set()
"""Locks held by this process, which the system would grant to it a second time."""


@contextmanager
def atomic_path(path: str | os.PathLike[str], flush: bool = True) -> Iterator[Path]:
    """A temporary path next to `path`, renamed to `path` if the block succeeds and removed if it does not.

    Parent folders are created. The temporary name starts with a dot and keeps the suffix, from which writers such as
    PIL and matplotlib infer the format. An existing file at `path` is untouched until the rename.

    Args:
        flush: wait until the bytes are on disk before the rename. Without it, a power cut may leave an incomplete
            file; meant for content with a checksum that can be made again.

    Raises:
        FileNotFoundError: if the block ends without having written the temporary file.
        IsADirectoryError: before the block runs, if `path` is a folder.
        OSError: if the folder cannot be created or the file cannot be written.
    """
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    # Not `mkstemp`, which creates the file readable by its owner only, and the rename would keep that mode. The stem
    # is truncated, since a name near the file system's limit would be too long with the random part.
    temporary = target.with_name(f".{target.stem[:100]}.{secrets.token_hex(6)}{target.suffix}")
    try:
        yield temporary
        if flush:
            _flush_to_disk(temporary)
        os.replace(temporary, target)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise


def check_writable(path: str | os.PathLike[str], field: str, folder: bool = False) -> None:
    """Check that a path can be written, before the work whose result goes there.

    The check creates a temporary file or folder and removes it at once. Missing parent folders are not created.

    Args:
        field: the path's name for the user.
        folder: whether the path is for a folder; otherwise for a file.
    """
    target, parent = Path(path), Path(path) if folder else Path(path).parent
    try:
        with suppress(FileNotFoundError):
            os.lstat(target)  # raises if the name is too long; the probe's name is not
            if not (target.is_dir() if folder else target.is_file()):
                what = "folder" if folder else "file"
                raise SaccadeError(f"{field}={str(path)!r} exists and is not a {what}: give another path")
        there = next(place for place in (parent, *parent.parents) if place.exists())
        probe = there / f".probe.{secrets.token_hex(6)}"
        if there == parent:
            probe.touch(exist_ok=False)
            probe.unlink()
        else:
            probe.mkdir()
            probe.rmdir()
    except SaccadeError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise SaccadeError(f"{field}={str(path)!r} cannot be written ({reason}): give another path") from error


def nearest_path(path: str | os.PathLike[str]) -> Path | None:
    """The most similar path in the folder of one that does not exist, if any is similar."""
    path = Path(path)
    try:
        entries = [entry for entry in path.parent.iterdir() if not entry.name.startswith(".") and entry != path]
    except (OSError, ValueError):
        return None
    # By the stems alone: a long folder or the same suffix would make any two names similar.
    near = difflib.get_close_matches(path.stem, [entry.stem for entry in entries], n=1)
    return next((entry for entry in entries if entry.stem in near), None)


def similar_path(path: str | os.PathLike[str], otherwise: str) -> str:
    """The hint for a path that does not exist: the most similar one in its folder, or else `otherwise`."""
    near = nearest_path(path)
    return otherwise if near is None else f"did you mean {str(near)!r}?"


def check_exists(path: str | os.PathLike[str], field: str, otherwise: str, folder: bool = False) -> None:
    """Refuse a path that does not exist."""
    if not (Path(path).is_dir() if folder else Path(path).exists()):
        state = "is not a folder" if folder else "does not exist"
        raise SaccadeError(f"{field}={str(path)!r} {state}: {similar_path(path, otherwise)}")


def check_new_folder(path: str | os.PathLike[str], field: str) -> None:
    """Check that a path for a new folder does not exist or is an empty folder, and that it can be written."""
    check_writable(path, field, folder=True)
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise SaccadeError(f"{field}={str(path)!r} exists: name a folder that does not, or remove it")


def write_text_atomically(path: str | os.PathLike[str], text: str) -> Path:
    """Write `text` as UTF-8 to `path`, whole or not at all, and return the path.

    Raises:
        OSError: if the file cannot be written.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def write_json_atomically(path: str | os.PathLike[str], obj: Any) -> Path:
    """Write `obj` as indented JSON to `path`, whole or not at all, and return the path.

    Paths become strings, sets sorted lists, and numpy and torch scalars plain numbers. NaN and infinity become null,
    since JSON has neither and strict readers would reject the whole file.

    Raises:
        TypeError: if something in `obj` has no JSON form.
        OSError: if the file cannot be written.
    """
    return write_text_atomically(path, to_json(obj) + "\n")


def to_json(obj: Any) -> str:
    """`obj` as the indented JSON text that `write_json_atomically` writes.

    Raises:
        TypeError: if something in `obj` has no JSON form.
    """
    return json.dumps(_plain(obj), indent=2, ensure_ascii=False, allow_nan=False)


def _plain(obj: Any) -> Any:
    """`obj` converted to dicts, lists, strings, finite numbers, booleans and None."""
    if isinstance(obj, float):
        return float(obj) if math.isfinite(obj) else None
    if obj is None or isinstance(obj, (str, bool, int)):
        return obj
    if isinstance(obj, Mapping):
        return {key if isinstance(key, str) else str(key): _plain(value) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [_plain(value) for value in obj]
    if isinstance(obj, (set, frozenset)):
        return sorted((_plain(value) for value in obj), key=str)
    if isinstance(obj, os.PathLike):
        return os.fspath(obj)
    if hasattr(obj, "tolist"):
        return _plain(obj.tolist())
    raise TypeError(f"{type(obj).__name__} has no JSON form: {obj!r}")


def _flush_to_disk(path: Path) -> None:
    """Wait until the bytes of `path` are on disk; otherwise the rename may survive a power cut without them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def file_lock(path: str | os.PathLike[str], taken: str, again: bool = False) -> Iterator[None]:
    """Lock the file `path`, creating it and its folders if needed, until the block or the process ends.

    It is a lock of the operating system, owned by the process and not by its children, so nothing needs cleaning up
    after a kill -9. If the file system has no locks, one warning is logged and the block runs without.

    Args:
        taken: the error message if the lock is held.
        again: allow this if the same process already holds the lock.

    Raises:
        SaccadeError: if another process holds the lock, or this one does and `again` is false.
        OSError: if the file cannot be created.
    """
    place = Path(path).absolute()
    if place in _held:
        if not again:
            raise SaccadeError(taken)
        yield
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.exists() and not place.is_file():
        raise SaccadeError(f"{place} is not a file: remove it")  # opening a pipe would block
    with place.open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise SaccadeError(taken) from error
            logger.warning("%s cannot be locked on this file system: start no second run in its folder", place)
        _held.add(place)
        try:
            yield
        finally:
            _held.discard(place)


def check_entries(folder: str | os.PathLike[str], field: str, weights: bool = False) -> None:
    """Refuse a folder that contains a link leading outside, or a pipe. Reading such a link would disclose foreign
    files along with the folder's, writing to it would write outside the folder, and opening a pipe would block.

    Args:
        field: the user's name for the folder.
        weights: also refuse weight files that are links, and check the checkpoints inside; for folders that are
            written to.
    """
    place = Path(folder)
    if not place.is_dir():
        return
    found = [*place.iterdir(), *(place.glob("checkpoint-*/*") if weights else ())]
    for path in sorted(found):
        if path.exists() and not path.is_file() and not path.is_dir():
            raise SaccadeError(f"{field}={str(folder)!r}: {path.relative_to(place)} is not a file: remove it")
        if not path.is_symlink() or (not weights and path.suffix in _TENSORS):
            continue
        if not is_inside(path, place):
            raise SaccadeError(
                f"{field}={str(folder)!r}: {path.relative_to(place)} is a link that leads out of the folder: "
                "replace it with its target, or move it elsewhere"
            )


def is_inside(path: str | os.PathLike[str], folder: str | os.PathLike[str]) -> bool:
    """Whether a path leads to a place in `folder`, all links followed.

    The hub's cache consists of links into its own folder `blobs`; they count as inside.
    """
    roots = [Path(folder).resolve()]
    if roots[0].parent.name == "snapshots":
        roots.append(roots[0].parent.parent / "blobs")
    try:
        target = Path(path).resolve()
    except (OSError, RuntimeError):  # a link to itself
        return False
    return any(target.is_relative_to(root) for root in roots)


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Report any error while reading possibly foreign files in one line.

    Readers raise all sorts of errors on damaged files: besides OSError and ValueError, for instance KeyError,
    TypeError, AttributeError, RecursionError and their own types.

    Args:
        what: what is read, phrased as the error: "model='out' cannot be loaded".

    Raises:
        SaccadeError: in place of any error except itself, a full disk, and the error for files that may contain code.
    """
    try:
        yield
    except SaccadeError:
        raise
    except Exception as error:
        # Compared by name, so that `pickle` need not be imported.
        if type(error).__name__ == "UnpicklingError" or getattr(error, "errno", None) in _FULL:
            raise
        line = " ".join(str(error).split())[:600]
        # For other types the text alone says little, such as just a key.
        kind = "" if isinstance(error, (OSError, ValueError)) and line else f"{type(error).__name__}: "
        raise SaccadeError(f"{what}: {kind}{line}") from error


@contextmanager
def disk_errors(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Convert native writers' exceptions about a full disk or an exhausted quota to `OSError`.

    Raises:
        OSError: with the errno of the fault, in place of the writer's own exception.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        number = _disk_fault(error, Path(folder))
        if number is None:
            raise
        raise OSError(number, os.strerror(number), os.fspath(folder)) from error


def _disk_fault(error: Exception, folder: Path) -> int | None:
    # The crates behind safetensors and tokenizers report the errno; torch's writer only says that writing failed.
    named = re.search(r"\(os error (\d+)\)", str(error))
    if named:
        return int(named[1])
    torchs = r"inline_container|PytorchStreamWriter|iostream error|write failed"
    if not isinstance(error, RuntimeError) or not re.search(torchs, str(error)):
        return None
    probe = folder / f".probe.{secrets.token_hex(6)}"
    try:
        with probe.open("wb") as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as fault:
        return fault.errno
    finally:
        with suppress(OSError):
            probe.unlink()
    return None
