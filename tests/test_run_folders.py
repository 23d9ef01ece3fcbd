"""A run keeps its folder to itself: used folders are refused, ids are kept apart, two runs do not write at once."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field, fields

import pytest
import torch
from datasets import Dataset
from helpers import make_trainer
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from saccade import DualSpeedConfig, SaccadeError
from saccade.cli.main import main
from saccade.data import digit_scenes
from saccade.dualspeed.checkpoint import check_same_run, newest_checkpoint, resolve_resume
from saccade.dualspeed.config import FREE_TO_CHANGE
from saccade.dualspeed.folder import LOCK_FILE, OWNER_FILE, RUN_FILE, read_owner, read_run_file
from saccade.dualspeed.identity import identify_model, identify_processor, identify_rows
from saccade.dualspeed.weights import read_evaluation
from saccade.files import file_lock
from saccade.pruning import ISOLATOR_FILE, ModeIsolator
from saccade.testing.training import make_config
from saccade.tiny import build_tiny_llava, build_tiny_processor
from saccade.training import ModelOptions, load_model, load_rows, load_to_run

SAVING = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}


def trained(processor, output, steps=1, seed=0, resume=None, **options):
    trainer = make_trainer(
        build_tiny_llava(processor, seed=seed), processor, output, max_steps=steps, **SAVING, **options
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_every_run_has_an_id_and_keeps_it(processor, tmp_path):
    first = trained(processor, tmp_path / "one")
    other = trained(processor, tmp_path / "two")
    assert first.run_id != other.run_id
    first.save_model(str(tmp_path / "one"))
    for place in ("one", "one/checkpoint-1"):
        assert read_run_file(tmp_path / place)["run_id"] == first.run_id
    assert read_owner(tmp_path / "one")["id"] == first.run_id
    resumed = trained(processor, tmp_path / "one", steps=2, resume=True)
    assert resumed.run_id == first.run_id == read_run_file(tmp_path / "one" / "checkpoint-2")["run_id"]
    # In another folder a run goes on as itself.
    moved = trained(processor, tmp_path / "three", steps=3, resume=str(tmp_path / "one" / "checkpoint-2"))
    assert moved.run_id == first.run_id == read_owner(tmp_path / "three")["id"]
    assert newest_checkpoint(tmp_path / "three").name == "checkpoint-3"
    # But not in the folder of a run that it is not.
    with pytest.raises(SaccadeError, match="two' holds checkpoints of a run, such as checkpoint-1"):
        trained(processor, tmp_path / "two", steps=3, resume=str(tmp_path / "one" / "checkpoint-2"))


def test_a_used_folder_is_refused_until_it_may_be_overwritten(processor, tmp_path):
    old = trained(processor, tmp_path, steps=2)
    with pytest.raises(SaccadeError, match=r"holds checkpoints of a run, such as checkpoint-2: .*--overwrite"):
        trained(processor, tmp_path)
    old.save_model(str(tmp_path))
    (tmp_path / "eval.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SaccadeError, match="holds a finished run: name another"):
        trained(processor, tmp_path)
    assert read_owner(tmp_path)["id"] == old.run_id
    new = trained(processor, tmp_path, overwrite=True)
    assert read_owner(tmp_path)["id"] == new.run_id != old.run_id
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"checkpoint-1", OWNER_FILE, LOCK_FILE, "notes.txt"}
    # A stock model is not written over either, which is what a second stage in the folder of the first would do.
    build_tiny_llava(processor).save_pretrained(tmp_path / "model")
    with pytest.raises(SaccadeError, match="holds a model: name another"):
        trained(processor, tmp_path / "model")


def test_a_run_that_died_before_its_first_checkpoint_leaves_its_folder_free(processor, tmp_path, monkeypatch):
    trainer = make_trainer(build_tiny_llava(processor), processor, tmp_path, **SAVING)
    monkeypatch.setattr(trainer, "get_train_dataloader", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert (tmp_path / OWNER_FILE).is_file()
    died = read_owner(tmp_path)["id"]
    assert trained(processor, tmp_path).run_id != died


def test_resume_takes_only_checkpoints_of_the_run(processor, tmp_path):
    """Once an older run's step 12 was taken, nothing was trained, and the new run reported success."""
    mine = trained(processor, tmp_path / "mine", steps=1)
    trained(processor, tmp_path / "older", steps=3)
    (tmp_path / "older" / "checkpoint-3").rename(tmp_path / "mine" / "checkpoint-3")
    assert resolve_resume(True, tmp_path / "mine").name == "checkpoint-1"
    assert trained(processor, tmp_path / "mine", steps=2, resume=True).state.global_step == 2
    (tmp_path / "mine" / "checkpoint-1").rename(tmp_path / "checkpoint-1")
    (tmp_path / "mine" / "checkpoint-2").rename(tmp_path / "checkpoint-2")
    with pytest.raises(SaccadeError, match=rf"checkpoint-3: it belongs to run \w+, not to {mine.run_id}"):
        trained(processor, tmp_path / "mine", steps=4, resume=True)


