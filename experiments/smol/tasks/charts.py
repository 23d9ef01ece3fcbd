"""Bar charts and line charts, drawn with Pillow in a few milliseconds each."""

import random
from collections import Counter
from collections.abc import Callable
from itertools import pairwise, permutations
from math import ceil, hypot

from experiments.smol.fonts import FONTS
from experiments.smol.page import Colour, Page
from experiments.smol.tasks.base import PATCH, Question, Sample, sample_rng, split_of

NAMES = ("Cairo", "Delhi", "Lima", "Oslo", "Paris", "Quito", "Rome", "Seoul", "Tokyo", "Turin")
COLOURS: dict[str, Colour] = {
    "red": (205, 40, 40),
    "blue": (50, 80, 200),
    "green": (50, 150, 60),
    "orange": (240, 150, 40),
    "purple": (130, 60, 160),
    "brown": (120, 80, 50),
}
TRENDS = ("up", "down")
VALUES = range(1, 10)
POINTS = 5
_SIZE = 13
_BARS_BEGIN = 4 * PATCH
"""Right of the longest name."""


class Charts:
    """A chart of one kind or the other: bars with their names before and their values after them, or lines with a
    legend.

    Bars and points stand on the patch grid. The splits share no series of values and no family of fonts.
    """

    name = "charts"
    kinds = ("value", "largest", "smaller", "colour", "trend", "legend")
    words = (*NAMES, *COLOURS, *TRENDS, *map(str, VALUES))

    def sample(self, split: str, number: int, seed: int = 0, grid: int = 12) -> Sample:
        rng = sample_rng(self.name, split, number, seed, grid)
        paper = tuple(rng.randint(235, 255) for _ in range(3))
        page = Page(grid, paper, rng.choice(FONTS[split]))
        ink = tuple(rng.randint(0, 60) for _ in range(3))
        # Out of eight, five with bars: they have four kinds of questions, lines have two.
        questions = (_bars if rng.randrange(8) < 5 else _lines)(page, rng, split, ink)
        return Sample(page.image, tuple(page.regions), tuple(questions))


def draw_series(rng: random.Random, split: str, make: Callable[[random.Random], tuple[int, ...]]) -> tuple[int, ...]:
    """A series of values that belongs to a split, from a function that draws one of any split."""
    while True:
        series = make(rng)
        if split_of(f"series {series}") == split:
            return series


def _bars(page: Page, rng: random.Random, split: str, ink: Colour) -> list[Question]:
    rows = page.side // PATCH
    # A bar of the largest value leaves a patch for the number after it.
    unit = (page.side - _BARS_BEGIN - PATCH) / max(VALUES)
    count = rng.randint(3, 4)
    values = draw_series(rng, split, lambda rng: tuple(sorted(rng.sample(VALUES, count), reverse=True)))
    names, colours = rng.sample(NAMES, count), rng.sample(tuple(COLOURS), count)
    slot = rows // count
    start = rng.randrange(rows - slot * (count - 1))
    for place, (name, value, colour) in enumerate(zip(names, values, colours, strict=True)):
        row = start + slot * place
        page.write_region(name, 0, row, _SIZE, ink)
        end = round(_BARS_BEGIN + unit * value)
        page.draw.rectangle((_BARS_BEGIN, row * PATCH + 1, end - 1, (row + 1) * PATCH - 2), _shade(rng, colour))
        page.mark(_BARS_BEGIN, row, end, colour)
        page.write_region(str(value), ceil(end / PATCH), row, _SIZE, ink)
    pairs = rng.sample(list(permutations(range(count), 2)), 2)
    one = rng.randrange(count)
    return [
        *(
            Question("value", f"What is the value of {name}?", str(value))
            for name, value in zip(names, values, strict=True)
        ),
        Question("largest", "Which name has the largest value?", names[values.index(max(values))]),
        *(
            Question(
                "smaller",
                f"Which is smaller, {names[first]} or {names[second]}?",
                names[first] if values[first] < values[second] else names[second],
            )
            for first, second in pairs
        ),
        Question("colour", f"What colour is {names[one]}?", colours[one]),
    ]


def _lines(page: Page, rng: random.Random, split: str, ink: Colour) -> list[Question]:
    rows = page.side // PATCH
    unit = (rows - 3) / max(VALUES)
    count = 2
    names, colours = rng.sample(NAMES, count), rng.sample(tuple(COLOURS), count)
    trends = rng.choices(TRENDS, k=count)
    step = (rows - 2) / (POINTS - 1)
    # Two lines that are the same would hide each other.
    drawn: list[tuple[int, ...]] = []
    while len(set(drawn)) < count:
        drawn = [draw_series(rng, split, lambda rng, trend=trend: _line(rng, trend)) for trend in trends]
    questions = []
    for place, (name, colour, trend, series) in enumerate(zip(names, colours, trends, drawn, strict=True)):
        shade = _shade(rng, colour)
        column = place * rows // 2
        left = column * PATCH
        page.draw.rectangle((left + 1, 1, left + PATCH - 2, PATCH - 2), shade)
        page.mark(left, 0, left + PATCH, colour)
        page.write_region(name, column + 1, 0, _SIZE, ink)
        points = [
            ((1 + step * number) * PATCH, (rows - 1 - unit * value) * PATCH) for number, value in enumerate(series)
        ]
        page.draw.line(points, fill=shade, width=4, joint="curve")
        for row, column in _patches(points):
            page.mark(column * PATCH, row, (column + 1) * PATCH, f"{name} {colour} {trend}")
        questions += [
            Question("trend", f"What is the trend of {name}?", trend),
            Question("legend", f"What colour is {name}?", colour),
        ]
    return questions


def _patches(points: list[tuple[float, float]]) -> list[tuple[int, int]]:
    """Row and column of every patch that a line through these points crosses for a third of its side or more."""
    pixels: Counter[tuple[int, int]] = Counter()
    for (x, y), (next_x, next_y) in pairwise(points):
        steps = ceil(hypot(next_x - x, next_y - y))
        shares = ((step + 0.5) / steps for step in range(steps))
        pixels.update(
            (int(y + share * (next_y - y)) // PATCH, int(x + share * (next_x - x)) // PATCH) for share in shares
        )
    return sorted(patch for patch, count in pixels.items() if count >= PATCH / 3)


def _line(rng: random.Random, trend: str) -> tuple[int, ...]:
    """A line that goes up all the way, or down."""
    return tuple(sorted(rng.sample(VALUES, POINTS), reverse=trend == "down"))


def _shade(rng: random.Random, colour: str) -> Colour:
    return tuple(min(255, max(0, level + rng.randint(-12, 12))) for level in COLOURS[colour])
