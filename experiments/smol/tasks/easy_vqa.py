"""easy-VQA, a public data set of coloured shapes: https://pypi.org/project/easy-vqa/."""

import json
import re
from collections import defaultdict
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from experiments.smol.fonts import package_folder
from experiments.smol.tasks.base import PATCH, Question, Region, Sample, sample_rng

SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
HELD_OUT = 10
"""One in so many images of the published training set is a validation image."""

_NEGATED = re.compile(r"\b(no|not)\b")


class EasyVQA:
    """One shape of one colour on a light ground, with the questions of the data set.

    The test split is the data set's own. Validation is a tenth of its training images, which `train` goes without.
    Of these, an image whose questions and answers tell neither its shape nor its colour is left out: it has no
    caption. Numbers go round.
    """

    name = "easy_vqa"
    kinds = ("shape", "colour", "has", "has_not")
    words = (*SHAPES, *COLOURS)

    def sample(self, split: str, number: int, seed: int = 0, grid: int = 12) -> Sample:
        rng = sample_rng(self.name, split, number, seed, grid)
        images = image_numbers(split)
        # A walk through all images that differs between seeds.
        index = images[(number + 7919 * seed) % len(images)]
        folder, asked = _questions(_folder(split))
        with Image.open(folder / "images" / f"{index}.png") as file:
            small = file.convert("RGB")
        scale = grid * PATCH / small.width
        box = tuple(round(edge * scale) for edge in shape_box(small))
        questions = list(asked[index])
        rng.shuffle(questions)
        image = small.resize((grid * PATCH, grid * PATCH), Image.Resampling.BILINEAR)
        return Sample(image, (Region(box, _content(questions)),), tuple(questions))


def image_numbers(split: str) -> tuple[int, ...]:
    """The images of a split, as the data set numbers them."""
    _, asked = _questions(_folder(split))
    if split == "test":
        return tuple(sorted(asked))
    return tuple(
        index
        for index in sorted(asked)
        if (index % HELD_OUT == 0) == (split == "validation") and _content(asked[index])
    )


def shape_box(image: Image.Image) -> tuple[int, int, int, int]:
    """Where the shape is: whatever differs from the ground, which the corners show, by more than noise does."""
    pixels = np.asarray(image, dtype=np.int16)
    ground = np.median(pixels[[0, 0, -1, -1], [0, -1, 0, -1]], axis=0)
    rows, columns = (np.abs(pixels - ground).max(-1) > 20).nonzero()
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def _folder(split: str) -> str:
    return "test" if split == "test" else "train"


@lru_cache(maxsize=2)
def _questions(part: str) -> tuple[Path, dict[int, list[Question]]]:
    """The folder of a part of the data set, and its questions by image."""
    folder = package_folder("easy_vqa") / "data" / part
    asked: dict[int, list[Question]] = defaultdict(list)
    for text, answer, index in json.loads((folder / "questions.json").read_text()):
        asked[index].append(Question(_kind(text, answer), text, answer))
    return folder, dict(asked)


def _kind(text: str, answer: str) -> str:
    if answer in SHAPES:
        return "shape"
    if answer in COLOURS:
        return "colour"
    return "has_not" if _NEGATED.search(text) else "has"


def _content(questions: list[Question]) -> str:
    """Colour and shape, as far as questions and answers tell."""
    found = set()
    for question in questions:
        # "what color is the circle?" is asked where there is one, "is there a red shape?" anywhere.
        if question.kind in ("shape", "colour") or (question.kind, question.answer) in (
            ("has", "yes"),
            ("has_not", "no"),
        ):
            found |= {question.answer, *re.findall(r"\w+", question.text)}
    return " ".join(word for word in (*COLOURS, *SHAPES) if word in found)
