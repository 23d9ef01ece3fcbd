"""Kill -9 between and inside checkpoints, a full disk, a resume that must not go on."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import losses, make_config, make_trainer
from peft import LoraConfig
from safetensors.torch import load_file

from saccade import DualSpeedTrainer, SaccadeError
from saccade.cli.main import main
from saccade.data import digit_scenes
from saccade.dualspeed.checkpoint import PARTIAL_DIR, RUN_FILE, newest_checkpoint, read_run_file, resolve_resume
from saccade.pruning import ModeIsolator
from saccade.tiny import build_tiny_llava

SCRIPT = Path(__file__).parent / "training_process.py"
# The random reducer draws anew each step, so a resumed run must find its place in the draws too.
OPTIONS = {"reducer": "random", "slow_probability": 0.4, "max_steps": 8, "save_strategy": "steps", "save_steps": 3}


def run(output, expect=0, **options):
    values = {**OPTIONS, "output_dir": str(output), **options}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), json.dumps(values)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == expect, done.stderr[-3000:]


def steps(output):
    """The last record of each step."""
    lines = (output / "steps.jsonl").read_text().splitlines()
    return {entry["step"]: entry for entry in map(json.loads, lines)}


@pytest.fixture(scope="module", params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["full", "lora"])
def unbroken(request, tmp_path_factory):
    output = tmp_path_factory.mktemp("unbroken")
    run(output, lora=request.param)
    return output, request.param


@pytest.mark.parametrize("kill", [{"kill_at_step": 5}, {"kill_in_checkpoint": 6}], ids=["between", "inside"])
def test_killed_run_resumes_on_the_same_curve(unbroken, tmp_path, kill):
    reference, lora = unbroken
    run(tmp_path, expect=-signal.SIGKILL, lora=lora, **kill)
    # Either way only the checkpoint of step 3 is whole; the one that was being written does not look like one.
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    assert (tmp_path / PARTIAL_DIR).exists() == ("kill_in_checkpoint" in kill)
    run(tmp_path, lora=lora, resume=True)
    got, expected = steps(tmp_path), steps(reference)
    assert list(got) == list(expected) == list(range(1, 9))
    assert {entry["mode"] for entry in got.values()} == {"fast", "slow"}
    for step, entry in expected.items():
        assert got[step].pop("mode") == entry.pop("mode"), step
        assert got[step] == pytest.approx(entry, rel=1e-6), step
    assert not (tmp_path / PARTIAL_DIR).exists()
    for name in ("adapter_model.safetensors" if lora else "model.safetensors", "mode_isolator.saccade"):
        final, whole = (load_file(folder / "final" / name) for folder in (tmp_path, reference))
        assert final.keys() == whole.keys()
        for key in whole:
            torch.testing.assert_close(final[key], whole[key], rtol=1e-6, atol=1e-7)


@pytest.fixture
def interrupted(model, processor, tmp_path):
    """A folder with a whole checkpoint of step 2."""
    trainer = make_trainer(model, processor, tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    return tmp_path


def again(processor, output, **options):
    return make_trainer(build_tiny_llava(processor, seed=1), processor, output, **{"max_steps": 4, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prune_ratio": 0.8}, r"prune_ratio=0.8 \(checkpoint: 0.9\)"),
        ({"slow_probability": 0.2, "seed": 4}, r"slow_probability=0.2 .*seed=4 \(checkpoint: 3\)"),
        ({"reducer": "random"}, "reducer='random'"),
        ({"weight_decay": 0.1}, "weight_decay=0.1"),
        ({"lr_scheduler_type": "constant"}, "lr_scheduler_type='constant'"),
        ({"positions": "original"}, "positions='original'"),
        ({"per_device_train_batch_size": 3}, r"global_batch_size=3 \(checkpoint: 4\)"),
    ],
)
def test_resume_with_other_options_is_refused(interrupted, processor, options, message):
    with pytest.raises(SaccadeError, match=message):
        again(processor, interrupted, **options).train(resume_from_checkpoint=True)


def test_adapters_are_compared_by_what_they_train(processor, tmp_path):
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]

    def trainer(rank):
        config = LoraConfig(target_modules=modules, r=rank)
        options = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
        return make_trainer(build_tiny_llava(processor), processor, tmp_path, peft_config=config, **options)

    trainer(4).train()
    saved = read_run_file(tmp_path / "checkpoint-1")["config"]["adapters"]["default"]
    # PEFT keeps the names in a set, whose order differs from process to process.
    assert saved["target_modules"] == sorted(modules)
    assert not {"peft_version", "base_model_name_or_path"} & saved.keys()
    trainer(4).train(resume_from_checkpoint=True)
    # An option that this version of PEFT does not know, and one that the checkpoint's did not.
    run_file = tmp_path / "checkpoint-1" / RUN_FILE
    written = json.loads(run_file.read_text())
    options = written["config"]["adapters"]["default"]
    options["of_tomorrow"] = options.pop("use_rslora")
    run_file.write_text(json.dumps(written))
    trainer(4).train(resume_from_checkpoint=True)
    with pytest.raises(SaccadeError, match=r"adapters\.default\.r=8 \(checkpoint: 4\)"):
        trainer(8).train(resume_from_checkpoint=True)


def test_another_way_to_the_same_global_batch_goes_on(processor, tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(build_tiny_llava(processor, seed=0), processor, tmp_path, **options)
    whole.train()
    trainer = again(processor, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(trainer) == pytest.approx(losses(whole), rel=1e-4)


def test_a_finished_run_is_not_trained_on(interrupted, processor):
    trainer = again(processor, interrupted, max_steps=2)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2
    saved = type(trainer.model).from_pretrained(interrupted / "checkpoint-2").state_dict()
    assert all(torch.equal(trainer.model.state_dict()[name], value) for name, value in saved.items())


def test_half_written_checkpoints_are_passed_over(interrupted, processor, caplog):
    whole = interrupted / "checkpoint-2"
    for number, missing in ((4, "trainer_state.json"), (6, "dualspeed.json")):
        shutil.copytree(whole, interrupted / f"checkpoint-{number}")
        (interrupted / f"checkpoint-{number}" / missing).unlink()
    # A disk that filled up, or a copy that was broken off.
    for number, name in ((5, "model.safetensors"), (7, "optimizer.pt")):
        shutil.copytree(whole, interrupted / f"checkpoint-{number}")
        file = interrupted / f"checkpoint-{number}" / name
        file.write_bytes(file.read_bytes()[:-100])
    cut = interrupted / "checkpoint-8"
    shutil.copytree(whole, cut)
    (cut / "trainer_state.json").write_text('{"global_step": 8, "log')
    assert newest_checkpoint(interrupted) == whole
    assert resolve_resume(True, interrupted) == whole
    assert f"{cut} is half-written and passed over" in caplog.text
    with pytest.raises(SaccadeError, match="not a whole checkpoint"):
        again(processor, interrupted).train(resume_from_checkpoint=str(cut))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_best_model_comes_back_at_the_end(processor, tmp_path, lora):
    """With stock loading its weights would match no key, and the last ones would stay."""
    adapters = LoraConfig(r=2, target_modules=r".*language_model.*q_proj")
    trainer = DualSpeedTrainer(
        build_tiny_llava(processor, seed=0),
        args=make_config(
            tmp_path,
            max_steps=4,
            save_strategy="steps",
            save_steps=1,
            eval_strategy="steps",
            eval_steps=1,
            load_best_model_at_end=True,
            metric_for_best_model="step_number",
            greater_is_better=False,
            save_total_limit=2,
        ),
        train_dataset=digit_scenes("sft", "train", 16),
        eval_dataset=digit_scenes("sft", "validation", 4),
        processing_class=processor,
        peft_config=adapters if lora else None,
    )
    evaluate = trainer.evaluate

    def numbered(*args, **kwargs):
        metrics = evaluate(*args, **kwargs)
        # Step 2 is the best by decree.
        metrics["eval_step_number"] = abs(trainer.state.global_step - 2)
        return metrics

    trainer.evaluate = numbered
    trainer.train()
    best = tmp_path / "checkpoint-2"
    assert trainer.state.best_model_checkpoint == str(best)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    state = json.loads((best / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(best)
    file = "adapter_model.safetensors" if lora else "model.safetensors"
    trainer.save_model(str(tmp_path / "final"))
    saved, final = (load_file(folder / file) for folder in (best, tmp_path / "final"))
    for name, value in saved.items():
        assert torch.equal(value, final[name]), name
    assert torch.equal(trainer.isolator.weight, ModeIsolator.load(best).weight)


def test_resume_without_a_checkpoint(model, processor, tmp_path):
    with pytest.raises(SaccadeError, match="holds no whole checkpoint"):
        make_trainer(model, processor, tmp_path).train(resume_from_checkpoint=True)


def test_weights_that_do_not_fit_are_an_error(interrupted, processor):
    """The stock trainer warns about missing keys and trains on from whatever is in memory."""
    from safetensors.torch import save_file

    path = interrupted / "checkpoint-2" / "model.safetensors"
    weights = load_file(path)
    weights.pop(next(name for name in weights if "q_proj" in name))
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(SaccadeError, match=r"missing_keys.*q_proj"):
        again(processor, interrupted).train(resume_from_checkpoint=True)


def test_full_disk_keeps_the_last_checkpoint(processor, tmp_path, monkeypatch):
    trainer = make_trainer(
        build_tiny_llava(processor, seed=0), processor, tmp_path, max_steps=6, save_strategy="steps", save_steps=2
    )
    write = trainer._save_optimizer_and_scheduler

    def full(folder):
        write(folder)
        if trainer.state.global_step == 4:
            raise OSError(errno.ENOSPC, "No space left on device", folder)

    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (tmp_path / PARTIAL_DIR).exists()
    resumed = again(processor, tmp_path, max_steps=6)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    assert len(losses(resumed)) == 6


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 9 MB, which holds one checkpoint of the tiny model but not two."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_really_full_disk(processor, small_disk):
    trainer = make_trainer(
        build_tiny_llava(processor, seed=0), processor, small_disk, max_steps=6, save_strategy="steps", save_steps=2
    )
    with pytest.raises(OSError, match="No space left") as error:
        trainer.train()
    assert error.value.errno == errno.ENOSPC
    assert newest_checkpoint(small_disk) == small_disk / "checkpoint-2"
    assert not (small_disk / PARTIAL_DIR).exists()


def test_a_full_disk_is_one_line_on_the_command_line(small_disk, capsys):
    flags = ["--max_steps", "4", "--save_steps", "1", "--per_device_train_batch_size", "2", "--disable_tqdm", "true"]
    options = ["--model", "tiny", "--output_dir", str(small_disk), "--dataset_rows", "16", *flags]
    assert main(["train", "tiny-digits/sft", *options]) == 1
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert printed.startswith("saccade: error: no space left on the disk")
    assert newest_checkpoint(small_disk) == small_disk / "checkpoint-1"
