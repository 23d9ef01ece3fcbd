"""docs/data.md: its examples are read as it says, and its mixture trains."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from saccade.cli.main import main
from saccade.dualspeed.config import DualSpeedConfig
from saccade.errors import RecordError
from saccade.training import ModelOptions, load_rows

PAGE = (Path(__file__).parent.parent / "docs" / "data.md").read_text()


def example(kind, number=0):
    return re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL)[number]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    for number in range(2):
        Image.new("RGB", (96, 96)).save(tmp_path / "images" / f"{number}.jpg")
    llava = json.loads(example("json"))
    for record in llava:
        if "image" in record:  # the mixture's source starts from images/
            names = record["image"] if isinstance(record["image"], list) else [record["image"]]
            record["image"] = [name.removeprefix("images/") for name in names]
    (tmp_path / "plain.json").write_text(example("json"))
    (tmp_path / "llava.json").write_text(json.dumps(llava))
    (tmp_path / "chat.jsonl").write_text(example("json", 1))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_formats(folder):
    rows = list(load_rows(ModelOptions(dataset="plain.json")))
    assert [len(row["images"]) for row in rows] == [1, 2, 0]
    assert [row["messages"][0]["role"] for row in rows] == ["user", "user", "system"]
    rows = list(load_rows(ModelOptions(dataset="chat.jsonl")))
    assert [row["messages"][-1]["content"] for row in rows] == ["3", "5"]
    assert not any(row["fault"] for row in rows)
    assert main(["data", "check", "plain.json"]) == 0


def test_the_mixture_trains(folder, capsys):
    (mixture,) = (text for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL) if "dataset:" in text)
    (folder / "recipe.yaml").write_text(
        f"model: tiny\noutput_dir: out\nmax_steps: 2\nper_device_train_batch_size: 2\nbf16: false\nuse_cpu: true\n"
        f"save_strategy: 'no'\ndisable_tqdm: true\ngradient_checkpointing: false\n{mixture}"
    )
    assert main(["data", "check", "recipe.yaml"]) == 0
    assert main(["train", "recipe.yaml", "--group_by", "shortened"]) == 0, capsys.readouterr().err
    assert (folder / "out" / "model.safetensors").is_file()


def test_the_page_names_every_kind_and_every_option():
    assert [kind for kind in RecordError.KINDS if f"`{kind}`" not in PAGE] == []
    defaults = DualSpeedConfig.__dataclass_fields__
    assert f"`max_bad_records: {defaults['max_bad_records'].default}`" in PAGE
    assert f"{defaults['max_image_pixels'].default:,}" in PAGE
    fields = ModelOptions.__dataclass_fields__
    assert f"`dataset_shuffle_buffer` ({fields['dataset_shuffle_buffer'].default})" in PAGE