@pytest.fixture
def locked(tmp_path):
    """A folder whose lock another process holds."""
    code = (
        "import sys, time\nfrom saccade.files import file_lock\n"
        f"with file_lock({str(tmp_path / LOCK_FILE)!r}, 'taken'): print('held', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield tmp_path, process
    process.kill()
    process.communicate()


def test_two_runs_do_not_write_into_one_folder(locked, processor, capsys):
    folder, process = locked
    with pytest.raises(SaccadeError, match=r"another run is writing there now"):
        trained(processor, folder)
    assert main(["train", "tiny-digits/sft", "--model", "tiny", "--output_dir", str(folder)]) == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith(f"saccade: error: output_dir={str(folder)!r}: another run is writing there now")
    assert sorted(path.name for path in folder.iterdir()) == [LOCK_FILE]
    process.send_signal(signal.SIGKILL)
    process.wait()
    # A lock of a dead process holds nobody up.
    trained(processor, folder)


def test_a_lock_is_not_taken_along_by_children(tmp_path):
    """A data worker that outlives its run for a moment does not hold up the next."""
    path = tmp_path / "lock"
    with file_lock(path, "taken"):
        child = os.fork()
        if child == 0:
            signal.pause()
    code = f"from saccade.files import file_lock\nwith file_lock({str(path)!r}, 'taken'): pass"
    try:
        assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with file_lock(path, "taken"), file_lock(path, "taken", again=True), pytest.raises(SaccadeError, match="taken"):
        file_lock(path, "taken").__enter__()


RECIPE = {
    "model": "tiny",
    "dataset_rows": 16,
    "max_steps": 1,
    "per_device_train_batch_size": 2,
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
}


@pytest.mark.parametrize("kind", ["model", "base", "isolator_path"])
@pytest.mark.parametrize("place", [".", "checkpoint-3", "base"])
def test_overwriting_in_python_keeps_what_the_run_starts_from(kind, place, processor, tmp_path):
    """A folder inside that no run writes to stays as it is, so that it may hold the base."""
    out, start = tmp_path / "out", tmp_path / "out" / place
    model = build_tiny_llava(processor, seed=0)
    model.save_pretrained(start)
    ModeIsolator(4, model.config.get_text_config().hidden_size).save_pretrained(start)
    if kind == "isolator_path":
        fields = {"isolator_path": str(start), "isolator_length": 4}
    else:
        fields = {}
        model = type(model).from_pretrained(start)
    lora = LoraConfig(r=2, target_modules=r".*language_model.*q_proj", task_type="CAUSAL_LM")
    fields |= {"peft_config": lora} if kind == "base" else {}
    trainer = make_trainer(model, processor, out, overwrite=True, max_steps=1, save_strategy="no", **fields)
    if place == "base":
        trainer.train()
    else:
        name = "isolator_path" if kind == "isolator_path" else "model"
        with pytest.raises(SaccadeError, match=f"overwrite=true would remove {name}="):
            trainer.train()
    assert (start / "model.safetensors").is_file()
    assert (start / ISOLATOR_FILE).is_file()


@pytest.mark.parametrize("place", [".", "checkpoint-3"])
def test_overwriting_in_python_keeps_adapters_that_train_on(place, processor, tmp_path):
    out, start = tmp_path / "out", tmp_path / "out" / place
    lora = LoraConfig(r=2, target_modules=r".*language_model.*q_proj", init_lora_weights=False)
    get_peft_model(build_tiny_llava(processor, seed=0), lora).save_pretrained(start)
    model = PeftModel.from_pretrained(build_tiny_llava(processor, seed=0), start, is_trainable=True)
    options = {"overwrite": True, "max_steps": 1, "save_strategy": "no"}
    with pytest.raises(SaccadeError, match="overwrite=true would remove adapters, which the model may have"):
        make_trainer(model, processor, out, **options).train()
    assert (start / "adapter_model.safetensors").is_file()
    make_trainer(model, processor, tmp_path / "other", **options).train()


def test_the_command_line_refuses_and_overwrites(tmp_path, capsys):
    flags = [word for name, value in RECIPE.items() for word in (f"--{name}", str(value))]
    command = ["train", "tiny-digits/sft", *flags, "--output_dir", str(tmp_path)]
    assert main(command) == 0
    first = read_run_file(tmp_path)["run_id"]
    assert json.loads((tmp_path / "log.json").read_text())["run_id"] == first
    capsys.readouterr()
    assert main(command) == 2
    assert "holds a finished run: name another" in capsys.readouterr().err
    # Nothing was saved to go on from, and a finished run is not silently trained anew.
    assert main([*command, "--resume", "auto"]) == 2
    assert main([*command, "--resume", "auto", "--overwrite"]) == 2
    assert "needs what overwrite=true removes" in capsys.readouterr().err
    assert main([*command, "--model", str(tmp_path), "--overwrite"]) == 2
    assert f"overwrite=true would remove model={str(tmp_path)!r}" in capsys.readouterr().err
    assert read_run_file(tmp_path)["run_id"] == first
    assert main([*command, "--check"]) == 2  # what the launcher asks once, before it starts the ranks
    assert main([*command, "--overwrite", "--check"]) == 0
    assert main([*command, "--overwrite", "--lora", "true", "--lora_r", "2"]) == 0
    assert read_run_file(tmp_path)["run_id"] != first
    assert not (tmp_path / "model.safetensors").exists()
    # The base that the adapters belong to was written by this run too.
    load_model(ModelOptions(model=str(tmp_path)))


@pytest.mark.parametrize("length", [["--max_steps", "2"], ["--max_steps", "-1", "--num_train_epochs", "1"]])
def test_a_finished_run_that_is_resumed_keeps_what_was_measured(tmp_path, length):
    fields = {**RECIPE, "dataset_rows": 4, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 1}
    flags = [word for name, value in fields.items() for word in (f"--{name}", str(value))]
    command = ["train", "tiny-digits/sft", *flags, *length, "--lr_scheduler_type", "constant"]
    command += ["--output_dir", str(tmp_path), "--resume", "auto"]
    assert main(command) == 0
    assert main(["eval", str(tmp_path), "--num-samples", "1"]) == 0
    measured = {name: (tmp_path / name).read_bytes() for name in ("log.json", "eval.json")}
    (tmp_path / "model.safetensors").unlink()
    assert main(command) == 0
    assert {name: (tmp_path / name).read_bytes() for name in measured} == measured
    assert read_evaluation(tmp_path)[0] is not None
    # One that goes on does not.
    (tmp_path / "checkpoint-2").rename(tmp_path / "away")
    assert main(command) == 0
    assert not (tmp_path / "eval.json").exists()
    assert (tmp_path / "log.json").read_bytes() != measured["log.json"]


def test_a_model_that_is_to_answer_is_put_on_the_accelerator(monkeypatch):
    assert load_to_run(ModelOptions())[0].device.type == "cpu"
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
    assert load_to_run(ModelOptions())[0].device.type == "meta"
    assert load_to_run(ModelOptions(), on_cpu=True)[0].device.type == "cpu"


# What a resumed run must share.


def other(value):
    """A value of the same kind that is not the same."""
    if isinstance(value, bool) or value is None:
        return not value
    return value + 1 if isinstance(value, (int, float)) else f"{value} and more"


def test_every_option_but_a_few_is_compared(tmp_path):
    """Field by field: a later version's new field is compared too, unless it is put on the list."""
    names = {entry.name for entry in fields(DualSpeedConfig)}
    assert names >= FREE_TO_CHANGE
    state = make_config(tmp_path, lr_scheduler_type="linear").resume_state()
    state = json.loads(json.dumps(state))
    assert set(state) == (names - FREE_TO_CHANGE) | {"max_steps", "num_train_epochs"}
    for name in state:
        (tmp_path / RUN_FILE).write_text(json.dumps({"config": {**state, name: other(state[name])}}))
        with pytest.raises(SaccadeError, match=rf"(^|, ){name}[=.].* \(checkpoint: .*was trained otherwise"):
            check_same_run(tmp_path, state)
    (tmp_path / RUN_FILE).write_text(json.dumps({"config": state}))
    check_same_run(tmp_path, state)

    @dataclass
    class Tomorrow(DualSpeedConfig):
        of_tomorrow: float = field(default=0.5)

    options = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False}
    assert Tomorrow(**options).resume_state()["of_tomorrow"] == 0.5
    for name in (
        "neftune_noise_alpha",
        "lr_scheduler_kwargs",
        "adam_epsilon",
        "optim_args",
        "truncation_mode",
        "tf32",
    ):
        assert name in state


