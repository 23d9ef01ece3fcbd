"""Folders of models and runs with a damaged file: every verb that reads it names it in one line."""

import json
import shutil
import subprocess
import sys

import pytest
from family_models import FAMILIES
from helpers import make_trainer
from peft import LoraConfig
from transformers import AutoProcessor

from saccade import SaccadeError
from saccade.cli.main import main
from saccade.families.fitting import check_processor
from saccade.testing.families import Case
from saccade.tiny import build_tiny_llava

JSON_FILES = (
    *("config.json", "generation_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("dualspeed.json", "pruning_config.json", "adapter_config.json"),
)
READ_BY = {"dualspeed.json": ["export"], "pruning_config.json": ["eval"]}
"""The verbs that take something from a file, where not all do."""
DAMAGES = {"empty": lambda content: b"", "half": lambda content: content[: len(content) // 2]}
DAMAGED_JSON = {**DAMAGES, "a list": lambda content: b"[1]", "no text": lambda content: b"\x80\x81"}


@pytest.fixture(scope="module")
def runs(processor, tmp_path_factory):
    """A model in full, and adapters, as runs leave them."""
    folder = tmp_path_factory.mktemp("runs")
    model = build_tiny_llava(processor, seed=0)
    trainer = make_trainer(model, processor, folder / "full", max_steps=1)
    trainer.train()
    trainer.save_model()
    model = build_tiny_llava(processor, seed=0)
    model.config._name_or_path = model.name_or_path = str(folder / "full")
    adapters = LoraConfig(r=2, target_modules=r".*language_model.*_proj", modules_to_save=["multi_modal_projector"])
    trainer = make_trainer(model, processor, folder / "adapters", peft_config=adapters, max_steps=1)
    trainer.train()
    trainer.save_model()
    return folder


def verbs(folder, output):
    yield "eval", ["eval", str(folder), "--num-samples", "1", "--output", str(output / "eval.json")]
    yield "export", ["export", str(folder), "--output", str(output / "exported")]
    yield "train", ["train", "tiny-digits/sft", "--model", str(folder), "--output_dir", str(output / "run")]


@pytest.mark.parametrize(
    ("kind", "name", "damage"),
    [
        *(
            ("adapters" if name == "adapter_config.json" else "full", name, damage)
            for name in JSON_FILES
            for damage in DAMAGED_JSON
        ),
        *(("full", "model.safetensors", damage) for damage in DAMAGES),
        *(("adapters", "adapter_model.safetensors", damage) for damage in DAMAGES),
    ],
)
def test_a_damaged_file_is_named_by_every_verb(kind, name, damage, runs, tmp_path, capfd):
    folder = tmp_path / "damaged"
    shutil.copytree(runs / kind, folder)
    file = folder / name
    file.write_bytes(DAMAGED_JSON[damage](file.read_bytes()))
    for verb, words in verbs(folder, tmp_path):
        readers = READ_BY.get(name, ["eval", "export", "train"])
        # One damage of each file at every verb is enough.
        if verb not in readers or (verb != readers[0] and damage != "half"):
            continue
        capfd.readouterr()
        assert main(words) == 2, verb
        line = capfd.readouterr().err.strip().splitlines()[-1]
        assert name in line, verb
        assert "is damaged" in line, verb


@pytest.mark.parametrize(
    ("template", "message"),
    [(None, "has no chat template"), ("{{ messages[ }}", "chat_template.jinja"), ("nothing", "chat_template.jinja")],
)
def test_a_chat_template_that_is_missing_or_makes_no_prompt(template, message, runs, tmp_path, capfd):
    folder = tmp_path / "damaged"
    shutil.copytree(runs / "full", folder)
    (folder / "chat_template.jinja").unlink()
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    assert main(["eval", str(folder), "--num-samples", "1"]) == 2
    assert message in capfd.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "value", "right"),
    [
        ("patch_size", 16, 8),
        ("num_additional_image_tokens", 0, 1),
        ("vision_feature_select_strategy", "full", "default"),
    ],
)
def test_processor_settings_that_do_not_fit_the_tower(name, value, right, runs, tmp_path, capfd, model):
    folder = tmp_path / "damaged"
    shutil.copytree(runs / "full", folder)
    file = folder / "processor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), name: value}))
    for _, words in verbs(folder, tmp_path):
        capfd.readouterr()
        assert main(words) == 2
        line = capfd.readouterr().err.strip().splitlines()[-1]
        assert f"{name}={value!r} of the processor" in line
        assert line.endswith(f"set it to {right!r}")
    other = AutoProcessor.from_pretrained(folder)
    with pytest.raises(SaccadeError, match=f"{name}={value!r} of the processor"):
        make_trainer(model, other, tmp_path / "python")


@pytest.mark.parametrize("name", FAMILIES)
def test_the_settings_of_every_family_fit(name):
    case = Case(name, FAMILIES[name])
    check_processor(case.processor, case.model.config)


def test_a_command_shows_no_warnings_and_no_loading_bars_of_dependencies(runs, tmp_path):
    """In a separate process, since the output of a command is set up before anything else is imported."""
    words = ["eval", str(runs / "adapters"), "--num-samples", "1", "--output", str(tmp_path / "eval.json")]
    command = [sys.executable, "-m", "saccade.cli.main", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "accuracy" in done.stdout or "written to" in done.stdout
    assert done.stderr == ""
