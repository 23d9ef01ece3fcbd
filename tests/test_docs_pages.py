"""The four pages for a new user, docs/start.md and the three that it ends with, followed from top to bottom."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from family_models import FAMILIES
from trl import SFTConfig

from saccade import DualSpeedConfig
from saccade.cli.main import main
from saccade.data import digit_scenes
from saccade.reducers import list_reducers
from saccade.testing.tiny_models import noise_image
from saccade.tiny import tiny_checkpoint

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
BLOCK = re.compile(r"(?:`([\w.]+)`:\n\n)?```(bash|python|json|yaml)\n(.*?)```", re.DOTALL)

SMALL = {
    "train": "--max_steps 2 --dataset_rows 8 --per_device_train_batch_size 2 --save_steps 1 --logging_steps 1 "
    "--disable_tqdm true --use_cpu true",
    "eval": "--num-samples 6",
    "demo": "--steps 1 --scenes 4",
    "data": "--jobs 1",
}
"""Flags that end each command of a verb; what comes last overrides what the page says."""

STAND_INS = {
    "llava-hf/llava-1.5-7b-hf": str(tiny_checkpoint()),
    "DualSpeedConfig(": "DualSpeedConfig(max_steps=1, per_device_train_batch_size=2, use_cpu=True, ",
}
"""What stands in for the parts of files and of Python that need a download or a GPU."""

RUNS_ELSEWHERE = {
    ". .venv/bin/activate": "VENV := .venv",
    "make demo": "saccade demo --output out/demo",
}
"""Lines for the user's own shell, and what must be in the Makefile, or in what it would run, for them to hold."""

LAUNCH = " --launch ddp --processes 2"
"""One process here; tests/test_launch.py starts two in this way."""


def blocks(page: str) -> Iterator[tuple[str, str, str]]:
    """File name, kind and text of each block of a page that is not plain text."""
    for name, kind, text in BLOCK.findall((DOCS / page).read_text()):
        for words, others in STAND_INS.items():
            text = text if kind == "bash" else text.replace(words, others)
        yield name, kind, text


def run_line(line: str) -> None:
    if line in RUNS_ELSEWHERE:
        planned = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert RUNS_ELSEWHERE[line] in planned + (ROOT / "Makefile").read_text()
        return
    program, *words = shlex.split(line.replace(LAUNCH, ""))
    assert program == "saccade", f"nothing runs {line!r}"
    if "--resume" in words:  # as if it had been stopped after the first step
        shutil.rmtree("out/mine/checkpoint-2")
    assert main([*words, *SMALL.get(words[0], "").split()]) == 0, line


def follow(page: str) -> dict:
    """Do what a page says, in the current folder, and return the names that its Python leaves."""
    names: dict = {}
    for name, kind, text in blocks(page):
        if name:
            Path(name).write_text(text)
        elif kind == "python":
            exec(text, names)
        else:
            assert kind == "bash", f"{page}: a {kind} block has no file name"
            for line in text.splitlines():
                run_line(line)
    return names


