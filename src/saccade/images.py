"""The only place where image files are opened: fully decoded, limited in size, turned upright, in 8-bit RGB."""

import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from saccade.errors import RecordError, kind_of, reason_of

MAX_PIXELS = 89_478_485
"""Number of pixels above which an image is refused: Pillow's own `MAX_IMAGE_PIXELS`, at which Pillow only warns."""
LARGEST_MAX_PIXELS = 2 * MAX_PIXELS
"""Number of pixels above which Pillow itself refuses, so no limit can be higher."""
MAX_ASPECT_RATIO = 200
"""Ratio of the longer to the shorter side above which an image is refused, as in Qwen's processors.

Processors that scale the shorter side to a fixed size enlarge the longer one by the same factor: an image of 30,000 x
1 pixels, 167 bytes as a PNG, would become 10,080,000 x 336 pixels."""
DARKEST_PEAK = 1 / 16
"""Fraction of full scale that the brightest value of a 16-bit or float image must reach, unless all are 0."""

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The transposition that makes an image upright, by EXIF orientation."""
_ORIENTATION_HOLDERS = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")
"""Where Pillow finds an orientation; removed after turning, or the next reader would turn the image again."""
FORMATS = (
    *("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO"),
    *("PCX", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP"),
)
"""The formats that are opened, by Pillow's names, regardless of the file name. Some of Pillow's other formats pass
their content to Ghostscript, to the reader of any other format, or to a decompressor without a limit."""


def open_image(image: Any, max_pixels: int = MAX_PIXELS, padded: bool = False) -> Image.Image:
    """A decoded 8-bit RGB image, turned upright according to its EXIF data: what the model sees in training.

    - Cameras store many photos sideways with a note on how to turn them. Whoever wrote a question about a photo saw it
      upright, so it is turned here. Damaged EXIF data is read as far as possible.
    - Transparent areas get a white background, as in the image processors of recent transformers.
    - 16-bit integers (and 32-bit ones, which hold 16 bits in some formats) are scaled from [0, 65535], floats from [0,
      1] if no value is above 1, from [0, 255] otherwise. An image with values out of range is refused, as is one that
      is not all black but stays below a sixteenth of the scale, since it was meant for another scale.
    - Of an animation or a file with several pages, the first is used; of a PIL image, the current frame.
    - Colours are converted as by Pillow, without colour profiles.

    An image returned by this function passes through unchanged.

    Args:
        image: a path, a dict with "bytes" or "path", or a PIL image, which is not modified.
        max_pixels: width times height above which an image is refused before it is decoded.
        padded: whether the processor will pad it to a square, to which the limit then applies too.

    Raises:
        RecordError: if it is missing, empty, damaged, too large, too narrow, has values on an unknown scale, or is not
            an image. It is a `SaccadeError`.
    """
    name = image_name(image)
    with _told(image, name, "truncated_image", "cannot be decoded ({}): replace it"):
        opened = _open(image, name)
        _check_size(opened.size, max_pixels, name, padded)
        opened.load()
        # Some files declare one size and contain an image of another.
        _check_size(opened.size, max_pixels, name, padded)
        turn = _TURNS.get(_orientation(opened))
        pixels = _rgb(opened, name)
        if turn is not None:
            pixels = pixels.transpose(turn)
            for holder in _ORIENTATION_HOLDERS:
                pixels.info.pop(holder, None)
        return pixels


def image_size(image: Any, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Width and height of an image when upright, read from the header only if it is a file.

    Raises:
        RecordError: if there is no header to read, or the image is too large or too narrow.
    """
    name = image_name(image)
    with _told(image, name, "not_an_image", "has no header that Pillow can read ({}): replace it"):
        opened = _open(image, name)
        _check_size(opened.size, max_pixels, name)
        width, height = opened.size
        # Pillow turns TIFF files itself and reports the size after turning.
        turned = not hasattr(opened, "tag_v2") and _orientation(opened) >= 5
        return (height, width) if turned else (width, height)


def image_name(image: Any) -> str:
    """The name of an image in messages."""
    if isinstance(image, dict):
        return f"image {str(image.get('path') or 'without a path')!r}"
    return f"image {str(image)!r}" if isinstance(image, (str, os.PathLike)) else "image"


