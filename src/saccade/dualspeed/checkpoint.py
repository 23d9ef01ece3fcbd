"""Checkpoints that are whole or not there, and a resume that refuses to go on from something else."""

import json
import logging
import shutil
from collections.abc import Collection, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from saccade.companions import ENDING, remove_companion
from saccade.errors import SaccadeError
from saccade.files import to_json, write_json_atomically
from saccade.pruning import ISOLATOR_FILE
from saccade.skip_vision import SUMMARY_FILE

logger = logging.getLogger(__name__)

RUN_FILE = "dualspeed.json"
PARTIAL_DIR = ".partial-checkpoint"
PLACE_OF_AN_ADAPTER = frozenset({"base_model_name_or_path", "inference_mode", "peft_version", "revision"})
"""Fields of a PEFT config that do not change what is trained."""


def write_run_file(folder: str | Path, config: Mapping[str, Any], **facts: Any) -> None:
    """Write what the weights in `folder` were trained with."""
    write_json_atomically(Path(folder) / RUN_FILE, {"config": dict(config), **facts})


def read_run_file(folder: str | Path) -> dict[str, Any] | None:
    """What `write_run_file` wrote, or None."""
    path = Path(folder) / RUN_FILE
    return json.loads(path.read_text()) if path.is_file() else None


def adapter_options(model: nn.Module) -> dict[str, Any]:
    """The options of each of a model's PEFT adapters, as JSON: the same in each process, its sets in order."""
    return {
        name: {
            field: _through_json(value)
            for field, value in config.to_dict().items()
            if field not in PLACE_OF_AN_ADAPTER
        }
        for name, config in getattr(model, "peft_config", {}).items()
    }


def _through_json(value: Any) -> Any:
    try:
        return json.loads(to_json(value))
    except TypeError:
        return type(value).__name__


def newest_checkpoint(output_dir: str | Path) -> Path | None:
    """The whole checkpoint with the highest step in `output_dir`.

    Whole means that the trainer's state, which is written last, is there and reads as JSON, that the run file is, and
    that no file of weights or optimizer state is missing or cut short.
    """
    found = []
    for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if _step(path) >= 0 and _is_whole(path):
            found.append((_step(path), path))
    return max(found)[1] if found else None


def _step(checkpoint: Path) -> int:
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1


def _is_whole(path: Path) -> bool:
    try:
        json.loads((path / "trainer_state.json").read_text())
        if read_run_file(path) is None:
            return False
        for index in path.glob("*.index.json"):
            if not all((path / name).is_file() for name in json.loads(index.read_text())["weight_map"].values()):
                return False
        for file in chain(path.glob("*.safetensors"), path.glob(f"*{ENDING}")):
            with safe_open(file, framework="pt"):  # compares the length of the file with its header
                pass
        # torch.save writes a zip archive, whose directory is at the end.
        return all(is_zipfile(file) for suffix in ("pt", "pth", "bin") for file in path.glob(f"*.{suffix}"))
    except (OSError, ValueError, KeyError, SafetensorError):
        return False


def resolve_resume(resume: str | bool | None, output_dir: str | Path) -> Path | None:
    """The checkpoint to go on from: a path as given, the newest whole one for True, None for none.

    Raises:
        SaccadeError: if there is no whole checkpoint where one was asked for.
    """
    if resume is None or resume is False:
        return None
    if resume is True:
        path = newest_checkpoint(output_dir)
        for other in sorted(Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")):
            if path is not None and _step(other) > _step(path):
                logger.warning("%s is half-written and passed over; going on from %s", other, path)
        if path is None:
            raise SaccadeError(
                f"resume_from_checkpoint=True, but output_dir={str(output_dir)!r} holds no whole checkpoint: "
                "name one, or start anew without it"
            )
        return path
    path = Path(resume)
    if not _is_whole(path):
        raise SaccadeError(
            f"resume_from_checkpoint={str(path)!r} is not a whole checkpoint of a DualSpeed run: "
            "name another, or pass True for the newest whole one"
        )
    return path


def check_same_run(checkpoint: Path, config: Mapping[str, Any]) -> None:
    """Check that a run with `config` may go on from `checkpoint`.

    Raises:
        SaccadeError: naming every option that differs.
    """
    saved = (read_run_file(checkpoint) or {}).get("config", {})
    # Through JSON, so that tuples and the like compare as they were written.
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


def remove_other_kind(folder: Path, adapters: bool, isolator: bool, skips: bool) -> None:
    """Remove what an earlier run of another kind left in `folder`, and what loading would prefer over the new files.

    Args:
        adapters: whether the new model is saved as adapters.
        isolator: whether the new run has an isolator.
        skips: whether some mode of it is Skip-Vision's.
    """
    if not isolator:
        remove_companion(folder, ISOLATOR_FILE)
    if not skips:
        remove_companion(folder, SUMMARY_FILE)
    if not adapters:
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (folder / name).unlink(missing_ok=True)


def publish_checkpoint(partial: Path, output_dir: Path) -> Path:
    """Move the finished checkpoint inside `partial` to its place in `output_dir`, and remove `partial`."""
    (written,) = partial.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    target = output_dir / written.name
    if target.exists():
        shutil.rmtree(target)
    written.rename(target)
    shutil.rmtree(partial, ignore_errors=True)
    return target


def load_weights_strictly(model: nn.Module, checkpoint: Path, ignored: Collection[str]) -> None:
    """Load a stock checkpoint's weights into the stock model `model`, every key accounted for.

    The weights go through `from_pretrained`, since checkpoints keep the key names that released ones have, which
    differ from the module tree's; a plain `load_state_dict` would match none of them and say so in a warning only.

    Args:
        ignored: names of our own parameters, which the checkpoint does not hold.

    Raises:
        SaccadeError: if a key is missing or unexpected.
    """
    assert isinstance(model, PreTrainedModel)
    loaded, info = type(model).from_pretrained(checkpoint, dtype=model.dtype, output_loading_info=True)
    problems = {kind: sorted(info[kind]) for kind in ("missing_keys", "unexpected_keys") if info[kind]}
    if problems:
        raise SaccadeError(f"resume_from_checkpoint={str(checkpoint)!r} does not fit the model: {problems}")
    result = model.load_state_dict(loaded.state_dict(), strict=False)
    missing = [name for name in result.missing_keys if name not in ignored]
    if missing or result.unexpected_keys:
        raise SaccadeError(
            f"resume_from_checkpoint={str(checkpoint)!r} does not fit the model: missing {missing}, "
            f"unexpected {result.unexpected_keys}"
        )
