"""What a stage reads of the files that its fields name, so that a sweep notices when they have changed."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from saccade.dualspeed.weights import weight_files
from saccade.sweeps.spec import stage_names

DATA = ("*.json", "*.jsonl", "*.parquet", "*.arrow")


def inputs_of(values: Mapping[str, Any]) -> dict[str, list[int]]:
    """Size and time of change, in ns, of each local file of rows or weights that the fields of a stage name, by path.

    Pictures are not looked at: there may be many.
    """
    found = {}
    for name in _named(values):
        place = Path(name)
        if place.is_file():
            files = [place]
        elif place.is_dir():
            files = weight_files(place) or [path for pattern in DATA for path in sorted(place.rglob(pattern))]
        else:
            continue
        for file in files:
            stat = file.stat()
            found[str(file)] = [stat.st_size, stat.st_mtime_ns]
    return found


def same_inputs(result: Mapping[str, Any]) -> bool:
    """Whether what the stages of a run's result have read is as it was. A result of an earlier version does not tell,
    and counts as unchanged."""
    stages = result["spec"]["stages"]
    return all(
        stage_inputs_are_as_before(values, result["stages"].get(name, {}))
        for name, values in zip(stage_names(stages), stages, strict=True)
    )


def stage_inputs_are_as_before(values: Mapping[str, Any], record: Mapping[str, Any]) -> bool:
    """The same of a stage's own record."""
    return record.get("inputs") is None or record["inputs"] == inputs_of(values)


def _named(values: Mapping[str, Any]) -> Iterator[str]:
    for field in ("model", "dataset", "eval_dataset"):
        given = values.get(field)
        for one in given if isinstance(given, Sequence) and not isinstance(given, str) else [given]:
            path = one.get("path") if isinstance(one, Mapping) else one
            if isinstance(path, str):
                yield path
