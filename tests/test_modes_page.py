"""docs/modes.md: its examples are configurations, and its list trains."""

import re
from pathlib import Path

import pytest
import yaml
from helpers import make_trainer

from saccade.dualspeed.modes import ACTIONS, ModeConfig
from saccade.presets import with_preset
from saccade.reducers.config import PRUNING_OPTIONS
from saccade.testing.training import make_config
from saccade.tiny import build_tiny_llava

PAGE = (Path(__file__).parent.parent / "docs" / "modes.md").read_text()
EXAMPLES = [with_preset(yaml.safe_load(text)) for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)]
ACTIONS_OF = [
    ["skip", "keep"],
    ["skip"],
    ["drop", "drop", "skip", "keep"],
    ["drop", "keep"],
    ["drop", "keep"],
    ["drop", "drop", "keep"],
]


@pytest.mark.parametrize(("options", "actions"), list(zip(EXAMPLES, ACTIONS_OF, strict=True)))
def test_examples_make_the_modes_that_the_text_says(options, actions, processor, tmp_path):
    modes = make_config(tmp_path, **options).all_modes()
    assert [mode.action for mode in modes] == actions
    trainer = make_trainer(build_tiny_llava(processor), processor, tmp_path, max_steps=2, **options)
    trainer.train()
    assert trainer.state.global_step == 2


def test_the_page_names_every_field_and_action():
    fields = set(ModeConfig.__dataclass_fields__) - {"pruning"} | set(PRUNING_OPTIONS)
    assert [name for name in fields if f"`{name}`" not in PAGE] == []
    assert [action for action in ACTIONS if f"`{action}`" not in PAGE] == []


def test_the_page_s_python_makes_three_modes():
    fast, middle, slow = run_python(0).all_modes()
    assert (fast.pruning.prune_ratio, middle.pruning.prune_ratio, slow.action) == (0.9, 0.67, "keep")
    assert (fast.isolator, middle.isolator, slow.isolator, middle.teacher) == (True, True, False, "fast")


def test_the_page_s_python_puts_slow_steps_last():
    args = run_python(1)
    assert (args.schedule, args.distill_weight, args.slow_probability) == ("sequential", 0.0, 0.1)


def run_python(number: int):
    """The `args` of one of the page's Python examples, after those before it."""
    names = {}
    for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[: number + 1]:
        exec(compile(code.replace('output_dir="out"', 'output_dir="out", use_cpu=True'), "modes.md", "exec"), names)
    return names["args"]
