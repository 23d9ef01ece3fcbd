"""The only place where videos are opened: a few frames of a clip, turned upright, with the time of each.

A clip is a file, decoded by PyAV (`pip install "saccade[video]"`), or a folder or a list of frames, which need nothing
but Pillow.
"""

import io
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from saccade.errors import RecordError, SaccadeError, kind_of, needing_extras, reason_of
from saccade.images import MAX_PIXELS, open_image

VIDEO_FRAMES = 32
"""Number of frames that are taken of a clip by default."""
MAX_FRAMES = 768
"""Largest number of frames that can be taken of a clip, as in Qwen's processors."""
MAX_SECONDS = 2 * 3600
"""Length above which a clip is refused."""
MAX_CLIP_PIXELS = 2**30
"""Number of pixels of all frames taken of a clip, above which it is refused: 3 GiB in memory."""
MAX_DECODED = 20_000
"""Number of frames that are decoded of a clip before it is given up: decoding starts at key frames, which some clips
have few of."""
SEEK_SECONDS = 5.0
"""Gap between two frames to take above which decoding jumps to the last key frame before the second."""
CONTAINERS = "mov,mp4,matroska,webm,avi,gif,mpegts,mpeg,mpegvideo,ogg,flv,asf"
"""The containers that are opened, by FFmpeg's names, regardless of the file name. Others, such as playlists, name
further files or addresses, which FFmpeg would open."""
_GUESSED_DURATION = ("mpeg", "mpegvideo")
"""Containers that store no duration. FFmpeg's guess is too short, up to a whole clip."""
_DURATION_FROM_ZERO = ("matroska,webm", "asf")
"""Containers whose duration counts from 0 by some writers and from the first frame by others."""
FRAME_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""Suffixes of the frames in a folder."""


@dataclass(frozen=True)
class Sampling:
    """Which frames are taken of a clip.

    Args:
        frames: at most so many, evenly spaced from the first to the last; all of a clip that has fewer.
        fps: so many a second; where that would be more than `frames`, evenly spaced ones again. None for `frames` in
            any case.

    Raises:
        SaccadeError: if a number is out of range.
    """

    frames: int = VIDEO_FRAMES
    fps: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.frames, bool) or not isinstance(self.frames, int) or not 1 <= self.frames <= MAX_FRAMES:
            raise SaccadeError(f"video_frames={self.frames!r}: give a number of frames from 1 to {MAX_FRAMES}")
        number = isinstance(self.fps, (int, float)) and not isinstance(self.fps, bool)
        if self.fps is not None and not (number and 0 < self.fps <= 1000):
            raise SaccadeError(
                f"video_fps={self.fps!r}: give frames per second above 0, or null for video_frames only"
            )

    def times(self, last: float) -> list[float]:
        """The times, in seconds, to take frames at, of a clip whose last frame is shown at `last` seconds."""
        if self.fps is not None:
            count = int(last * self.fps + 1e-6) + 1
            if count <= self.frames:
                return [number / self.fps for number in range(count)]
        if self.frames == 1:
            return [last / 2]
        return [last * number / (self.frames - 1) for number in range(self.frames)]


@dataclass(frozen=True)
class Clip:
    """The frames taken of a clip.

    Args:
        frames: uint8 `(T, H, W, 3)`, RGB.
        times: when each is shown, in seconds after the first frame of the clip.
        rate: frames per second of the whole clip, on average.
        duration: seconds of the whole clip.
        wanted: how many frames were asked for, where the clip may have fewer; None for as many as there are.
    """

    frames: np.ndarray
    times: tuple[float, ...]
    rate: float
    duration: float
    wanted: int | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.frames.shape[2], self.frames.shape[1]

    def metadata(self) -> dict[str, Any]:
        """What transformers' processors ask to know of a clip, `VideoMetadata` as a dict: they compute a frame's time
        as its index over `fps`."""
        indices = [round(time * self.rate) for time in self.times]
        return {
            "total_num_frames": max(round(self.duration * self.rate), indices[-1] + 1),
            "fps": self.rate,
            "width": self.size[0],
            "height": self.size[1],
            "duration": self.duration,
            "frames_indices": indices,
        }

    def filled(self) -> "Clip":
        """The clip with as many frames as wanted: where it has fewer, each stands for several, evenly."""
        count = len(self.times)
        wanted = count if self.wanted is None else self.wanted
        if count >= wanted:
            return self
        index = [number * count // wanted for number in range(wanted)]
        return replace(self, frames=self.frames[index], times=tuple(self.times[number] for number in index))


def open_video(video: Any, sampling: Sampling | None = None, max_pixels: int = MAX_PIXELS) -> Clip:
    """The frames of a clip that the model sees: decoded, upright, 8-bit RGB.

    Phones store clips sideways with a note on how to turn them, which is followed. Of frames at irregular times, the
    one on the screen at each wanted time is taken. A clip that ends sooner than its header says gives the frames that
    it has, as long as there is one.

    Args:
        video: a path of a file or of a folder of frames, in the order of the numbers in their names; a list of frames,
            each anything that `open_image` accepts; a dict with "path", "bytes" or "frames", and for frames optionally
            their rate, "fps", which is otherwise one per second; or a `Clip`, which is returned as it is.
        sampling: which frames to take.
        max_pixels: width times height above which a clip is refused before it is decoded.

    Raises:
        RecordError: if the clip is missing, empty, damaged, too long or too large, or not a video.
        MissingPackageError: if it is a file, and PyAV is not installed.
    """
    if isinstance(video, Clip):
        return video
    sampling = Sampling() if sampling is None else sampling
    name = video_name(video)
    frames = frames_of(video)
    if frames is not None:
        return _from_frames(frames, _given_rate(video), sampling, max_pixels, name)
    with _opened(video, name) as (container, stream):
        _check_size(_stream_size(stream), max_pixels, name)
        rate, last = _timing(container, stream, name)
        times = sampling.times(last)
        taken, seen = [], []
        for time, frame in _decoded(container, stream, times, name):
            pixels = np.rot90(frame.to_ndarray(format="rgb24"), k=round(frame.rotation / 90))
            if taken and pixels.shape != taken[0].shape:
                raise RecordError(f"{name} changes its size from frame to frame: convert it", "not_a_video")
            if not taken:
                _check_size((pixels.shape[1], pixels.shape[0]), max_pixels, name, len(times))
            taken.append(pixels)
            seen.append(time)
        # PyAV frees what it knows of a stream with its container.
        shortest = _shortest_step(stream)
    if not taken:
        raise RecordError(f"{name} has no frames that can be decoded: replace it", "truncated_video")
    step = float(1 / rate)
    end = max(last, seen[-1]) + min(step, shortest)
    return Clip(np.stack(taken), tuple(seen), float(rate), end, sampling.frames)


def video_shape(
    video: Any, sampling: Sampling | None = None, max_pixels: int = MAX_PIXELS
) -> tuple[int, tuple[int, int]]:
    """The number of frames that `open_video` takes, and their width and height, from the header alone.

    The number is wrong for clips that end sooner than their header says.

    Raises:
        RecordError: as `open_video` does for what a header tells.
    """
    sampling = Sampling() if sampling is None else sampling
    if isinstance(video, Clip):
        return len(video.frames), video.size
    name = video_name(video)
    frames = frames_of(video)
    if frames is not None:
        _check_frames(frames, name)
        rate = _given_rate(video)
        count = len(_picked(len(frames), rate, sampling))
        return count, open_image(frames[0], max_pixels).size
    with _opened(video, name) as (container, stream):
        size = _stream_size(stream)
        _check_size(size, max_pixels, name)
        rate, last = _timing(container, stream, name)
        count = min(len(sampling.times(last)), round(last * float(rate)) + 1)
        frame = next(_frames(container, stream), None)
        turned = frame is not None and round(frame.rotation / 90) % 2 == 1
        return count, (size[1], size[0]) if turned else size


def frames_of(video: Any) -> list[Any] | None:
    """The frames of a clip that is given as a folder or a list of them; None if it is a file."""
    if isinstance(video, Mapping):
        if video.get("frames") is not None:
            return list(video["frames"])
        if video.get("bytes") is not None:
            return None
        video = video.get("path")
    if isinstance(video, (list, tuple)):
        return list(video)
    if isinstance(video, (str, os.PathLike)) and os.path.isdir(video):
        return [os.path.join(video, name) for name in frame_names(video)]
    return None


def frame_names(folder: str | os.PathLike) -> list[str]:
    """The names of the frames in a folder, in the order of the numbers in their names: 2 comes before 10."""
    names = [entry.name for entry in os.scandir(folder) if Path(entry.name).suffix.lower() in FRAME_SUFFIXES]
    # macOS puts a file "._1.png" beside "1.png" on other file systems and into archives.
    return sorted((name for name in names if not name.startswith(".")), key=_by_number)


_DIGITS = re.compile(r"(\d+)", re.ASCII)


def _by_number(name: str) -> list[Any]:
    # Numbers are at the odd places.
    return [int(part) if place % 2 else part for place, part in enumerate(_DIGITS.split(name))]


def video_name(video: Any) -> str:
    """The name of a clip in messages."""
    if isinstance(video, Mapping):
        video = video.get("path") or "without a path"
    return f"video {str(video)!r}" if isinstance(video, (str, os.PathLike)) else "video"


def _given_rate(video: Any) -> float:
    """Frames per second of a clip that is given as frames."""
    rate = video.get("fps") if isinstance(video, Mapping) else None
    if rate is None:
        return 1.0
    number = isinstance(rate, (int, float)) and not isinstance(rate, bool)
    if not number or not 0 < rate <= 1000:
        raise RecordError(f"{video_name(video)} has fps={rate!r}: give frames per second, above 0")
    return float(rate)


def _check_frames(frames: Sequence[Any], name: str) -> None:
    if not frames:
        raise RecordError(
            f"{name} has no frames: give a file, or a folder with {', '.join(FRAME_SUFFIXES)}", "no_frames"
        )


def _picked(count: int, rate: float, sampling: Sampling) -> list[int]:
    """Indices of the frames to take of `count`, each once."""
    times = sampling.times((count - 1) / rate)
    return list(dict.fromkeys(min(count - 1, int(time * rate + 0.5)) for time in times))


def _from_frames(frames: Sequence[Any], rate: float, sampling: Sampling, max_pixels: int, name: str) -> Clip:
    _check_frames(frames, name)
    if len(frames) / rate > MAX_SECONDS:
        raise RecordError(_too_long(name, len(frames) / rate), "too_long")
    picked = _picked(len(frames), rate, sampling)
    opened: list[Image.Image] = []
    for index in picked:
        opened.append(open_image(frames[index], max_pixels))
        if opened[-1].size != opened[0].size:
            raise RecordError(
                f"{name} has frames of {opened[0].size} and {opened[-1].size} pixels: give frames of one size",
                "not_a_video",
            )
        if len(opened) == 1:
            _check_size(opened[0].size, max_pixels, name, len(picked))
    pixels = np.stack([np.asarray(image) for image in opened])
    return Clip(pixels, tuple(index / rate for index in picked), rate, len(frames) / rate, sampling.frames)


@contextmanager
def _opened(video: Any, name: str) -> Iterator[tuple[Any, Any]]:
    """The container and the video stream of a file. Whatever goes wrong inside is a record error."""
    content = video.get("bytes") if isinstance(video, Mapping) else None
    path = video.get("path") if isinstance(video, Mapping) else video
    try:
        if content is None and not isinstance(path, (str, os.PathLike)):
            raise RecordError(
                f"{name} is {kind_of(video)}: give a path, a list of frames, or a dict with 'path', 'bytes' "
                "or 'frames'",
                "missing_video",
            )
        if content is None and not stat.S_ISREG(os.stat(path).st_mode):
            # Opening a pipe would block, and a device may have no end.
            raise RecordError(f"{name} is neither a file nor a folder: replace it", "not_a_video")
        if (len(content) if content is not None else os.path.getsize(path)) == 0:
            raise RecordError(f"{name} is empty, 0 bytes: replace it", "not_a_video")
        with needing_extras(f"reading {name}"):
            import av
        # FFmpeg gets an open file and no name, so that it can open nothing else.
        with ExitStack() as stack:
            file = stack.enter_context(io.FileIO(path) if content is None else io.BytesIO(content))
            try:
                options = {"format_whitelist": CONTAINERS, "protocol_whitelist": ""}
                container = stack.enter_context(av.open(file, options=options))
            except av.error.FFmpegError as error:
                raise RecordError(
                    f"{name} is not a video in a supported format, or damaged: convert it to MP4", "not_a_video"
                ) from error
            if not container.streams.video:
                raise RecordError(f"{name} has no pictures: replace it", "not_a_video")
            yield container, container.streams.video[0]
    except SaccadeError:
        raise
    except FileNotFoundError as error:
        raise RecordError(f"{name} does not exist: correct the path, or remove the sample", "missing_video") from error
    except Exception as error:
        reason = reason_of(error)
        raise RecordError(f"{name} cannot be decoded ({reason}): replace it", "truncated_video") from error


def _stream_size(stream: Any) -> tuple[int, int]:
    return stream.codec_context.width, stream.codec_context.height


def _check_size(size: tuple[int, int], max_pixels: int, name: str, frames: int = 1) -> None:
    pixels = size[0] * size[1]
    if pixels < 1:
        raise RecordError(f"{name} has {size[0]} x {size[1]} pixels, none at all: replace it", "not_a_video")
    if pixels > max_pixels:
        raise RecordError(
            f"{name} has {size[0]} x {size[1]} pixels, more than max_image_pixels={max_pixels}: shrink it, or raise "
            "the limit",
            "decompression_bomb",
        )
    if pixels * frames > MAX_CLIP_PIXELS:
        raise RecordError(
            f"{name} has {frames} frames of {size[0]} x {size[1]} pixels to take, more than {MAX_CLIP_PIXELS} pixels: "
            "shrink it, or lower video_frames",
            "decompression_bomb",
        )


def _too_long(name: str, seconds: float) -> str:
    return f"{name} lasts {seconds:.0f} s, and the limit is {MAX_SECONDS} s: cut it into pieces"


def _timing(container: Any, stream: Any, name: str) -> tuple[Fraction, float]:
    """Frames per second on average, and when the last one is shown, in seconds after the first."""
    rate = stream.average_rate or stream.guessed_rate
    kind, seconds = container.format.name, None
    if kind not in _GUESSED_DURATION:
        if stream.duration and stream.time_base:
            seconds = float(stream.duration * stream.time_base)
        elif container.duration:
            seconds = container.duration / 1_000_000
    start = float((stream.start_time or 0) * stream.time_base)
    # Encoders that reorder frames start a moment after 0, for which no long file is read to its end.
    unsure = seconds is None or (kind in _DURATION_FROM_ZERO and start > 0.01 * seconds)
    if unsure or not rate:
        # The header does not say: the packets do, without decoding them.
        packets = [packet for packet in container.demux(stream) if packet.pts is not None]
        times = sorted(float(packet.pts * packet.time_base) for packet in packets)
        container.seek(0)
        if not times:
            raise RecordError(f"{name} has no frames: replace it", "no_frames")
        last = times[-1] - times[0]
        rate = rate or Fraction((len(times) - 1) / last if last > 0 else 1.0).limit_denominator(1000)
        seconds = last + float(1 / rate)
    else:
        last = max(0.0, seconds - min(float(1 / rate), _shortest_step(stream)))
    if seconds > MAX_SECONDS:
        raise RecordError(_too_long(name, seconds), "too_long")
    return Fraction(rate), last


def _shortest_step(stream: Any) -> float:
    """Seconds from one frame to the next, at the least."""
    rates = (stream.average_rate, stream.base_rate, stream.guessed_rate)
    return float(1 / max((rate for rate in rates if rate), default=Fraction(1)))


def _frames(container: Any, stream: Any) -> Iterator[Any]:
    """Decoded frames, from where the container stands; the end of a truncated file ends them."""
    import av

    try:
        yield from container.decode(stream)
    except (av.error.InvalidDataError, av.error.EOFError):
        return


def _decoded(container: Any, stream: Any, times: Sequence[float], name: str) -> Iterator[tuple[float, Any]]:
    """The frame on the screen at each of `times`, which ascend, with its own time; no frame twice."""
    import av

    start = float((stream.start_time or 0) * stream.time_base)
    step = _shortest_step(stream)
    # The nearest frame, since times are rounded to the ticks of the container.
    tolerance = min(step, 0.1) / 2
    count = 0

    def read() -> Iterator[tuple[float, Any]]:
        nonlocal count
        now = -step
        for frame in _frames(container, stream):
            count += 1
            if count > MAX_DECODED:
                raise RecordError(
                    f"{name} has too few key frames: {MAX_DECODED} frames were decoded to reach {now:.0f} s; encode "
                    "it with a key frame every few seconds, or cut it into pieces",
                    "too_long",
                )
            now = now + step if frame.time is None else frame.time - start
            yield now, frame

    reader = read()
    shown: tuple[float, Any] | None = None
    following: tuple[float, Any] | None = None
    given = -float("inf")
    for wanted in times:
        if shown is not None and wanted - shown[0] > SEEK_SECONDS:
            # Where the container cannot jump, every frame is decoded.
            with suppress(av.error.FFmpegError):
                container.seek(int((wanted + start) / stream.time_base), stream=stream, backward=True)
                reader, shown, following = read(), None, None
        while True:
            following = next(reader, None) if following is None else following
            if following is None or (shown is not None and following[0] > wanted + tolerance):
                break
            shown, following = following, None
        if shown is not None and shown[0] > given:
            given = shown[0]
            yield shown
