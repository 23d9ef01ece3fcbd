"""The shipped recipes, and how a recipe is read: light enough that a mistyped name is answered at once."""

import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import yaml

from saccade.errors import SaccadeError, did_you_mean, kind_of
from saccade.files import similar_path
from saccade.presets import with_preset

RECIPES = Path(__file__).parent
FIELD_FILES = (
    *("saccade/training/models.py", "saccade/dualspeed/config.py"),
    *("trl/trainer/base_config.py", "trl/trainer/sft_config.py", "transformers/training_args.py"),
)
"""The files of the dataclasses whose fields a recipe may have."""


_DECIMAL = {
    "tag:yaml.org,2002:int": r"[-+]?(0|[1-9][0-9]*)$",
    "tag:yaml.org,2002:float": r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?$|[-+]?[0-9]+[eE][-+]?[0-9]+$|"
    r"[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$",
}
_NUMBERS = (*_DECIMAL, "tag:yaml.org,2002:timestamp")


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, as YAML says; of two, the stock loader takes the last.

    Numbers are decimal, as in YAML 1.2: for the stock loader `2024_11` is 202411, `0755` 493, `12:30` 750,
    `2024-11-12` a date and `1e-3` a text.
    """

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in pairs if tag not in _NUMBERS]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        # Here rather than where mappings are constructed: there, keys that `<<` merges in are beside the own ones.
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                name, line = (key.tag, key.value), key.start_mark.line + 1
                if name in lines:
                    where = f"in lines {lines[name]} and" if lines[name] != line else "twice in line"
                    raise yaml.YAMLError(f"{key.value!r} is given {where} {line}: remove one")
                lines[name] = line
        return node


for _tag, _pattern in _DECIMAL.items():
    _Loader.add_implicit_resolver(_tag, re.compile(_pattern), list("-+.0123456789"))


def _read_yaml(text: str) -> Any:
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def find_recipe(name: str | Path) -> Path:
    """The file of a recipe, by path or by the name of a shipped one.

    Raises:
        SaccadeError: if there is neither.
    """
    path = Path(name)
    shipped = RECIPES / path.with_suffix(".yaml")
    for candidate in (path, shipped):
        if candidate.is_file():
            return candidate
    names = sorted(str(file.relative_to(RECIPES).with_suffix("")) for file in RECIPES.rglob("*.yaml"))
    folders = sorted({name.partition("/")[0] for name in names})
    for folder in (path, RECIPES / path):
        if folder.is_dir():
            inside = sorted(file.name if folder == path else file.stem for file in folder.glob("*.yaml"))
            hint = "give a YAML file or a shipped recipe, such as tiny-digits/sft; a model's folder goes with --model"
            if inside:
                hint = f"use one of {', '.join(str(path / one) for one in inside)}"
            raise SaccadeError(f"recipe {str(name)!r} is a folder: {hint}")
    otherwise = f"give a YAML file, or a shipped recipe, such as tiny-digits/sft (there are {', '.join(folders)})"
    hint = did_you_mean(str(name), names, similar_path(path, otherwise))
    raise SaccadeError(f"recipe {str(name)!r} does not exist: {hint}")


def is_recipe(name: str) -> bool:
    """Whether the name of data, or of a recipe that says which, is that of a recipe: a YAML file or a shipped one."""
    path = Path(name)
    shipped = not path.suffix and not path.exists() and (RECIPES / f"{name}.yaml").is_file()
    return path.suffix in (".yaml", ".yml") or shipped


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The fields of a recipe file, with those of its preset, and `pretrain`, the recipe to run before it.

    Raises:
        SaccadeError: on a missing or malformed file, or an unknown preset.
    """
    path = find_recipe(path)
    try:
        values = _read_yaml(path.read_text())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise SaccadeError(f"recipe {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise SaccadeError(f"recipe {path} must be a mapping of fields to values, found {kind_of(values)}")
    return with_preset(values)


def earlier_stage(path: str | Path, model: str) -> Path | None:
    """The recipe in the folder of the recipe `path` whose `output_dir` is `model`; None if there is none."""
    for beside in sorted(find_recipe(path).parent.glob("*.yaml")):
        # Any file may lie in the folder of a recipe, of any size and kind.
        with suppress(SaccadeError, OSError):
            if model.encode() not in beside.read_bytes():
                continue
            earlier = read_recipe(beside)
            before = earlier.get("model")
            if earlier.get("output_dir") == model and isinstance(before, str) and before != model:
                return beside
    return None


def put_over(values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a recipe, overridden by others and by those of the preset that the others name. A number of tokens
    also replaces a ratio, and a ratio a number of tokens.

    Raises:
        SaccadeError: on an unknown preset.
    """
    given = with_preset(given)
    budgets = ("prune_ratio", "keep_tokens")
    replaced = budgets if any(given.get(name) is not None for name in budgets) else ()
    return {**{name: value for name, value in values.items() if name not in replaced}, **given}


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """`--field value` and `--field=value` pairs as a mapping; values are read as YAML.

    Raises:
        SaccadeError: on a word that is not a field, or a field without a value.
    """
    values: dict[str, Any] = {}
    words = list(overrides)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise SaccadeError(f"{word!r} is not a field: overrides are written --field value")
        name, equals, text = word[2:].partition("=")
        if not equals:
            if not words:
                raise SaccadeError(f"--{name} has no value: write --{name} VALUE")
            text = words.pop(0)
        try:
            values[name.replace("-", "_")] = _read_yaml(text)
        except yaml.YAMLError as error:
            raise SaccadeError(f"--{name} {text!r} cannot be read as a value") from error
    return values


def parse_grid(texts: Sequence[str], flag: str = "--grid") -> dict[str, list[Any]]:
    """Parse one `field=a,b,c` per field; values are read as YAML.

    Raises:
        SaccadeError: on a text without values, a field given twice, or a value given twice.
    """
    grid: dict[str, list[Any]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name or not values.strip():
            raise SaccadeError(f"{flag} {text!r}: write {flag} field=a,b,c")
        if name in grid:
            raise SaccadeError(f"{flag} {name} is given twice: write {flag} {name}=a,b,c once")
        try:
            grid[name] = _read_yaml(f"[{values}]")
        except yaml.YAMLError as error:
            raise SaccadeError(f"{flag} {text!r} cannot be read as values") from error
        repeated = [value for number, value in enumerate(grid[name]) if value in grid[name][:number]]
        if repeated:
            raise SaccadeError(f"{flag} {name}: the value {repeated[0]!r} is given twice")
    return grid


def check_fields(names: Collection[Any], known: Collection[str], source: str, flags: Collection[str] = ()) -> None:
    """Refuse a field that a recipe cannot have.

    Args:
        flags: what else could have been meant.
    """
    for name in names:
        if name not in known:
            hint = did_you_mean(str(name), [*known, *flags], "DualSpeedConfig and docs/recipes.md list the fields")
            raise SaccadeError(f"{source}: unknown field {name!r}: {hint}")


def check_early(path: str | Path, overrides: Sequence[str], flags: Collection[str] = ()) -> dict[str, Any]:
    """Refuse a recipe whose name or fields are mistyped, before the seconds that torch and trl take to import.

    Args:
        flags: of the verb, with underscores, which a mistyped field may have been meant as.

    Returns:
        The recipe's fields, overridden, as written.
    """
    values, source, known = read_recipe(path), str(find_recipe(path)), source_fields()
    if known is not None:
        # Without their values, since a mistyped flag may have none.
        given = [word[2:].partition("=")[0].replace("-", "_") for word in overrides if word.startswith("--")]
        # `pretrain` is a sweep's, and the whole check says so.
        check_fields([*values, *given], known | {"pretrain", "preset"}, source, flags)
    return put_over(values, parse_overrides(overrides))


def source_fields() -> set[str] | None:
    """The annotated names in `FIELD_FILES`, from their text alone: nothing is imported.

    None if a file is not there: where a library keeps its fields is its own affair. The whole check comes later.
    """
    names: set[str] = set()
    for file in FIELD_FILES:
        package, _, inner = file.partition("/")
        spec = find_spec(package)  # of a top-level package, this finds the folder without importing it
        path = Path(*(spec.submodule_search_locations or ()), inner) if spec else None
        if path is None or not path.is_file():
            return None
        parts = re.split(r"^(?=\S)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        classes = "".join(part for part in parts if part.startswith("class "))
        names |= set(re.findall(r"^    (\w+): ", classes, re.MULTILINE))
    return names
