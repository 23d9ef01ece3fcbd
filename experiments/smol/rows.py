"""The tasks as rows of conversations: one Parquet file for each task, split, stage and number."""

import io
import random
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value, concatenate_datasets

from experiments.smol.tasks import TASKS, Sample
from experiments.smol.tasks.base import Question
from saccade.errors import SaccadeError
from saccade.files import atomic_path
from saccade.values import check_counts

STAGES = ("pretrain", "sft")
REQUEST = "Describe the picture."
ASKED_SEED = 3
"""The stream of the pictures that trained models are asked about. Stages one and two have 1 and 2, and what the tasks
ask was decided by answers about stream 0."""

_MESSAGES = List({"role": Value("string"), "content": Value("string")})
_FEATURES = Features(
    {
        "images": List({"bytes": Value("binary"), "path": Value("string")}),
        "messages": _MESSAGES,
        "kind": Value("string"),
        "answer": Value("string"),
    }
)


def make_rows(
    task: str, split: str, stage: str, number: int, seed: int = 0, grid: int = 12, turns: int = 1
) -> Dataset:
    """Pictures of a task with captions or questions. Row i depends on the other arguments and i alone.

    Args:
        task: a key of `TASKS`.
        split: "train", "validation" or "test".
        stage: "pretrain" for captions, "sft" for questions.
        number: rows.
        seed: which stream of pictures.
        grid: patches per side.
        turns: questions about each picture, in one conversation, or as many as there are.

    Returns:
        Columns `images` (one PNG file), `messages`, `kind` (task and kind of the last question, as "charts/value") and
        `answer` (to it).

    Raises:
        SaccadeError: on an unknown task, stage, split or grid, or a number below 1.
    """
    if task not in TASKS:
        raise SaccadeError(f"task={task!r} is unknown: use one of {', '.join(TASKS)}")
    if stage not in STAGES:
        raise SaccadeError(f"stage={stage!r} is unknown: use one of {', '.join(STAGES)}")
    check_counts(number=number, turns=turns)
    rows = [_row(task, split, stage, index, seed, grid, turns) for index in range(number)]
    return Dataset.from_list(rows, features=_FEATURES)


def rows_file(folder: Path, task: str, split: str, stage: str, number: int, seed: int, grid: int, turns: int) -> Path:
    """The file that `make_rows` of these arguments is in, made if it is not there yet.

    Raises:
        SaccadeError: as `make_rows`.
    """
    path = folder / f"{task}-{split}-{stage}-{number}-seed{seed}-grid{grid}-turns{turns}.parquet"
    if not path.is_file():
        with atomic_path(path) as aside:
            make_rows(task, split, stage, number, seed, grid, turns).to_parquet(str(aside))
    return path


def asked_file(folder: Path, task: str, split: str, number: int, grid: int) -> Path:
    """The file of the questions that trained models are asked, one about each picture, made if it is not there yet.

    Raises:
        SaccadeError: as `make_rows`.
    """
    return rows_file(folder, task, split, "sft", number, ASKED_SEED, grid, 1)


def read_rows(paths: list[Path]) -> Dataset:
    """The rows of several files, one file after the other."""
    return concatenate_datasets([Dataset.from_parquet(str(path), features=_FEATURES) for path in paths])


def _row(task: str, split: str, stage: str, index: int, seed: int, grid: int, turns: int) -> dict[str, Any]:
    sample = TASKS[task].sample(split, index, seed, grid)
    rng = random.Random(f"rows/{task}/{split}/{stage}/{seed}/{index}")
    if stage == "pretrain":
        kind, asked = "caption", [(REQUEST, sample.caption)]
    else:
        kind, asked = _ask(sample, rng, turns)
    messages = []
    for question, answer in asked:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    file = io.BytesIO()
    # Little compression: the files are read once or twice.
    sample.image.save(file, "PNG", compress_level=1)
    image = {"bytes": file.getvalue(), "path": None}
    return {"images": [image], "messages": messages, "kind": f"{task}/{kind}", "answer": asked[-1][1]}


def _ask(sample: Sample, rng: random.Random, turns: int) -> tuple[str, list[tuple[str, str]]]:
    """Different questions about a sample, of kinds taken in turn so that each is learned; the last is of a kind drawn
    from those that there are."""
    by_kind: dict[str, list[Question]] = {}
    for question in rng.sample(sample.questions, len(sample.questions)):
        by_kind.setdefault(question.kind, []).append(question)
    kinds = rng.sample(sorted(by_kind), len(by_kind))
    in_turn = (
        by_kind[kind][place] for place in range(len(sample.questions)) for kind in kinds if place < len(by_kind[kind])
    )
    asked: dict[str, str] = {}
    for question in in_turn:
        if len(asked) < turns:
            asked.setdefault(question.text, question.answer)
    return kinds[0], list(asked.items())[::-1]
