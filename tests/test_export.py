"""`saccade export`: stock transformers loads what it writes, key by key and value by value."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from helpers import make_trainer
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

from saccade import SaccadeError
from saccade.cli.main import main
from saccade.families import use_released_names
from saccade.pruning import ModeIsolator
from saccade.tiny import build_tiny_llava
from saccade.training import export
from saccade.training.card import model_card
from saccade.training.export import export_model


@pytest.fixture(scope="module", params=["full", "lora"])
def trained(request, processor, tmp_path_factory):
    """A trained folder, the model's logits as it was trained, and the batch that they are of."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    lora = LoraConfig(r=4, target_modules=r".*language_model.*_proj", modules_to_save=["multi_modal_projector"])
    model = build_tiny_llava(processor, seed=0)
    if request.param == "lora":
        model.save_pretrained(folder.parent / "base")
        model.config._name_or_path = model.name_or_path = str(folder.parent / "base")
    trainer = make_trainer(
        model, processor, folder, peft_config=lora if request.param == "lora" else None, slow_probability=0.5
    )
    trainer.train()
    trainer.save_model(str(folder))
    batch = dict(trainer.data_collator([trainer.train_dataset[0]]))
    batch.pop("labels")
    with torch.no_grad():
        logits = trainer.model.eval()(**batch).logits
    log = {"recipe": {"model": "org/base", "learning_rate": 1e-3}, "log_history": trainer.state.log_history}
    (folder / "log.json").write_text(json.dumps(log))
    return folder, batch, logits, request.param


@pytest.mark.interfaces
def test_stock_transformers_loads_it(trained, tmp_path):
    folder, batch, logits, kind = trained
    summary = export_model(folder, tmp_path / "new" / "out")
    output = tmp_path / "new" / "out"
    loaded, info = LlavaForConditionalGeneration.from_pretrained(output, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(**batch).logits, logits, rtol=1e-4, atol=1e-5)
    assert not isinstance(loaded, PeftModel)
    assert not any(path.name.startswith("adapter") for path in output.iterdir())
    AutoProcessor.from_pretrained(output)
    assert torch.equal(ModeIsolator.from_pretrained(output).weight, ModeIsolator.from_pretrained(folder).weight)
    assert summary["files"] == sorted(path.name for path in output.iterdir())
    assert (summary["base_model"] is not None) == (kind == "lora")
    # Nothing is left beside it.
    assert [path.name for path in output.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("name", [".", "empty", "link", "empty/../empty/"])
def test_an_empty_folder_is_filled(trained, tmp_path, monkeypatch, name):
    """Whatever it is: one in whose place no other folder can be put, too."""
    place = tmp_path / "empty"
    place.mkdir()
    (tmp_path / "link").symlink_to("empty")
    monkeypatch.chdir(place if name == "." else tmp_path)
    before = place.stat()
    summary = export_model(trained[0], name)
    assert os.path.samestat(place.stat(), before)
    assert summary["files"] == sorted(path.name for path in place.iterdir())
    assert "# empty\n" in (place / "README.md").read_text()
    LlavaForConditionalGeneration.from_pretrained(place)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "link"]


def test_a_folder_that_is_filled_is_a_model_last(tmp_path):
    names = []
    with pytest.MonkeyPatch.context() as patch, export.whole_folder(tmp_path) as folder:
        folder.mkdir()
        for name in ("a.json", "config.json", "z.safetensors"):
            (folder / name).touch()
        rename = Path.rename
        patch.setattr(Path, "rename", lambda path, target: (names.append(path.name), rename(path, target)))
    assert names[-1] == "config.json"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_the_card_says_what_was_set_and_measured(trained, tmp_path):
    folder, _, _, kind = trained
    export_model(folder, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "transformers"
    for line in ("| `prune_ratio` | 0.9 |", "| `slow_probability` | 0.5 |", "| `learning_rate` | 0.001 |"):
        assert line in body
    history = json.loads((folder / "log.json").read_text())["log_history"]
    loss = [entry["loss"] for entry in history if "loss" in entry][-1]
    assert f"| training loss, last log | {loss:.6g} |" in body.replace("  ", " ")
    assert "| KL(fast \\|\\| slow), last log |" in body
    assert ("| `lora_r` | 4 |" in body) == (kind == "lora")
    assert "## Evaluation" not in body
    assert str(tmp_path) not in card
    assert str(folder.parent) not in card


FACTS = {"architecture": "Llava", "parameters": 1, "dtype": "float32", "base_model": None, "own_classes": []}


@pytest.mark.parametrize(
    ("model", "local", "shown"),
    [("out/pretrain", True, None), ("../pretrain", None, None), ("me/pretrain", False, "me/pretrain")],
)
def test_the_card_names_no_folder_as_a_model_of_the_hub(model, local, shown, tmp_path):
    """Also from where its relative path leads nowhere: the hub would take "out" for a user."""
    log = {"recipe": {"model": model}} | ({} if local is None else {"local_model": local})
    (tmp_path / "log.json").write_text(json.dumps(log))
    _, front, body = model_card("x", tmp_path, FACTS).split("---\n", 2)
    assert yaml.safe_load(front).get("base_model") == shown
    assert f"trained from `{shown or 'pretrain'}`." in body
    assert f"| `model` | {model} |" in body.replace("  ", " ")


def test_the_card_says_how_images_were_pruned(tmp_path):
    entry = {"accuracy": 0.4, "samples": 5, "mean_prompt_length": 30.0}
    pruned = {"inference": "pruned", "reducer": "random", "prune_ratio": 0.3, "positions": "original", **entry}
    card = model_card("x", tmp_path, FACTS, {"results": [{"inference": "full", "reducer": None, **entry}, pruned]})
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in card.splitlines() if line.startswith("|")]
    assert ["full", ""] in rows
    assert ["pruned", "random, ratio 0.3, positions=original"] in rows


