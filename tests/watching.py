"""What the interpreter opens, lists, starts and connects to, told by an audit hook and not by the code under test."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from saccade.errors import RecordError

OUTSIDE = "/etc/hostname"
"""A file that every machine has and no test may open."""
EVENTS = {
    *("open", "os.listdir", "os.scandir", "os.symlink", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir"),
    *("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"),
    *("shutil.rmtree", "ctypes.dlopen"),
}
_OWN = tuple(os.path.join(place, "") for place in {sys.prefix, sys.base_prefix, os.path.dirname(os.__file__)})
"""Python's own files, which modules are loaded from."""
_watched: list[list[tuple[str, tuple]]] = []


def _hook(event: str, args: tuple) -> None:
    if _watched and event in EVENTS:
        _watched[-1].append((event, args))


sys.addaudithook(_hook)


@contextmanager
def watched() -> Iterator[list[tuple[str, tuple]]]:
    """What this process does meanwhile, as pairs of an event's name and its arguments."""
    _watched.append([])
    try:
        yield _watched[-1]
    finally:
        _watched.pop()


def check_inside(events: list[tuple[str, tuple]], *folders: Path) -> None:
    """Files were opened and folders listed in `folders` alone, and in Python's own; nothing else was done at all."""
    places = tuple(os.path.join(folder, "") for folder in folders)
    for event, args in events:
        place = os.fspath(args[0]) if event in ("open", "os.listdir", "os.scandir") and args[0] is not None else None
        if isinstance(place, bytes):
            place = os.fsdecode(place)
        assert isinstance(place, str), (event, args)
        real = os.path.join(os.path.realpath(place), "")
        assert place.startswith(_OWN) or real.startswith((*places, *_OWN)), (event, args)


def used_or_refused(make: Callable[[], dict[str, Any]], collator: Any, folder: Path) -> str | None:
    """A row collated as training does gives a batch or a bad record, and nothing outside the folder is opened."""
    with watched() as events:
        try:
            batch = collator([make()])
        except RecordError as error:
            kind = error.kind
        else:
            kind = None
            assert (batch["labels"] != -100).any()
    assert kind is None or kind in RecordError.KINDS
    check_inside(events, folder)
    return kind
