"""A half-written file never looks whole."""

import json
import os
import stat
from pathlib import Path

import numpy
import pytest
import torch

from saccade.files import atomic_path, similar_path, write_json_atomically, write_text_atomically


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_the_file_appears_when_the_block_ends_and_not_before(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder" / "picture.png"
    with atomic_path(target) as temporary:
        temporary.write_bytes(b"half")
        assert not target.exists()
        assert temporary.parent == target.parent
        assert temporary.suffix == ".png"
    assert target.read_bytes() == b"half"
    assert names(target.parent) == ["picture.png"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_failure_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path, error: type[BaseException]) -> None:
    target = write_text_atomically(tmp_path / "report.txt", "old")

    def fail_half_way() -> None:
        with atomic_path(target) as temporary:
            temporary.write_text("half of the n")
            raise error

    with pytest.raises(error):
        fail_half_way()
    assert target.read_text() == "old"
    assert names(tmp_path) == ["report.txt"]


def test_a_block_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "report.txt"):
        pass
    assert names(tmp_path) == []


@pytest.mark.parametrize("path", ["", "/", "folder"])
def test_a_folder_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError), atomic_path(path):
        pytest.fail("the block ran")


def test_the_mode_is_that_of_an_ordinary_new_file(tmp_path: Path) -> None:
    ordinary = tmp_path / "ordinary.txt"
    ordinary.write_text("x")
    written = write_text_atomically(tmp_path / "written.txt", "x")
    assert stat.S_IMODE(os.stat(written).st_mode) == stat.S_IMODE(os.stat(ordinary).st_mode)


def test_the_longest_name_that_the_file_system_takes_is_taken(tmp_path: Path) -> None:
    target = write_text_atomically(tmp_path / ("n" * 250 + ".json"), "{}")
    assert target.read_text() == "{}"


def test_json_reads_back_and_is_strict(tmp_path: Path) -> None:
    target = write_json_atomically(
        tmp_path / "result.json",
        {
            "path": tmp_path,
            "needs": frozenset({"keys", "attention"}),
            "loss": float("nan"),
            "rate": numpy.float32(0.5),
            "best": numpy.float64("inf"),
            "kept": torch.tensor([3, 5]),
            "count": torch.tensor(2),
            7: ("a", True, None),
            "name": "Zoë",
        },
    )
    text = target.read_text(encoding="utf-8")
    assert text.endswith("}\n")
    assert "Zoë" in text
    assert json.loads(text, parse_constant=pytest.fail) == {
        "path": str(tmp_path),
        "needs": ["attention", "keys"],
        "loss": None,
        "rate": 0.5,
        "best": None,
        "kept": [3, 5],
        "count": 2,
        "7": ["a", True, None],
        "name": "Zoë",
    }


def test_what_has_no_json_form_is_an_error_and_leaves_the_old_file(tmp_path: Path) -> None:
    target = write_json_atomically(tmp_path / "result.json", {"old": 1})
    with pytest.raises(TypeError, match="object has no JSON form"):
        write_json_atomically(target, {"new": object()})
    assert json.loads(target.read_text()) == {"old": 1}
    assert names(tmp_path) == ["result.json"]


def test_the_hint_for_a_missing_path_compares_names_and_not_their_folders(tmp_path):
    for name in ("sft", "recipe.yaml", ".hidden"):
        (tmp_path / name).touch()
    assert similar_path(tmp_path / "stf", "x") == f"did you mean {str(tmp_path / 'sft')!r}?"
    assert similar_path(tmp_path / "recipes.yaml", "x") == f"did you mean {str(tmp_path / 'recipe.yaml')!r}?"
    for name in ("other.yaml", "hidden", "gone/sft"):
        assert similar_path(tmp_path / name, "x") == "x"
