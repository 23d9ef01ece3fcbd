"""Digit scenes, the embedded task, at twice the size."""

import random
from collections.abc import Sequence

from PIL import Image

from experiments.smol.tasks.base import PATCH, Question, Region, Sample, sample_rng
from saccade.data.questions import COLUMN_WORDS, ROW_WORDS, SINGLE_KINDS, place_words
from saccade.data.scenes import PATCH_SIZE, PlacedDigit, render_scene, sample_scene

DIGITS_IN_A_SCENE = (1, 2, 2, 3)
SCENE_KINDS = ("has", "leftmost", "rightmost", "max", "min")
"""Those of the digit scenes' questions that are asked here."""
_SCALE = PATCH // PATCH_SIZE


class Digits:
    """One to three handwritten digits on a noisy canvas. The splits share no handwritten digit."""

    name = "digits"
    kinds = (*SCENE_KINDS, "row", "column")
    words = (*map(str, range(10)), *ROW_WORDS, *COLUMN_WORDS)

    def sample(self, split: str, number: int, seed: int = 0, grid: int = 12) -> Sample:
        rng = sample_rng(self.name, split, number, seed, grid)
        spec, digits = sample_scene(rng, split, (grid, grid), rng.choice(DIGITS_IN_A_SCENE))
        scene = render_scene(spec)
        placed = zip(digits, *(spec[start::4] for start in (4, 5, 6)), strict=True)
        regions = [region for digit, x, y, size in placed for region in _halves(digit, x, y, size)]
        image = scene.resize((grid * PATCH, grid * PATCH), Image.Resampling.BILINEAR)
        return Sample(image, tuple(regions), tuple(_questions(digits, rng)))


def _halves(digit: PlacedDigit, x: int, y: int, size: int) -> tuple[Region, Region]:
    """The left half of a digit, which shows its value, and the right half, which shows its place: the words of one
    region are learned as one, and ten values among nine places would hardly be told apart."""
    left, top, right, bottom = (_SCALE * pixel for pixel in (x, y, x + size, y + size))
    middle = left + PATCH
    return Region((left, top, middle, bottom), str(digit.value)), Region(
        (middle, top, right, bottom), place_words(digit)
    )


def _questions(digits: Sequence[PlacedDigit], rng: random.Random) -> list[Question]:
    found = []
    for kind in SCENE_KINDS:
        turn = SINGLE_KINDS[kind](digits, rng)
        if turn is not None:
            text, answer = turn
            found.append(Question(kind, text.replace(" ?", "?").capitalize(), answer))
    values = [digit.value for digit in digits]
    once = [digit for digit in digits if values.count(digit.value) == 1]
    if once:
        one = rng.choice(once)
        found.append(Question("row", f"In which row is the {one.value}?", ROW_WORDS[one.row]))
        found.append(Question("column", f"In which column is the {one.value}?", COLUMN_WORDS[one.column]))
    return found