def test_the_card_says_what_the_folder_was_trained_for(tmp_path):
    """A model that skips is not one that prunes, and a file that is not there is not named."""

    def read():
        _, front, body = model_card("x", tmp_path, FACTS).split("---\n", 2)
        return yaml.safe_load(front)["tags"], body

    tags, body = read()
    assert tags == ["saccade"]
    assert "dualspeed.json" not in body
    assert "from saccade import" not in body
    (tmp_path / "skip_vision.saccade").touch()
    tags, body = read()
    assert tags == ["saccade", "skip-vision"]
    assert "apply_skip_vision(model, folder)" in body
    assert "prune_inputs" not in body
    (tmp_path / "pruning_config.json").touch()
    (tmp_path / "dualspeed.json").write_text("{}")
    tags, body = read()
    assert tags == ["saccade", "dualspeed", "visual-token-pruning", "skip-vision"]
    assert "prune_inputs(model, inputs, folder)" in body
    assert "settings in `dualspeed.json`" in body


@pytest.mark.parametrize("name", ["mode_isolator.saccade", "skip_vision.saccade"])
def test_files_beside_the_weights_are_read_not_copied(trained, tmp_path, name):
    """A stranger's link to a private file would be published with the export."""
    folder, secret = tmp_path / "run", tmp_path / "secret"
    shutil.copytree(trained[0], folder)
    secret.write_text("SECRET" * 20)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    with pytest.raises(SaccadeError, match=rf"{name} is not a whole safetensors file"):
        export_model(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (folder / name).unlink()
    (folder / "pruning_config.json").write_text("nonsense")
    with pytest.raises(SaccadeError, match=r"pruning_config.json' is damaged"):
        export_model(folder, tmp_path / "out")


def test_an_isolator_of_another_model_is_refused(trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained[0], folder)
    ModeIsolator(2, 999).save_pretrained(folder)
    with pytest.raises(SaccadeError, match="isolator has width 999"):
        export_model(folder, tmp_path / "out")


def test_the_token_of_an_account_is_recorded_nowhere(tmp_path, capsys):
    """Nor in a card, from the log of a version that took one in a recipe."""
    for command in (["train", "tiny-digits/pretrain", "--output_dir"], ["sweep", "tiny-digits/pretrain", "--output"]):
        assert main([*command, str(tmp_path / "run"), "--hub_token", "hf_SECRET"]) == 2
        said = capsys.readouterr()
        assert "hub_token: what a recipe and a command line say is recorded" in said.err
        assert "SECRET" not in said.out + said.err
        assert not (tmp_path / "run").exists()
    (tmp_path / "log.json").write_text(json.dumps({"recipe": {"model": "a/b", "hub_token": "hf_SECRET"}}))
    assert "SECRET" not in model_card("x", tmp_path, FACTS)


def test_the_command_line_and_a_dtype(trained, tmp_path, capsys):
    folder, *_ = trained
    assert main(["export", str(folder), "--output", str(tmp_path / "out"), "--dtype", "bfloat16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dtype"] == "bfloat16"
    values = load_file(tmp_path / "out" / "model.safetensors").values()
    assert {value.dtype for value in values} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("tower", "rest", "kept"),
    [
        (torch.float16, torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32),
    ],
)
def test_no_weight_is_rounded_or_grows_without_need(tower, rest, kept, processor, tmp_path):
    model = build_tiny_llava(processor, seed=0).to(rest)
    model.base_model.vision_tower.to(tower)
    use_released_names(model)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "run")
    export_model(tmp_path / "run", tmp_path / "out")
    written, before = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "run"))
    assert {value.dtype for value in written.values()} == {kept}
    assert all(torch.equal(written[name].float(), value.float()) for name, value in before.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_adapters_keep_the_dtype_of_a_base_of_the_hub(dtype, processor, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = tmp_path / "hub" / "models--me--base" / "snapshots" / "a1"
    model = build_tiny_llava(processor, seed=0).to(dtype)
    for part in (model, processor):
        part.save_pretrained(snapshot)
    refs = snapshot.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text("a1")
    lora = get_peft_model(model, LoraConfig(r=2, target_modules=r".*language_model.*q_proj"))
    lora.peft_config["default"].base_model_name_or_path = "me/base"
    for part in (lora, processor):
        part.save_pretrained(tmp_path / "run")
    export_model(tmp_path / "run", tmp_path / "out")
    assert {value.dtype for value in load_file(tmp_path / "out" / "model.safetensors").values()} == {dtype}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["nowhere"], "model='nowhere' is not a folder"),
        (["{empty}"], "has no config.json"),
        (["{run}", "--output", "{taken}"], "exists: name a folder"),
        (["{run}", "--dtype", "int3"], "dtype='int3' is unknown"),
        (["{run}", "--max-shard-size", "big"], "max_shard_size='big'"),
    ],
)
def test_bad_input_is_one_line(trained, tmp_path, capsys, flags, message):
    places = {"run": trained[0], "empty": tmp_path / "empty", "taken": tmp_path / "taken"}
    for name in ("empty", "taken"):
        places[name].mkdir()
    (places["taken"] / "file").write_text("mine")
    words = [flag.format(**places) for flag in flags]
    if "--output" not in words:
        words += ["--output", str(tmp_path / "out")]
    assert main(["export", *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("saccade: error: ")
    assert message in error
    assert not (tmp_path / "out").exists()
    assert (places["taken"] / "file").read_text() == "mine"


def test_weights_that_miss_a_key_are_refused(trained, tmp_path):
    """Stock loading only warns, and fills them with noise."""
    folder, _, _, kind = trained
    if kind == "lora":
        pytest.skip("the base is loaded as it is")
    cut = tmp_path / "cut"
    shutil.copytree(folder, cut)
    weights = load_file(cut / "model.safetensors")
    weights.pop(next(name for name in weights if "q_proj" in name))
    save_file(weights, cut / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SaccadeError, match=r"missing.*q_proj"):
        export_model(cut, tmp_path / "out")


def test_an_evaluation_belongs_to_the_weights_that_it_was_measured_on(trained, tmp_path, capsys):
    """A retrained folder was exported with the accuracy of the model before it."""
    run = tmp_path / "run"
    shutil.copytree(trained[0], run)
    assert main(["eval", str(run), "--num-samples", "2", "--inference", "full"]) == 0
    measured = json.loads((run / "eval.json").read_text())
    assert export_model(run, tmp_path / "one")["notes"] == []
    assert "## Evaluation" in (tmp_path / "one" / "README.md").read_text()
    # An export of the export has it too, and still says what it was measured on.
    assert export_model(tmp_path / "one", tmp_path / "two")["notes"] == []
    again = json.loads((tmp_path / "two" / "eval.json").read_text())
    assert again["weights"] == measured["weights"]
    assert again["results"] == measured["results"]
    name = "model.safetensors" if trained[3] == "full" else "adapter_model.safetensors"
    weights = load_file(run / name)
    first = next(iter(weights))
    save_file({**weights, first: weights[first] + 1}, run / name, metadata={"format": "pt"})
    capsys.readouterr()
    assert main(["export", str(run), "--output", str(tmp_path / "three")]) == 0
    assert f"note: {run / 'eval.json'} was measured on other weights, and was left out" in capsys.readouterr().out
    assert "## Evaluation" not in (tmp_path / "three" / "README.md").read_text()
    assert not (tmp_path / "three" / "eval.json").exists()
    (run / "eval.json").write_text(json.dumps({key: measured[key] for key in measured if key != "weights"}))
    (note,) = export_model(run, tmp_path / "four")["notes"]
    assert "does not say which weights" in note
    assert main(["eval", "compare", str(tmp_path / "one"), str(tmp_path / "one")]) == 0
    capsys.readouterr()
    assert main(["eval", "compare", str(tmp_path / "one"), str(run)]) == 2
    assert "does not say which weights" in capsys.readouterr().err


def test_saving_other_weights_takes_what_was_measured_away(processor, tmp_path):
    trainer = make_trainer(build_tiny_llava(processor), processor, tmp_path)
    for name in ("eval.json", "log.json"):
        (tmp_path / name).write_text("{}")
    trainer.save_model(str(tmp_path))
    assert not (tmp_path / "eval.json").exists()
    assert not (tmp_path / "log.json").exists()


def test_a_full_disk_leaves_nothing(trained, tmp_path, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export, "check_loads", full)
    assert main(["export", str(trained[0]), "--output", str(tmp_path / "out" / "model")]) == 1
    assert "no space left" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []
