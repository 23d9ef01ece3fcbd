"""Load a recipe's rows: embedded ones, files, folders, or the hub."""

import logging
import random
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset

from saccade.data import digit_scenes
from saccade.data.addresses import ImageAddresses
from saccade.data.mixture import SourceOptions, mix, source_options, stream
from saccade.data.sources import PROBED, Source, TableSource, is_data_file
from saccade.errors import RecordError, SaccadeError
from saccade.training.models import ModelOptions
from saccade.values import SPLITS, check_choice

logger = logging.getLogger(__name__)

DIGITS = "digits"
DIGIT_ROWS = 50_000
DIGIT_EVAL_ROWS = 500


def dataset_sources(options: ModelOptions) -> list[SourceOptions]:
    """The sources that a recipe's `dataset` names. The recipe's image folder, split and format are the defaults of
    each source.
    """
    given = options.dataset if isinstance(options.dataset, list) else [options.dataset]
    mine = {"format": options.dataset_format, "image_folder": options.image_folder, "split": options.dataset_split}
    sources = source_options(given, **mine)
    if any(source.path == DIGITS for source in sources):
        check_choice("dataset_split", options.dataset_split, SPLITS)
        if options.dataset_streaming:
            raise SaccadeError("dataset_streaming=true: digits are drawn when they are read, set it to false")
    return sources


def check_split(options: ModelOptions) -> None:
    """Refuse a split where all rows, to train and to evaluate on, come from single files, which have none."""
    sources = [
        source for one in (options, _eval_options(options)) if one is not None for source in dataset_sources(one)
    ]
    if options.dataset_split != ModelOptions.dataset_split and all(is_data_file(source.path) for source in sources):
        raise SaccadeError(
            f"dataset_split={options.dataset_split!r}: {sources[0].path!r} is a single file, which has no splits: "
            "remove it, and give dataset_rows for the first rows, or eval_share to hold some out"
        )


def dataset_name(options: ModelOptions) -> str:
    """What a recipe trains on, in a few words."""
    names = ["digits, the embedded scenes" if one.path == DIGITS else one.path for one in dataset_sources(options)]
    more = len(names) - 3
    return ", ".join(names[:3]) + (f" and {more} more" if more > 0 else "")


def check_rows(options: ModelOptions) -> None:
    """Refuse what can be known of the rows to train and to evaluate on without reading one: options of a source, files
    and folders that are not there.
    """
    check_split(options)
    addresses = image_addresses(options)
    for one in (options, _eval_options(options)):
        for source in [] if one is None else dataset_sources(one):
            if source.path != DIGITS:  # which has no files
                source.folders(options.allow_outside_images, addresses)


def load_rows(options: ModelOptions, shards: int = 1) -> Dataset | IterableDataset:
    """The rows to train on, with `messages` (or `prompt` and `completion`) and `images`.

    Rows are read and converted when they are used; an unusable row has a `fault`.

    Args:
        options: the recipe's options.
        shards: for a stream: number of parts to read in parallel, one per process and data-loader worker.

    Raises:
        SaccadeError: if they cannot be read, or none of the first rows is usable.
    """
    sources = dataset_sources(options)
    if options.dataset_streaming:
        order = (options.dataset_seed, options.dataset_shuffle_buffer, shards, options.dataset_rows)
        return stream(sources, options.allow_outside_images, *order, image_addresses(options))
    if options.dataset == DIGITS:
        return _digits(options, options.dataset_rows)
    # A file that is listed twice is one source: each of its rows is one record, however often it is trained on.
    kinds = [_kind(one) for one in sources]
    firsts = [kinds.index(kind) for kind in kinds]
    distinct = {first: open_source(sources[first], options) for first in dict.fromkeys(firsts)}
    opened = [distinct[first] for first in firsts]
    weights = None if sources[0].weight is None else [source.weight for source in sources]
    mixed = mix(opened, weights, [source.rows for source in sources], options.dataset_seed)
    _warn_without_images(opened)
    return mixed if options.dataset_rows is None else mixed.select(range(min(options.dataset_rows, len(mixed))))


