"""What ends a run early: SIGTERM, a loss that is not finite, a dead data worker. Each is made to happen."""

import ast
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import losses, make_trainer
from torch.utils.data import get_worker_info
from transformers import EarlyStoppingCallback, TrainerCallback

from saccade import DualSpeedTrainer, SaccadeError
from saccade.cli.main import main
from saccade.data import digit_scenes
from saccade.dualspeed.checkpoint import newest_checkpoint
from saccade.testing.training import make_config
from saccade.tiny import build_tiny_llava


def trainer_for(processor, output, **options):
    defaults = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "slow_probability": 0.4}
    return make_trainer(build_tiny_llava(processor, seed=0), processor, output, **{**defaults, **options})


class At(TrainerCallback):
    """Run a function at the beginning of a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


def test_sigterm_saves_and_the_run_goes_on_from_there(processor, tmp_path):
    unbroken = trainer_for(processor, tmp_path / "unbroken")
    unbroken.train()
    trainer = trainer_for(processor, tmp_path / "run")
    before = signal.getsignal(signal.SIGTERM)
    trainer.add_callback(At(2, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    trainer.train()
    assert trainer.sigterm.stopped
    assert trainer.state.global_step == 3
    assert newest_checkpoint(tmp_path / "run").name == "checkpoint-3"
    assert signal.getsignal(signal.SIGTERM) == before
    resumed = trainer_for(processor, tmp_path / "run")
    resumed.train(resume_from_checkpoint=True)
    assert not resumed.sigterm.stopped
    assert losses(resumed) == pytest.approx(losses(unbroken), rel=1e-6)


def test_sigterm_saves_even_where_no_checkpoints_are_asked_for(processor, tmp_path):
    trainer = trainer_for(processor, tmp_path, save_strategy="no")
    trainer.add_callback(At(1, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    trainer.train()
    assert newest_checkpoint(tmp_path).name == "checkpoint-2"


class Seen(TrainerCallback):
    """The steps after which a run saved and evaluated."""

    def __init__(self):
        self.saved, self.evaluated = [], []

    def on_save(self, args, state, control, **kwargs):
        self.saved.append(state.global_step)

    def on_evaluate(self, args, state, control, **kwargs):
        self.evaluated.append(state.global_step)


BY_STEPS = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
BEST = {"metric_for_best_model": "loss", "greater_is_better": True}  # the first one stays the best


@pytest.mark.parametrize(
    ("options", "before", "after"),
    [
        ({**BY_STEPS, **BEST, "load_best_model_at_end": True, "save_total_limit": 1}, [2], [4, 6]),
        ({**BY_STEPS, **BEST, "save_strategy": "best"}, [2], [4, 6]),
        ({**BY_STEPS, "save_only_model": True}, [2], [4, 6]),
        ({"save_strategy": "epoch", "eval_strategy": "epoch", "per_device_train_batch_size": 2}, [], [6]),
        ({"save_strategy": "epoch", "eval_strategy": "epoch", "per_device_train_batch_size": 16}, [], [4, 6]),
    ],
    ids=[
        "the best alone is kept",
        "the best alone is saved",
        "weights alone are saved",
        "in mid-epoch",
        "at the end of an epoch",
    ],
)
def test_a_stopped_run_leaves_the_checkpoint_from_which_it_goes_on(processor, tmp_path, options, before, after):
    """It is saved once, and neither an evaluation is begun nor the best model loaded: a cluster does not wait. An
    evaluation that was due is the resumed run's first."""

    def make():
        trainer = DualSpeedTrainer(
            build_tiny_llava(processor, seed=0),
            args=make_config(tmp_path, max_steps=6, **options),
            train_dataset=digit_scenes("sft", "train", 64),
            eval_dataset=digit_scenes("sft", "validation", 2),
            processing_class=processor,
            callbacks=[seen := Seen()],
        )
        return trainer, seen

    trainer, seen = make()
    trainer.add_callback(At(3, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    trainer.train()
    assert trainer.sigterm.stopped
    assert seen.saved == [*before, 4]
    assert seen.evaluated == before
    assert trainer._weights_step is None
    assert newest_checkpoint(tmp_path).name == "checkpoint-4"
    resumed, seen = make()
    resumed.train(resume_from_checkpoint=True)
    assert resumed._resumed_at == 4
    assert seen.evaluated == after
    assert resumed.state.global_step == 6
    assert resumed.args.save_only_model == options.get("save_only_model", False)


@pytest.mark.parametrize("stop", [2, 6], ids=["the best", "the last"])
def test_early_stopping_counts_an_evaluation_that_was_left_out(processor, tmp_path, stop):
    """As the unbroken run it ends after the second one without a better one, in step 6."""

    def make():
        return DualSpeedTrainer(
            build_tiny_llava(processor, seed=0),
            args=make_config(tmp_path, max_steps=10, **BY_STEPS, **BEST, load_best_model_at_end=True),
            train_dataset=digit_scenes("sft", "train", 64),
            eval_dataset=digit_scenes("sft", "validation", 2),
            processing_class=processor,
            callbacks=[EarlyStoppingCallback(2)],
        )

    trainer = make()
    trainer.add_callback(At(stop - 1, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    trainer.train()
    assert trainer.state.global_step == stop
    resumed = make()
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    assert resumed.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert resumed._weights_step == 2


def test_a_run_stopped_in_its_last_step_is_evaluated_when_it_is_resumed(processor, tmp_path):
    """No epoch is run then, and the last model may be the best one."""

    def make():
        return DualSpeedTrainer(
            build_tiny_llava(processor, seed=0),
            args=make_config(tmp_path, max_steps=4, **BY_STEPS, load_best_model_at_end=True),
            train_dataset=digit_scenes("sft", "train", 64),
            eval_dataset=digit_scenes("sft", "validation", 2),
            processing_class=processor,
        )

    trainer = make()
    trainer.add_callback(At(3, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    trainer.train()
    assert (trainer.state.global_step, trainer.sigterm.stopped) == (4, True)
    resumed = make()
    resumed.train(resume_from_checkpoint=True)
    losses = {entry["step"]: entry["eval_loss"] for entry in resumed.state.log_history if "eval_loss" in entry}
    assert list(losses) == [2, 4]
    best = min(losses, key=losses.get)
    assert resumed.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert resumed._weights_step == best


def test_the_first_ctrl_c_saves_and_says_how_to_go_on(processor, tmp_path, capfd):
    trainer = trainer_for(processor, tmp_path)
    before = signal.getsignal(signal.SIGINT)
    trainer.add_callback(At(2, lambda: os.kill(os.getpid(), signal.SIGINT)))
    with pytest.raises(KeyboardInterrupt, match="checkpoint-3 is whole, resume from it"):
        trainer.train()
    assert newest_checkpoint(tmp_path).name == "checkpoint-3"
    assert "interrupted: saving after this step; Ctrl-C again stops at once" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) == before
    resumed = trainer_for(processor, tmp_path)
    resumed.add_callback(At(4, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)]))
    with pytest.raises(KeyboardInterrupt) as second:
        resumed.train(resume_from_checkpoint=True)
    assert not str(second.value)
    assert newest_checkpoint(tmp_path).name == "checkpoint-4"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_the_final_save_waits_until_all_is_saved(tmp_path, capsys, monkeypatch, number):
    save = DualSpeedTrainer.save_model

    def signalled(self, output_dir=None, _internal_call=False):
        os.kill(os.getpid(), number)
        save(self, output_dir, _internal_call)

    monkeypatch.setattr(DualSpeedTrainer, "save_model", signalled)
    flags = ["--max_steps", "1", "--per_device_train_batch_size", "2", "--disable_tqdm", "true"]
    flags += ["--dataset_rows", "16", "--save_strategy", "no", "--output_dir", str(tmp_path)]
    assert main(["train", "tiny-digits/sft", "--model", "tiny", *flags]) == 0
    assert f"saved {tmp_path} (model" in capsys.readouterr().out
    assert all((tmp_path / name).is_file() for name in ("model.safetensors", "dualspeed.json", "log.json"))


def test_a_signal_while_a_model_is_saved_by_hand_is_obeyed_afterwards(processor, tmp_path, monkeypatch, request):
    trainer = trainer_for(processor, tmp_path)
    save = trainer._save
    # Ignored where whoever runs the tests put them into the background.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))

    def signalled(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        save(*args, **kwargs)

    monkeypatch.setattr(trainer, "_save", signalled)
    with pytest.raises(KeyboardInterrupt):
        trainer.save_model(str(tmp_path / "final"))
    assert (tmp_path / "final" / "dualspeed.json").is_file()


def test_the_command_exits_0_on_sigterm(tmp_path):
    """From outside, as a cluster does it, with a data worker that gets the signal too."""
    flags = ["--max_steps", "100000", "--per_device_train_batch_size", "2", "--logging_steps", "1"]
    flags += ["--dataset_rows", "64", "--num_train_epochs", "1000", "--save_strategy", "no"]
    command = [sys.executable, "-m", "saccade.cli.main", "train", "tiny-digits/sft", "--model", "tiny"]
    process = subprocess.Popen(
        [*command, "--output_dir", str(tmp_path), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"},
    )
    try:
        seen = ""
        for line in process.stdout:
            seen += line
            if "  loss " in line:
                break
        assert "  loss " in seen, seen
        os.killpg(process.pid, signal.SIGTERM)
        rest = process.stdout.read()
        assert process.wait(timeout=60) == 0, seen + rest
    finally:
        process.kill()
        process.wait()
    checkpoint = newest_checkpoint(tmp_path)
    assert f"stopped by SIGTERM, saved {checkpoint}; --resume auto continues from it" in rest
    # Only the checkpoint: a final model would look as if training had ended.
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_nan_loss_stops_the_run_and_names_the_batch(processor, tmp_path, accumulation):
    # A method that looks at no feature: others stop at NaN by themselves.
    options = {"gradient_accumulation_steps": accumulation, "max_grad_norm": 0, "reducer": "random"}
    trainer = trainer_for(processor, tmp_path, **options)
    collate, made = trainer.data_collator, []

    def poisoned(rows):
        batch = collate(rows)
        made.append(batch)
        if len(made) == 5 * accumulation:
            batch["pixel_values"] = batch["pixel_values"] * float("nan")
        return batch

    trainer.data_collator = poisoned
    weights = {}
    trainer.add_callback(At(4, lambda: weights.update({k: v.clone() for k, v in trainer.model.state_dict().items()})))
    place = f"in step 4, micro-batch {accumulation - 1} of rank 0: 4 samples, '"
    with pytest.raises(SaccadeError, match=place) as error:
        trainer.train()
    message, bad = str(error.value), made[5 * accumulation - 1]
    assert message.startswith("the loss is nan")
    assert f"{tmp_path / 'checkpoint-4'} is whole" in message
    assert "\n" not in message
    text = " ".join(processor.tokenizer.decode(bad["input_ids"][0], skip_special_tokens=True).split())
    assert text[:60] in message
    kept = torch.load(tmp_path / "bad-batch-step-4-rank-0.pt")
    assert torch.equal(kept["input_ids"], bad["input_ids"])
    assert kept["pixel_values"].isnan().all()
    # It stopped before the weights took it in.
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, weights[name]), name
    assert newest_checkpoint(tmp_path).name == "checkpoint-4"


def test_pixels_that_are_no_numbers_are_named(processor, tmp_path):
    trainer = trainer_for(processor, tmp_path)
    collate = trainer.data_collator

    def poisoned(rows):
        batch = collate(rows)
        return {**batch, "pixel_values": batch["pixel_values"] * float("nan")}

    trainer.data_collator = poisoned
    with pytest.raises(
        SaccadeError, match=r"(pixel_values is not finite|the loss is nan) in step 0, micro-batch 0 of"
    ):
        trainer.train()
    assert (tmp_path / "bad-batch-step-0-rank-0.pt").is_file()


def test_ordinary_training_is_watched_too(processor, tmp_path):
    trainer = trainer_for(processor, tmp_path, prune_ratio=0.0, slow_probability=1.0, distill_weight=0.0)
    with torch.no_grad():
        trainer.model.get_output_embeddings().weight.fill_(float("inf"))
    with pytest.raises(SaccadeError, match=r"the loss is nan in step 0.*no checkpoint was saved yet"):
        trainer.train()


def test_a_gradient_that_is_no_number_stops_the_run(processor, tmp_path):
    trainer = trainer_for(processor, tmp_path)
    parameter = trainer.isolator.weight
    parameter.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(SaccadeError, match=r"gradient norm is (nan|inf) in step \d"):
        trainer.train()
    assert parameter.isfinite().all()


class Killer:
    """Kills the data worker that asks for its `count`-th row."""

    def __init__(self, rows, count):
        self.rows, self.left = rows, count
        self.column_names = rows.column_names

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        # Not the main process, which looks at rows before it trains.
        self.left -= get_worker_info() is not None
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.rows[index]


def test_a_dead_data_worker_is_one_line(processor, tmp_path, scenes):
    trainer = trainer_for(processor, tmp_path, dataloader_num_workers=1)
    trainer.train_dataset = Killer(scenes, 19)
    with pytest.raises(SaccadeError, match=r"dataloader_num_workers=1: a process that prepares batches died") as error:
        trainer.train()
    assert "killed by signal: Killed" in str(error.value) or "exited unexpectedly" in str(error.value)
    newest = newest_checkpoint(tmp_path)
    assert ("no checkpoint" if newest is None else f"{newest} is whole") in str(error.value)


def test_an_error_inside_a_data_worker_is_not_taken_for_its_death(processor, tmp_path, scenes):
    class Broken(Killer):
        def __getitem__(self, index):
            raise RuntimeError("a bug in the data set")

    trainer = trainer_for(processor, tmp_path, dataloader_num_workers=1)
    trainer.train_dataset = Broken(scenes, 0)
    with pytest.raises(RuntimeError, match="a bug in the data set"):
        trainer.train()


def test_a_nan_loss_is_one_line_on_the_command_line(tmp_path, capsys):
    flags = ["--max_steps", "40", "--per_device_train_batch_size", "2", "--disable_tqdm", "true"]
    flags += ["--dataset_rows", "16", "--learning_rate", "1e30", "--warmup_steps", "0", "--max_grad_norm", "0"]
    assert main(["train", "tiny-digits/sft", "--model", "tiny", "--output_dir", str(tmp_path), *flags]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match(r"saccade: error: the (loss|visual features|gradient norm) (is|are) .* in step \d", line)


def fault_rows():
    page = (Path(__file__).parent.parent / "docs" / "faults.md").read_text()
    lines = [line for line in page.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize("row", fault_rows(), ids=lambda row: row[0][:40])
def test_every_fault_of_the_page_is_made_to_happen(row):
    _, happens, tests = row
    assert happens
    named = re.findall(r"`([^`]+)`", tests)
    assert named, f"no test for {row[0]!r}"
    for name in named:
        file, *path = name.split("::")
        body = ast.parse((Path(__file__).parent.parent / file).read_text()).body
        for step in path:
            (found,) = (node for node in body if getattr(node, "name", None) == step)
            body = found.body
        assert isinstance(found, ast.FunctionDef), f"{name} is not a test"
