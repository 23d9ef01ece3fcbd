"""docs/add-a-reducer.md, followed from scratch: a separate package, found through its entry point."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent


def blocks(language: str) -> list[str]:
    page = (ROOT / "docs" / "add-a-reducer.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    """A folder as `pip install` would leave it: the page's module, and metadata made from the page's project file."""
    folder = tmp_path_factory.mktemp("site")
    method, test = blocks("python")
    (project_file,) = blocks("toml")
    project = tomllib.loads(project_file)
    (module,) = project["tool"]["setuptools"]["py-modules"]
    (folder / f"{module}.py").write_text(method)
    (folder / "test_unusual.py").write_text(test)
    details = project["project"]
    info = folder / f"{details['name'].replace('-', '_')}-{details['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {details['name']}\nVersion: {details['version']}\n")
    lines = []
    for group, entries in details["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {target}" for name, target in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return folder


def run(package: Path, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    # The package under test may itself be found through the variable.
    paths = os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")])
    variables = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=variables, cwd=cwd or package)


def test_it_is_listed(package):
    done = run(package, "saccade.cli.main", "reducers", "--json")
    assert done.returncode == 0, done.stderr
    (entry,) = [entry for entry in json.loads(done.stdout) if entry["name"] == "unusual"]
    assert entry == {
        "name": "unusual",
        "kind": "select",
        "needs": ["saliency"],
        "options": {"attention": 0.25},
        "description": "Keeps the tokens with the lowest mean cosine similarity to the others, and some of the most "
        "salient",
    }


def test_it_passes_the_testers(package):
    done = run(package, "pytest", "-q", "-p", "no:cacheprovider", "test_unusual.py")
    assert done.returncode == 0, done.stdout[-3000:]
    assert re.search(r"\b\d{2,} passed", done.stdout)


@pytest.mark.slow
def test_it_trains_from_a_recipe(package, tmp_path):
    (lines,) = blocks("yaml")
    recipe = {
        **yaml.safe_load(lines),
        "model": "tiny",
        "dataset": "digits",
        "dataset_rows": 16,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "slow_probability": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "output_dir": "out",
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = run(package, "saccade.cli.main", "train", "recipe.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    saved = "".join(path.read_text() for path in (tmp_path / "out").glob("*.json"))
    assert '"unusual"' in saved
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 0
    wrong = run(
        package, "saccade.cli.main", "train", "recipe.yaml", "--reducer_options", "{attention: 3}", cwd=tmp_path
    )
    assert wrong.returncode == 2
    assert wrong.stderr.strip().splitlines()[-1].endswith("reducer 'unusual': attention=3 is outside [0, 1]")