@contextmanager
def _told(image: Any, name: str, otherwise: str, what: str) -> Iterator[None]:
    """Convert any error while an image is read to a record error.

    Decoders raise all sorts of errors on damaged data: besides OSError, for instance struct.error, KeyError,
    IndexError, OverflowError and MemoryError.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns about sizes, which are checked here, and damaged EXIF data, which is read as far as
            # possible.
            warnings.simplefilter("ignore")
            yield
    except RecordError:
        raise
    except FileNotFoundError as error:
        message = f"{name} does not exist: correct the path, or remove the sample"
        raise RecordError(message, "missing_image") from error
    except UnidentifiedImageError as error:
        kind, fault = "not_an_image", "is not an image in a supported format"
        if _is_empty(image):
            kind, fault = "zero_byte_image", "is empty, 0 bytes"
        raise RecordError(f"{name} {fault}: replace it with a JPEG or a PNG", kind) from error
    except Image.DecompressionBombError as error:
        raise RecordError(f"{name} is too large ({error}): shrink it", "decompression_bomb") from error
    except Exception as error:
        reason = reason_of(error)
        raise RecordError(f"{name} {what.format(reason)}", otherwise) from error


def _open(image: Any, name: str) -> Image.Image:
    if isinstance(image, dict):
        content = image.get("bytes")
        if content is None and not image.get("path"):
            raise RecordError(f"{name} has neither 'bytes' nor a 'path': give one of them", "missing_image")
        if content is not None:
            return Image.open(io.BytesIO(content), formats=_formats())
        image = image["path"]
    if isinstance(image, (str, os.PathLike)):
        if os.path.exists(image) and not os.path.isfile(image):
            # Opening a pipe would block, and a device may have no end.
            raise RecordError(f"{name} is not a file: replace it with a JPEG or a PNG", "not_an_image")
        return Image.open(image, formats=_formats())
    if not isinstance(image, Image.Image):
        raise RecordError(f"image is {kind_of(image)}: give a PIL image, a path, or a dict with 'bytes'")
    if image.format is not None and image.format not in FORMATS:
        raise RecordError(f"{name} is {image.format}: replace it with a JPEG or a PNG", "not_an_image")
    return image


@cache
def _formats() -> list[str]:
    """Members of `FORMATS` that the installed Pillow can read."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _check_size(size: tuple[int, int], max_pixels: int, name: str, padded: bool = False) -> None:
    short, long = sorted(size)
    if short < 1:
        raise RecordError(f"{name} has {size[0]} x {size[1]} pixels, none at all: replace it", "not_an_image")
    if (long * long if padded else short * long) > max_pixels:
        square = f", {long} x {long} once it is padded to a square" if padded else ""
        raise RecordError(
            f"{name} has {size[0]} x {size[1]} pixels{square}, more than max_image_pixels={max_pixels}: shrink it, "
            "or raise the limit",
            "decompression_bomb",
        )
    if long > MAX_ASPECT_RATIO * short:
        raise RecordError(
            f"{name} has {size[0]} x {size[1]} pixels, one side more than {MAX_ASPECT_RATIO} times the other, which "
            "image processors cannot take: crop it, or remove the sample",
            "aspect_ratio",
        )


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, from 1 to 8; 1 (upright) if it cannot be read."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
        return value if value in _TURNS else 1
    except Exception:
        return 1


def _rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _scaled(image, name).convert("RGB")
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    seen = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), seen).convert("RGB")


def _scaled(image: Image.Image, name: str) -> Image.Image:
    """Convert a grey image of 16-bit, 32-bit or float values to 8 bits."""
    floats = image.mode == "F"
    values = np.asarray(image if floats else image.convert("I"), dtype=np.float64)
    low, high = values.min(), values.max()
    full = (1 if high <= 1 else 255) if floats else 65535
    # Both comparisons are false if a value is NaN.
    if not (low >= 0 and high <= full) or 0 < high < DARKEST_PEAK * full:
        raise RecordError(
            f"{name} has values from {low:g} to {high:g} in mode {image.mode!r}, which fit no known scale: "
            "save it with 8 bits per channel",
            "value_range",
        )
    grey = np.rint(values * (255 / full)).astype(np.uint8)
    transparent = image.info.get("transparency")
    if transparent is not None:
        grey[values == transparent] = 255
    return Image.fromarray(grey)


def _is_empty(image: Any) -> bool:
    if isinstance(image, dict):
        if image.get("bytes") is not None:
            return len(image["bytes"]) == 0
        image = image["path"]
    return isinstance(image, (str, os.PathLike)) and os.path.getsize(image) == 0
