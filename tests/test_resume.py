"""Kill -9 between and inside checkpoints, a full disk, a resume that must not go on."""

import errno
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from data_files import good_records, turn, write_json
from forked import run_forked
from helpers import losses, make_trainer
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, TrainerCallback
from watching import watched

from saccade import DualSpeedTrainer, SaccadeError
from saccade.cli.main import DISK_FAULTS, main
from saccade.data import digit_scenes
from saccade.dualspeed.checkpoint import MANIFEST_FILE, newest_checkpoint, remove_old_checkpoints, resolve_resume
from saccade.dualspeed.folder import OWNER_FILE, PARTIAL_DIR, RUN_FILE, read_run_file
from saccade.pruning import ModeIsolator
from saccade.testing.training import make_config
from saccade.tiny import build_tiny_llava
from saccade.training import ModelOptions, load_rows

SCRIPT = Path(__file__).parent / "training_process.py"
# The random reducer draws anew each step, so a resumed run must find its place in the draws too.
# At a constant rate a run may go on for longer than it was meant to.
LONGER = {"lr_scheduler_type": "constant"}
DAMAGES = {
    "missing": None,
    "cut": lambda content: content[:-1],
    "flipped": lambda content: bytes([content[0] ^ 1]) + content[1:],
    "empty": lambda content: b"",
}
OPTIONS = {"reducer": "random", "slow_probability": 0.4, "max_steps": 8, "save_strategy": "steps", "save_steps": 3}


def run(output, expect=0, **options):
    values = {**OPTIONS, "output_dir": str(output), **options}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = run_forked([sys.executable, str(SCRIPT), json.dumps(values)], env=environment)
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


@pytest.mark.parametrize(
    "kill",
    [{"kill_at_step": 5}, pytest.param({"kill_in_checkpoint": 6}, marks=pytest.mark.slow)],
    ids=["between", "inside"],
)
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


def test_a_run_killed_while_a_checkpoint_is_replaced_goes_on_from_the_new_one(unbroken, tmp_path):
    """Then there is none in its place: the old one is moved aside, and the new one is not there yet."""
    reference, lora = unbroken
    run(tmp_path, expect=-signal.SIGKILL, lora=lora, kill_at_step=7)
    run(tmp_path, expect=-signal.SIGKILL, lora=lora, resume=str(tmp_path / "checkpoint-3"), kill_in_replacing=True)
    assert sorted(path.name for path in (tmp_path / PARTIAL_DIR).glob("*/")) == ["checkpoint-6", "replaced"]
    assert not (tmp_path / "checkpoint-6").exists()
    shutil.rmtree(tmp_path / "checkpoint-3")
    (tmp_path / "steps.jsonl").unlink()
    assert newest_checkpoint(tmp_path) == tmp_path / PARTIAL_DIR / "checkpoint-6"
    run(tmp_path, lora=lora, resume=True)
    got, expected = steps(tmp_path), steps(reference)
    assert list(got) == [7, 8]
    for step, entry in got.items():
        assert entry.pop("mode") == expected[step].pop("mode"), step
        assert entry == pytest.approx(expected[step], rel=1e-6), step
    assert not (tmp_path / PARTIAL_DIR).exists()
    assert (tmp_path / "checkpoint-6").is_dir()


