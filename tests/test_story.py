"""experiments/story.py at its smallest: data, two processes, kill -9, resume, export, evaluation."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    folder = tmp_path_factory.mktemp("story")
    flags = ["--steps", "8", "--pretrain-steps", "2", "--scenes", "8", "--docs", str(folder / "story.md")]
    command = [sys.executable, "-m", "experiments.story", str(folder / "run"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "run" / "story.json").read_text()), (folder / "story.md").read_text()


def test_every_step_ended_as_it_should(told):
    outcomes = [step["outcome"] for step in told[0]["steps"]]
    assert outcomes.count("killed by signal 9") == 1
    assert set(outcomes) == {"exit 0", "killed by signal 9"}
    assert told[0]["loaded"].startswith("LlavaForConditionalGeneration")
    for ways in told[0]["accuracy"].values():
        assert set(ways) == {"full", "pruned"}


def test_the_page_has_every_step(told):
    story, page = told
    for step in story["steps"]:
        assert f"`{step['command']}`" in page
    committed = (ROOT / "docs" / "story.md").read_text()
    titles = [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in committed.splitlines() if line.startswith("| ")] == titles
