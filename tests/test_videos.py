"""Clips: which frames are taken of them, at which times, and one clear error for each kind of bad clip."""

from fractions import Fraction
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from video_files import SIZE, frame_image, numbers_of, write_clip, write_frames

from saccade import SaccadeError
from saccade.errors import MissingPackageError, RecordError
from saccade.videos import MAX_FRAMES, MAX_SECONDS, Clip, Sampling, open_video, video_shape


@pytest.fixture
def needs_av():
    pytest.importorskip("av")


@pytest.mark.parametrize(
    ("sampling", "last", "times"),
    [
        (Sampling(4), 3.0, [0, 1, 2, 3]),
        (Sampling(1), 3.0, [1.5]),
        (Sampling(32, fps=2), 1.6, [0, 0.5, 1, 1.5]),
        (Sampling(32, fps=0.5), 1.0, [0]),
        # More than allowed: spaced over the whole clip.
        (Sampling(3, fps=10), 4.0, [0, 2, 4]),
    ],
)
def test_times(sampling, last, times):
    assert sampling.times(last) == pytest.approx(times)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 0}, "video_frames=0: give a number of frames from 1 to 768"),
        ({"frames": MAX_FRAMES + 1}, "video_frames=769"),
        ({"frames": 2.5}, "video_frames=2.5"),
        ({"fps": 0}, "video_fps=0"),
        ({"fps": "fast"}, "video_fps='fast'"),
    ],
)
def test_bad_sampling(options, message):
    with pytest.raises(SaccadeError, match=message):
        Sampling(**options)


def test_a_folder_of_frames(tmp_path):
    folder = write_frames(tmp_path / "clip", 12)
    (folder / "notes.txt").write_text("not a frame")
    (folder / "._frame0.png").write_bytes(b"what macOS knows of frame0.png")
    clip = open_video(folder, Sampling(4))
    # By the numbers in the names, not by the alphabet: 2 comes before 10.
    assert numbers_of(clip) == [0, 4, 7, 11]
    assert clip.times == (0, 4, 7, 11)
    assert clip.duration == 12
    assert open_video(folder, Sampling(50)).frames.shape == (12, SIZE[1], SIZE[0], 3)
    assert video_shape(folder, Sampling(4)) == (4, SIZE)


def test_frames_at_a_rate():
    frames = [frame_image(number) for number in range(10)]
    clip = open_video({"frames": frames, "fps": 5}, Sampling(32, fps=2))
    assert numbers_of(clip) == [0, 3, 5, 8]
    assert clip.times == pytest.approx((0, 0.6, 1, 1.6))
    assert clip.metadata()["frames_indices"] == [0, 3, 5, 8]
    assert clip.metadata()["total_num_frames"] == 10
    assert numbers_of(open_video(frames, Sampling(2))) == [0, 9]
    assert open_video(clip) is clip
    # For processors that put clips into one tensor.
    filled = open_video(frames[:3], Sampling(8)).filled()
    assert numbers_of(filled) == [0, 0, 0, 1, 1, 1, 2, 2]
    assert filled.times == (0, 0, 0, 1, 1, 1, 2, 2)
    assert filled.filled() is filled


@pytest.mark.parametrize(
    ("frames", "options", "kind", "message"),
    [
        ([], {}, "no_frames", "has no frames"),
        ([frame_image(0), Image.new("RGB", (8, 8))], {}, "not_a_video", "frames of one size"),
        (["none.png"], {}, "missing_image", "'none.png' does not exist"),
        ([frame_image(0)], {"fps": -1}, "malformed", "fps=-1"),
        ([frame_image(0)] * (MAX_SECONDS + 1), {}, "too_long", "cut it into pieces"),
        ([Image.new("L", (7000, 7000))] * 32, {}, "decompression_bomb", "32 frames of 7000 x 7000"),
    ],
)
def test_bad_frames(frames, options, kind, message):
    with pytest.raises(RecordError, match=message) as raised:
        open_video({"frames": frames, **options})
    assert raised.value.kind == kind


