"""Nothing here unpickles, runs code that comes with a checkpoint, or reads an image from where it should not."""

import ast
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers import make_trainer

from saccade import SaccadeError
from saccade.dualspeed.checkpoint import MANIFEST_FILE
from saccade.tiny import build_tiny_llava, save_tiny
from saccade.training import ModelOptions, load_model

SOURCES = sorted((Path(__file__).parent.parent / "src").rglob("*.py"))
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
LOADS = re.compile(r"\b(torch\.load|np\.load|numpy\.load|pickle\.loads?|read_pickle|allow_pickle|yaml\.load)\b")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_nothing_is_unpickled(path):
    text = path.read_text(encoding="utf-8")
    for number, line in enumerate(text.splitlines(), start=1):
        assert not LOADS.search(line), f"{path}:{number} {line.strip()}"
        assert not re.search(r"trust_remote_code\s*=\s*True|weights_only\s*=\s*False", line), f"{path}:{number}"
        assert not re.search(r"\beval\(|\bexec\(", line.replace(".eval(", "")), f"{path}:{number}"
    for node in ast.walk(ast.parse(text)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        assert not UNPICKLERS & {name.split(".")[0] for name in names}, f"{path}:{node.lineno}"


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return (os.mkdir, (self.folder,))


def test_a_checkpoint_with_code_in_it_is_refused_on_resume(processor, tmp_path):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make_trainer(build_tiny_llava(processor, seed=0), processor, tmp_path / "out", **options).train()
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        output = shutil.copytree(tmp_path / "out", tmp_path / name)
        checkpoint = output / "checkpoint-1"
        torch.save(Payload(tmp_path / "harm"), checkpoint / name)
        # A stranger's checkpoint brings a manifest that fits, or none.
        (checkpoint / MANIFEST_FILE).unlink()
        trainer = make_trainer(build_tiny_llava(processor, seed=0), processor, output, **options)
        with pytest.raises(SaccadeError, match=r"checkpoint-1.* contains something other than tensors") as error:
            trainer.train(resume_from_checkpoint=str(checkpoint))
        assert "\n" not in str(error.value), name
        assert not (tmp_path / "harm").exists(), name


def test_code_that_comes_with_a_model_is_not_run(tmp_path, processor):
    """The config asks for a class in a Python file in the same folder."""
    save_tiny(build_tiny_llava(processor, seed=0), processor, tmp_path)
    config = (tmp_path / "config.json").read_text()
    harmful = config.replace('"model_type": "llava"', '"model_type": "other", "auto_map": {"AutoConfig": "code.C"}', 1)
    assert harmful != config
    (tmp_path / "config.json").write_text(harmful)
    (tmp_path / "code.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'harm')!r})\n")
    with pytest.raises(SaccadeError, match="trust_remote_code"):
        load_model(ModelOptions(model=str(tmp_path)))
    assert not (tmp_path / "harm").exists()