def test_an_interruption_while_a_checkpoint_is_replaced_removes_neither(processor, tmp_path, monkeypatch):
    trainer = make_trainer(
        build_tiny_llava(processor, seed=0), processor, tmp_path, max_steps=1, save_strategy="steps"
    )
    trainer.train()
    rename = Path.rename

    def interrupted(path, target):
        rename(path, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer._save_checkpoint(trainer.model, None)
    monkeypatch.undo()
    assert resolve_resume(True, tmp_path) == tmp_path / "checkpoint-1"


def test_a_stream_goes_on_in_the_epoch_where_it_stopped(processor, tmp_path):
    """Three rows in batches of two, in another order in each epoch: the second step of each has a single row. It makes
    no difference how batches are cut, before the resume or after."""
    records = good_records(tmp_path, 3)
    for record, answer in zip(records, ("1", "2 3", "4 5 6"), strict=True):
        record["conversations"] = turn("<image>\nhow many ?", answer)
    data = write_json(tmp_path / "rows.jsonl", records)
    streaming = ModelOptions(dataset=str(data), dataset_streaming=True, dataset_shuffle_buffer=3)

    def curve(name, cut, resume=None):
        output = tmp_path / name
        if resume is not None:
            shutil.copytree(tmp_path / "whole" / resume, output / resume)
        options = {"per_device_train_batch_size": 2 // cut, "gradient_accumulation_steps": cut, "max_steps": 7}
        options |= {"save_strategy": "steps", "save_steps": 1}
        trainer = make_trainer(build_tiny_llava(processor, seed=0), processor, output, load_rows(streaming), **options)
        trainer.train(resume_from_checkpoint=None if resume is None else str(output / resume))
        return [
            entry[name] for entry in trainer.state.log_history if "loss" in entry for name in ("loss", "grad_norm")
        ]

    whole = curve("whole", 1)
    assert len(set(whole)) == 14
    assert curve("cut", 2) == pytest.approx(whole, rel=1e-3)
    for cut, resume in ((1, "checkpoint-5"), (2, "checkpoint-6")):
        assert curve(resume, cut, resume) == pytest.approx(whole, rel=1e-3)


@pytest.fixture(scope="module")
def trained(processor, tmp_path_factory):
    model, folder = build_tiny_llava(processor, seed=0), tmp_path_factory.mktemp("interrupted")
    make_trainer(model, processor, folder, **LONGER, max_steps=2, save_strategy="steps", save_steps=2).train()
    return folder


@pytest.fixture
def interrupted(trained, tmp_path):
    """A folder with a whole checkpoint of step 2."""
    return shutil.copytree(trained, tmp_path, dirs_exist_ok=True)


def again(processor, output, **options):
    options = {**LONGER, "max_steps": 4, **options}
    return make_trainer(build_tiny_llava(processor, seed=1), processor, output, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prune_ratio": 0.8}, r"prune_ratio=0.8 \(checkpoint: 0.9\)"),
        ({"slow_probability": 0.2, "seed": 4}, r"seed=4 \(checkpoint: 3\), slow_probability=0.2 \(checkpoint: 0.1\)"),
        ({"reducer": "random"}, "reducer='random'"),
        ({"weight_decay": 0.1}, "weight_decay=0.1"),
        ({"lr_scheduler_type": "cosine"}, r"lr_scheduler_type='cosine' .*max_steps=4 \(checkpoint: None\)"),
        ({"positions": "original"}, "positions='original'"),
        ({"per_device_train_batch_size": 3}, r"global_batch_size=3 \(checkpoint: 4\)"),
    ],
)
def test_resume_with_other_options_is_refused(interrupted, processor, options, message):
    with pytest.raises(SaccadeError, match=message):
        again(processor, interrupted, **options).train(resume_from_checkpoint=True)


@pytest.mark.interfaces
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
    (run_file.parent / MANIFEST_FILE).unlink()
    trainer(4).train(resume_from_checkpoint=True)
    with pytest.raises(SaccadeError, match=r"adapters\.default\.r=8 \(checkpoint: 4\)"):
        trainer(8).train(resume_from_checkpoint=True)


@pytest.mark.interfaces
def test_another_way_to_the_same_global_batch_goes_on(processor, tmp_path):
    options = {**LONGER, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
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


@pytest.mark.parametrize("epochs", [1.0, 1.5, 2.0])
def test_a_finished_run_of_epochs_is_not_trained_on(processor, tmp_path, epochs):
    options = {**LONGER, "max_steps": -1, "num_train_epochs": epochs, "per_device_train_batch_size": 4}
    rows = digit_scenes("sft", "train", 8)
    for _ in range(2):
        options |= {"save_strategy": "steps", "save_steps": 1}
        trainer = make_trainer(build_tiny_llava(processor, seed=0), processor, tmp_path, rows, **options)
        found = newest_checkpoint(tmp_path)
        trainer.train(resume_from_checkpoint=found is not None)
        assert trainer.state.global_step == 2 * epochs
        assert newest_checkpoint(tmp_path).name == f"checkpoint-{round(2 * epochs)}"


def test_weights_of_several_dtypes_come_back_as_they_were(processor, tmp_path):
    """A projector in float32 in a model in bfloat16, as in stage one of a run in bfloat16."""

    def trainer():
        model = build_tiny_llava(processor, seed=0).to(torch.bfloat16)
        model.model.multi_modal_projector.float()
        return make_trainer(model, processor, tmp_path, **options)

    options = {"bf16": True, "freeze_language_model": True, "max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trained = trainer()
    trained.train()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=True)
    states = [one.model.state_dict() for one in (trained, resumed)]
    for name, value in states[0].items():
        assert torch.equal(states[1][name], value), name
        assert states[1][name].dtype == value.dtype


def test_damaged_checkpoints_are_passed_over_by_name(interrupted, caplog):
    whole = interrupted / "checkpoint-2"
    files = sorted(path.name for path in whole.iterdir())
    assert {"config.json", "model.safetensors", "mode_isolator.saccade", "optimizer.pt", "scheduler.pt"} < set(files)
    damaged = {}
    # Without its manifest a checkpoint counts as one of an earlier version, and is looked at as those are.
    for number, name in enumerate(sorted(set(files) - {MANIFEST_FILE}), start=3):
        for extra, damage in enumerate(DAMAGES.values()):
            path = interrupted / f"checkpoint-{10 * number + extra}"
            shutil.copytree(whole, path, copy_function=os.link)
            content = (path / name).read_bytes()
            (path / name).unlink()
            if damage is not None:
                (path / name).write_bytes(damage(content))
            damaged[path] = name
    assert resolve_resume(True, interrupted) == whole
    for path, name in damaged.items():
        # The file is named, and so is the checkpoint that is taken.
        (line,) = [line for line in caplog.messages if f"{path}: " in line]
        assert name in line
        assert line.endswith(f"; passed over, going on from {whole}")
        with pytest.raises(SaccadeError, match="is not a whole checkpoint") as error:
            resolve_resume(str(path), interrupted)
        assert name in str(error.value)
    shutil.rmtree(whole)
    with pytest.raises(SaccadeError, match="has no whole checkpoint") as error:
        resolve_resume(True, interrupted)
    for path, name in damaged.items():
        (fault,) = [part for part in str(error.value).split("; ") if f"{path}: " in part]
        assert name in fault


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "config.json", "model.safetensors"])
def test_a_checkpoint_of_an_earlier_version(interrupted, processor, name):
    """It has no manifest and no id, and training still resumes from it; what stock loading would miss is named."""
    checkpoint = interrupted / "checkpoint-2"
    (checkpoint / MANIFEST_FILE).unlink()
    (interrupted / OWNER_FILE).unlink()
    run_file = checkpoint / RUN_FILE
    written = json.loads(run_file.read_text())
    kept = {name: written["config"][name] for name in ("reducer", "seed", "learning_rate", "adapters")}
    run_file.write_text(json.dumps({**written, "config": kept, "run_id": None}))
    if name == "optimizer.pt":  # once is enough
        trainer = again(processor, interrupted, save_strategy="steps", save_steps=1, max_steps=3)
        trainer.train(resume_from_checkpoint=True)
        assert read_run_file(interrupted / "checkpoint-3")["run_id"] == trainer.run_id is not None
        shutil.rmtree(interrupted / "checkpoint-3")
        assert resolve_resume(True, interrupted) == checkpoint
    file = checkpoint / name
    file.rename(interrupted / name)
    with pytest.raises(SaccadeError, match=f"{checkpoint}: {name} is missing"):
        again(processor, interrupted).train(resume_from_checkpoint=True)


