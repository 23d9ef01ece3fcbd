"""Two real processes (gloo, CPU) against one at the same global batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).parent / "training_process.py"


def launch(output, processes, **options):
    values = {
        "output_dir": str(output),
        "max_steps": 6,
        "slow_probability": 0.5,
        "per_device_train_batch_size": 4 // processes,
        **options,
    }
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)),
            *(str(SCRIPT), json.dumps(values)),
        ],
        capture_output=True,
        text=True,
        env=environment,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in (output / "steps.jsonl").read_text().splitlines()]


def test_two_processes_equal_one(tmp_path):
    """Same modes, same losses, same gradient norms, same weights, isolator included."""
    one, two = (launch(tmp_path / str(processes), processes) for processes in (1, 2))
    assert [entry["mode"] for entry in one] == [entry["mode"] for entry in two]
    assert {entry["mode"] for entry in one} == {"fast", "slow"}
    for single, double in zip(one, two, strict=True):
        assert double.keys() == single.keys()
        for name in single.keys() & {"loss_fast", "loss_slow", "kl", "num_tokens", "length_in", "length_full"}:
            assert double[name] == pytest.approx(single[name], rel=1e-3, abs=1e-5), name
        assert double["loss"] == pytest.approx(single["loss"], rel=1e-4)
        assert double["grad_norm"] == pytest.approx(single["grad_norm"], rel=1e-3)
    for name in ("model.safetensors", "mode_isolator.safetensors"):
        weights = [load_file(tmp_path / str(processes) / "final" / name) for processes in (1, 2)]
        for key, value in weights[0].items():
            torch.testing.assert_close(weights[1][key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("find_unused", [True, False])
def test_a_rank_without_images_works(tmp_path, find_unused):
    entries = launch(tmp_path, 2, text_only_rank=1, ddp_find_unused_parameters=find_unused, max_steps=4)
    assert len(entries) == 4
