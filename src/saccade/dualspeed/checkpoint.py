"""Checkpoints that are either complete or absent, and resuming only from a checkpoint of the same run."""

import json
import logging
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from saccade.companions import ENDING
from saccade.dualspeed.folder import PARTIAL_DIR, RUN_FILE, find_stranger, read_run_file
from saccade.dualspeed.identity import through_json
from saccade.dualspeed.weights import check_keys, checksums, load_whole
from saccade.errors import SaccadeError, kind_of
from saccade.files import check_entries, to_json, write_json_atomically
from saccade.model_files import INDEX_ENDING, check_names
from saccade.pruning import ISOLATOR_FILE
from saccade.reducers import PRUNING_FILE
from saccade.skip_vision import SUMMARY_FILE

logger = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"
MANIFEST_FILE = "manifest.json"
"""Name, size and checksum of every file of a checkpoint, written once all of them are complete."""
PLACE_OF_AN_ADAPTER = frozenset({"base_model_name_or_path", "inference_mode", "peft_version", "revision"})
"""Fields of a PEFT config that do not change what is trained."""


def adapter_options(model: nn.Module) -> dict[str, Any]:
    """The options of each of a model's PEFT adapters, as JSON values."""
    configs = {name: config.to_dict() for name, config in getattr(model, "peft_config", {}).items()}
    return {
        name: {field: through_json(value) for field, value in config.items() if field not in PLACE_OF_AN_ADAPTER}
        for name, config in configs.items()
    }


def newest_checkpoint(output_dir: str | Path) -> Path | None:
    """The checkpoint with the highest step in `output_dir` that has no missing or truncated file.

    A quick check: only `resolve_resume` compares checksums, before training continues.
    """
    return next((path for path in checkpoints(output_dir) if find_fault(path) is None), None)


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Every checkpoint in `output_dir`, complete or not, from the highest step down.

    One that a kill kept from its place, see `publish_checkpoint`, is among them.
    """
    found = [path for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if step_of(path) >= 0]
    return sorted([*found, *unpublished(Path(output_dir))], key=step_of, reverse=True)


def unpublished(output_dir: Path) -> list[Path]:
    """The finished checkpoint, if any, that is still where it was written and has no other in its place."""
    written = (output_dir / PARTIAL_DIR).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{MANIFEST_FILE}")
    return [path.parent for path in written if not (output_dir / path.parent.name).exists()]


def step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint's folder, -1 if it is not one."""
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isascii() and number.isdigit() and checkpoint.is_dir() else -1


def find_fault(path: Path, thorough: bool = False) -> str | None:
    """Why training cannot resume from the checkpoint `path`, naming the file; None if it can.

    Args:
        thorough: also compare checksums with those of the manifest, which reads every file once.
    """
    try:
        check_entries(path, "checkpoint")
    except SaccadeError as error:
        return str(error)
    checks = {path / STATE_FILE: _check_state, path / RUN_FILE: _check_run_file}
    for file, check in {**checks, **dict.fromkeys(sorted(path.glob(f"*{INDEX_ENDING}")), check_names)}.items():
        try:
            check(file)
        except FileNotFoundError:
            return f"{file.name} is missing"
        except (OSError, ValueError, TypeError, RecursionError) as error:
            return f"{file.name} is damaged: {' '.join(str(error).split())[:200]}"
    try:
        files = read_manifest(path)
        damage = _damage_unlisted(path) if files is None else find_damage(path, files, thorough)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        return f"a file is damaged: {' '.join(str(error).split())[:200]}"
    return damage or _missing_part(path)


def write_manifest(folder: Path) -> None:
    """List every file below `folder` in its `manifest.json`, after flushing them to disk."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_FILE)
    sums = checksums(paths, flush=True)
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "crc32": sums[path]} for path in paths
    }
    write_json_atomically(folder / MANIFEST_FILE, {"files": files})


def read_manifest(folder: Path) -> dict[str, dict[str, Any]] | None:
    """The files that `folder` should contain, or None without a manifest, as in checkpoints of earlier versions."""
    path = folder / MANIFEST_FILE
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    try:
        return {
            name: {"bytes": int(file["bytes"]), "crc32": str(file["crc32"])} for name, file in found["files"].items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a list of files") from error


def find_damage(folder: Path, files: dict[str, dict[str, Any]], thorough: bool) -> str | None:
    """The first file that differs from the manifest, and how; None if all match.

    Args:
        thorough: also compare checksums, which reads every file once; otherwise only names and sizes.
    """
    for name, file in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != file["bytes"]:
            return f"{name} has {path.stat().st_size:,} of {file['bytes']:,} bytes"
    if thorough:
        sums = checksums([folder / name for name in files])
        for name, file in files.items():
            if sums[folder / name] != file["crc32"]:
                return f"{name} is damaged: its checksum is not that of the file as it was written"
    return None


def _check_state(file: Path) -> None:
    """Check the types in a trainer's state."""
    state = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(state, dict):
        raise TypeError("it is not a mapping")
    TrainerState(**state)
    number = (int, float)
    types = {
        **dict.fromkeys(("global_step", "max_steps", "num_train_epochs", "num_input_tokens_seen"), int),
        **dict.fromkeys(("logging_steps", "eval_steps", "save_steps", "total_flos"), number),
        **dict.fromkeys(("epoch", "best_metric"), (*number, type(None))),
        **dict.fromkeys(("train_batch_size", "best_global_step"), (int, type(None))),
        **{"best_model_checkpoint": (str, type(None)), "log_history": list, "stateful_callbacks": (dict, type(None))},
    }
    for name, kind in types.items():
        if name in state and not isinstance(state[name], kind):
            raise TypeError(f"{name} is {kind_of(state[name])}")
    if not all(isinstance(entry, dict) for entry in state.get("log_history", ())):
        raise TypeError("log_history is not a list of entries")


