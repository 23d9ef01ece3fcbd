"""Where a command cannot write: one line that names the output, before anything is read, loaded or started."""

import argparse
import json
import os
from importlib import import_module
from pathlib import Path

import pytest
from helpers import make_trainer
from hypothesis import given
from hypothesis import strategies as st

from saccade import SaccadeError
from saccade.cli.main import VERBS, main
from saccade.files import check_writable, write_json_atomically
from saccade.tiny import build_tiny_llava

COMMANDS = {
    "train": ["train", "no.yaml", "--dry-run"],
    "assemble": ["assemble", "--vision-tower", "no", "--language-model", "no"],
    "grow": ["grow", "no", "--image-size", "448"],
    "data": ["data", "check", "no.json"],
    "demo": ["demo", "--steps", "1"],
    "sweep": ["sweep", "no.yaml"],
    "eval": ["eval", "no"],
    "report": ["report", "no"],
    "export": ["export", "no"],
    "view": ["view", "no.jpg", "--model", "no"],
    "reducers": ["reducers"],
    "env": ["env"],
}
"""A command of each verb; of what it is to read there is nothing, so that another complaint would come first."""
FOLDERS = {"assemble", "grow", "demo", "sweep", "report", "export"}


@pytest.fixture
def places(tmp_path):
    """Paths that cannot be written, as files and as folders."""
    (tmp_path / "file").touch()
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    inside = ["/proc/x", "/proc/x/y/z.png", "/dev/null/x", "file/x", "n" * 300, "loop", "loop/x", "pipe", "/dev/null"]
    return {False: [*inside, "folder.json"], True: [*inside, "file"]}, tmp_path


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_that_takes_a_place_is_tried_here(verb):
    parser = argparse.ArgumentParser()
    import_module(VERBS[verb][0]).add_arguments(parser)
    assert any(action.dest == "output" for action in parser._actions) == (verb in COMMANDS)


@pytest.mark.parametrize("verb", COMMANDS)
def test_every_verb_says_so_first(verb, places, monkeypatch, capsys):
    paths, folder = places
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    for path in paths[verb in FOLDERS]:
        assert main([*COMMANDS[verb], "--output", path]) == 2, path
        said = capsys.readouterr()
        assert said.err.startswith(f"saccade: error: output={path!r} "), path
        assert said.err.count("\n") == 1
        assert said.out == ""
    assert sorted(folder.rglob("*")) == before


def test_results_go_beside_a_model_only_where_they_can(tmp_path, capsys):
    (tmp_path / "eval.json").mkdir()
    assert main(["eval", str(tmp_path)]) == 2
    assert f"output='{tmp_path / 'eval.json'}' exists and is not a file" in capsys.readouterr().err


def test_the_picture_has_a_record_beside_it(tmp_path, capsys):
    (tmp_path / "a.json").mkdir()
    assert main(["view", "no.jpg", "--output", str(tmp_path / "a.png")]) == 2
    assert "a.json' exists and is not a file" in capsys.readouterr().err


@pytest.mark.parametrize("field", ["output_dir", "feature_cache"])
@pytest.mark.parametrize("more", [[], ["--check"]])
def test_what_a_recipe_writes_is_tried_before_a_model_is_loaded(field, more, tmp_path, capsys):
    flags = {"output_dir": str(tmp_path / "out"), field: "/proc/x/y", "model": "no", "bf16": "false"}
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    assert main(["train", "tiny-digits/sft", *words, *more]) == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith(f"saccade: error: {field}='/proc/x/y' cannot be written (")
    assert "\n" not in line


def test_a_run_in_python_says_so_too(processor):
    with pytest.raises(SaccadeError, match="output_dir='/proc/x' cannot be written"):
        make_trainer(build_tiny_llava(processor, seed=0), processor, "/proc/x").train()


def test_a_place_that_can_be_written_is_left_as_it_is(tmp_path):
    (tmp_path / "there.json").write_text("[]")
    (tmp_path / "link.json").symlink_to(tmp_path / "there.json")
    for name in ("there.json", "link.json", "new.json", "n" * 250, "a/b/new.json"):
        check_writable(tmp_path / name, "output")
        assert not (tmp_path / "a").exists()
        write_json_atomically(tmp_path / name, {"a": 1})
        assert json.loads((tmp_path / name).read_text()) == {"a": 1}
    check_writable(tmp_path / "a", "output", folder=True)
    check_writable(tmp_path / "a" / "c" / "d", "output", folder=True)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["b"]


@given(st.text(max_size=20).filter(lambda name: "/" not in name), st.booleans())
def test_any_name_can_be_written_or_is_refused(tmp_path_factory, name, folder):
    place = tmp_path_factory.mktemp("any")
    try:
        check_writable(f"{place}/{name}", "output", folder)
    except SaccadeError:
        return
    if not folder:
        write_json_atomically(f"{place}/{name}", {})
    Path(f"{place}/{name}").exists()