@pytest.mark.usefixtures("needs_av")
@pytest.mark.parametrize(
    ("name", "codec"), [("a.mp4", "mpeg4"), ("a.mp4", "libx264"), ("a.webm", "libvpx"), ("a.avi", "mpeg4")]
)
def test_a_file(tmp_path, name, codec):
    path = write_clip(tmp_path / name, 20, rate=10, codec=codec)
    clip = open_video(path, Sampling(5))
    assert numbers_of(clip) == [0, 5, 10, 14, 19]
    assert clip.size == SIZE
    assert clip.duration == pytest.approx(2, abs=0.11)
    assert numbers_of(open_video(path, Sampling(50))) == list(range(20))
    assert numbers_of(open_video(path, Sampling(50, fps=2))) == [0, 5, 10, 15]
    assert clip.metadata()["frames_indices"] == numbers_of(clip)
    assert video_shape(path, Sampling(5)) == (5, SIZE)
    content = {"bytes": path.read_bytes(), "path": name}
    assert np.array_equal(open_video(content, Sampling(5)).frames, clip.frames)


@pytest.mark.usefixtures("needs_av")
def test_frames_at_irregular_times(tmp_path):
    """At each wanted time the frame on the screen, however long it stays there."""
    path = write_clip(tmp_path / "a.mp4", 6, rate=10, ticks=[0, 1, 2, 20, 21, 40])
    clip = open_video(path, Sampling(5))
    assert numbers_of(clip) == [0, 2, 3, 4, 5]
    assert clip.times == pytest.approx([0, 0.2, 2, 2.1, 4])
    assert clip.metadata()["duration"] == pytest.approx(clip.duration)
    seconds = [index / clip.metadata()["fps"] for index in clip.metadata()["frames_indices"]]
    assert seconds == pytest.approx(clip.times, abs=1 / clip.metadata()["fps"])


@pytest.mark.usefixtures("needs_av")
@pytest.mark.parametrize("start", [0, 125, 4 * 3600 * 25])
@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.mp4", "mpeg4"),
        ("a.mkv", "mpeg4"),
        ("a.webm", "libvpx"),
        ("a.ts", "mpeg4"),
        ("a.flv", "flv"),
        ("a.asf", "mpeg4"),
        ("a.mpg", "mpeg1video"),
        ("a.vob", "mpeg2video"),
    ],
)
def test_the_frames_are_those_of_the_clip_whenever_it_starts(tmp_path, name, codec, start):
    """A piece cut out of a film keeps its times, and some containers count their duration from 0, or store none."""
    path = write_clip(tmp_path / name, 20, rate=25, codec=codec, ticks=range(start, start + 20))
    clip = open_video(path, Sampling(4))
    # Times in the container are rounded to its ticks.
    assert np.allclose(numbers_of(clip), [0, 19 / 3, 38 / 3, 19], atol=0.7)
    assert clip.times == pytest.approx([number / 25 for number in numbers_of(clip)], abs=0.01)
    assert clip.duration == pytest.approx(0.8, abs=0.03)
    assert video_shape(path, Sampling(50)) == (20, SIZE)


@pytest.mark.usefixtures("needs_av")
def test_an_hour_is_read_by_jumping(tmp_path, monkeypatch):
    monkeypatch.setattr("saccade.videos.MAX_DECODED", 200)
    # A frame every two seconds for an hour, with a key frame every twelve frames.
    path = write_clip(tmp_path / "a.mp4", 1800, rate=Fraction(1, 2), group=12, size=(32, 32))
    clip = open_video(path, Sampling(8))
    # To the frame, as if every one were decoded: at 0, 514 and so on seconds.
    assert clip.times == pytest.approx([2 * round(1799 * number / 7 - 1e-3) for number in range(8)], abs=2.01)
    assert clip.duration == pytest.approx(3600)
    with pytest.raises(RecordError, match="too few key frames") as raised:
        open_video(write_clip(tmp_path / "b.mp4", 1800, rate=Fraction(1, 2), group=1800, size=(32, 32)), Sampling(8))
    assert raised.value.kind == "too_long"