@pytest.mark.parametrize(
    ("one", "two", "differing"),
    [
        ({"lr_scheduler_type": "cosine"}, {"max_steps": 9}, {"max_steps"}),
        ({"lr_scheduler_type": "constant"}, {"max_steps": 9}, set()),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0.1}, {"max_steps": 9}, {"max_steps"}),
        ({"max_steps": -1, "num_train_epochs": 2}, {"num_train_epochs": 3}, {"num_train_epochs"}),
        ({"max_steps": 5, "num_train_epochs": 2}, {"num_train_epochs": 3}, set()),
    ],
)
def test_the_length_of_a_run_is_compared_where_a_rate_depends_on_it(tmp_path, one, two, differing):
    first, second = (make_config(tmp_path, **options).resume_state() for options in (one, {**one, **two}))
    assert {name for name in first if first[name] != second[name]} == differing


def test_other_rows_or_another_model_are_refused(processor, tmp_path):
    rows = digit_scenes("sft", "train", 64, seed=5)
    first = make_trainer(build_tiny_llava(processor), processor, tmp_path, rows=rows, max_steps=1, **SAVING)
    first.train()
    found = read_run_file(tmp_path / "checkpoint-1")["config"]
    assert found["data"]["rows"] == found["data"]["sampled"] == 64

    def message(**options):
        given = {"rows": rows, "model": build_tiny_llava(processor), "processor": processor, **options}
        trainer = make_trainer(given["model"], given["processor"], tmp_path, rows=given["rows"], max_steps=2, **SAVING)
        with pytest.raises(SaccadeError) as error:
            trainer.train(resume_from_checkpoint=True)
        return str(error.value)

    assert message(rows=rows.select(range(63))).startswith("data.rows=63 (checkpoint: 64), ")
    assert "data.fingerprint=" in message(rows=digit_scenes("sft", "train", 64, seed=6))
    larger = build_tiny_llava(processor)
    larger.config.text_config.rms_norm_eps = 1e-3
    assert message(model=larger).startswith("model.config=")
    half = build_tiny_llava(processor).bfloat16()
    assert "model.dtype='bfloat16' (checkpoint: 'float32')" in message(model=half)
    changed = build_tiny_processor()
    changed.image_processor.image_mean = [0.4, 0.4, 0.4]
    assert message(processor=changed).startswith("processor=")


