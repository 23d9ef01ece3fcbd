"""A run and its folder: each run has an id, and no run overwrites the files of another."""

import json
import secrets
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from saccade.companions import ENDING
from saccade.errors import SaccadeError
from saccade.files import check_entries, check_writable, file_lock, write_json_atomically
from saccade.reducers import PRUNING_FILE

RUN_FILE = "dualspeed.json"
"""How the weights next to this file were trained, and the id of the run."""

OWNER_FILE = "run.json"
"""In `output_dir` from the start of training: the run that the folder belongs to."""

LOCK_FILE = ".run.lock"
PARTIAL_DIR = "_partial-checkpoint"
"""Uploads of `output_dir`, which run while a checkpoint is written, leave out what begins with an underscore."""
EVALUATION_FILE = "eval.json"
LOG_FILE = "log.json"
MEASURED = (EVALUATION_FILE, LOG_FILE)
"""Files that describe the weights next to them and no others."""

_WEIGHTS = (
    "*.safetensors",
    f"*{ENDING}",
    "*.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model*.bin.index.json",
)
_MODEL = ("config.json", "adapter_config.json")
_PROCESSOR = ("*processor_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*")
_BESIDE = (
    PRUNING_FILE,
    "generation_config.json",
    "chat_template.*",
    "merges.txt",
    "training_args.bin",
    "bad_records.jsonl",
)

Result = TypeVar("Result")


def write_run_file(folder: str | Path, config: Mapping[str, Any], run_id: str | None, **facts: Any) -> None:
    """Write what the weights in `folder` were trained with, and by which run."""
    write_json_atomically(Path(folder) / RUN_FILE, {"run_id": run_id, "config": dict(config), **facts})


def read_run_file(folder: str | Path) -> dict[str, Any] | None:
    """What `write_run_file` wrote, or None."""
    path = Path(folder) / RUN_FILE
    try:
        found = _read(path)
        config = (found or {}).get("config", {})
        if not isinstance(config, dict):
            raise ValueError("its config is not a mapping")
    except ValueError as error:
        raise SaccadeError(f"{path} is damaged ({error}): restore it, or remove it") from error
    return found


def find_stranger(checkpoint: Path, output_dir: str | Path) -> str | None:
    """Why `checkpoint` does not belong to the run of `output_dir`; None if it does, or if that is unknown."""
    owner = read_owner(output_dir)
    if owner is None:
        return None
    try:
        found = (read_run_file(checkpoint) or {}).get("run_id")
    except (OSError, ValueError):
        return f"{RUN_FILE} is damaged"
    if found == owner["id"] or (found is None and owner.get("takes_unnamed")):
        return None
    return f"it belongs to {'a run of an earlier version' if found is None else f'run {found}'}, not to {owner['id']}"


def read_owner(output_dir: str | Path) -> dict[str, Any] | None:
    """The run that `output_dir` belongs to: `id`, `started`; None if unknown."""
    path = Path(output_dir) / OWNER_FILE
    try:
        found = _read(path)
    except (OSError, ValueError) as error:
        raise SaccadeError(
            f"{path} is damaged ({error}): remove it if its folder's checkpoints are of one run"
        ) from error
    return found if found and isinstance(found.get("id"), str) else None


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not what Saccade writes")
    return found


