"""Bar charts and line charts, drawn with Pillow in a few milliseconds each."""

import random
from collections.abc import Callable
from itertools import pairwise

from experiments.smol.fonts import FONTS, text_width
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
TRENDS = ("up", "down", "flat")
VALUES = range(1, 10)
POINTS = 5
_SIZE = 13


class Charts:
    """A chart of one kind or the other: bars with their values above and their names below, or lines with a legend.

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


def trend_of(series: tuple[int, ...]) -> str | None:
    """Where a line goes from its first to its last point; None where that is not clear."""
    change = series[-1] - series[0]
    return {True: "up", False: "down"}[change > 0] if abs(change) >= 3 else "flat" if change == 0 else None


def _bars(page: Page, rng: random.Random, split: str, ink: Colour) -> list[Question]:
    # Two rows for the values above the tallest bar, one for the names.
    rows = page.side // PATCH
    unit = (rows - 3) // max(VALUES)
    count = rng.randint(3, 4)
    values = draw_series(rng, split, lambda rng: tuple(rng.sample(VALUES, count)))
    names, colours = rng.sample(NAMES, count), rng.sample(tuple(COLOURS), count)
    slot = rows // 4
    start = rng.randrange(rows - slot * count + 1)
    bottom = rows - 1
    for place, (name, value, colour) in enumerate(zip(names, values, colours, strict=True)):
        left, right = (start + slot * place) * PATCH, (start + slot * (place + 1)) * PATCH
        top = bottom - unit * value
        page.draw.rectangle(
            (left + PATCH // 2, top * PATCH, right - PATCH // 2 - 1, bottom * PATCH - 1), _shade(rng, colour)
        )
        _centre(page, str(value), left, right, top - 1, ink)
        _centre(page, name, left, right, bottom, ink)
        page.mark(left, top - 1, right, f"{name} {value} {colour}", rows=unit * value + 2)
    first, second = rng.sample(range(count), 2)
    smaller = "yes" if values[first] < values[second] else "no"
    one = rng.randrange(count)
    return [
        *(
            Question("value", f"What is the value of {name}?", str(value))
            for name, value in zip(names, values, strict=True)
        ),
        Question("largest", "Which is the largest?", names[values.index(max(values))]),
        Question("smaller", f"Is {names[first]} smaller than {names[second]}?", smaller),
        Question("colour", f"What colour is {names[one]}?", colours[one]),
    ]


def _lines(page: Page, rng: random.Random, split: str, ink: Colour) -> list[Question]:
    rows = page.side // PATCH
    unit = (rows - 3) / max(VALUES)
    count = 2
    names, colours = rng.sample(NAMES, count), rng.sample(tuple(COLOURS), count)
    trends = rng.sample(TRENDS, count)
    step = (rows - 2) / (POINTS - 1)
    questions = []
    for place, (name, colour, trend) in enumerate(zip(names, colours, trends, strict=True)):
        series = draw_series(rng, split, lambda rng, trend=trend: _line(rng, trend))
        shade = _shade(rng, colour)
        left = 8 + place * page.side // 2
        page.draw.rectangle((left, 4, left + 15, 11), shade)
        _, right = page.write(name, left + 22, 0, _SIZE, ink)
        text = f"{name} {colour} {trend}"
        page.mark(left, 0, right, text)
        points = [
            ((1 + step * number) * PATCH, (rows - 1 - unit * value) * PATCH) for number, value in enumerate(series)
        ]
        page.draw.line(points, fill=shade, width=4, joint="curve")
        for (x, y), (next_x, next_y) in pairwise(points):
            for share in (0.0, 0.5):
                at_x, at_y = x + share * (next_x - x), y + share * (next_y - y)
                page.mark(at_x - PATCH / 2, at_y / PATCH - 0.5, at_x + PATCH / 2, text)
        questions += [
            Question("trend", f"Does {name} go up, down or stay flat?", trend),
            Question("legend", f"What colour is {name}?", colour),
        ]
    return questions


def _line(rng: random.Random, trend: str) -> tuple[int, ...]:
    """A line without turns: one that goes up goes up all the way, and a flat one stays near its level."""
    while True:
        if trend == "flat":
            level = rng.choice(VALUES[:-1])
            series = [level + rng.randint(0, 1) for _ in range(POINTS)]
        else:
            series = sorted(rng.choices(VALUES, k=POINTS), reverse=trend == "down")
        steepest = max(abs(after - before) for before, after in pairwise(series))
        if trend_of(tuple(series)) == trend and steepest <= 4:
            return tuple(series)


def _centre(page: Page, text: str, left: int, right: int, row: int, ink: Colour) -> None:
    width = text_width(page.font, _SIZE, text)
    page.write(text, max(0, min((left + right - width) / 2, page.side - width)), row, _SIZE, ink)


def _shade(rng: random.Random, colour: str) -> Colour:
    return tuple(min(255, max(0, level + rng.randint(-12, 12))) for level in COLOURS[colour])
