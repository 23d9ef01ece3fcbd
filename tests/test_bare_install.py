"""`pip install saccade` without an extra: it prunes, it skips, and it says in one line what an extra is needed for."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import saccade
from saccade.errors import EXTRAS, MissingPackageError, needing_extras

ROOT = Path(__file__).resolve().parent.parent
ABSENT = ("trl", "peft", "accelerate", "datasets", "matplotlib", "sklearn", "pytest")
"""Not jinja2 and rich: torch brings the one, transformers the other."""

SCRIPT = """
import contextlib, io, json, sys
from importlib.util import find_spec

absent, folder = json.loads(sys.argv[1]), sys.argv[2]
assert not [name for name in absent if find_spec(name)]

from pathlib import Path
import torch
import saccade
from saccade import PruningConfig, SkipVisionConfig, apply_pruning, apply_skip_vision, open_image, prune_inputs
from saccade.cli.main import main
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

tiny = Path(saccade.__file__).parent / "tiny" / "checkpoint"
model = LlavaForConditionalGeneration.from_pretrained(tiny).eval()
processor = AutoProcessor.from_pretrained(tiny)
Image.effect_noise((96, 96), 80).convert("RGB").save(f"{folder}/noise.png")
messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "how many digits are there ?"}]}]
text = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = dict(processor(images=open_image(f"{folder}/noise.png"), text=text, return_tensors="pt"))
options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
stock = model.generate(**inputs, **options)
found = {"full": inputs["input_ids"].shape[1]}

PruningConfig(reducer="divprune", prune_ratio=0.9).save_pretrained(folder)
pruned = prune_inputs(model, inputs, folder)
found["pruned"] = pruned["input_ids"].shape[1]
answer = model.generate(**pruned, **options)[:, found["pruned"]:]
with apply_pruning(model, folder):
    in_place = model.generate(**inputs, **options)
found["same in place"] = torch.equal(in_place[:, found["full"]:], answer)
skip = apply_skip_vision(model, SkipVisionConfig(retained=14, skipped=20))
found["skips"] = model.generate(**inputs, **options).shape == stock.shape
skip.remove()
found["stock again"] = torch.equal(model.generate(**inputs, **options), stock)
found["reducers"] = saccade.list_reducers()

found["missing"] = {}
for name in saccade.__all__:
    try:
        getattr(saccade, name)
    except ImportError as error:
        found["missing"][name] = str(error)