def what_is_in(output_dir: str | Path) -> str | None:
    """Describe files in `output_dir` that a new run would overwrite or mistake for its own; None if there are none.

    A run that died before its first checkpoint leaves no such files.
    """
    folder = Path(output_dir)
    saved = [path.name for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")]
    # The run file is written last, so it marks a complete model.
    if (folder / RUN_FILE).is_file():
        return "a finished run"
    if saved:
        return f"checkpoints of a run, such as {max(saved, key=lambda name: (len(name), name))}"
    if any((folder / name).is_file() for name in _MODEL):
        return "a model"
    return None


def check_unused(output_dir: str | Path) -> None:
    """Refuse a folder that contains files of another run."""
    found = what_is_in(output_dir)
    if found is not None:
        raise SaccadeError(
            f"output_dir={str(output_dir)!r} holds {found}: name another, resume its run with --resume auto "
            "(in Python resume_from_checkpoint=True), or replace it with --overwrite (in Python overwrite=True)"
        )


def check_not_removed(path: str | Path | None, output_dir: str | Path, name: str) -> None:
    """Refuse to overwrite what the new run starts from, as `remove_run` would: files and checkpoints of the folder.
    What lies in other folders inside it stays."""
    if not path or not Path(path).exists() or not Path(path).resolve().is_relative_to(Path(output_dir).resolve()):
        return
    first, *_ = (*Path(path).resolve().relative_to(Path(output_dir).resolve()).parts, None)
    stays = first is not None and (Path(output_dir) / first).is_dir()
    if not stays or first == PARTIAL_DIR or first.startswith(PREFIX_CHECKPOINT_DIR):
        raise SaccadeError(
            f"overwrite=true would remove {name}={str(path)!r}, which is inside output_dir={str(output_dir)!r}: "
            "name another output_dir"
        )


def claim(output_dir: str | Path, run_id: str, checkpoint: Path | None, overwrite: bool) -> None:
    """Make `output_dir` the folder of run `run_id`.

    Args:
        checkpoint: what the run resumes from, None for a new one.
        overwrite: remove the files of another run.

    Raises:
        SaccadeError: if the folder belongs to another run and `overwrite` is false.
    """
    folder = Path(output_dir)
    inside = checkpoint is not None and checkpoint.resolve().parent == folder.resolve()
    owner = read_owner(folder)
    if checkpoint is None and overwrite:
        remove_run(folder)
    elif checkpoint is None or (not inside and (owner or {}).get("id") != run_id):
        check_unused(folder)
    facts = {"id": run_id, "started": datetime.now().astimezone().isoformat(timespec="seconds")}
    if checkpoint is not None and (read_run_file(checkpoint) or {}).get("run_id") is None:
        facts["takes_unnamed"] = True
    if owner is None or owner["id"] != run_id:
        write_json_atomically(folder / OWNER_FILE, facts)


def remove_run(folder: Path) -> None:
    """Remove what a run wrote to `folder`: checkpoints, weights and what was measured on them. Other files stay."""
    for path in (*folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), folder / PARTIAL_DIR):
        if path.is_dir():
            shutil.rmtree(path)
    for pattern in (RUN_FILE, OWNER_FILE, *MEASURED, *_MODEL, *_WEIGHTS, *_PROCESSOR, *_BESIDE):
        for path in folder.glob(pattern):
            path.unlink()


def new_id() -> str:
    """A new id for a run."""
    return secrets.token_hex(6)


def hold(args: TrainingArguments) -> AbstractContextManager[None]:
    """Keep other processes from starting a run in `output_dir`.

    Raises:
        SaccadeError: if another run is active there, something in it is a link that leads outside, or it cannot be
            written.
    """
    check_writable(args.output_dir, "output_dir", folder=True)
    check_entries(args.output_dir, "output_dir", weights=True)
    taken = (
        f"output_dir={args.output_dir!r}: another run is writing there now; wait for it to end, or name another folder"
    )
    return file_lock(Path(args.output_dir) / LOCK_FILE, taken, again=True)


def agreed(args: TrainingArguments, work: Callable[[], Result]) -> Result:
    """Do `work` on the ranks that write, and return the first rank's result on every rank.

    Raises:
        SaccadeError: on every rank, if it was raised on one.
        OSError: likewise.
    """
    result, error = None, None
    if args.should_save:
        try:
            result = work()
        except (SaccadeError, OSError) as fault:
            error = fault
    if args.world_size > 1:
        # Only here, since evaluation and export read these folders where accelerate may not be installed.
        from accelerate.utils import gather_object

        found = gather_object([(result, error)])
        result = found[0][0]
        error = next((fault for _, fault in found if fault is not None), None)
    if error is not None:
        raise error
    return result
