"""Mistyped values, told before the seconds that torch and transformers take to import.

Only what is certainly wrong is refused here. The rest passes, and the whole checks come later.
"""

import re
from collections.abc import Mapping
from glob import glob
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from saccade.errors import SaccadeError, one_of
from saccade.files import check_exists, nearest_path
from saccade.recipes import RECIPES, earlier_stage
from saccade.values import DATA_SUFFIXES, DTYPES, ENTRY_POINT_GROUP, check_choice, check_pruning, is_number

REDUCERS = Path(__file__).parents[1] / "reducers"
WRITTEN = ("pruning_config.json", "log.json", "eval.json")
"""Files of which a folder that this library trained or evaluated has at least one."""
FILE_SUFFIXES = (*DATA_SUFFIXES, ".csv", ".arrow")
"""What no hub id ends in. Files of the last kinds are refused where they are opened."""
NUMBERS = ("prune_ratio", "keep_tokens", "fit_length", "patch_tolerance")


def check_values(values: Mapping[str, Any]) -> None:
    """Refuse a reducer or a dtype that there is not, or a pruning option that is out of range.

    Args:
        values: of the options, or of all fields of a recipe.

    Raises:
        SaccadeError: naming the first of them.
    """
    check_reducer(values.get("reducer"))
    if isinstance(values.get("dtype"), str):
        check_choice("dtype", values["dtype"], DTYPES)
    # YAML reads 1e-1 as a string, which is converted later.
    check_pruning({name: value for name, value in values.items() if name not in NUMBERS or is_number(value)})


def check_reducer(name: Any) -> None:
    """Refuse a reducer that there is not. Where plug-ins are installed, they may provide it under any name.

    Raises:
        SaccadeError: with the most similar one.
    """
    known = sorted(reducer_names())
    if isinstance(name, str) and name not in known and not entry_points(group=ENTRY_POINT_GROUP):
        raise SaccadeError(f"reducer={name!r} is unknown: {one_of(name, known)}")


def reducer_names() -> set[str]:
    """The names of the library's own reducers, from their source."""
    sources = (path.read_text(encoding="utf-8") for path in REDUCERS.glob("*.py"))
    return {name for source in sources for name in re.findall(r'^@register_reducer\("(\w+)"\)', source, re.MULTILINE)}


def check_model(model: Any) -> None:
    """Refuse a model that is neither a folder nor a hub id.

    An id has at most one slash and may look like a path, so such a name is only refused if it resembles the folder of
    a model that was trained here.

    Raises:
        SaccadeError: with the most similar folder.
    """
    if not isinstance(model, str) or model == "tiny" or Path(model).exists():
        return
    near = nearest_path(model)
    trained = near is not None and any((near / name).is_file() for name in WRITTEN)
    if trained or model.startswith((".", "/", "~")) or model.count("/") > 1:
        check_exists(model, "model", "give the folder of a model, or a hub id", folder=True)


def stage_to_come(recipe: str, model: Any) -> str | None:
    """That a model does not exist, with the command that writes it, if that trains another recipe in the folder of
    `recipe`; None of any other model.
    """
    before = earlier_stage(recipe, model) if isinstance(model, str) and not Path(model).exists() else None
    if before is None:
        return None
    name = before.relative_to(RECIPES).with_suffix("") if before.is_relative_to(RECIPES) else before
    return f"model={model!r} does not exist: `saccade train {name}` writes it"


def check_dataset(path: Any) -> None:
    """Refuse a data file that does not exist. What does not end as one may be a hub id; patterns and addresses pass.

    Raises:
        SaccadeError: with the most similar file.
    """
    if isinstance(path, str) and path.endswith(FILE_SUFFIXES) and not ("://" in path or glob(path, recursive=True)):
        check_exists(path, "dataset", "give a JSON, JSON-lines or Parquet file")
