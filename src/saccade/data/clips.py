"""Clips for a stock processor, and whether it takes any.

The video processors of transformers need torchvision. Where it is not installed, a processor has none, and rows with
videos are refused.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from saccade.errors import RecordError
from saccade.videos import Clip

_PIXELS = ("pixel_values", "pixel_attention_mask")


def check_takes_videos(processor: Any) -> None:
    """Refuse a row with videos if the model's processor makes nothing of them."""
    if "pixel_values_videos" not in _outputs(processor) and not _frames_are_images(processor):
        raise RecordError(
            f"this row has videos, and the model's processor, {type(processor).__name__}, makes no inputs of videos: "
            "remove the row, or use a model that takes videos, in an environment with torchvision "
            "(docs/families.md#videos)",
            "no_video",
        )


def _outputs(processor: Any) -> Sequence[str]:
    """What a processor makes of videos."""
    return getattr(getattr(processor, "video_processor", None), "model_input_names", ())


def _frames_are_images(processor: Any) -> bool:
    """Whether a processor gives the frames of clips under the name of images, as SmolVLM's does."""
    return set(_PIXELS) <= set(_outputs(processor))


def with_clips(processor: Any, clips: Sequence[Clip]) -> Callable[..., Any]:
    """The processor with the clips of a batch, in the order of their places in its texts, as one more argument.

    The frames are taken already, so the processor is told their times and takes none itself. Where it puts all clips
    into one tensor, without a grid for each, they get the same number of frames.
    """
    if "video_grid_thw" not in _outputs(processor):
        clips = [clip.filled() for clip in clips]
    call = partial(
        processor,
        videos=[clip.frames for clip in clips],
        videos_kwargs={
            "do_sample_frames": False,
            "input_data_format": "channels_last",
            "video_metadata": [clip.metadata() for clip in clips],
        },
    )
    return partial(_frames_among_images, processor, call) if _frames_are_images(processor) else call


def _frames_among_images(
    processor: Any, call: Callable[..., Any], text: list[str], images: Any = None, **options: Any
) -> Any:
    """What a processor makes of texts, images and clips, where what it makes of clips has the names of images.

    Beside clips, the stock processor loses the pixels of images. Here each text has the pixels of its images and
    frames, in the order of their places, as the stock processor lays out images alone: `(B, most, C, H, W)`.

    Raises:
        ValueError: if images and frames are not of one size.
    """
    outputs = call(text=text, images=images, **options)
    if options.get("return_tensors") is None:
        return outputs
    queues = {processor.video_token: zip(*(outputs[name] for name in _PIXELS), strict=True)}
    if images:
        stock = processor.image_processor(images, return_row_col_info=True, return_tensors="pt")
        queues[processor.image_token] = _images(stock)
        if stock["pixel_values"].shape[-2:] != outputs["pixel_values"].shape[-2:]:
            sizes = (tuple(each["pixel_values"].shape[-2:]) for each in (stock, outputs))
            raise ValueError("its images are scaled to {} pixels, and its frames to {}".format(*sizes))
    places = re.compile("|".join(map(re.escape, queues)))
    rows = [[next(queues[place]) for place in places.findall(words)] for words in text]
    most = max(sum(len(pixels) for pixels, _ in row) for row in rows)
    for number, name in enumerate(_PIXELS):
        stock = outputs[name]
        outputs[name] = laid_out = stock.new_zeros(len(rows), most, *stock.shape[2:])
        for row, found in zip(laid_out, rows, strict=True):
            start = 0
            for values in (pair[number] for pair in found):
                row[start : start + len(values)] = values
                start += len(values)
    return outputs


def _images(stock: Any) -> Iterator[tuple[Any, Any]]:
    """Pixels and mask of each image in turn, from what an image processor made of the images of several texts."""
    for row, mask, down, across in zip(*(stock[name] for name in (*_PIXELS, "rows", "cols")), strict=True):
        start = 0
        for lines, columns in zip(down, across, strict=True):
            end = start + lines * columns + 1  # the crops and the thumbnail, which is all there is of a small image
            yield row[start:end], mask[start:end]
            start = end


def placeholder_ids(processor: Any, image_id: int | None) -> list[int]:
    """The token ids of visual tokens in a processor's output.

    Args:
        image_id: that of images.
    """
    ids = (image_id, getattr(processor, "video_token_id", None))
    return [token for token in ids if token is not None]
