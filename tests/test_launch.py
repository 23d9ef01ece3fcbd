"""`saccade train --launch`: what it starts, what it refuses, and how the processes end together."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from helpers import make_trainer

from saccade import DualSpeedConfig, DualSpeedTrainer, SaccadeError
from saccade.cli.main import main
from saccade.data import digit_scenes
from saccade.dualspeed.checkpoint import newest_checkpoint
from saccade.launch import PRESETS, check_engine, make_plan, run_processes
from saccade.launch import plan as plan_module
from saccade.launch.plan import FOLDER, LaunchPlan
from saccade.testing.training import make_config


@pytest.fixture
def gpus(monkeypatch):
    """Eight GPUs and DeepSpeed, as far as a plan can see."""
    monkeypatch.setattr(plan_module, "_gpus", lambda: 8)
    find = plan_module.importlib.util.find_spec
    monkeypatch.setattr(
        plan_module.importlib.util, "find_spec", lambda name: True if name == "deepspeed" else find(name)
    )


def local_plan(processes, **environment):
    return LaunchPlan(processes, {**os.environ, **environment})


@pytest.mark.parametrize("name", PRESETS)
def test_the_presets_are_configs_that_accelerate_takes(name, gpus):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    plan = make_plan(name, 8)
    environment = plan.environment_of(3)
    assert (environment["RANK"], environment["LOCAL_RANK"], environment["WORLD_SIZE"]) == ("3", "3", "8")
    assert (environment.get("ACCELERATE_USE_FSDP") == "true") == (name == "fsdp2")
    assert (environment.get("ACCELERATE_USE_DEEPSPEED") == "true") == name.startswith("zero")
    if name == "fsdp2":
        assert environment["FSDP_VERSION"] == "2"
        assert environment["FSDP_STATE_DICT_TYPE"] == "FULL_STATE_DICT"
    if name.startswith("zero"):
        settings = json.loads(Path(environment["ACCELERATE_DEEPSPEED_CONFIG_FILE"]).read_text())
        assert settings["zero_optimization"]["stage"] == int(name[-1])
        # Its prefetcher replays the modules of the step before, and modes differ in them.
        assert name == "zero2" or settings["zero_optimization"]["stage3_prefetch_bucket_size"] == 0
        assert config.deepspeed_config["deepspeed_config_file"] == f"{name}.json"


def test_a_users_own_config(tmp_path, gpus):
    config = yaml.safe_load((FOLDER / "fsdp2.yaml").read_text())
    config["num_processes"] = 4
    config["fsdp_config"]["fsdp_reshard_after_forward"] = False
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(config))
    plan = make_plan(str(path))
    assert plan.processes == 4
    assert plan.environment["FSDP_RESHARD_AFTER_FORWARD"] == "false"
    assert make_plan("fsdp2").processes == 8


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--launch", "fsdp3", "--processes", "2"], "launch='fsdp3' is unknown: did you mean 'fsdp2'?"),
        (["--launch", "ddp"], "processes=0: give --processes"),
        (["--launch", "ddp", "--processes", "-1"], "processes=-1"),
        (["--launch", "fsdp2", "--processes", "2"], "shards over GPUs and none was found"),
        (["--launch", "ddp", "--processes", "2", "--prune_ratoi", "1"], "unknown field 'prune_ratoi'"),
        (["--processes", "2"], "processes=2 without --launch"),
        (["--launch", "{bad}", "--processes", "2"], "is not valid YAML"),
        (["--launch", "{tpu}", "--processes", "2"], "distributed_type='XLA', expected one of"),
        (["--launch", "{list}", "--processes", "2"], "must be an accelerate config"),
        (["--launch", "{two}", "--processes", "2"], "num_machines=2, and --launch starts processes on one"),
    ],
)
def test_bad_input_is_one_line(flags, message, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(plan_module, "_gpus", lambda: 0)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    files = {"bad": "a: [", "tpu": "distributed_type: XLA", "list": "- a", "two": "num_machines: 2"}
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    words = [flag.format(**{name: tmp_path / f"{name}.yaml" for name in files}) for flag in flags]
    assert main(["train", "tiny-digits/pretrain", *words]) == 2
    error = capfd.readouterr().err.strip()
    assert error.startswith("saccade: error: ")
    assert message in error
    assert "\n" not in error


def test_zero_without_deepspeed(monkeypatch):
    monkeypatch.setattr(plan_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SaccadeError, match=r"launch='zero2' needs deepspeed, .* pip install \"saccade\[deepspeed\]\""):
        make_plan("zero2", 2)


def test_more_processes_than_gpus(gpus):
    with pytest.raises(SaccadeError, match="processes=9: this machine has 8 GPUs"):
        make_plan("ddp", 9)


@pytest.fixture
def two_gpus(monkeypatch):
    """Two GPUs in this process, as far as the options of a run can see."""
    monkeypatch.setattr(DualSpeedConfig, "_n_gpu", property(lambda args: 2, lambda args, number: None), raising=False)


def test_several_gpus_without_a_launcher_are_one_line(two_gpus, tmp_path, capfd):
    output, words = tmp_path / "run", ["train", "tiny-digits/sft", "--model", "tiny", "--use_cpu", "true"]
    assert main([*words, "--output_dir", str(output)]) == 2
    error = capfd.readouterr().err.strip()
    assert error.startswith("saccade: error: n_gpu=2: a process trains on one GPU and this one sees 2; start one ")
    assert "--launch ddp`" in error
    assert "set CUDA_VISIBLE_DEVICES=0" in error
    assert "\n" not in error
    assert not output.exists()
    # A launcher checks the recipe in a process that sees all GPUs.
    assert main([*words, "--output_dir", str(output), "--check"]) == 0


def test_several_gpus_are_refused_before_a_model_is_loaded(two_gpus, model, processor, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path / "model")
    monkeypatch.setattr("saccade.dualspeed.trainer.load_by_name", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(SaccadeError, match="n_gpu=2"):
        make_trainer(str(tmp_path / "model"), processor, tmp_path)


def test_a_model_that_is_split_over_gpus_may_see_them(model, processor, tmp_path):
    """The stock trainer counts its GPUs as one. One that is on a single device, as quantized ones are, TRL refuses."""
    rows = digit_scenes("sft", "train", 2, seed=5)
    for devices, refused in (((0, 1), False), (("cpu", "cpu"), True)):
        model.hf_device_map = dict(zip(("model.vision_tower", "model.language_model"), devices, strict=True))
        args = make_config(tmp_path)
        args._n_gpu = 2
        with pytest.raises(SaccadeError, match="DataParallel") if refused else nullcontext():
            DualSpeedTrainer(model, args, train_dataset=rows, processing_class=processor)


class Accelerator:
    def __init__(self, engine, processes):
        self.distributed_type = type("Type", (), {"value": engine})
        self.num_processes = processes


@pytest.mark.parametrize(
    ("environment", "engine", "processes", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "MULTI_CPU", 1, "FSDP was requested but accelerate runs MULTI_CPU"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "NO", 1, "DEEPSPEED was requested but accelerate runs NO"),
        ({"WORLD_SIZE": "2"}, "NO", 1, "2 processes were started but accelerate joined 1"),
        ({"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"}, "FSDP", 2, None),
        ({}, "NO", 1, None),
    ],
)
def test_a_silent_fall_back_is_refused(monkeypatch, environment, engine, processes, message):
    for name in ("WORLD_SIZE", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if message is None:
        check_engine(Accelerator(engine, processes))
        return
    with pytest.raises(SaccadeError, match=message):
        check_engine(Accelerator(engine, processes))


RANK_1 = "import os, sys, time\nif os.environ['RANK'] == '1': "


@pytest.mark.parametrize(
    ("code", "status", "message"),
    [
        ("pass", 0, ""),
        (RANK_1 + "sys.exit(3)\ntime.sleep(600)", 3, ""),
        (RANK_1 + "os.kill(os.getpid(), 9)\ntime.sleep(600)", 1, "rank 1 was killed by SIGKILL"),
    ],
)
def test_processes_end_together(code, status, message, capfd):
    """Nobody waits forever for a rank that has died."""
    started = time.monotonic()
    assert run_processes(local_plan(2), [sys.executable, "-c", code], patience_seconds=0.5) == status
    assert message in capfd.readouterr().err
    assert time.monotonic() - started < 60


LAUNCHER = """
import sys
sys.path.insert(0, {tests!r})
from test_launch import local_plan
from saccade.launch import run_processes
code = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
sys.exit(run_processes(local_plan(2), [sys.executable, "-c", code]))
"""


def test_ranks_end_with_a_launcher_that_is_killed(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER.format(tests=str(Path(__file__).parent))], stdout=subprocess.PIPE, text=True
    )
    ranks = [int(process.stdout.readline()) for _ in range(2)]
    process.send_signal(signal.SIGKILL)
    process.wait()
    until = time.monotonic() + 20
    while any(Path(f"/proc/{rank}").exists() for rank in ranks) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)


def test_ctrl_c_in_a_terminal_reaches_each_rank_once(capfd):
    """The launcher hands it on, and the ranks are not in the group that a terminal signals."""
    code = (
        "import os, signal, sys, time\nseen = []\nsignal.signal(signal.SIGINT, lambda *a: seen.append(1))\n"
        "os.kill(os.getppid(), signal.SIGINT) if os.environ['RANK'] == '0' else None\n"
        "until = time.monotonic() + 60\nwhile not seen and time.monotonic() < until: time.sleep(0.05)\n"
        "time.sleep(0.5)\nos.write(1, f'seen {len(seen)} {os.getpgid(0) == os.getpid()}\\n'.encode())\nsys.exit(130)"
    )
    # Both have to listen before the signal comes. Each writes its line at once, since both have the same output.
    code = code.replace("os.kill", "time.sleep(2) or os.kill")
    assert run_processes(local_plan(2), [sys.executable, "-c", code], patience_seconds=30) == 130
    assert capfd.readouterr().out.splitlines() == ["seen 1 True"] * 2


@pytest.mark.slow
def test_sigterm_to_the_launcher_saves_and_exits_0(tmp_path):
    flags = ["--max_steps", "100000", "--per_device_train_batch_size", "2", "--logging_steps", "1"]
    flags += ["--dataset_rows", "64", "--num_train_epochs", "10000", "--save_strategy", "no"]
    command = [sys.executable, "-m", "saccade.cli.main", "train", "tiny-digits/sft", "--model", "tiny"]
    process = subprocess.Popen(
        [*command, "--launch", "ddp", "--processes", "2", "--output_dir", str(tmp_path), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"},
    )
    try:
        seen = ""
        for line in process.stdout:
            seen += line
            if "  loss " in line:
                break
        assert "  loss " in seen, seen
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
        assert process.wait(timeout=60) == 0, seen + rest
    finally:
        process.terminate()
        process.wait(timeout=60)
    assert f"stopped by SIGTERM, saved {newest_checkpoint(tmp_path)}" in rest