def _check_run_file(file: Path) -> None:
    """`_check_state` for the file that says what the weights were trained with."""
    run = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(run, dict) or not isinstance(run.get("config", {}), dict):
        raise TypeError("it is not what Saccade writes")
    tokens = run.get("tokens", {})
    if not isinstance(tokens, dict) or not all(isinstance(count, (int, float)) for count in tokens.values()):
        raise TypeError("its tokens are not numbers")


def _damage_unlisted(path: Path) -> str | None:
    """Damage that can be found without a manifest (earlier versions wrote none): file lengths."""
    for file in chain(path.glob("*.safetensors"), path.glob(f"*{ENDING}")):
        try:
            with safe_open(file, framework="pt"):  # compares the length of the file with its header
                pass
        except SafetensorError as error:
            return f"{file.name} is damaged: {error}"
    # torch.save writes a zip archive, whose directory is at the end.
    archives = (file for suffix in ("pt", "pth", "bin") for file in path.glob(f"*.{suffix}"))
    return next((f"{file.name} is cut short" for file in archives if not is_zipfile(file)), None)


def _missing_part(path: Path) -> str | None:
    """A file that resuming needs but whose absence stock loading ignores or reports unclearly."""
    if not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
        return "config.json is missing"
    # Under FSDP and DeepSpeed the engine keeps the following in its own folders.
    adapters = (path / "adapter_config.json").is_file()
    patterns = ["adapter_model.*"] if adapters else ["model*.safetensors", "pytorch_model*"]
    if not any(found for pattern in [*patterns, "global_step*"] for found in path.glob(pattern)):
        return f"{'adapter_model' if adapters else 'model'}.safetensors is missing"
    if not any(path.glob("optimizer*")) and not any(path.glob("global_step*")):
        return "optimizer.pt is missing (save_only_model=true saves none)"
    if not (path / "scheduler.pt").is_file() and not any(path.glob("global_step*")):
        return "scheduler.pt is missing"
    return None if any(path.glob("rng_state*.pth")) else "rng_state.pth is missing"


def resolve_resume(resume: str | bool | None, output_dir: str | Path) -> Path | None:
    """The checkpoint to resume from: a path as given, the newest complete one for True, None for none.

    True considers only checkpoints of the run that `output_dir` belongs to. One that a kill kept from its place is put
    there first; no other process may be writing to `output_dir`.

    Raises:
        SaccadeError: if a checkpoint was requested and none is complete; the message says what is wrong with each.
    """
    if resume is None or resume is False:
        return None
    if resume is True:
        faults = []
        for path in unpublished(Path(output_dir)):
            path.rename(Path(output_dir) / path.name)
        for path in checkpoints(output_dir):
            fault = find_fault(path) or find_stranger(path, output_dir) or find_fault(path, thorough=True)
            if fault is None:
                for line in faults:
                    logger.warning("%s; passed over, going on from %s", line, path)
                return path
            faults.append(f"{path}: {fault}")
        raise SaccadeError(
            f"output_dir={str(output_dir)!r} has no whole checkpoint of its run to resume from: "
            f"{'; '.join(faults) or 'there is none at all'}; name one, or start anew without resuming"
        )
    path = Path(resume)
    fault = find_fault(path, thorough=True) if path.is_dir() else "it is not a folder"
    if fault is not None:
        raise SaccadeError(
            f"resume_from_checkpoint={str(path)!r} is not a whole checkpoint of a DualSpeed run: {fault}; "
            "name another, or pass True for the newest whole one"
        )
    return path


def find_best(best: str | None, *folders: Path) -> Path | None:
    """Find the best checkpoint by name in the run's own folders, which may have moved since its path was written.

    The state is untrusted input, so no other folder is looked at. Returns None if no folder has the checkpoint.

    Args:
        best: the path in the run's state.
        folders: the run's folders. The one that contains `best` is tried first, then the others in order.
    """
    if best is None:
        return None
    name, parent = Path(best).name, os.path.abspath(Path(best).parent)
    for folder in sorted(folders, key=lambda folder: os.path.abspath(folder) != parent):
        place = folder / name
        if step_of(place) >= 0 and place.resolve().parent == folder.resolve():
            return place
    return None


