"""Clips of handwritten digits that move, with questions that no single frame answers.

A clip has one to three digits, each in its own lane. A digit enters at one side, crosses in a straight line and
leaves at the other; how fast and when is its own. Between them it is not to be seen.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image

from saccade.data.digits import SPLITS, digit_samples, split_indices
from saccade.data.scenes import PATCH_SIZE
from saccade.errors import SaccadeError, one_of
from saccade.videos import Clip

MOTION_KINDS = ("direction", "first", "passed")
"""Which way a digit goes, which of two came first, and how many passed."""
LANE = 16
"""Height of a lane, and edge of a digit, in pixels."""
LANES = 3
RATE = 2.0
"""Frames per second of the clips, which decides what a model with times is told."""

_COLUMNS = ("images", "videos", "messages", "kind", "answer")


@dataclass(frozen=True)
class Mover:
    """A digit that crosses a clip.

    Args:
        value: of the digit.
        sample: number of its picture among the digits.
        lane: counted from the top.
        start: frame in which it enters.
        frames: in how many frames it is seen, at least 2.
        right: whether it moves to the right.
    """

    value: int
    sample: int
    lane: int
    start: int
    frames: int
    right: bool

    def position(self, frame: int, width: int) -> int | None:
        """Its left edge in a frame, in pixels; None if it is not there.

        Digits stand at whole patches, as those that the embedded tower has learned.
        """
        step = frame - self.start
        if not 0 <= step < self.frames:
            return None
        share = step / (self.frames - 1)
        place = PATCH_SIZE * round(share * (width - LANE) / PATCH_SIZE)
        return place if self.right else width - LANE - place


def motion_clips(
    split: str,
    num_rows: int,
    seed: int = 0,
    frames: int = 8,
    width: int = 48,
    kinds: Sequence[str] = MOTION_KINDS,
) -> Dataset:
    """Clips of digits that move, with one question each. A row is drawn when it is read.

    Row i depends only on i and the other arguments. Digit samples are disjoint between the splits.

    Args:
        split: "train", "validation" or "test".
        num_rows: number of rows.
        seed: selects the sequence of clips.
        frames: of a clip, at least 5: three digits enter one after the other, and the last is seen in three.
        width: of a frame in pixels, at least three digits.
        kinds: of questions, in equal shares, from `MOTION_KINDS`.

    Returns:
        Columns `images` (empty), `videos` (a list of one `Clip`, 48 px high), `messages`, `kind` and `answer`.

    Raises:
        SaccadeError: on an argument out of range.
    """
    if split not in SPLITS:
        raise SaccadeError(f"split={split!r} is unknown: {one_of(split, SPLITS)}")
    if not isinstance(num_rows, int) or num_rows < 0:
        raise SaccadeError(f"num_rows is {num_rows!r}: give an int of at least 0")
    for name, value, least in (("frames", frames, LANES + 2), ("width", width, 3 * LANE)):
        if not isinstance(value, int) or value < least:
            raise SaccadeError(f"{name} is {value!r}: give an int of at least {least}")
    unknown = [kind for kind in kinds if kind not in MOTION_KINDS]
    if unknown or not kinds:
        raise SaccadeError(f"kinds is {list(kinds)!r}: choose from {', '.join(MOTION_KINDS)}")
    drawn = _DrawnClips(f"motion/{split}/{seed}", split, frames, width, tuple(kinds))
    return Dataset.from_dict({name: range(num_rows) for name in _COLUMNS}).with_transform(drawn)


class _DrawnClips:
    """The transform from numbers of rows to rows; a clip is only drawn if its column is read."""

    def __init__(self, seed: str, split: str, frames: int, width: int, kinds: tuple[str, ...]) -> None:
        self.seed, self.split, self.frames, self.width, self.kinds = seed, split, frames, width, kinds

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        rows = [self._row(number, "videos" in batch) for number in next(iter(batch.values()))]
        return {name: [row[name] for row in rows] for name in batch}

    def _row(self, number: int, draw: bool) -> dict[str, Any]:
        rng = random.Random(f"{self.seed}/{number}")
        kind = rng.choice(self.kinds)
        movers = sample_movers(rng, self.split, self.frames, kind)
        question, answer = ask(movers, kind, rng)
        turns = zip(("user", "assistant"), (question, answer), strict=True)
        ground = rng.getrandbits(31)
        return {
            "images": [],
            "videos": [render_clip(movers, self.frames, self.width, ground)] if draw else [],
            "messages": [{"role": role, "content": text} for role, text in turns],
            "kind": kind,
            "answer": answer,
        }


def sample_movers(rng: random.Random, split: str, frames: int, kind: str) -> list[Mover]:
    """Digits of different values for a question of this kind: one to three, or two to three for which comes first."""
    pools = split_indices(split)
    count = rng.randint(2, LANES) if kind == "first" else rng.randint(1, LANES)
    starts = sorted(rng.sample(range(frames - 2), count))
    values = rng.sample(range(10), count)
    lanes = rng.sample(range(LANES), count)
    return [
        Mover(
            value,
            rng.choice(pools[value]),
            lane,
            start,
            rng.randint(3, max(3, frames - start)),
            rng.random() < 0.5,
        )
        for value, lane, start in zip(values, lanes, starts, strict=True)
    ]


def ask(movers: Sequence[Mover], kind: str, rng: random.Random) -> tuple[str, str]:
    """A question about digits in the order in which they enter, and its answer."""
    if kind == "passed":
        return "how many digits ?", str(len(movers))
    if kind == "direction":
        asked = rng.choice(movers)
        return f"is the {asked.value} left or right ?", "right" if asked.right else "left"
    one, other = rng.sample(range(len(movers)), 2)
    return f"which is first , {movers[one].value} or {movers[other].value} ?", str(movers[min(one, other)].value)


def render_clip(movers: Sequence[Mover], frames: int, width: int, ground: int) -> Clip:
    """Draw a clip: the same ground in every frame, and the digits over it."""
    rng = np.random.default_rng(ground)
    height = LANE * LANES
    still = rng.integers(0, 40, (height, width, 1), dtype=np.uint8) + rng.integers(20, 70, 3, dtype=np.uint8)
    images, _ = digit_samples()
    stamps = [
        Image.fromarray(images[mover.sample]).resize((LANE, LANE), Image.Resampling.BILINEAR) for mover in movers
    ]
    colours = [tuple(int(level) for level in rng.integers(150, 256, 3)) for _ in movers]
    drawn = []
    for frame in range(frames):
        image = Image.fromarray(still)
        for mover, stamp, colour in zip(movers, stamps, colours, strict=True):
            left = mover.position(frame, width)
            if left is not None:
                image.paste(colour, (left, mover.lane * LANE), stamp)
        drawn.append(np.asarray(image))
    times = tuple(frame / RATE for frame in range(frames))
    return Clip(np.stack(drawn), times, RATE, frames / RATE)
