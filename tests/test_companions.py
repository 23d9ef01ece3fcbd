"""Files beside the weights: engines do not mistake them for weights."""

import json
import os
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch

from saccade import SaccadeError
from saccade.cli.main import main
from saccade.dualspeed.checkpoint import newest_checkpoint, remove_other_kind
from saccade.pruning import ISOLATOR_FILE, ModeIsolator
from saccade.reducers import PRUNING_FILE
from saccade.skip_vision import SUMMARY_FILE, SkipVisionConfig, apply_skip_vision
from saccade.training.export import export_model

ENGINE_GLOBS = ("*.safetensors*", "*.bin", "*.pt", "*.pth", "*.gguf", "*.ckpt")
"""What vLLM, SGLang, TensorRT-LLM and llama.cpp look for when they read a folder's weights."""
STOCK = ("model.safetensors", "adapter_model.safetensors", "training_args.bin")
STOCK_OF_A_CHECKPOINT = ("optimizer.pt", "scheduler.pt", "rng_state.pth")
"""What transformers itself writes there, and engines know to leave alone."""
MODES = [
    {"name": "fast", "probability": 0.5, "isolator": True},
    {"name": "skipping", "probability": 0.5, "action": "skip", "teacher": "fast"},
]


@pytest.fixture(scope="module", params=[False, True], ids=["full", "lora"])
def trained(request, tmp_path_factory):
    """A run with an isolator and a summary head, its checkpoint, and its export."""
    folder = tmp_path_factory.mktemp("run")
    flags = {
        "model": "tiny",
        "output_dir": folder / "out",
        "modes": json.dumps(MODES),
        "lora": str(request.param).lower(),
        "dataset_rows": 8,
        "max_steps": 2,
        "save_steps": 1,
        "per_device_train_batch_size": 2,
        "warmup_steps": 0,
        "dataloader_num_workers": 0,
        "disable_tqdm": "true",
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    assert main(["train", "tiny-digits/sft", *words]) == 0
    export_model(folder / "out", folder / "export")
    return folder


def test_engines_find_only_stock_weights_in_what_is_written(trained):
    written = [Path(top, name).relative_to(trained) for top, _, names in os.walk(trained) for name in names]
    assert {"export", "out", "out/checkpoint-2"} <= {str(path.parent) for path in written}
    for folder in ("export", "out", "out/checkpoint-2"):
        # The pages above are about something: both learned tables are there.
        assert {ISOLATOR_FILE, SUMMARY_FILE} <= {path.name for path in written if str(path.parent) == folder}
    taken = [path for path in written if any(fnmatch(path.name, glob) for glob in ENGINE_GLOBS)]
    allowed = {
        path: STOCK + STOCK_OF_A_CHECKPOINT if path.parent.name.startswith("checkpoint-") else STOCK for path in taken
    }
    assert [str(path) for path in taken if path.name not in allowed[path]] == []
    assert Path("export/model.safetensors") in taken


def test_a_folder_says_how_its_model_skips(model, tmp_path):
    config = SkipVisionConfig(retained=10, skipped=20, layers=(0, 2), text_visibility="prompt_only")
    skip = apply_skip_vision(model, config)
    skip.save_pretrained(tmp_path)
    head = {name: value.clone() for name, value in skip.summary.state_dict().items()}
    skip.remove()
    assert SkipVisionConfig.from_pretrained(tmp_path) == config
    again = apply_skip_vision(model, tmp_path, drop_kv=False)
    assert again.config == config.replace(drop_kv=False) != config
    assert all(torch.equal(value, head[name]) for name, value in again.summary.state_dict().items())
    again.remove()
    with pytest.raises(SaccadeError, match="'drop_kw' is not an option of Skip-Vision: did you mean 'drop_kv'"):
        apply_skip_vision(model, tmp_path, drop_kw=False)
    with pytest.raises(SaccadeError, match=f"has no {SUMMARY_FILE}"):
        apply_skip_vision(model, tmp_path / "nothing")


@pytest.mark.parametrize(
    ("kind", "files"),
    [
        ("adapters", {"adapter_config.json", "adapter_model.safetensors"}),
        ("isolator", {ISOLATOR_FILE}),
        ("prunes", {PRUNING_FILE}),
        ("skips", {SUMMARY_FILE}),
    ],
)
def test_what_a_run_of_another_kind_left_goes(tmp_path, kind, files):
    """Loading would prefer it over the new files. What the new run has too stays."""
    kinds = ("adapters", "isolator", "prunes", "skips")
    for name in ("adapter_config.json", "adapter_model.safetensors", ISOLATOR_FILE, PRUNING_FILE, SUMMARY_FILE, "own"):
        (tmp_path / name).touch()
    before = {path.name for path in tmp_path.iterdir()}
    remove_other_kind(tmp_path, **{one: one != kind for one in kinds})
    assert before - {path.name for path in tmp_path.iterdir()} == files
    remove_other_kind(tmp_path, **dict.fromkeys(kinds, False))
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


def test_a_file_that_is_cut_short(trained, tmp_path):
    for name, kind in ((ISOLATOR_FILE, ModeIsolator), (SUMMARY_FILE, SkipVisionConfig)):
        with pytest.raises(SaccadeError, match=f"has no {name}"):
            kind.from_pretrained(tmp_path)
        (tmp_path / name).write_bytes((trained / "out" / name).read_bytes()[:-3])
        with pytest.raises(SaccadeError, match=f"{name} is not a whole safetensors file"):
            kind.from_pretrained(tmp_path)


def test_a_checkpoint_whose_isolator_is_cut_short_is_passed_over(trained, tmp_path):
    (tmp_path / "out").mkdir()
    source = newest_checkpoint(trained / "out")
    for number in (1, 2):
        copy = tmp_path / "out" / f"checkpoint-{number}"
        copy.mkdir()
        for path in source.iterdir():
            (copy / path.name).write_bytes(path.read_bytes())
    assert newest_checkpoint(tmp_path / "out").name == "checkpoint-2"
    isolator = tmp_path / "out" / "checkpoint-2" / ISOLATOR_FILE
    isolator.write_bytes(isolator.read_bytes()[:-3])
    assert newest_checkpoint(tmp_path / "out").name == "checkpoint-1"