class BestOfRun(TrainerCallback):
    """Replaces the best checkpoint's path in a resumed state with the one that `find_best` found.

    The stock trainer would load whatever is at the saved path. If nothing is there, as after a run was moved, it would
    forget the best checkpoint, and `save_total_limit=1` would then delete it at the end.
    """

    def __init__(self) -> None:
        self.path: Path | None = None

    def on_train_begin(self, args, state, control, **kwargs: Any) -> None:
        state.best_model_checkpoint = None if self.path is None else str(self.path)


def check_same_run(checkpoint: Path, config: Mapping[str, Any]) -> None:
    """Check that a run with `config` may resume from `checkpoint`."""
    saved = (read_run_file(checkpoint) or {}).get("config", {})
    # Through JSON, so that tuples and the like compare equal to what was read back.
    current = json.loads(to_json(dict(config)))
    differing = [
        difference
        for name in current
        if name in saved
        for difference in _differences(name, current[name], saved[name])
    ]
    if differing:
        raise SaccadeError(
            f"{', '.join(differing)}: {checkpoint} was trained otherwise; use its values, or start anew"
        )


def _differences(name: str, current: Any, saved: Any) -> Iterator[str]:
    if isinstance(current, dict) and isinstance(saved, dict):
        # Another version of PEFT may know other options of an adapter.
        keys = [key for key in current if key in saved] if name.startswith("adapters.") else {**current, **saved}
        for key in keys:
            yield from _differences(f"{name}.{key}", current.get(key), saved.get(key))
    elif current != saved:
        yield f"{name}={current!r} (checkpoint: {saved!r})"


def remove_other_kind(folder: Path, adapters: bool, isolator: bool, prunes: bool, skips: bool) -> None:
    """Remove files of an earlier run of another kind from `folder`, which loading would prefer over the new ones."""
    others = {
        ISOLATOR_FILE: not isolator,
        PRUNING_FILE: not prunes,
        SUMMARY_FILE: not skips,
        **dict.fromkeys(("adapter_config.json", "adapter_model.safetensors"), not adapters),
    }
    for name, is_old in others.items():
        if is_old:
            (folder / name).unlink(missing_ok=True)


def publish_checkpoint(partial: Path, output_dir: Path) -> Path:
    """Move the finished checkpoint inside `partial` to its place in `output_dir`, and remove `partial`.

    After a kill in between, `resolve_resume` does the rest.
    """
    (written,) = partial.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    write_manifest(written)
    target = output_dir / written.name
    if target.exists():
        # Not removed before the new one is in its place: a kill between the two would leave neither.
        target.rename(partial / "replaced")
    written.rename(target)
    shutil.rmtree(partial, ignore_errors=True)
    return target


def remove_old_checkpoints(
    newest: Path, limit: int | None, best: str | None, in_use: Collection[str] = frozenset()
) -> None:
    """Remove checkpoints next to `newest`, which was just written, until `limit` are left.

    They are ordered by step, not by file times, which go backwards when a clock is reset. Those with a later step are
    removed first: they were not used when this run was resumed.

    Args:
        limit: how many to keep; None or 0 for all. `newest` and `best` are always kept.
        best: the best checkpoint so far; only the folder's name matters, since the run may have been moved.
        in_use: names of others that have to stay for now, though there may then be more than `limit`.
    """
    if not limit or limit < 1:
        return
    kept = {newest.name, *in_use, *([] if best is None else [Path(best).name])}
    others = [path for path in checkpoints(newest.parent) if path.name not in kept]
    later = [path for path in others if step_of(path) > step_of(newest)]
    earlier = [path for path in reversed(others) if path not in later]
    here = sum((newest.parent / name).is_dir() for name in kept)
    for path in [*later, *earlier][: max(0, len(others) + here - limit)]:
        shutil.rmtree(path, ignore_errors=True)


def load_weights_strictly(model: nn.Module, checkpoint: Path, ignored: Collection[str]) -> None:
    """Load a stock checkpoint's weights into the stock model `model`, accounting for every key.

    The weights go through `from_pretrained`, since checkpoints use the key names of released ones, which differ from
    those of the module tree; a plain `load_state_dict` would match none of them and only warn.

    Args:
        ignored: names of Saccade's own parameters, which the checkpoint does not contain.
    """
    assert isinstance(model, PreTrainedModel)
    dtypes = {
        weight.dtype for name, weight in model.named_parameters() if name not in ignored and weight.is_floating_point()
    }
    # Where some weights are in float32, one dtype for all must not round them.
    loaded = load_whole(checkpoint, type(model), dtype=dtypes.pop() if len(dtypes) == 1 else torch.float32)
    result = model.load_state_dict(loaded.state_dict(), strict=False)
    missing = [name for name in result.missing_keys if name not in ignored]
    check_keys(checkpoint, {"missing": missing, "unexpected": result.unexpected_keys})
