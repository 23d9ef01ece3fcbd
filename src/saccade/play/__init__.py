"""`saccade play`: a page on this machine that asks a model about a picture, with all visual tokens and with a few."""

import socket

from saccade.errors import SaccadeError

HOST = "127.0.0.1"
"""The only address that the page is served at."""


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
