"""The benchmarks of dropping patches before the tower run, and measure what they say."""

import json

import numpy as np
import pytest
import torch

from benchmarks import patches, patches_read
from benchmarks.pictures import KINDS, page, screenshot
from saccade.errors import SaccadeError

SMALL = ["--images", "1", "--width", "168", "--height", "224", "--tolerances", "0", "0.1", "--repeats", "1"]
TIMED = ["--tower-layers", "2", "--tower-width", "160", "--timed-width", "112", "--timed-height", "168"]


def test_shares_and_times(tmp_path, capsys):
    path = tmp_path / "found.json"
    assert patches.main([*SMALL, *TIMED, "--json", str(path)]) == 0
    assert "dropped, mean" in capsys.readouterr().out
    found = json.loads(path.read_text())
    assert [*found["shares"]] == [*found["times"]] == [*KINDS]
    assert found["shares"]["page"]["0"][0] > 0.2
    assert found["shares"]["photograph"]["0"] == [0]
    for timed in found["times"].values():
        whole, exact, loose = (timed["ways"][name] for name in (patches.WHOLE, "0", "0.1"))
        assert whole["dropped"] == 0
        assert whole["cosine"] == pytest.approx(1)
        assert 0 <= exact["dropped"] <= loose["dropped"] < 1
        assert all(len(way["seconds"]) == 1 for way in (whole, exact, loose))
    kept = found["times"]["photograph"]["ways"]["0"]
    assert (kept["dropped"], kept["cosine"]) == (0, pytest.approx(1))


def test_your_own_images(tmp_path, capsys):
    screenshot(0, 160, 120).save(tmp_path / "shot.png")
    assert patches.main(["--images-from", str(tmp_path), "--tolerances", "0"]) == 0
    assert patches.OWN in capsys.readouterr().out
    (tmp_path / "shot.png").unlink()
    with pytest.raises(SaccadeError, match="has no files: give a folder of images"):
        patches.main(["--images-from", str(tmp_path)])
    with pytest.raises(SaccadeError, match="images=0: give at least 1"):
        patches.main(["--images", "0"])


def test_pictures_are_the_same_for_the_same_seed():
    for draw in (page, screenshot):
        first, again, other = (np.asarray(draw(seed, 200, 160)) for seed in (1, 1, 2))
        assert (first == again).all()
        assert (first != other).any()


def test_forms_show_what_their_labels_say():
    for number in range(4):
        image, shows = patches_read.form("test", number)
        pixels = np.asarray(image).astype(int).reshape(4, 16, 4, 16, 3).transpose(0, 2, 1, 3, 4).reshape(16, -1, 3)
        inked = (pixels.sum(axis=2).min(axis=1)) < 380
        assert inked[shows != patches_read.NOTHING].mean() > 0.8
        assert (shows != patches_read.NOTHING).sum() >= patches_read.DIGITS
    inputs, shown = patches_read.forms("test", 0, 2)
    assert inputs["image_grid_thw"].tolist() == [[1, 8, 8]] * 2
    assert shown.tolist() == [*patches_read.form("test", 0)[1], *patches_read.form("test", 1)[1]]


def test_a_reader_learns_on_all_patches_or_on_some():
    threads = torch.get_num_threads()
    for tolerance in (None, 0.05):
        family, reader = patches_read.train(2, tolerance, seed=0)
        whole, some = (patches_read.score(family, reader, value, 4) for value in (None, 0.05))
        assert (whole["lost"], whole["dropped"]) == (0, 0)
        assert 0.2 < some["dropped"] < 0.8
        assert some["lost"] < 0.1
    torch.set_num_threads(threads)