trained = f"{folder}/trained"
model.save_pretrained(trained)
processor.save_pretrained(trained)
assert main(["view", f"{folder}/noise.png", "--reducer", "divprune", "--output", f"{folder}/view.png"]) == 0
assert main(["export", trained, "--output", f"{folder}/export"]) == 0
found["written"] = sorted(path.name for path in Path(folder).iterdir())
found["verbs"] = {}
for words in json.loads(sys.argv[3]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(words)
    found["verbs"][" ".join(words)] = [status, out.getvalue(), err.getvalue()]
print("FOUND", json.dumps(found))
"""
VERBS = [
    ["reducers"],
    ["env"],
    ["train", "tiny-digits/pretrain"],
    ["demo"],
    ["eval", "tiny"],
    ["data", "check", "someone/rows"],
    ["assemble", "--vision-tower", "tiny", "--language-model", "tiny", "--output", "out2"],
    ["grow", "none", "--image-size", "448", "--output", "out2"],
]
"""Verbs that need none, the first two, and that need an extra."""

OTHERS = {
    ("view", "none.png"): "image='none.png'",
    ("export", "out", "--output", "out2"): "'out'",
    ("serve", "out"): "model='out' is not a folder",
}
"""Verbs that need no extra, and what they complain of instead."""


def closure(requirements: Iterable[str]) -> Iterator[Distribution]:
    """The installed packages that `requirements` ask for, directly or not, without extras."""
    seen: set[str] = set()
    wanted = list(requirements)
    while wanted:
        requirement = Requirement(wanted.pop())
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name in seen or (requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})):
            continue
        seen.add(name)
        found = distribution(name)
        yield found
        wanted += found.requires or []


def link(packages: Iterable[Distribution], folder: Path) -> None:
    """Make `folder` what `pip install --target` would make of the packages, by links to those of this environment."""
    for package in packages:
        tops = {file.parts[0] for file in package.files or ()} - {"..", "__pycache__", "bin"}
        for top in tops:
            place = folder / top
            if not place.exists():
                place.symlink_to(Path(str(package.locate_file(top))))


def run_bare(site: Path, folder: Path) -> dict:
    """What `SCRIPT` finds in a Python that has the packages in `site` and no others."""
    variables = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-S", "-c", SCRIPT, json.dumps(ABSENT), str(folder), json.dumps([*VERBS, *OTHERS])]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("FOUND "))
    return json.loads(line.removeprefix("FOUND "))


def check(found: dict) -> None:
    assert found["full"] - found["pruned"] == 144 - 14
    assert found["same in place"]
    assert found["skips"]
    assert found["stock again"]
    assert "divprune" in found["reducers"]
    wanted = r'saccade\.{} needs \w+, which is not installed: pip install "saccade\[train\]"'
    assert found["missing"].keys() == {"DualSpeedConfig", "DualSpeedTrainer"}
    assert {"view.png", "view.json", "export"} <= set(found["written"])
    for name, message in found["missing"].items():
        assert re.fullmatch(wanted.format(name), message)
    for verb in ("reducers", "env"):
        status, out, err = found["verbs"].pop(verb)
        assert (status, err) == (0, "")
        assert len(out.splitlines()) > 5
    for words, complaint in OTHERS.items():
        status, out, err = found["verbs"].pop(" ".join(words))
        assert (status, out) == (2, "")
        assert complaint in err
        assert "pip install" not in err
    for words, (status, out, err) in found["verbs"].items():
        verb = words.split()[0]
        assert (status, out) == (2, "")
        assert re.fullmatch(
            rf'saccade: error: saccade {verb} needs \w+, which is not installed: pip install "saccade\[\w+\]"\n', err
        )


def test_the_bare_package_prunes(tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    link(closure(project["dependencies"]), site)
    (site / "saccade").symlink_to(Path(saccade.__file__).parent)
    check(run_bare(site, tmp_path))


def build(kind: str, folder: Path) -> Path:
    """The release archive that `python -m build` would make from what git tracks, "wheel" or "sdist"."""
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            place = folder / "source" / name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, place)
    code = f"import sys; from setuptools import build_meta; print('BUILT', build_meta.build_{kind}(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, cwd=folder / "source", capture_output=True, text=True, check=True)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("BUILT "))
    return folder / line.removeprefix("BUILT ")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_a_release_prunes(kind: str, tmp_path: Path) -> None:
    """The same with a wheel, and with a source archive: with its own list of dependencies, and its own files only."""
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(site), str(build(kind, tmp_path))], check=True)
    installed = sorted(path.relative_to(site / "saccade") for path in (site / "saccade").rglob("*") if path.is_file())
    package = Path(saccade.__file__).parent
    expected = sorted(path.relative_to(package) for path in package.rglob("*") if path.is_file())
    assert [path for path in installed if "__pycache__" not in path.parts] == [
        path for path in expected if "__pycache__" not in path.parts
    ]
    (info,) = site.glob("saccade-*.dist-info")
    assert (info / "licenses" / "LICENSE").is_file()
    link(closure(Distribution.at(info).requires or []), site)
    check(run_bare(site, tmp_path))


def test_an_optional_package_that_is_missing_is_named_with_its_extra() -> None:
    for module, package in (("trl.trainer", "trl"), ("sklearn", "scikit-learn")):
        with pytest.raises(MissingPackageError) as found, needing_extras("saccade.x"):
            raise ModuleNotFoundError(name=module)
        expected = f'saccade.x needs {package}, which is not installed: pip install "saccade[{EXTRAS[package]}]"'
        assert str(found.value) == expected
        assert isinstance(found.value, ImportError)


def test_a_module_that_is_missing_for_another_reason_is_an_error_as_before() -> None:
    with pytest.raises(ModuleNotFoundError) as found, needing_extras("saccade.x"):
        raise ModuleNotFoundError(name="saccade.nowhere")
    assert not isinstance(found.value, MissingPackageError)