def _kind(source: SourceOptions) -> SourceOptions:
    """What two sources of the same records have in common, however their paths are written."""
    folders = source.image_folder
    folders = [folders] if isinstance(folders, str) else folders
    return replace(
        source,
        path=_resolved(source.path),
        weight=None,
        rows=source.rows if source.path == DIGITS else None,
        image_folder=None if folders is None else [_resolved(folder) for folder in folders],
    )


def _resolved(path: str) -> str:
    return str(Path(path).resolve()) if path != DIGITS and Path(path).exists() else path


def load_eval_rows(options: ModelOptions) -> Dataset | None:
    """The rows of `eval_dataset`, read as those of `dataset` are; None without one."""
    mine = _eval_options(options)
    return None if mine is None else load_rows(mine)


def _eval_options(options: ModelOptions) -> ModelOptions | None:
    """Options whose `dataset` is the `eval_dataset`; None without one."""
    if options.eval_dataset is None:
        return None
    rows = options.eval_rows
    mine = replace(options, dataset=options.eval_dataset, dataset_rows=rows, dataset_streaming=False)
    if options.eval_dataset == DIGITS:
        mine = replace(mine, dataset_split="validation", dataset_rows=DIGIT_EVAL_ROWS if rows is None else rows)
    return mine


def hold_out(rows: Dataset, share: float, seed: int, most: int | None = None) -> tuple[Dataset, Dataset]:
    """Split rows into those to train on and those to evaluate on, in the order as before.

    A weighted mixture repeats records: one that is held out is evaluated on once, and no repeat of it is trained on.

    Args:
        share: of the records to hold out, in (0, 1), drawn by `seed`.
        most: evaluate on at most so many of those held out.
    """
    records = _records(rows)
    first = sorted({record: index for index, record in reversed(list(enumerate(records)))}.values())
    number = round(share * len(first))
    if not 0 < number < len(first):
        raise SaccadeError(
            f"eval_share={share}: {number} of {len(first)} rows would be held out, and both parts need one: "
            "give another share"
        )
    places = sorted(random.Random(f"saccade eval {seed}").sample(first, number))
    held = {records[index] for index in places}
    kept = [index for index, record in enumerate(records) if record not in held]
    return rows.select(kept), rows.select(places[:most])


def _records(rows: Dataset) -> list[Any]:
    """What tells the record of each row: its source and its place there, or the row itself if no row is repeated."""
    if not {"source", "row"} <= set(rows.column_names):
        return list(range(len(rows)))
    # A file that is listed with other image folders, or in another format, has the same records.
    firsts = rows.format["format_kwargs"]["transform"].firsts
    numbers = rows.with_format("numpy")
    sources = [firsts[number] for number in numbers["source"][:].tolist()]
    return list(zip(sources, numbers["row"][:].tolist(), strict=True))


def _warn_without_images(sources: list[Source]) -> None:
    """Warn if the first rows of all sources have no images, usually because their column has another name."""
    for source in sources:
        for index in range(min(len(source), PROBED)):
            with suppress(RecordError):
                row = source.read(index)
                if row["images"] or row.get("videos"):
                    return
    logger.warning(
        "the first rows of the dataset have no image and no video: there is nothing to prune; they belong in 'images' "
        "and 'videos'"
    )


def open_source(source: SourceOptions, options: ModelOptions) -> Source:
    """Open the rows of one source."""
    if source.path == DIGITS:
        return TableSource(_digits(options, source.rows), DIGITS)
    return source.open(options.allow_outside_images, image_addresses(options))


def image_addresses(options: ModelOptions) -> ImageAddresses | None:
    """What fetches images by their addresses; None without `image_urls`.

    Raises:
        SaccadeError: on a value that is not the beginning of an address.
    """
    given = options.image_urls
    if given is None:
        return None
    return ImageAddresses([given] if isinstance(given, str) else given, options.image_cache)


def _digits(options: ModelOptions, rows: int | None) -> Dataset:
    return digit_scenes(
        options.dataset_stage,
        options.dataset_split,
        DIGIT_ROWS if rows is None else rows,
        options.dataset_seed,
        turns=options.dataset_turns,
    )
