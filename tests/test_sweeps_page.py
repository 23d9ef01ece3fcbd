"""docs/sweeps.md: its commands run as written, at a size that learns nothing, and it names every study."""

import re
import shlex
from pathlib import Path

import pytest

from experiments.studies.__main__ import main as studies
from experiments.studies.studies import STUDIES
from saccade.cli.main import main
from saccade.sweeps.plan import Plan

PAGE = (Path(__file__).parent.parent / "docs" / "sweeps.md").read_text()
COMMANDS = [
    shlex.split(line) for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()
]
SMALL = "--max_steps 1 --dataset_rows 4 --per_device_train_batch_size 2 --save_strategy no --scenes 4"
SMALL_PRETRAIN = "--pretrain.dataset_rows 4 --pretrain.per_device_train_batch_size 2 --pretrain.save_strategy no"


def small(words: list[str]) -> list[str]:
    """A command of the page with one run to make; what comes last overrides."""
    if "parts" in words and "--table" not in words:
        return [*words, "--steps", "1", "--scenes", "4", "--only", "method=dualspeed", "--only", "seed=0"]
    if "--grid" in words:
        name, _, values = words[words.index("--grid") + 1].partition("=")
        extra = [] if name == "pretrain.max_steps" else ["--pretrain.max_steps", "1"]
        only = ["--only", f"{name}={values.split(',')[0]}", "--only", "seed=0"]
        return [*words, *SMALL.split(), *SMALL_PRETRAIN.split(), *extra, *only]
    return words


@pytest.mark.slow
def test_the_commands_run(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    # Twenty steps of pretraining are the page's; two do here.
    commands = [[word.replace("max_steps=20,40", "max_steps=2,4") for word in words] for words in COMMANDS]
    assert len(commands) == 7
    for program, *words in commands:
        if program == "saccade":
            assert main(small(words)) == 0, capsys.readouterr().err
        else:
            assert [program, *words[:2]] == ["python", "-m", "experiments.studies"]
            assert studies(small(words[2:])) == 0
    assert len(Plan.read(tmp_path / "out" / "slow").runs) == 6
    assert "| 0.1 | 1 |" in (tmp_path / "out" / "slow" / "table.md").read_text()
    assert "| DualSpeed | 1 |" in (tmp_path / "out" / "studies" / "parts" / "table.md").read_text()
    assert "## Part by part" in (tmp_path / "docs" / "results.md").read_text()


def test_the_page_names_every_study() -> None:
    assert re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE) == list(STUDIES)
