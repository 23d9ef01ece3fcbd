"""Strict loading of weights: stock loading initialises missing weights randomly, and only warns."""

import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import AutoModelForImageTextToText, PreTrainedModel

from saccade.companions import ENDING
from saccade.dualspeed.folder import EVALUATION_FILE, RUN_FILE, read_run_file
from saccade.errors import SaccadeError
from saccade.files import check_entries, reading
from saccade.model_files import ADAPTER_FILE, check_files, damaged

if TYPE_CHECKING:
    from saccade.dualspeed.config import DualSpeedConfig

BASE_WEIGHTS = "base_weights"
"""In the run file beside adapters: what `identify_weights` found in the folder of their base."""
# Computed buffers, which some released checkpoints contain nevertheless.
_COMPUTED = ("position_ids", "inv_freq", "num_batches_tracked")
_KINDS = ("missing", "unexpected", "mismatched")
_SHOWN = 3
_CHUNK = 1 << 22
_THREADS = 8


def load_whole(place: str | Path, factory: Any = AutoModelForImageTextToText, **options: Any) -> PreTrainedModel:
    """Load a stock model from its folder or hub id, and check that all weights come from there.

    Raises:
        SaccadeError: naming weights that are missing, unexpected, or have the wrong shape.
        OSError: if it cannot be read, and whatever else `from_pretrained` raises.
    """
    check_files(place)
    # Otherwise mismatched shapes raise an error that names no key; this way they are reported below.
    options = {**options, "output_loading_info": True, "ignore_mismatched_sizes": True}
    model, info = factory.from_pretrained(place, **options)
    check_keys(place, {kind: info.get(f"{kind}_keys") or () for kind in _KINDS})
    return model


