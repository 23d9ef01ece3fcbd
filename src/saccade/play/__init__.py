"""`saccade play`: a page on this machine that asks a model about a picture, with all visual tokens and with a few."""

import socket

from saccade.errors import SaccadeError
from saccade.files import check_exists

HOST = "127.0.0.1"
"""The only address that the page is served at."""
TINY = "tiny"
"""The name of the embedded model."""


def check_folder(name: str) -> None:
    """Refuse a model that is not on this machine: the page never downloads one.

    Raises:
        SaccadeError: if `name` is neither a folder nor `TINY`.
    """
    if name != TINY:
        check_exists(name, "model", f"give the folder of a trained model, or {TINY}", folder=True)


def check_port(port: int) -> None:
    """Refuse a port that cannot be listened at.

    Raises:
        SaccadeError: naming the port.
    """
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            free.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise SaccadeError(f"port={port}: it cannot be listened at ({error}); give another --port") from error
