"""Export a trained folder to a plain Hugging Face checkpoint: merge adapters, check keys, write a model card."""

import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedModel, ProcessorMixin

from saccade.companions import find_companion, read_companion, save_companion
from saccade.dualspeed.folder import EVALUATION_FILE, RUN_FILE
from saccade.dualspeed.weights import base_of, check_keys, identify_weights, load_whole, read_evaluation
from saccade.errors import SaccadeError
from saccade.families import get_family
from saccade.files import check_exists, check_new_folder, reading, write_json_atomically, write_text_atomically
from saccade.model_files import check_files
from saccade.pruning import ISOLATOR_FILE
from saccade.pruning.prune_inputs import isolator_rows
from saccade.reducers import PRUNING_FILE, PruningConfig
from saccade.skip_vision import SUMMARY_FILE
from saccade.training.card import model_card
from saccade.training.models import ModelOptions, load_model

_FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
"""Names of dtypes in safetensors files."""


def export_model(
    source: str | Path,
    output: str | Path,
    dtype: str = "auto",
    max_shard_size: str = "5GB",
) -> dict[str, Any]:
    """Write the model in `source` as a checkpoint that stock transformers loads.

    Adapters are merged into their base model. The mode isolator and the run's settings are copied as separate files,
    which stock loading ignores and pruned inference uses. The written weights are read back through the stock classes,
    and every key and value is compared, before the folder is renamed to its final name.

    Args:
        source: `output_dir` of a run, or one of its checkpoints.
        output: folder to create; it must not exist, or be empty.
        dtype: "auto" keeps that of the trained weights, or of an adapter's base, and of several the one that rounds
            none of them; "float32", "bfloat16" or "float16".
        max_shard_size: size above which the weights are split into several files.

    Returns:
        `output`, `source`, `base_model` (None if nothing was merged), `parameters`, `dtype`, `own_classes` (those that
        transformers does not have), `bytes`, `files`, `notes` (what was left out, and why).

    Raises:
        SaccadeError: if `source` is not a trained model, a file beside its weights is damaged or does not fit it,
            `output` is taken, or the written model does not load unchanged.
        OSError: if it cannot be written; nothing is left behind.
    """
    source, output = Path(source), Path(output)
    _check_paths(source, output)
    check_shard_size(max_shard_size)
    base = base_of(source)
    evaluation, note = read_evaluation(source)
    if (source / PRUNING_FILE).is_file():
        PruningConfig.from_pretrained(source)
    learned = {
        name: read_companion(source, name, "model")
        for name in (ISOLATOR_FILE, SUMMARY_FILE)
        if find_companion(source, name) is not None
    }
    for place in (source, *([] if base is None else [base])):
        check_files(place)
    if dtype == "auto":
        whole = source if base is None else Path(base)
        dtype = stored_dtype(whole) if whole.is_dir() else declared_dtype(str(base))
    model, processor = load_model(ModelOptions(model=str(source), dtype=dtype))
    if ISOLATOR_FILE in learned:
        isolator_rows(get_family(model), source)
    with whole_folder(output) as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        processor.save_pretrained(folder)
        check_loads(folder, model)
        # Written anew: a copy would disclose whatever file a link in a stranger's folder leads to.
        for name, (config, tensors) in learned.items():
            save_companion(folder, name, tensors, config)
        for name in (PRUNING_FILE, RUN_FILE):
            if (source / name).is_file():
                shutil.copy2(source / name, folder / name)
        if evaluation is not None:
            # Merging or another dtype changes the bytes; what it was measured on stays recorded.
            evaluation = {**evaluation, "exported_weights": identify_weights(folder)}
            write_json_atomically(folder / EVALUATION_FILE, evaluation)
        facts = {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "dtype": str(model.dtype).removeprefix("torch."),
            "architecture": type(model).__name__,
            "base_model": base,
            "own_classes": own_classes(model, processor),
        }
        with reading(f"model={str(source)!r}: its files about the run cannot be read"):
            card = model_card(output.resolve().name, source, facts, evaluation)
        write_text_atomically(folder / "README.md", card)
    files = sorted(path for path in output.iterdir() if path.is_file())
    return {
        "output": str(output),
        "source": str(source),
        **{name: facts[name] for name in ("base_model", "parameters", "dtype", "own_classes")},
        "bytes": sum(path.stat().st_size for path in files),
        "files": [path.name for path in files],
        "notes": []
        if note is None
        else [f"{note}, and was left out: `saccade eval {shlex.quote(str(source))}` measures these"],
    }


@contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """A temporary folder that becomes `output` if the block succeeds, and is removed if it does not.

    An empty folder that is there is filled: it may be a link, a mount or the current folder, which no other folder can
    take the place of.
    """
    there = output.is_dir()
    place = output if there else output.parent
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place, prefix=f".{output.name[:100]}.") as temporary:
        folder = Path(temporary) / "model"
        yield folder
        if not there:
            folder.rename(output)
            return
        # Until its config is there, which comes last, a folder is not taken for a model.
        for path in sorted(folder.iterdir(), key=lambda path: path.name == "config.json"):
            path.rename(output / path.name)


def stored_dtype(folder: Path) -> str:
    """The dtype that holds every weight in a folder's safetensors files as it is; "auto" if there are none."""
    dtypes = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            dtypes |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    found = [_FLOATS[name] for name in dtypes & _FLOATS.keys()]
    return str(reduce(torch.promote_types, found)).removeprefix("torch.") if found else "auto"


def declared_dtype(name: str) -> str:
    """The dtype that the config of a model of the hub names; "auto" if that is not one of those to export."""
    try:
        dtype = AutoConfig.from_pretrained(name, trust_remote_code=False).dtype
    except (OSError, ValueError):  # loading the model says what is wrong
        return "auto"
    return str(dtype).removeprefix("torch.") if dtype in _FLOATS.values() else "auto"


def own_classes(model: PreTrainedModel, processor: ProcessorMixin) -> list[str]:
    """The names of a checkpoint's classes that transformers finds only once `saccade.families` is imported."""
    parts = (type(model), type(getattr(processor, "image_processor", None)))
    return [part.__name__ for part in parts if part.__module__.startswith("saccade.")]


def loads_in(summary: Mapping[str, Any]) -> str:
    """What a written folder loads in, by the summary of what wrote it."""
    return "transformers, with `import saccade.families`" if summary["own_classes"] else "stock transformers"


def check_loads(folder: Path, model: PreTrainedModel) -> None:
    """Read `folder` through the stock classes and compare it with `model`."""
    loaded = load_whole(folder, dtype=model.dtype)
    written, kept = loaded.state_dict(), model.state_dict()
    both = kept.keys() & written.keys()
    changed = [name for name in both if not torch.equal(written[name], kept[name].to(written[name].dtype))]
    check_keys(folder, {"missing": kept.keys() - written.keys(), "other values of": changed})


def _check_paths(source: Path, output: Path) -> None:
    check_exists(source, "model", "name the output_dir of a run, or a checkpoint in it", folder=True)
    if not any((source / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise SaccadeError(
            f"model={str(source)!r} has no config.json and no adapter_config.json: name the output_dir of a finished "
            "run, or a checkpoint in it"
        )
    check_new_folder(output, "output")


def check_shard_size(text: str) -> None:
    """Check a size in bytes such as "5GB"."""
    if not re.fullmatch(r"\d+(\.\d+)?\s*[KMGT]B", text.strip(), re.IGNORECASE):
        raise SaccadeError(f"max_shard_size={text!r} is not a size: write a number and KB, MB, GB or TB, such as 5GB")
