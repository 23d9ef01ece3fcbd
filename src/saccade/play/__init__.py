"""`saccade play`: a page on this machine that asks a model about a picture, with all visual tokens and with a few."""

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
