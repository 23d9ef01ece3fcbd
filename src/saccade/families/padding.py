"""Padding images to a square, in the processor that is saved with the model."""

from typing import Any

import numpy as np
from PIL import Image
from transformers import (
    AutoImageProcessor,
    LlavaImageProcessorPil,
    LlavaNextConfig,
    LlavaNextImageProcessorPil,
    ProcessorMixin,
)

from saccade.errors import SaccadeError
from saccade.families.base import Family

PAD = "pad"
ASPECT_RATIOS = (PAD,)
"""Values of `image_aspect_ratio`, besides None."""

_STEPS = (
    "do_convert_rgb",
    "do_resize",
    "size",
    "resample",
    "do_center_crop",
    "crop_size",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
)
"""Settings of the stock processor that are kept: what it does with a square image."""
_PROBE = 100


class HdPadImageProcessor(LlavaNextImageProcessorPil):
    """LLaVA-HD's `hd_pad`: LLaVA-NeXT's crops of an image that is first padded to a square with the mean colour.

    With a single resolution that is a square, every image then has the same number of crops, and none has padding.
    """

    def process_image(self, image: Any, **kwargs: Any) -> np.ndarray:
        image = super().process_image(image, **kwargs)  # (3, H, W)
        _, height, width = image.shape
        side = max(height, width)
        colour = np.array([int(255 * mean) for mean in self.image_mean], dtype=image.dtype)
        square = np.broadcast_to(colour[:, None, None], (3, side, side)).copy()
        top, left = (side - height) // 2, (side - width) // 2
        square[:, top : top + height, left : left + width] = image
        return square


class _HdPadConfig(LlavaNextConfig):
    """The key of the registration below. Under `LlavaNextConfig`, it would replace LLaVA-NeXT's image processor."""


AutoImageProcessor.register(
    _HdPadConfig, image_processor_classes={"pil": HdPadImageProcessor, "torchvision": HdPadImageProcessor}
)


def check_aspect_ratio(family: type[Family], image_aspect_ratio: str | None) -> None:
    """Check that padding makes sense for a family."""
    if image_aspect_ratio is not None and family.unpadded is not None:
        raise SaccadeError(
            f"image_aspect_ratio={image_aspect_ratio!r}: images of {family.name} {family.unpadded}; leave it out"
        )


def pad_to_square(processor: ProcessorMixin) -> None:
    """Make a processor pad images to a square with the mean colour before it scales them, in place.

    Stock LLaVA checkpoints come with CLIP's or SigLIP's image processor. CLIP's scales the shorter side to the size of
    the tower and crops the longer one, which loses a quarter of a 4:3 picture. It is replaced by transformers' own
    `LlavaImageProcessor` with `do_pad`, which pads as LLaVA-1.5 does in its second stage: the image in the middle,
    `int(255 * mean)` around it. It is saved with the processor, so whoever loads that pads too.

    Raises:
        SaccadeError: if the image processor treats square images differently from the one that pads.
    """
    stock = processor.image_processor
    if pads_to_square(processor):
        return
    padding = _padding_class(stock)
    options: dict[str, Any] = {"do_center_crop": False, **{name: getattr(stock, name, None) for name in _STEPS}}
    if not options["do_center_crop"]:
        options |= {"do_center_crop": False, "crop_size": stock.size}  # read by the code that counts tokens
    pads = padding(**options, do_pad=True)
    square = Image.fromarray(np.random.default_rng(0).integers(0, 256, (_PROBE, _PROBE, 3), dtype=np.uint8))
    before, after = (np.asarray(each(square)["pixel_values"][0]) for each in (stock, pads))
    if not np.array_equal(before, after):
        raise SaccadeError(
            f"image_aspect_ratio='{PAD}': {type(stock).__name__} does not treat square images as "
            f"{padding.__name__}, the one that pads, does: leave it out, or give the model that image processor"
        )
    processor.image_processor = pads


def pads_to_square(processor: ProcessorMixin) -> bool:
    """Whether a processor pads images to a square before it scales them."""
    stock = getattr(processor, "image_processor", None)
    if isinstance(stock, HdPadImageProcessor):
        return True
    return isinstance(stock, _padding_class(stock)) and bool(stock.do_pad)


def padded(image: Image.Image, processor: ProcessorMixin) -> Image.Image:
    """The square that such a processor pads an RGB image to, before scaling."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(int(255 * mean) for mean in processor.image_processor.image_mean))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _padding_class(stock: Any) -> type:
    if getattr(stock, "backend", "pil") == "pil":
        return LlavaImageProcessorPil
    from transformers import LlavaImageProcessor  # of torchvision

    return LlavaImageProcessor