def load_by_name(model: str, args: "DualSpeedConfig", quantization: Any) -> PreTrainedModel:
    """Load a model as TRL would, in float32 unless `model_init_kwargs` says otherwise, and check every key."""
    options = {"dtype": "float32", "trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    args.model_init_kwargs = None
    with reading(f"model={model!r} cannot be loaded"):
        return load_whole(model, **options, **({} if quantization is None else {"quantization_config": quantization}))


def check_keys(place: str | Path, keys: Mapping[str, Any]) -> None:
    """Refuse weights that do not match the model."""
    problems = []
    for kind, names in keys.items():
        found = sorted(name if isinstance(name, str) else str(name[0]) for name in names)
        if kind == "unexpected":
            found = [name for name in found if not name.endswith(_COMPUTED)]
        if found:
            more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
            problems.append(f"{kind} {', '.join(found[:_SHOWN])}{more}")
    if problems:
        raise SaccadeError(
            f"model={str(place)!r}: the weights do not fit the config next to them: {'; '.join(problems)}; "
            "name another checkpoint, or fetch this one again"
        )


def base_of(folder: str | Path) -> str | None:
    """The base model of the adapters in `folder`; None if there are no adapters."""
    check_entries(folder, "model")
    if not (Path(folder) / ADAPTER_FILE).is_file():
        return None
    # Only here, so that a model without adapters loads where PEFT is not installed.
    from peft import PeftConfig

    try:
        return PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    except Exception as error:
        raise damaged(folder, ADAPTER_FILE, error) from error


def identify_weights(place: str | Path) -> str | None:
    """A fingerprint of the weights in a folder: a hash over the checksums of all files, and of an adapter's base.

    It reads every file in full. None if `place` is not a folder.
    """
    folder = Path(place)
    if not folder.is_dir():
        return None
    sums = checksums(weight_files(folder))
    parts = [f"{path.name} {path.stat().st_size} {found}" for path, found in sums.items()]
    base = base_of(folder)
    if base is not None:
        parts.append(identify_weights(base) or base)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def checksums(paths: Iterable[Path], flush: bool = False) -> dict[Path, str]:
    """The CRC-32 of files, several at a time.

    CRC-32 is the fastest checksum of the standard library; it detects damage, not deliberate forgery.

    Args:
        flush: wait until each file's bytes are on disk.
    """
    paths = list(paths)
    with ThreadPoolExecutor(max(1, min(_THREADS, len(paths)))) as pool:
        return dict(zip(paths, pool.map(lambda path: _checksum(path, flush), paths), strict=True))


def _checksum(path: Path, flush: bool) -> str:
    value, buffer = 0, bytearray(_CHUNK)
    with path.open("rb", buffering=0) as file:
        if flush:
            os.fsync(file.fileno())
        while count := file.readinto(buffer):
            value = zlib.crc32(memoryview(buffer)[:count], value)
    return f"{value:08x}"


def weight_files(folder: Path) -> list[Path]:
    """The weight files in `folder` and the files of learned tensors next to them, sorted."""
    patterns = ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin", f"*{ENDING}")
    return sorted({path for pattern in patterns for path in folder.glob(pattern)})


def read_evaluation(folder: str | Path) -> tuple[dict[str, Any] | None, str | None]:
    """The result of `saccade eval` for the weights in `folder`; or None, and why a result there is not theirs."""
    path = Path(folder) / EVALUATION_FILE
    if not path.is_file():
        return None, None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None, f"{path} is damaged"
    named = [found.get("weights"), found.get("exported_weights")] if isinstance(found, dict) else []
    measured = {weights for weights in named if isinstance(weights, str)}
    if not measured:
        return None, f"{path} does not say which weights it was measured on"
    if identify_weights(folder) not in measured:
        return None, f"{path} was measured on other weights"
    return found, None


def merge_adapters(model: PreTrainedModel, folder: str | Path) -> PreTrainedModel:
    """Merge the adapters in `folder` into `model`, which was loaded from the place that they name as their base.

    If input and output embeddings are tied and adapters change one of them, or both differently, they are untied:
    merged into one table they would give other logits.

    Raises:
        SaccadeError: if they do not fit, or were trained on other weights than those that are there now.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights

    _check_base(folder)
    found = load_peft_weights(str(folder), device="cpu")
    _untie(model, found)
    with reading(f"model={str(folder)!r}: its adapters cannot be loaded"):
        adapted = PeftModel.from_pretrained(model, str(folder))
    expected = get_peft_model_state_dict(adapted)
    shapes = [name for name in expected.keys() & found.keys() if expected[name].shape != found[name].shape]
    check_keys(
        folder,
        {
            "missing": expected.keys() - found.keys(),
            "unexpected": found.keys() - expected.keys(),
            "mismatched": shapes,
        },
    )
    return adapted.merge_and_unload()


def _check_base(folder: str | Path) -> None:
    """Refuse adapters where the weights of their base are not those that they were trained on.

    The base is known by its path, where another model may lie since. One from the hub is not compared.
    """
    base = base_of(folder)
    recorded = (read_run_file(folder) or {}).get(BASE_WEIGHTS)
    found = identify_weights(base) if base and recorded else None
    if found not in (None, recorded):
        raise SaccadeError(
            f"model={str(folder)!r}: its adapters were trained on other weights than those that are in {base!r} now: "
            f"put these back, or name their folder as base_model_name_or_path in {ADAPTER_FILE}; if they are the same "
            f"in other files, remove {BASE_WEIGHTS} from {RUN_FILE}"
        )


def _untie(model: PreTrainedModel, adapters: Mapping[str, Any]) -> None:
    """Untie the output embeddings if one of the adapters' weights changes either embedding."""
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    if outputs is None or outputs.weight is not inputs.weight:
        return
    tied = {name for name, module in model.named_modules() if module is inputs or module is outputs}
    touched = {name for key in adapters for name in tied if _is_of(key, name)}
    if not touched:
        return
    outputs.weight = nn.Parameter(outputs.weight.detach().clone(), requires_grad=outputs.weight.requires_grad)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    # Otherwise transformers would tie them again on saving, and PEFT on merging.
    model.all_tied_weights_keys = {}


def _is_of(key: str, module: str) -> bool:
    """Whether `key` of an adapter's file belongs to `module`."""
    return f".{module}." in f".{key}" or f".{module.rpartition('.')[2]}." in f".{key}"