def test_a_checkpoint_without_an_optimizer_is_not_resumed(model, processor, tmp_path):
    options = {**LONGER, "max_steps": 1, "save_strategy": "steps", "save_steps": 1, "save_only_model": True}
    make_trainer(model, processor, tmp_path, **options).train()
    with pytest.raises(SaccadeError, match=r"optimizer.pt is missing \(save_only_model=true saves none\)"):
        again(processor, tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(SaccadeError, match=r"not a whole checkpoint of a DualSpeed run: optimizer\.pt"):
        again(processor, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_the_newest_checkpoint_stays_when_the_clock_goes_back(model, processor, tmp_path):
    trainer = make_trainer(
        model, processor, tmp_path, max_steps=4, save_strategy="steps", save_steps=1, save_total_limit=1
    )

    class Clock(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            # What was written before seems to come from tomorrow.
            for path in tmp_path.glob("checkpoint-*"):
                os.utime(path, (path.stat().st_mtime + 86400,) * 2)

    trainer.add_callback(Clock())
    trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]


@pytest.mark.parametrize(
    ("there", "limit", "best", "left"),
    [
        ([2, 4, 6], 2, None, [4, 6]),
        ([2, 4, 6], None, None, [2, 4, 6]),
        ([2, 4, 6, 8], 2, "elsewhere/checkpoint-2", [2, 8]),
        ([2, 4, 6], 1, "elsewhere/checkpoint-4", [4, 6]),
        ([8, 9, 10, 100], 2, None, [10, 100]),
    ],
)
def test_which_checkpoints_are_removed(tmp_path, there, limit, best, left):
    for number in there:
        (tmp_path / f"checkpoint-{number}").mkdir()
    remove_old_checkpoints(tmp_path / f"checkpoint-{max(there)}", limit, best)
    assert sorted(int(path.name[11:]) for path in tmp_path.iterdir()) == left


def test_what_was_passed_over_is_removed_first(tmp_path):
    for number in (2, 4, 6, 8):
        (tmp_path / f"checkpoint-{number}").mkdir()
    # The run went on from step 2, and wrote its step 4.
    remove_old_checkpoints(tmp_path / "checkpoint-4", 2, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-4"]


def with_a_best(processor, output, adapters=None, **options):
    """A trainer of four steps that is told that the second is the best."""
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "step_number", "greater_is_better": False}
    trainer = DualSpeedTrainer(
        build_tiny_llava(processor, seed=0),
        args=make_config(output, **{**settings, "save_total_limit": 2, **options}),
        train_dataset=digit_scenes("sft", "train", 16),
        eval_dataset=digit_scenes("sft", "validation", 4),
        processing_class=processor,
        peft_config=adapters,
    )
    evaluate = trainer.evaluate

    def numbered(*args, **kwargs):
        metrics = evaluate(*args, **kwargs)
        metrics["eval_step_number"] = abs(trainer.state.global_step - 2)
        return metrics

    trainer.evaluate = numbered
    return trainer


def test_early_stopping_goes_on_counting(processor, tmp_path):
    """The first step is the best: the loss falls, and is to rise."""
    falls = {"metric_for_best_model": "loss", "greater_is_better": True}

    def stopping(patience, resume=None):
        trainer = with_a_best(processor, tmp_path, max_steps=9, save_total_limit=None, **falls)
        trainer.add_callback(EarlyStoppingCallback(patience))
        trainer.train(resume_from_checkpoint=resume and str(tmp_path / resume))
        return trainer.state.global_step

    assert stopping(3) == 4
    assert stopping(3, "checkpoint-3") == 4
    # It may have more patience than the run had before.
    assert stopping(4, "checkpoint-2") == 5


def test_a_resumed_run_may_have_another_callback_with_a_state(processor, tmp_path):
    """Without an entry for it in the checkpoint, stock saving raises a KeyError."""
    options = {"max_steps": 3, "save_total_limit": None}
    with_a_best(processor, tmp_path, **options).train()
    trainer = with_a_best(processor, tmp_path, **options)
    for _ in range(2):
        trainer.add_callback(EarlyStoppingCallback(9))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert trainer.state.global_step == 3


@pytest.mark.interfaces
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_best_model_comes_back_at_the_end(processor, tmp_path, lora):
    """With stock loading its weights would match no key, and the last ones would stay."""
    adapters = LoraConfig(r=2, target_modules=r".*language_model.*q_proj")
    trainer = with_a_best(processor, tmp_path, adapters if lora else None)
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
    assert torch.equal(trainer.isolator.weight, ModeIsolator.from_pretrained(best).weight)
    told, last = read_run_file(tmp_path / "final"), read_run_file(tmp_path / "checkpoint-4")
    assert (told["global_step"], told["weights_step"]) == (4, 2)
    assert told["tokens"] == last["tokens"]
    # A job that is started once more resumes it, and has no step left.
    resumed = with_a_best(processor, tmp_path, adapters if lora else None)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    resumed.save_model(str(tmp_path / "again"))
    again = load_file(tmp_path / "again" / file)
    for name, value in saved.items():
        assert torch.equal(value, again[name]), name
    assert read_run_file(tmp_path / "again")["weights_step"] == 2


def test_the_best_model_is_one_of_the_runs_own(processor, tmp_path):
    """A state from somebody else may name any folder, and that of a run that was moved names where it was."""
    run, outside = tmp_path / "run", tmp_path / "outside"
    constant = {"lr_scheduler_type": "constant", "warmup_steps": 0}
    with_a_best(processor, run, max_steps=3, **constant).train()
    shutil.copytree(run / "checkpoint-3", outside / "checkpoint-7")
    shutil.copytree(run / "checkpoint-3", outside / "checkpoint-2")
    state = run / "checkpoint-3" / "trainer_state.json"
    (run / "checkpoint-3" / MANIFEST_FILE).unlink()
    written = json.loads(state.read_text())
    for best in (outside / "checkpoint-7", "/etc", "..", "\0"):
        state.write_text(json.dumps({**written, "best_model_checkpoint": str(best)}))
        with pytest.raises(SaccadeError, match=r"is not a checkpoint of .*run: put it there"):
            with_a_best(processor, run, **constant).train(resume_from_checkpoint=True)
    state.write_text(json.dumps({**written, "best_model_checkpoint": str(outside / "checkpoint-2")}))
    trainer = with_a_best(processor, run, save_total_limit=1, **constant)
    with watched() as events:
        trainer.train(resume_from_checkpoint=True)
    assert not [args for event, args in events if event == "open" and str(args[0]).startswith(str(outside))]
    assert trainer.state.best_model_checkpoint == str(run / "checkpoint-2")
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-2"]
    best = load_file(run / "checkpoint-2" / "model.safetensors")
    trainer.save_model(str(tmp_path / "final"))
    final = load_file(tmp_path / "final" / "model.safetensors")
    assert all(torch.equal(value, final[name]) for name, value in best.items())


def test_resume_without_a_checkpoint(model, processor, tmp_path):
    with pytest.raises(SaccadeError, match="has no whole checkpoint"):
        make_trainer(model, processor, tmp_path).train(resume_from_checkpoint=True)


def test_weights_that_do_not_fit_are_an_error(interrupted, processor):
    """The stock trainer warns about missing keys and trains on from whatever is in memory."""
    from safetensors.torch import save_file

    path = interrupted / "checkpoint-2" / "model.safetensors"
    weights = load_file(path)
    weights.pop(next(name for name in weights if "q_proj" in name))
    save_file(weights, path, metadata={"format": "pt"})
    (path.parent / MANIFEST_FILE).unlink()
    with pytest.raises(SaccadeError, match=r"missing .*q_proj"):
        again(processor, interrupted).train(resume_from_checkpoint=True)


def test_full_disk_keeps_the_last_checkpoint(processor, tmp_path, monkeypatch):
    options = {**LONGER, "max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(build_tiny_llava(processor, seed=0), processor, tmp_path, **options)
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
    """A file system of 9 MB, which has room for one checkpoint of the tiny model but not two."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.decode().strip()}")
    yield disk
    # Lazily: the traceback of a write that failed holds its file open.
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_really_full_disk(processor, small_disk):
    trainer = make_trainer(
        build_tiny_llava(processor, seed=0), processor, small_disk, max_steps=6, save_strategy="steps", save_steps=2
    )
    with pytest.raises(OSError, match="No space left") as error:
        trainer.train()
    assert error.value.errno == errno.ENOSPC
    assert newest_checkpoint(small_disk) == small_disk / "checkpoint-2"
    assert not (small_disk / PARTIAL_DIR).exists()


def test_the_disk_fills_up_in_any_file(processor, tmp_path, small_disk):
    """File by file: each time a few bytes too few are left for it."""
    whole = make_trainer(build_tiny_llava(processor, seed=0), processor, tmp_path / "whole", max_steps=1)
    whole.train()
    whole._save_checkpoint(whole.model, None)
    files = sorted((tmp_path / "whole" / "checkpoint-1").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert len(files) > 10
    pages = [-(-path.stat().st_size // 4096) for path in files]
    trainer = make_trainer(build_tiny_llava(processor, seed=0), processor, small_disk / "run", max_steps=1)
    trainer.train()
    for number, path in enumerate(files):
        # Room for what is written before it, and the folders.
        left = sum(pages[:number]) + pages[number] - 1
        disk = os.statvfs(small_disk)
        with (small_disk / "filler").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, (disk.f_bavail - left)) * disk.f_bsize)
        with pytest.raises(OSError, match="No space left") as error:
            trainer._save_checkpoint(trainer.model, None)
        assert error.value.errno == errno.ENOSPC, path.name
        assert not (small_disk / "run" / PARTIAL_DIR).exists(), path.name
        assert not list((small_disk / "run").glob("checkpoint-*")), path.name
        (small_disk / "filler").unlink()
        # Its traceback holds a file open that was removed, and so its room.
        del error
        gc.collect()
    trainer._save_checkpoint(trainer.model, None)
    assert newest_checkpoint(small_disk / "run").name == "checkpoint-1"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_quota_in_writers_of_other_languages_is_one_line(processor, tmp_path, monkeypatch, capsys, number):
    """safetensors and tokenizers are written in Rust, and raise their own kinds of errors."""

    def refused(self, *args, **kwargs):
        raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})")

    monkeypatch.setattr(ModeIsolator, "save_pretrained", refused)
    flags = ["--max_steps", "1", "--per_device_train_batch_size", "2", "--disable_tqdm", "true", "--save_steps", "1"]
    options = ["--model", "tiny", "--output_dir", str(tmp_path), "--dataset_rows", "16", *flags]
    assert main(["train", "tiny-digits/sft", *options]) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith(f"saccade: error: {DISK_FAULTS[number]}")


def test_a_full_disk_is_one_line_on_the_command_line(small_disk, capsys):
    flags = ["--max_steps", "4", "--save_steps", "1", "--per_device_train_batch_size", "2", "--disable_tqdm", "true"]
    options = ["--model", "tiny", "--output_dir", str(small_disk), "--dataset_rows", "16", *flags]
    assert main(["train", "tiny-digits/sft", *options]) == 1
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert printed.startswith("saccade: error: no space left on the disk")
    assert newest_checkpoint(small_disk) == small_disk / "checkpoint-1"
