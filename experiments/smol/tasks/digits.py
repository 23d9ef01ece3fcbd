"""Digit scenes, the embedded task, at twice the size."""

import random
from collections.abc import Sequence

from PIL import Image

from experiments.smol.tasks.base import PATCH, Question, Region, Sample, sample_rng
from saccade.data.questions import COLUMN_WORDS, ROW_WORDS, SINGLE_KINDS, place_words
from saccade.data.scenes import PATCH_SIZE, PlacedDigit, render_scene, sample_scene

MAX_DIGITS = 4
_SCALE = PATCH // PATCH_SIZE


class Digits:
    """Handwritten digits scattered over a noisy canvas. The splits share no handwritten digit."""

    name = "digits"
    kinds = tuple(SINGLE_KINDS)
    words = (*map(str, range(10)), *ROW_WORDS, *COLUMN_WORDS)

    def sample(self, split: str, number: int, seed: int = 0, grid: int = 12) -> Sample:
        rng = sample_rng(self.name, split, number, seed, grid)
        # Sums are asked of two digits at most, which would make them rare.
        spec, digits = sample_scene(rng, split, (grid, grid), rng.choice((1, 2, 2, 3, MAX_DIGITS)))
        scene = render_scene(spec)
        regions = [
            Region((x * _SCALE, y * _SCALE, (x + size) * _SCALE, (y + size) * _SCALE), _words(digit))
            for digit, x, y, size in zip(digits, spec[4::4], spec[5::4], spec[6::4], strict=True)
        ]
        image = scene.resize((grid * PATCH, grid * PATCH), Image.Resampling.BILINEAR)
        return Sample(image, tuple(regions), tuple(_questions(digits, rng)))


def _words(digit: PlacedDigit) -> str:
    return f"{digit.value} {place_words(digit)}"


def _questions(digits: Sequence[PlacedDigit], rng: random.Random) -> list[Question]:
    found = []
    for kind, ask in SINGLE_KINDS.items():
        turn = ask(digits, rng)
        if turn is not None:
            text, answer = turn
            found.append(Question(kind, text.replace(" ?", "?").replace(" .", "."), answer))
    return found
