"""docs/skip-vision.md: its code runs, and it names every option, preset and default."""

import re
from pathlib import Path

import pytest
import torch
import yaml

from saccade.data import digit_scenes
from saccade.evaluation.digits import collate_prompts
from saccade.skip_vision import PRESETS, SkipVisionConfig
from saccade.testing.training import make_config

PAGE = (Path(__file__).parent.parent / "docs" / "skip-vision.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def inputs(processor):
    return collate_prompts(processor, list(digit_scenes("sft", "train", 2, seed=0, kinds=["read"])))


def test_two_lines_and_what_is_saved(model, inputs, tmp_path):
    with torch.no_grad():
        before = model(**inputs).logits
        names = {"model": model, "inputs": inputs, "folder": tmp_path}
        exec(PYTHON[0].replace("skip.remove()", "skip.save_pretrained(folder)\nskip.remove()"), names)
        assert names["output"].shape[1] > inputs["input_ids"].shape[1]
        assert torch.equal(model(**inputs).logits, before)
        exec(PYTHON[1], names)
        assert torch.equal(model.generate(**inputs, max_new_tokens=8), names["output"])


def test_the_recipe_lines_skip_in_every_step(tmp_path):
    options = yaml.safe_load(re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[1])
    (mode,) = make_config(tmp_path, **options).all_modes()
    assert mode.action == "skip"


def test_the_page_names_every_option_and_preset():
    assert [name for name in SkipVisionConfig.__dataclass_fields__ if f"`{name}`" not in PAGE] == []
    assert [name for name in PRESETS if f"`{name}`" not in PAGE] == []
