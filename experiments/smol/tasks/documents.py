"""Pages of text: a heading, fields, a table of numbers, and paragraphs of Python's own documentation."""

import random
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from pydoc_data.topics import topics

from experiments.smol.fonts import FONTS
from experiments.smol.page import MARGIN, Colour, Page
from experiments.smol.tasks.base import Question, Sample, sample_rng, split_of

HEADINGS = ("Invoice", "Report", "Letter", "Notice", "Contract", "Receipt", "Schedule", "Summary", "Permit", "Agenda")
FIELDS = {
    "City": ("Berlin", "Cairo", "Delhi", "London", "Madrid", "Oslo", "Paris", "Rome", "Tokyo", "Vienna"),
    "Month": ("January", "March", "April", "May", "June", "July", "August", "October", "November", "December"),
    "Name": ("Anna", "David", "Emma", "Frank", "Grace", "Henry", "Laura", "Martin", "Peter", "Sarah"),
}
ITEMS = (
    *("apples", "books", "boxes", "chairs", "clocks", "coats", "cups", "doors"),
    *("hats", "keys", "lamps", "maps", "pens", "plates", "shoes", "tables"),
)
NUMBERS = range(1, 10)
_SIZE, _HEADING_SIZE, _BODY_SIZE = 13, 20, 10
_WORDS_IN_A_LINE = 16


class Documents:
    """One page: a heading, then fields, a table and running text in any order, a line to each row of patches.

    The splits share no family of fonts and no running text, which is of different topics.
    """

    name = "documents"
    kinds = ("heading", "field", "number", "says")
    words = (
        *HEADINGS,
        *(word for field, values in FIELDS.items() for word in (field, *values)),
        *ITEMS,
        *map(str, NUMBERS),
    )

    def sample(self, split: str, number: int, seed: int = 0, grid: int = 12) -> Sample:
        rng = sample_rng(self.name, split, number, seed, grid)
        paper = tuple(rng.randint(225, 255) for _ in range(3))
        ink = tuple(rng.randint(0, 70) for _ in range(3))
        page = Page(grid, paper, rng.choice(FONTS[split]))
        heading = rng.choice(HEADINGS)
        fields = {name: rng.choice(FIELDS[name]) for name in rng.sample(tuple(FIELDS), rng.randint(2, 3))}
        items = rng.sample(ITEMS, rng.randint(2, 4))
        table = {item: str(number) for item, number in zip(items, rng.sample(NUMBERS, len(items)), strict=True)}
        page.write_region(heading, rng.randint(0, 1), 0, _HEADING_SIZE, ink, rows=2)
        body = iter(_words(rng, split))
        free = grid - 2 - len(fields) - len(table)
        blocks = [{f"{name}:": value for name, value in fields.items()}, table]
        rng.shuffle(blocks)
        before, between = sorted(rng.randint(0, free) for _ in range(2))
        row = _paragraph(page, body, 2, before, ink)
        row = _block(page, rng, blocks[0], row, ink)
        row = _paragraph(page, body, row, between - before, ink)
        row = _block(page, rng, blocks[1], row, ink)
        _paragraph(page, body, row, free - between, ink)
        return Sample(page.image, tuple(page.regions), tuple(_questions(rng, page, heading, fields, table)))


def _block(page: Page, rng: random.Random, lines: dict[str, str], row: int, ink: Colour) -> int:
    """Draw fields or a table in two columns from a row on; returns the next row."""
    first = rng.randint(0, 1)
    second = first + rng.randint(4, 5)
    for name, value in lines.items():
        page.write_region(name, first, row, _SIZE, ink)
        page.write_region(value, second, row, _SIZE, ink)
        row += 1
    return row


def _paragraph(page: Page, body: Iterator[str], row: int, rows: int, ink: Colour) -> int:
    """Fill rows with running text; returns the next row."""
    for line in range(row, row + rows):
        page.write_all(list(islice(body, _WORDS_IN_A_LINE)), MARGIN, line, _BODY_SIZE, ink)
    return row + rows


def _questions(rng: random.Random, page: Page, heading: str, fields: dict, table: dict) -> list[Question]:
    said = [*fields.values(), *table]
    # Running text may have one of the words too.
    everything = {word.strip(".,;:()").lower() for line in page.written for word in line.split()}
    unsaid = [word for words in (*FIELDS.values(), ITEMS) for word in words if word.lower() not in everything]
    looked_for = [
        rng.choice(((there, "yes"), (absent, "no")))
        for there, absent in zip(rng.sample(said, 2), rng.sample(unsaid, 2), strict=True)
    ]
    return [
        Question("heading", "What is the heading?", heading),
        *(Question("field", f"What is the {name.lower()}?", value) for name, value in fields.items()),
        *(Question("number", f"How many {item}?", number) for item, number in table.items()),
        *(Question("says", f"Does it say {word}?", answer) for word, answer in looked_for),
    ]


def _words(rng: random.Random, split: str) -> Iterator[str]:
    """Words of running text without end, from a place in one of the split's topics on."""
    texts = running_text(split)
    while True:
        words = rng.choice(texts)
        yield from words[rng.randrange(len(words)) :]


@lru_cache(maxsize=3)
def running_text(split: str) -> tuple[tuple[str, ...], ...]:
    """The topics of Python's documentation that belong to a split, word by word."""
    found = []
    for topic, text in topics.items():
        # Letters alone: most fonts have no glyph for what the markup draws.
        words = tuple(word for word in text.split() if word.isascii() and word.strip(".,;:()").isalpha())
        if split_of(topic) == split and len(words) >= 100:
            found.append(words)
    return tuple(found)