@pytest.mark.usefixtures("needs_av")
def test_a_clip_of_one_frame(tmp_path):
    clip = open_video(write_clip(tmp_path / "a.mp4", 1, rate=10))
    assert numbers_of(clip) == [0]
    assert clip.metadata()["total_num_frames"] == 1


@pytest.mark.usefixtures("needs_av")
def test_a_clip_that_was_filmed_sideways(tmp_path):
    path = write_clip(tmp_path / "a.mp4", 3, rate=10, turned=90)
    clip = open_video(path, Sampling(2))
    assert clip.size == (SIZE[1], SIZE[0])
    assert video_shape(path, Sampling(2)) == (2, clip.size)
    # A matrix that turns by 90 degrees clockwise takes the left column, the mark, to the top.
    assert clip.frames[0, 0].mean() > 200
    assert clip.frames[0, -1].mean() < 200


@pytest.mark.usefixtures("needs_av")
@pytest.mark.parametrize(
    ("name", "content", "kind", "message"),
    [
        ("none.mp4", None, "missing_video", "does not exist"),
        ("a.mp4", b"", "not_a_video", "is empty, 0 bytes"),
        ("a.mp4", b"not a video at all" * 50, "not_a_video", "not a video in a supported format"),
        # A playlist names other files, which FFmpeg would open.
        (
            "a.m3u8",
            b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nsecret.mp4\n#EXT-X-ENDLIST\n",
            "not_a_video",
            "supported",
        ),
        ("a.ffconcat", b"ffconcat version 1.0\nfile secret.mp4\n", "not_a_video", "supported"),
    ],
)
def test_bad_files(tmp_path, name, content, kind, message):
    write_clip(tmp_path / "secret.mp4", 3, rate=10)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(RecordError, match=message) as raised:
        open_video(tmp_path / name)
    assert raised.value.kind == kind
    assert name in str(raised.value)


@pytest.mark.usefixtures("needs_av")
def test_a_damaged_file(tmp_path):
    path = write_clip(tmp_path / "a.webm", 20, rate=10, codec="libvpx", size=(64, 64))
    content = path.read_bytes()
    # Cut off in the middle: what is there is used.
    numbers = numbers_of(open_video({"bytes": content[: len(content) * 2 // 3]}, Sampling(20)))
    assert 0 < len(numbers) < 20
    assert numbers == list(range(len(numbers)))
    with pytest.raises(RecordError):
        open_video({"bytes": content[:200]})


@pytest.mark.usefixtures("needs_av")
def test_limits(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "a.mp4", 20, rate=10)
    with pytest.raises(RecordError, match="more than max_image_pixels=1000") as raised:
        open_video(path, max_pixels=1000)
    assert raised.value.kind == "decompression_bomb"
    monkeypatch.setattr("saccade.videos.MAX_SECONDS", 1)
    with pytest.raises(RecordError, match="lasts 2 s, and the limit is 1 s") as raised:
        open_video(path)
    assert raised.value.kind == "too_long"
    with pytest.raises(RecordError, match="neither a file nor a folder"):
        open_video("/dev/null")


@pytest.mark.usefixtures("needs_av")
def test_a_sound_is_no_clip():
    import av

    stream = BytesIO()
    with av.open(stream, "w", format="matroska") as container:
        sound = container.add_stream("flac", rate=8000)
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), format="s16", layout="mono")
        samples.sample_rate, samples.pts = 8000, 0
        for packet in (*sound.encode(samples), *sound.encode()):
            container.mux(packet)
    with pytest.raises(RecordError, match="has no pictures"):
        open_video({"bytes": stream.getvalue()})


def test_without_pyav_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    (tmp_path / "a.mp4").write_bytes(b"0")
    with pytest.raises(MissingPackageError, match=r'pip install "saccade\[video\]"'):
        open_video(tmp_path / "a.mp4")
    assert isinstance(open_video([frame_image(0)]), Clip)