def test_the_quick_start_notebook(tmp_path) -> None:
    """Its cells in order, in one namespace, in a process without what other tests have imported; shorter training."""
    cells = json.loads((DOCS / "quickstart.ipynb").read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    for words, others in {"max_steps=40": "max_steps=2", "logging_steps=10": "logging_steps=1"}.items():
        assert code.count(words) == 1
        code = code.replace(words, others)
    code += "\nimport json\nprint('FOUND', json.dumps([len(trainer.state.log_history), answers, seen['grid']]))\n"
    command = [sys.executable, "-W", "error::FutureWarning", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    steps, answers, grid = json.loads(done.stdout.rpartition("FOUND ")[2])
    assert steps == 3  # two, and the summary
    assert answers.keys() == {"all tokens", "kept tokens"}
    assert grid == [12, 12]
    printed = re.findall(r"from (\w+) tokens, a prompt of (\d+)", done.stdout)
    assert [name for name, _ in printed] == ["all", "kept"]
    assert int(printed[0][1]) - int(printed[1][1]) == 144 - 14
    assert (tmp_path / "out/quickstart/kept.png").is_file()
    kept = "".join(next(cell for cell in cells if "kept.png" in "".join(cell["source"]))["outputs"][0]["text"])
    assert kept in done.stdout  # what the notebook shows is what it prints


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train_first(stage: str) -> None:
    """A model that start.md has trained."""
    lines = [line for _, kind, text in blocks("start.md") if kind == "bash" for line in text.splitlines()]
    (line,) = [line for line in lines if line.startswith(f"saccade train tiny-digits/{stage}")]
    run_line(line)


@pytest.mark.slow
def test_start(folder) -> None:
    follow("start.md")
    results = json.loads((folder / "out/sft/eval.json").read_text())["results"]
    assert [result["inference"] for result in results] == ["full", "pruned", "pruned_isolator"]
    for name in ("out/look/table.md", "out/sft/report/report.html", "kept.png", "kept.json"):
        assert (folder / name).is_file(), name


def test_train_your_own(folder) -> None:
    (folder / "images").mkdir()
    for number in range(2):
        noise_image(96, 96, number).save(folder / "images" / f"{number}.jpg")
    names = follow("train-your-own.md")
    assert names["trainer"].state.global_step == 1
    assert (folder / "out/mine_python/adapter_model.safetensors").is_file()
    page = (DOCS / "train-your-own.md").read_text()
    saved = re.findall(r"^\| `([\w.]+)` \|", page, re.MULTILINE)
    assert len(saved) == 5
    assert [name for name in saved if not (folder / "out/mine" / name).is_file()] == []
    steps = [entry["step"] for entry in json.loads((folder / "out/mine/log.json").read_text())["log_history"]]
    assert max(steps) == 2
    assert json.loads((folder / "data_check.json").read_text())["checked"] == 3


def test_prune_at_inference(folder) -> None:
    train_first("pretrain")
    train_first("sft")
    digit_scenes("sft", "test", 1)[0]["images"][0].save("scene.png")
    names = follow("prune-at-inference.md")
    visual = names["pruned"]["input_ids"] == names["model"].config.image_token_id
    assert visual.sum() == 7 + 4  # of 144 at a ratio of 0.95, and the isolator that the folder has
    assert isinstance(names["answer"], str)
    results = json.loads((folder / "out/skip_vision/eval.json").read_text())["results"]
    assert [result["inference"] for result in results] == ["full", "skip"]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_next"])
def test_pruning_is_the_same_for_other_families(family, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    noise_image(32, 32, 0).save("scene.png")
    model, processor = FAMILIES[family].build()
    names = {"model": model, "processor": processor}
    texts = [text for _, kind, text in blocks("prune-at-inference.md") if kind == "python"]
    for text in texts[1:7]:
        exec(text, names)
        assert names["pruned"]["input_ids"].shape[1] < names["inputs"]["input_ids"].shape[1]
    assert "positions=" in texts[6]


def test_how_it_works() -> None:
    names = follow("how-it-works.md")
    assert names["encoded"].context.features.shape == (1, 144, 96)
    index = names["reduction"].index
    assert index.shape == (1, 14)
    assert torch.equal(index, index.sort(dim=1).values)
    assert names["inputs"]["input_ids"].shape[1] - names["logits"].shape[1] == 130


def test_dualspeed_s_page_names_every_option() -> None:
    page = (DOCS / "dualspeed.md").read_text()
    own = {name for name in DualSpeedConfig.__dataclass_fields__ if not name.startswith("_")}
    assert sorted(name for name in own - set(SFTConfig.__dataclass_fields__) if f"`{name}`" not in page) == []


def test_the_index_names_every_page() -> None:
    linked = set(re.findall(r"\]\(([\w-]+\.md)\)", (DOCS / "README.md").read_text()))
    assert linked == {path.name for path in DOCS.glob("*.md")} - {"README.md"}


def test_the_matrix_of_families_has_a_column_for_each_reducer_and_nothing_else() -> None:
    columns = re.findall(r"^\| \| (.*) \|$", (DOCS / "families.md").read_text(), re.MULTILINE)
    assert len(columns) == 2
    assert {tuple(names.split(" | ")) for names in columns} == {tuple(sorted(set(list_reducers()) - {"none"}))}
