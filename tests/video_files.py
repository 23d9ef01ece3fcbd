"""Small clips, made for real: a white mark on the left, and right of it a grey that tells the number of the frame."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from saccade.videos import Clip

SIZE = (48, 32)
MARK = 8
STEP = 8


def frame_image(number: int, size: tuple[int, int] = SIZE) -> Image.Image:
    pixels = np.full((size[1], size[0], 3), number * STEP % 256, dtype=np.uint8)
    pixels[:, :MARK] = 255
    return Image.fromarray(pixels)


def numbers_of(clip: Clip) -> list[int]:
    """The numbers of a clip's frames, up to 31, whatever the codec did to their grey."""
    return [round(float(frame[:, MARK + 4 :].mean()) / STEP) for frame in clip.frames]


def write_frames(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True)
    for number in range(count):
        frame_image(number).save(folder / f"frame{number}.png")
    return folder


def write_clip(
    path: Path,
    count: int,
    rate: int | Fraction,
    codec: str = "mpeg4",
    size: tuple[int, int] = SIZE,
    ticks: Sequence[int] | None = None,
    group: int = 12,
    turned: int = 0,
) -> Path:
    """Write `count` frames with PyAV.

    Args:
        rate: frames per second.
        ticks: when each is shown, in units of 1 / rate; by default one after the other.
        group: frames from one key frame to the next.
        turned: of an MP4, degrees clockwise by which players turn it.
    """
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = group
        # No key frames of the encoder's own.
        stream.options = {"sc_threshold": "1000000000"}
        stream.codec_context.bit_rate = 2_000_000
        for number in range(count):
            frame = av.VideoFrame.from_image(frame_image(number, size))
            frame.time_base = 1 / Fraction(rate)
            frame.pts = number if ticks is None else ticks[number]
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    if turned:
        _turn(path, turned)
    return path


def _turn(path: Path, degrees: int) -> None:
    """Write the matrix of a rotation into the header of an MP4's only track."""
    content = bytearray(path.read_bytes())
    start = content.index(b"tkhd") + 4 + 40
    cos, sin = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    matrix = (cos << 16, sin << 16, 0, -sin << 16, cos << 16, 0, 0, 0, 1 << 30)
    for number, value in enumerate(matrix):
        content[start + 4 * number : start + 4 * number + 4] = value.to_bytes(4, "big", signed=True)
    path.write_bytes(content)
