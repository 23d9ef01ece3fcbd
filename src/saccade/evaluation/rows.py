"""Rows of a data file to evaluate on: each conversation's last answer is the one to find."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import ProcessorMixin

from saccade.data.addresses import ImageAddresses
from saccade.data.conversation import text_of
from saccade.data.lengths import check_words
from saccade.data.mixture import source_options
from saccade.data.sources import Source, is_data_file
from saccade.data.tables import list_splits
from saccade.dualspeed.folder import read_run_file
from saccade.errors import RecordError, SaccadeError
from saccade.values import check_choice
from saccade.videos import Sampling, open_video

COLUMNS = ("images", "videos", "messages", "kind", "answer")


def file_rows(
    path: str,
    image_folder: Sequence[str] | None = None,
    count: int | None = None,
    sampling: Sampling | None = None,
    addresses: ImageAddresses | None = None,
    split: str | None = None,
    reader: tuple[ProcessorMixin, int] | None = None,
) -> Dataset:
    """The rows of a data file with what `evaluate_inferences` reads, each opened when it is.

    Args:
        path: in any form that `dataset` of a recipe has.
        image_folder: folders of its images and videos; by default that of the file.
        count: only the first so many rows.
        sampling: which frames are taken of a video.
        addresses: fetches images that are named by their address; none are when left out.
        split: which split to read; as `choose_split` returns it.
        reader: the model's processor and the token id of its visual tokens; with these, rows whose text the model
            would take for something else are refused, as in training.

    Returns:
        Columns `images`, `videos` (clips), `messages`, `kind` (the row's own, or "rows") and `answer`, the last turn.

    Raises:
        SaccadeError: if there are no rows to read.
    """
    given = {"path": path} if split is None else {"path": path, "split": split}
    source = source_options([given], image_folder=image_folder)[0].open(addresses=addresses)
    rows = len(source) if count is None else min(count, len(source))
    return Dataset.from_dict({name: range(rows) for name in COLUMNS}).with_transform(
        partial(_answers, source, sampling, reader)
    )


def choose_split(path: str, split: str | None = None) -> str | None:
    """The split of a data set to evaluate on; None where it has none.

    Args:
        path: as for `file_rows`.
        split: the one asked for. It can be left out where there is only one.

    Raises:
        SaccadeError: if there is no such split, or there are several to choose from.
    """
    if is_data_file(path):
        return split
    splits = list_splits(path)
    if not splits:
        return split
    if split is None and len(splits) > 1:
        named = ", ".join(sorted(splits))
        raise SaccadeError(f"dataset={path!r} has the splits {named}: choose one of them with --split")
    split = splits[0] if split is None else split
    check_choice("split", split, splits)
    return split


def trained_sampling(folder: str | Path) -> Sampling:
    """Which frames of a video the model in a folder was trained on; the defaults if there is no such record.

    Raises:
        SaccadeError: if the record is damaged.
    """
    trained = (read_run_file(folder) or {}).get("config", {}) if Path(folder).is_dir() else {}
    given = {name: trained.get(f"video_{name}") for name in ("frames", "fps")}
    return Sampling(**{name: value for name, value in given.items() if value is not None})


def _answers(
    source: Source, sampling: Sampling | None, reader: tuple[ProcessorMixin, int] | None, batch: dict[str, list]
) -> dict[str, list]:
    """The transform from numbers of rows to the columns that are read of them."""
    rows = [_row(source, sampling, reader, number, clips="videos" in batch) for number in next(iter(batch.values()))]
    return {name: [row[name] for row in rows] for name in batch}


def _row(
    source: Source, sampling: Sampling | None, reader: tuple[ProcessorMixin, int] | None, number: int, clips: bool
) -> dict[str, Any]:
    try:
        record = source.record(number)
        row = source.row(record)
        messages = row["messages"] if "messages" in row else [*row["prompt"], *row["completion"]]
        if messages[-1]["role"] != "assistant":
            raise RecordError("it ends with a question: end it with the answer to find", "no_answer")
        if reader is not None:
            check_words(row, *reader)
        videos = [open_video(video, sampling) for video in row["videos"]] if clips else []
    except RecordError as error:
        raise SaccadeError(f"{source.name(number)}: {error}") from error
    kind = record.get("kind")
    return {
        "images": row["images"],
        "videos": videos,
        "messages": messages,
        "kind": kind if isinstance(kind, str) and kind else "rows",
        "answer": text_of(messages[-1]),
    }
