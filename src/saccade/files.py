"""Writing files so that a half-written one never looks whole."""

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
"""Locks of this process, which the system would grant it a second time."""


@contextmanager
def atomic_path(path: str | os.PathLike[str], flush: bool = True) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to `path` when the block ends well and removed when it does not.

    The parent folders are made. The temporary name keeps the suffix, from which writers such as PIL and matplotlib
    guess the format, and starts with a dot. A file that was at `path` stays as it was until the rename.

    Args:
        flush: wait until the bytes are on disk before the rename. Without it a power cut may leave a file that is not
            whole: for content with a checksum, which can be made again.

    Raises:
        FileNotFoundError: if the block ends without having written the temporary file.
        IsADirectoryError: before the block runs, if `path` is a folder.
        OSError: if the folder cannot be made or the file cannot be written.
    """
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    # Not `mkstemp`: it makes the file itself, readable by its owner only, and the rename would keep that mode. The
    # stem is cut short since a name that just fits the file system would not fit with the random part.
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
    """Refuse a place that nothing can be written to, before the work whose result is meant for it.

    It is tried out with a file or a folder that is removed at once; what is missing of the path is not made.

    Args:
        field: what the user calls the path.
        folder: whether it is to be a folder, and not a file.

    Raises:
        SaccadeError: naming the field.
    """
    target, parent = Path(path), Path(path) if folder else Path(path).parent
    try:
        with suppress(FileNotFoundError):
            os.lstat(target)  # refuses a name that is too long, which what is written aside does not have
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


def check_new_folder(path: str | os.PathLike[str], field: str) -> None:
    """Refuse a place for a new folder that is taken, which an empty folder is not, or that cannot be written to.

    Raises:
        SaccadeError: naming the field that gave the path.
    """
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

    Paths become strings, sets sorted lists, and scalars of numpy and torch plain numbers. NaN and infinity become
    null, since JSON has neither and strict readers refuse the whole file over one.

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
    """`obj` in dicts, lists, strings, finite numbers, booleans and None."""
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
    """Wait until the bytes of `path` are on disk: a rename may otherwise survive a power cut that they do not."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def file_lock(path: str | os.PathLike[str], taken: str, again: bool = False) -> Iterator[None]:
    """Hold the file `path`, which is made with its folders, until the block or the process ends, in whatever way.

    The lock is the system's, of the process and not of its children: nothing is left to clean up after a kill -9.
    Where the file system has no locks, one warning is logged and the block runs without.

    Args:
        taken: what to say where another holds it.
        again: go on where this very process holds it already.

    Raises:
        SaccadeError: if another process holds it, or this one and not `again`.
        OSError: if the file cannot be made.
    """
    place = Path(path).absolute()
    if place in _held:
        if not again:
            raise SaccadeError(taken)
        yield
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.exists() and not place.is_file():
        raise SaccadeError(f"{place} is not a file: remove it")  # a pipe would be waited for
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
    """Refuse a folder in which a file is a link that leads out of it, or a pipe: the text behind a link would go where
    the folder's goes, what is written under its name would go out of the folder, and a pipe would be waited for.

    The hub's cache is made of such links, into a folder `blobs` of its own: they count as inside.

    Args:
        field: what the user calls the folder.
        weights: also refuse files of weights that are links, and look into the checkpoints inside: the folder is
            written to.

    Raises:
        SaccadeError: naming the link or the pipe.
    """
    place = Path(folder)
    if not place.is_dir():
        return
    inside = [place.resolve()]
    if inside[0].parent.name == "snapshots":
        inside.append(inside[0].parent.parent / "blobs")
    found = [*place.iterdir(), *(place.glob("checkpoint-*/*") if weights else ())]
    for path in sorted(found):
        if path.exists() and not path.is_file() and not path.is_dir():
            raise SaccadeError(f"{field}={str(folder)!r}: {path.relative_to(place)} is not a file: remove it")
        if not path.is_symlink() or (not weights and path.suffix in _TENSORS):
            continue
        try:
            target = path.resolve()
        except (OSError, RuntimeError):  # a link to itself
            target = None
        if target is None or not any(target.is_relative_to(root) for root in inside):
            raise SaccadeError(
                f"{field}={str(folder)!r}: {path.relative_to(place)} is a link that leads out of the folder: "
                "replace it by what it leads to, or move it elsewhere"
            )


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Say in one line whatever goes wrong while files that somebody else may have written are read.

    Readers raise what they run into in damaged files: besides OSError and ValueError for instance KeyError, TypeError,
    AttributeError, RecursionError and errors of their own.

    Args:
        what: what is read, and what is the matter with it if that fails: "model='out' cannot be loaded".

    Raises:
        SaccadeError: in the place of any error but itself, a full disk, and one that says that a file may hold code.
    """
    try:
        yield
    except SaccadeError:
        raise
    except Exception as error:
        # By its name: it comes from the module that nothing here imports.
        if type(error).__name__ == "UnpicklingError" or getattr(error, "errno", None) in _FULL:
            raise
        line = " ".join(str(error).split())[:600]
        # Of these the text alone says little: a key, or what an object lacks.
        kind = "" if isinstance(error, (OSError, ValueError)) and line else f"{type(error).__name__}: "
        raise SaccadeError(f"{what}: {kind}{line}") from error


@contextmanager
def disk_errors(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Raise what writers in other languages say of a full disk or a used up quota as the `OSError` that it is.

    Args:
        folder: where the block writes.

    Raises:
        OSError: with the number of the fault, in place of the writer's own exception.
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
    # The crates behind safetensors and tokenizers name the number; torch's writer only says that it could not write.
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
