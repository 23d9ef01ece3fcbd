"""Digit scenes as a `datasets.Dataset` with the columns that TRL expects; a row is drawn when it is read."""

import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from saccade.data.digits import SPLITS
from saccade.data.questions import KINDS, SINGLE_KINDS, Turn, arithmetic, ask_several, caption
from saccade.data.scenes import check_grid, render_scene, sample_scene
from saccade.errors import SaccadeError
from saccade.files import write_text_atomically
from saccade.values import STAGES, check_choice

MAX_DIGITS = 4

# Two images double the visual tokens of every row in their padded batch, so they are kept rare.
_SHARES = dict.fromkeys(SINGLE_KINDS, 0.08) | {"multi_turn": 0.08, "two_images": 0.01, "text_only": 0.03}
_COLUMNS = ("images", "messages", "kind", "answer", "num_digits")


def digit_scenes(
    stage: str,
    split: str,
    num_rows: int,
    seed: int = 0,
    grid: int | tuple[int, int] = 12,
    kinds: Sequence[str] | None = None,
    turns: int = 1,
) -> Dataset:
    """Scenes of handwritten digits with captions or questions.

    Row i depends only on i and the other arguments: a longer dataset starts with the shorter one. Digit samples, and
    so scenes, are disjoint between the splits.

    Args:
        stage: "pretrain" for captions, "sft" for questions.
        split: "train", "validation" or "test".
        num_rows: number of rows; they are drawn when read, so many rows cost little.
        seed: selects the sequence of scenes.
        grid: patches of 8 px per side, or (rows, cols); 12 gives a 96 x 96 px image.
        kinds: for "sft", only these of `KINDS`, in equal shares; None for all in their usual shares.
        turns: for "sft", the number of questions about one image in one conversation, as in LLaVA's training data; the
            last one is of the row's `kind`. Scenes that allow fewer questions get fewer.

    Returns:
        Columns `images` (list of RGB PIL images, empty for text-only rows), `messages` (list of {"role", "content"},
        plain strings without placeholders), `kind`, `answer` (the last assistant turn), `num_digits` (of all images).

    Raises:
        SaccadeError: on an unknown `stage`, `split` or kind, a negative `num_rows`, `turns` below 1, or a too small
            `grid`.
    """
    check_choice("stage", stage, STAGES)
    check_choice("split", split, SPLITS)
    if not isinstance(num_rows, int) or num_rows < 0:
        raise SaccadeError(f"num_rows is {num_rows!r}: give an int of at least 0")
    if not isinstance(turns, int) or turns < 1:
        raise SaccadeError(f"turns is {turns!r}: give an int of at least 1")
    sides = check_grid(grid)
    shares = _shares(stage, kinds)
    names, weights = list(shares), list(shares.values())
    drawn = _DrawnRows(f"{stage}/{split}/{seed}", split, sides, turns, names, weights)
    # Under each name stands the number of the row, so that a trainer finds, and may drop, the columns that it knows.
    return Dataset.from_dict({name: range(num_rows) for name in _COLUMNS}).with_transform(drawn)


class _DrawnRows:
    """The transform from numbers of rows to rows: only what is read is drawn."""

    def __init__(
        self, seed: str, split: str, grid: tuple[int, int], turns: int, kinds: list[str], weights: list[float]
    ) -> None:
        self.seed, self.split, self.grid, self.turns = seed, split, grid, turns
        self.kinds, self.weights = kinds, weights

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        rows = [self.specified(number) for number in next(iter(batch.values()))]
        if "images" in batch:
            for row in rows:
                row["images"] = [render_scene(spec) for spec in row["images"]]
        return {name: [row[name] for row in rows] for name in batch}

    def specified(self, number: int) -> dict[str, Any]:
        """A row with the specs of its images in their place."""
        rng = random.Random(f"{self.seed}/{number}")
        return _make_row(rng.choices(self.kinds, self.weights)[0], rng, self.split, self.grid, self.turns)


def scene_specs(dataset: Dataset) -> list[list[tuple[int, ...]]]:
    """The specs that each row's images are drawn from, for `render_scene` and `patch_labels`."""
    drawn = dataset.format["format_kwargs"]["transform"]
    return [drawn.specified(number)["images"] for number in dataset.with_format(None)["images"]]


def write_jsonl(dataset: Dataset, folder: str | os.PathLike) -> Path:
    """Write a dataset as PNG files and `data.jsonl`, one row {"messages", "images": [relative paths]} per line.

    Returns:
        The path of `data.jsonl`, written last, so that it never names a missing image.
    """
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for number, row in enumerate(dataset):
        paths = []
        for part, image in enumerate(row["images"]):
            path = f"images/{number:06d}_{part}.png"
            image.save(folder / path)
            paths.append(path)
        lines.append(json.dumps({"messages": row["messages"], "images": paths}) + "\n")
    return write_text_atomically(folder / "data.jsonl", "".join(lines))


def _shares(stage: str, kinds: Sequence[str] | None) -> dict[str, float]:
    if stage == "pretrain":
        if kinds is not None:
            raise SaccadeError(f"kinds is {kinds!r}: the pretrain stage has captions only, leave it out")
        return {"caption": 1.0}
    if kinds is None:
        return _SHARES
    unknown = [kind for kind in kinds if kind not in _SHARES]
    if unknown or not kinds:
        raise SaccadeError(f"kinds is {list(kinds)!r}: choose from {', '.join(k for k in KINDS if k in _SHARES)}")
    return dict.fromkeys(kinds, 1.0)


def _make_row(kind: str, rng: random.Random, split: str, grid: tuple[int, int], number: int) -> dict[str, Any]:
    if kind == "text_only":
        return _row(kind, [], [arithmetic(rng)], 0)
    while True:
        count = rng.randint(1, 2) if kind == "sum" else rng.randint(1, MAX_DIGITS)
        spec, digits = sample_scene(rng, split, grid, count)
        specs = [spec]
        if kind == "caption":
            turns = [caption(digits)]
        elif kind == "multi_turn":
            turns = [turn for _, turn in ask_several(digits, rng, max(number, rng.randint(2, 3)))]
        elif kind == "two_images":
            other = rng.choice([number for number in range(1, MAX_DIGITS + 1) if number != count])
            specs.append(sample_scene(rng, split, grid, other)[0])
            turns = [("which image has more digits ?", "first" if count > other else "second")]
            count += other
        else:
            last = SINGLE_KINDS[kind](digits, rng)
            others = ask_several(digits, rng, number) if number > 1 else []
            turns = [*[turn for other, turn in others if other != kind][: number - 1], last]
        if turns[-1] is not None:
            return _row(kind, specs, turns, count)


def _row(kind: str, specs: list[tuple[int, ...]], turns: list[Turn], num_digits: int) -> dict[str, Any]:
    messages = []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"images": specs, "messages": messages, "kind": kind, "answer": turns[-1][1], "num_digits": num_digits}
