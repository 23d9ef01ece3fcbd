"""The one place where image files are opened: decoded whole, limited in size, turned upright, in RGB."""

import io
import os
import warnings
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from saccade.errors import RecordError

MAX_PIXELS = 89_478_485
"""Pixels beyond which an image is refused: Pillow's own `MAX_IMAGE_PIXELS`, at which Pillow only warns."""
LARGEST_MAX_PIXELS = 2 * MAX_PIXELS
"""Pixels beyond which Pillow refuses, so that no limit can be higher."""

_ORIENTATION = 0x0112
_PROGRAMS = ("EPS",)
"""Formats that are programs. Pillow hands them to Ghostscript, whatever the name of the file says."""


def open_image(image: Any, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A decoded image in RGB, turned upright as its EXIF data says.

    Cameras store many photos lying on their side with a note on how to turn them. Whoever wrote a question about one
    saw it upright, so it is turned here, in training and in inference alike.

    Args:
        image: a path, a dict with "bytes" or "path", or a PIL image.
        max_pixels: width times height above which an image is refused before it is decoded.

    Raises:
        RecordError: if it is missing, empty, truncated, too large, or no image. It is a `SaccadeError`.
    """
    name = image_name(image)
    try:
        with warnings.catch_warnings():
            # Pillow warns at a limit of its own; ours is checked below, before anything is decoded.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = _open(image, name)
            if opened.format in _PROGRAMS:
                raise RecordError(f"{name} is {opened.format}: replace it by a JPEG or a PNG", "not_an_image")
            _check_pixels(opened.size, max_pixels, name)
            opened.load()
        return _upright(opened)
    except FileNotFoundError as error:
        message = f"{name} does not exist: correct the path, or remove the sample"
        raise RecordError(message, "missing_image") from error
    except UnidentifiedImageError as error:
        kind, what = ("zero_byte_image", "is empty, 0 bytes") if _is_empty(image) else ("not_an_image", "is no image")
        raise RecordError(f"{name} {what}: replace it by a file that Pillow can read", kind) from error
    except Image.DecompressionBombError as error:
        raise RecordError(f"{name} is too large ({error}): shrink it", "decompression_bomb") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        if isinstance(error, RecordError):
            raise
        raise RecordError(f"{name} cannot be decoded ({error}): replace it", "truncated_image") from error


def image_size(image: Any, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Width and height of an image once upright, from its header alone where it is a file.

    Raises:
        RecordError: if there is no header to read, or the image is too large.
    """
    name = image_name(image)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = _open(image, name)
        _check_pixels(opened.size, max_pixels, name)
        width, height = opened.size
        return (height, width) if opened.getexif().get(_ORIENTATION, 1) >= 5 else (width, height)
    except Image.DecompressionBombError as error:
        raise RecordError(f"{name} is too large ({error}): shrink it", "decompression_bomb") from error
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, RecordError):
            raise
        raise RecordError(f"{name} has no header that Pillow can read: {error}", "not_an_image") from error


def image_name(image: Any) -> str:
    """How messages call an image."""
    if isinstance(image, dict):
        return f"image {str(image.get('path') or 'without a path')!r}"
    return f"image {str(image)!r}" if isinstance(image, (str, os.PathLike)) else "image"


def _open(image: Any, name: str) -> Image.Image:
    if isinstance(image, dict):
        content = image.get("bytes")
        if content is None and not image.get("path"):
            raise RecordError(f"{name} has neither 'bytes' nor a 'path': give one of them", "missing_image")
        return Image.open(io.BytesIO(content) if content is not None else image["path"])
    if isinstance(image, (str, Path)):
        return Image.open(image)
    if not isinstance(image, Image.Image):
        raise RecordError(f"image is a {type(image).__name__}: give a PIL image, a path, or a dict with 'bytes'")
    return image


def _check_pixels(size: tuple[int, int], max_pixels: int, name: str) -> None:
    if size[0] * size[1] > max_pixels:
        raise RecordError(
            f"{name} has {size[0]} x {size[1]} pixels, more than max_image_pixels={max_pixels}: shrink it, or raise "
            "the limit",
            "decompression_bomb",
        )


def _upright(image: Image.Image) -> Image.Image:
    if image.getexif().get(_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _is_empty(image: Any) -> bool:
    if isinstance(image, dict):
        if image.get("bytes") is not None:
            return len(image["bytes"]) == 0
        image = image["path"]
    return os.path.getsize(image) == 0