def test_the_dtype_of_the_embedded_model_is_compared(tmp_path, capsys):
    flags = ["--model", "tiny", "--use_cpu", "true", "--max_steps", "1", "--dataset_rows", "4"]
    flags += ["--save_strategy", "steps", "--save_steps", "1", "--output_dir", str(tmp_path)]
    flags += ["--per_device_train_batch_size", "2"]
    assert main(["train", "tiny-digits/sft", *flags, "--dtype", "bfloat16"]) == 0
    weights = load_file(tmp_path / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    capsys.readouterr()
    assert main(["train", "tiny-digits/sft", *flags, "--resume", "auto"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("saccade: error: ")
    assert "model.dtype='float32' (checkpoint: 'bfloat16')" in line


def test_adapters_know_the_model_that_they_belong_to(processor):
    from peft import get_peft_model

    def identity(seed, adapters=True):
        model = build_tiny_llava(processor, seed=seed)
        config = model.config
        if adapters:
            model = get_peft_model(model, LoraConfig(r=2, target_modules=r".*language_model.*q_proj"))
        return identify_model(model, config, adapters)

    assert identity(0) == identity(0)
    assert identity(0) != identity(1)
    # A checkpoint of all weights holds the model itself: where training started from does not matter any more.
    assert identity(0, adapters=False) == identity(1, adapters=False)


def test_rows_are_told_apart_without_reading_all(processor, tmp_path):
    lines = [
        {"messages": [{"role": "user", "content": f"{n} ?"}, {"role": "assistant", "content": str(n)}]}
        for n in range(300)
    ]

    def written(name, rows):
        path = tmp_path / name
        path.write_text("\n".join(map(json.dumps, rows)))
        return load_rows(ModelOptions(dataset=str(path)))

    same, found = (identify_rows(written(name, lines)) for name in ("one.jsonl", "two.jsonl"))
    assert {**found, "fingerprint": None} == {**same, "fingerprint": None}
    assert found["rows"] == 300
    assert found["sampled"] == 64
    assert found["bytes"] == (tmp_path / "one.jsonl").stat().st_size
    longer = json.loads(json.dumps(lines))
    longer[7]["messages"][1]["content"] += "."  # a row that is not sampled
    assert identify_rows(written("longer.jsonl", longer)) != found
    assert identify_rows(written("turned.jsonl", lines[::-1]))["fingerprint"] != found["fingerprint"]
    stock = Dataset.from_list(lines)
    assert identify_rows(stock) == identify_rows(Dataset.from_list(lines))
    assert identify_rows(stock) != identify_rows(Dataset.from_list(longer))
    stream = stock.to_iterable_dataset()
    assert identify_rows(stream)["rows"] is None
    assert identify_rows(stream) != identify_rows(Dataset.from_list(lines[1:]).to_iterable_dataset())
    assert identify_processor(processor) == identify_processor(build_tiny_processor())
