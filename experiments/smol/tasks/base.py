"""What a task is: pictures with regions, and questions about them with one exact answer."""

import hashlib
import random
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

from PIL import Image

from saccade.data.digits import SPLITS
from saccade.errors import SaccadeError

PATCH = 16
"""Pixels along a patch of the tower; a picture of `grid` patches per side has `grid * PATCH` pixels per side."""
GRIDS = (12, 24)
"""144 visual tokens, and 576 as in LLaVA-1.5."""

_SHARES = {"train": 0.70, "validation": 0.15, "test": 0.15}


@dataclass(frozen=True)
class Region:
    """Part of a picture that shows one thing.

    Args:
        box: left, top, right and bottom in pixels, the last two exclusive.
        text: what is to be seen there, in words of the task's `words` and whole numbers of them. Empty for what no
            question is about.
    """

    box: tuple[int, int, int, int]
    text: str


@dataclass(frozen=True)
class Question:
    """A question about a picture.

    Args:
        kind: one of the task's `kinds`.
        text: the question.
        answer: the one right answer, compared word by word.
    """

    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class Sample:
    """A picture, what is on it, and everything that may be asked about it.

    Args:
        image: RGB, `grid * PATCH` pixels per side.
        regions: what is on it, in reading order.
        questions: a question for each kind that has a clear answer, and several of some.
    """

    image: Image.Image
    regions: tuple[Region, ...]
    questions: tuple[Question, ...]

    @property
    def caption(self) -> str:
        """Everything on the picture, row by row and once each."""
        shown: dict[str, int] = {}
        for region in self.regions:
            if region.text:
                shown.setdefault(region.text, region.box[1])
        rows = groupby(shown, key=shown.__getitem__)
        return ", ".join(" ".join(row) for _, row in rows)


class Task(Protocol):
    """Makes samples from a seed.

    The splits share no picture, and nothing that pictures are made of which the task names in its docstring.
    """

    name: str
    kinds: tuple[str, ...]
    """The kinds of its questions."""
    words: tuple[str, ...]
    """Every word of the text of its regions."""

    def sample(self, split: str, number: int, seed: int = 0, grid: int = 12) -> Sample:
        """The sample of a number: the same whenever it is made, on every machine.

        Args:
            split: "train", "validation" or "test".
            number: from 0 on.
            seed: which stream of samples.
            grid: patches per side, one of `GRIDS`.

        Raises:
            SaccadeError: on an unknown split or grid, or if a package that it needs is not installed.
        """


def sample_rng(task: str, split: str, number: int, seed: int, grid: int) -> random.Random:
    """The random numbers of one sample.

    Raises:
        SaccadeError: on an unknown split or grid.
    """
    if split not in SPLITS:
        raise SaccadeError(f"split={split!r} is unknown: use one of {', '.join(SPLITS)}")
    if grid not in GRIDS:
        raise SaccadeError(f"grid={grid!r} is unknown: use one of {', '.join(map(str, GRIDS))} patches per side")
    return random.Random(f"{task}/{split}/{seed}/{number}/{grid}")


def split_of(key: str) -> str:
    """The split that something belongs to, by a hash of its name: 70, 15 and 15 % of all names."""
    place = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
    for split, share in _SHARES.items():
        if place < share:
            return split
        place -= share
    return SPLITS[-1]
