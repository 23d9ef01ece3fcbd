"""Clips for a stock processor, and whether it takes any.

The video processors of transformers need torchvision. Where it is not installed, a processor has none, and rows with
videos are refused.
"""

from collections.abc import Sequence
from typing import Any

from saccade.errors import RecordError
from saccade.videos import Clip


def check_takes_videos(processor: Any) -> None:
    """Refuse a row with videos if the model's processor makes nothing of them.

    Raises:
        RecordError: naming the processor.
    """
    if "pixel_values_videos" not in _outputs(processor):
        raise RecordError(
            f"this row has videos, and the model's processor, {type(processor).__name__}, makes no inputs of videos: "
            "remove the row, or use a model that takes videos, in an environment with torchvision "
            "(docs/families.md#videos)",
            "no_video",
        )


def _outputs(processor: Any) -> Sequence[str]:
    """What a processor makes of videos. SmolVLM's gives frames as if they were images, and not beside images."""
    return getattr(getattr(processor, "video_processor", None), "model_input_names", ())


def videos_kwargs(processor: Any, clips: Sequence[Clip]) -> dict[str, Any]:
    """The arguments of a processor for the clips of a batch, in the order of their places in its texts.

    The frames are taken already, so the processor is told their times and takes none itself. Where it puts all clips
    into one tensor, without a grid for each, they get the same number of frames.
    """
    if "video_grid_thw" not in _outputs(processor):
        clips = [clip.filled() for clip in clips]
    return {
        "videos": [clip.frames for clip in clips],
        "videos_kwargs": {
            "do_sample_frames": False,
            "input_data_format": "channels_last",
            "video_metadata": [clip.metadata() for clip in clips],
        },
    }


def placeholder_ids(processor: Any, image_id: int | None) -> list[int]:
    """The token ids of visual tokens in a processor's output.

    Args:
        image_id: that of images.
    """
    ids = (image_id, getattr(processor, "video_token_id", None))
    return [token for token in ids if token is not None]
