"""Digit scenes: their content, how they are drawn, and what each patch shows.

A scene is a canvas of `rows` x `cols` patches of 8 px, divided into three by three places. Each place holds at most
one digit; some of the others hold a distractor. A spec is the short tuple of ints that a scene is drawn from:
`(render_seed, rows, cols, sample, x, y, size, sample, x, y, size, ...)`, four ints per digit, in pixels.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from saccade.data.digits import digit_samples, split_indices
from saccade.errors import SaccadeError

PATCH_SIZE = 8
PLACES = 3
SMALLEST_GRID = 9
DISTRACTOR, BACKGROUND, AMBIGUOUS = 10, 11, -1

# Two patches per side, aligned with the patch grid: at arbitrary offsets a tower needs far more training.
_DIGIT_PATCHES = 2
_DIGIT_PIXELS = (15, 16)
_MAX_ROTATION = 10.0
# A patch with more ink than the first share is labelled by its content; between the two shares it is ambiguous.
_INK_CLEAR, _INK_NONE = 0.12, 0.02


@dataclass(frozen=True)
class PlacedDigit:
    """A digit and its place: `row` 0 (top) to 2 (bottom), `column` 0 (left) to 2 (right)."""

    value: int
    row: int
    column: int


def check_grid(grid: int | tuple[int, int]) -> tuple[int, int]:
    """(rows, cols) of patches from a side or a pair.

    Raises:
        SaccadeError: if a side is not an int, or less than nine patches, too few for a digit per place.
    """
    sides = (grid, grid) if isinstance(grid, int) else tuple(grid)
    if len(sides) != 2 or any(not isinstance(side, int) or side < SMALLEST_GRID for side in sides):
        raise SaccadeError(f"grid is {grid!r}: give one int or two, each at least {SMALLEST_GRID} patches")
    return sides


def sample_scene(
    rng: random.Random, split: str, grid: tuple[int, int], num_digits: int
) -> tuple[tuple[int, ...], tuple[PlacedDigit, ...]]:
    """Draw a spec with `num_digits` (0 to 9) digits of `split`.

    Returns:
        The spec, and the digits in reading order (top row first, left to right).
    """
    pools = split_indices(split)
    cells = sorted(rng.sample(range(PLACES * PLACES), num_digits))
    values = [rng.randrange(10) for _ in cells]
    # Without repeated digits, questions that count one class would be trivial.
    if num_digits > 1 and rng.random() < 0.35:
        first, second = rng.sample(range(num_digits), 2)
        values[first] = values[second]
    spec = [rng.getrandbits(31), *grid]
    digits = []
    for cell, value in zip(cells, values, strict=True):
        row, column = divmod(cell, PLACES)
        size = rng.randint(*_DIGIT_PIXELS)
        spec += [
            rng.choice(pools[value]),
            _position(rng, grid[1], column, size),
            _position(rng, grid[0], row, size),
            size,
        ]
        digits.append(PlacedDigit(value, row, column))
    return tuple(spec), tuple(digits)


def render_scene(spec: Sequence[int]) -> Image.Image:
    """Draw a scene: RGB, `rows * 8` px high and `cols * 8` px wide. The same spec gives the same pixels."""
    rng = np.random.default_rng(spec[0])
    height, width = spec[1] * PATCH_SIZE, spec[2] * PATCH_SIZE
    tint = rng.integers(20, 70, 3, dtype=np.uint8)
    noise = rng.integers(0, 40, (height, width, 1), dtype=np.uint8)
    image = Image.fromarray(noise + tint)
    for stamp, x, y, _ in _stamps(spec):
        colour = tuple(int(level) for level in rng.integers(150, 256, 3))
        image.paste(colour, (x, y), stamp)
    return image


def patch_labels(spec: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """What every patch of a scene shows.

    Returns:
        content: int64 (rows, cols): 0 to 9 for a digit, 10 a distractor, 11 background, -1 if there is too little ink.
        owner: int64 (rows, cols): which digit of the spec (reading order) the ink belongs to, -1 for none.
    """
    rows, cols = spec[1], spec[2]
    _, classes = digit_samples()
    content = np.full((rows, cols), BACKGROUND, dtype=np.int64)
    owner = np.full((rows, cols), -1, dtype=np.int64)
    for stamp, x, y, digit in _stamps(spec):
        canvas = Image.new("L", (cols * PATCH_SIZE, rows * PATCH_SIZE))
        canvas.paste(stamp, (x, y))
        ink = np.asarray(canvas, dtype=np.float32).reshape(rows, PATCH_SIZE, cols, PATCH_SIZE).mean((1, 3)) / 255
        content[(ink > _INK_NONE) & (content == BACKGROUND)] = AMBIGUOUS
        clear = ink > _INK_CLEAR
        content[clear] = DISTRACTOR if digit < 0 else classes[spec[3 + 4 * digit]]
        owner[clear] = digit
    return content, owner


def _position(rng: random.Random, patches: int, place: int, size: int) -> int:
    """First pixel of something `size` px long inside a place."""
    low, high = (edge // PATCH_SIZE for edge in _place_edges(patches, place))
    return rng.randint(low, high - _DIGIT_PATCHES) * PATCH_SIZE + rng.randint(0, _DIGIT_PATCHES * PATCH_SIZE - size)


def _place_edges(patches: int, place: int) -> tuple[int, int]:
    """First pixel of a place and the first one after it; whole patches, so that each patch is in one place."""
    return patches * place // PLACES * PATCH_SIZE, patches * (place + 1) // PLACES * PATCH_SIZE


def _stamps(spec: Sequence[int]) -> Iterator[tuple[Image.Image, int, int, int]]:
    """Ink masks in drawing order: (mask, x, y, index of the digit or -1). Distractors come first, in free places."""
    rng = random.Random(spec[0])
    rows, cols = spec[1], spec[2]
    images, _ = digit_samples()
    placed = list(zip(*(spec[3 + part :: 4] for part in range(4)), strict=True))
    taken = {(_place_of(rows, y + size // 2), _place_of(cols, x + size // 2)) for _, x, y, size in placed}
    free = [(row, column) for row in range(PLACES) for column in range(PLACES) if (row, column) not in taken]
    wanted = round(rng.randint(2, 4) * rows * cols / 144)
    for number in range(wanted if free else 0):
        if number % len(free) == 0:
            rng.shuffle(free)
        row, column = free[number % len(free)]
        size = rng.randint(*_DIGIT_PIXELS)
        stamp = _enlarge(_distractor(rng), size, rng)
        yield stamp, _position(rng, cols, column, size), _position(rng, rows, row, size), -1
    for number, (sample, x, y, size) in enumerate(placed):
        yield _enlarge(Image.fromarray(images[sample]), size, rng), x, y, number


def _place_of(patches: int, pixel: int) -> int:
    return next(place for place in range(PLACES) if pixel < _place_edges(patches, place)[1])


def _enlarge(small: Image.Image, size: int, rng: random.Random) -> Image.Image:
    angle = rng.uniform(-_MAX_ROTATION, _MAX_ROTATION)
    return small.resize((size, size), Image.Resampling.BILINEAR).rotate(angle, Image.Resampling.BILINEAR)


def _distractor(rng: random.Random) -> Image.Image:
    """A bar, a blob or a zigzag at the resolution of the digits, so that sharpness does not give it away."""
    small = Image.new("L", (8, 8))
    draw = ImageDraw.Draw(small)
    shape = rng.randrange(3)
    if shape == 0:
        # Bars are horizontal: a vertical one would look like a handwritten 1.
        draw.line((0, rng.randint(1, 6), 7, rng.randint(1, 6)), fill=255, width=rng.randint(1, 2))
    elif shape == 1:
        x, y = rng.randint(0, 2), rng.randint(0, 2)
        draw.ellipse((x, y, x + rng.randint(4, 5), y + rng.randint(4, 5)), fill=rng.randint(170, 255))
    else:
        heights = [(6, 1)[step % 2] + rng.randint(-1, 1) for step in range(5)]
        draw.line([(step * 7 // 4, height) for step, height in enumerate(heights)], fill=255, width=1)
    return small
