"""Questions about a scene, their answers, and captions, in the fixed vocabulary of the embedded task."""

import random
from collections.abc import Callable, Sequence
from functools import partial

from saccade.data.scenes import PlacedDigit

ROW_WORDS = ("top", "middle", "bottom")
COLUMN_WORDS = ("left", "center", "right")
LARGEST_SUM = 20

Turn = tuple[str, str]
Digits = Sequence[PlacedDigit]


def place_words(digit: PlacedDigit) -> str:
    """The position of a digit, in two words."""
    return f"{ROW_WORDS[digit.row]} {COLUMN_WORDS[digit.column]}"


def caption(digits: Digits) -> Turn:
    """(request, caption): every digit in reading order with its place."""
    return "describe the image .", " , ".join(f"{digit.value} at {place_words(digit)}" for digit in digits)


def arithmetic(rng: random.Random) -> Turn:
    """A question that needs no image."""
    first, second = rng.randrange(10), rng.randrange(10)
    if rng.random() < 0.5:
        return f"what is {first} plus {second} ?", str(first + second)
    return f"which is greater , {first} or {second} ?", str(max(first, second))


def _count(digits: Digits, rng: random.Random) -> Turn:
    return "how many digits ?", str(len(digits))


def _has(digits: Digits, rng: random.Random) -> Turn:
    present = {digit.value for digit in digits}
    if rng.random() < 0.5:
        return f"is there a {rng.choice(sorted(present))} ?", "yes"
    return f"is there a {rng.choice([value for value in range(10) if value not in present])} ?", "no"


def _outermost(side: str, most: Callable[..., int], digits: Digits, rng: random.Random) -> Turn | None:
    edge = most(digit.column for digit in digits)
    values = [digit.value for digit in digits if digit.column == edge]
    return (f"which digit is {side}most ?", str(values[0])) if len(values) == 1 else None


def _relation(digits: Digits, rng: random.Random) -> Turn | None:
    single = _unique(digits)
    pairs = [(first, second) for first in single for second in single if first.row != second.row]
    if not pairs:
        return None
    first, second = rng.choice(pairs)
    word = rng.choice(("above", "below"))
    holds = (first.row < second.row) == (word == "above")
    return f"is the {first.value} {word} the {second.value} ?", "yes" if holds else "no"


def _extreme(name: str, most: Callable[..., int], digits: Digits, rng: random.Random) -> Turn:
    return f"what is the {name}imum ?", str(most(digit.value for digit in digits))


def _sum(digits: Digits, rng: random.Random) -> Turn | None:
    total = sum(digit.value for digit in digits)
    return ("what is the sum ?", str(total)) if len(digits) <= 2 and total <= LARGEST_SUM else None


def _read(digits: Digits, rng: random.Random) -> Turn:
    return "read all digits .", " ".join(str(digit.value) for digit in digits)


def _count_of(digits: Digits, rng: random.Random) -> Turn:
    values = [digit.value for digit in digits]
    asked = rng.choice(values) if rng.random() < 0.75 else rng.randrange(10)
    return f"how many times {asked} ?", str(values.count(asked))


def _where(digits: Digits, rng: random.Random) -> Turn | None:
    single = _unique(digits)
    if not single:
        return None
    digit = rng.choice(single)
    return f"where is the {digit.value} ?", place_words(digit)


def _unique(digits: Digits) -> list[PlacedDigit]:
    values = [digit.value for digit in digits]
    return [digit for digit in digits if values.count(digit.value) == 1]


SINGLE_KINDS: dict[str, Callable[[Digits, random.Random], Turn | None]] = {
    "count": _count,
    "has": _has,
    "leftmost": partial(_outermost, "left", min),
    "rightmost": partial(_outermost, "right", max),
    "relation": _relation,
    "max": partial(_extreme, "max", max),
    "min": partial(_extreme, "min", min),
    "sum": _sum,
    "read": _read,
    "count_of": _count_of,
    "where": _where,
}
"""Kinds asked about one image in one turn; each returns None if the scene has no clear answer."""

KINDS = ("caption", *SINGLE_KINDS, "multi_turn", "two_images", "text_only")
"""Every value of the `kind` column."""


def ask_several(digits: Digits, rng: random.Random, turns: int) -> list[tuple[str, Turn]]:
    """Up to `turns` questions of different kinds that fit one scene: [(kind, (question, answer))]."""
    asked = []
    for kind in rng.sample(tuple(SINGLE_KINDS), len(SINGLE_KINDS)):
        turn = SINGLE_KINDS[kind](digits, rng)
        if turn is not None:
            asked.append((kind, turn))
        if len(asked) == turns:
            break
    return asked
