"""Checks of the files in a model's folder, which may come from a stranger, before stock loading reads them."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from saccade.errors import SaccadeError
from saccade.files import check_entries

ADAPTER_FILE = "adapter_config.json"
_READ = frozenset(
    (
        *("config.json", "generation_config.json", ADAPTER_FILE, "processor_config.json", "preprocessor_config.json"),
        *("video_preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
        *("added_tokens.json", "vocab.json"),
    )
)
"""JSON objects that stock loading reads."""
INDEX_ENDING = ".index.json"
_NAMES = ("fast_tokenizer_files", "gguf_file")
"""Fields in which a tokenizer's config names other files."""


def check_files(place: str | Path, field: str = "model") -> None:
    """Refuse a model's folder with a damaged file, for which stock loading raises an error that does not name it, or
    with one that names a file of another folder.

    Args:
        field: what the user named it by.
    """
    folder = Path(place)
    if folder.exists() and not folder.is_dir():  # stock loading would read it as a config
        raise SaccadeError(f"{field}={str(place)!r} is not a folder: name the folder of a model")
    if not folder.is_dir():
        return
    check_entries(folder, field)
    for path in sorted(folder.iterdir()):
        try:
            if path.name in _READ or path.name.endswith(INDEX_ENDING):
                check_names(path)
            elif path.suffix == ".safetensors":
                with safe_open(path, framework="pt"):  # compares the length of the file with its header
                    pass
        except (OSError, ValueError, SafetensorError) as error:
            raise damaged(place, path.name, error, field) from error


def check_names(path: Path) -> None:
    """Refuse a JSON file of a model that is damaged, or that makes stock loading read a file of another folder."""
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError("it is not a JSON object")
    if path.name.endswith(INDEX_ENDING):
        if not isinstance(found.get("weight_map"), dict):
            raise ValueError("its weight_map is not a mapping")
        names = set(map(str, found["weight_map"].values()))
    else:
        given = [found.get(field) for field in _NAMES]
        names = {str(name) for entry in given for name in (entry if isinstance(entry, list) else [entry]) if name}
    for name in sorted(names):
        if Path(name).name != name or not (path.parent / name).is_file():
            raise ValueError(f"it names {name[:100]!r}, which is not a file beside it")


def damaged(place: str | Path, name: str, error: Exception, field: str = "model") -> SaccadeError:
    """The error for a model with an unreadable file."""
    reason = " ".join(str(error).split())[:200]
    return SaccadeError(f"{field}={str(place)!r}: {name} is damaged ({reason}): restore it, or name another model")
