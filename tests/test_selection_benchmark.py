"""The benchmark of selection covers every reducer, and what it compares does the same."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import selection
from benchmarks.selection_overlap import drawn, overlaps
from saccade.errors import SaccadeError
from saccade.reducers import list_reducers
from saccade.reducers.frames import KNOW_TIME

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("shape", [(3, 144, 14), (2, 180, 24)])
def test_batched_and_loop_choose_the_same(shape):
    results = selection.measure(selection.providers(), shape, 48, torch.float32, torch.device("cpu"), repeats=1)
    batched = {name: result["equal"] for name, result in results.items() if not name.endswith(selection.LOOP)}
    assert set(list_reducers()) - set(KNOW_TIME) <= set(batched)
    assert {name for name, equal in batched.items() if equal is None} == {"random", selection.SEEDED}
    assert {equal for equal in batched.values() if equal is not None} == {shape[0]}
    for name, result in results.items():
        assert [len(result[metric]) for metric in selection.METRICS] == [1, 1, 1], name


def test_a_quick_run_of_some_providers_appends_to_a_ledger(tmp_path):
    ledger = tmp_path / "ledger.csv"
    names = {"uniform", "random, seeded"}
    loops = {f"{name}, loop over images" for name in names}
    flags = ["--quick", "--repeats", "1", "--width", "32", "--only", "; ".join(names), "--ledger", str(ledger)]
    command = [sys.executable, "-m", "benchmarks.selection", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert selection.main(flags) == 0
    rows = list(csv.DictReader(ledger.open()))
    assert len(rows) == 2 * 2 * 3 * 2 * len(names)  # runs, shapes, metrics, a loop each
    assert {row["metric"] for row in rows} == {"time", "cpu_time", "operations"}
    assert {row["provider"] for row in rows} == names | loops
    assert all(float(row["ratio_to_baseline"]) == 1 for row in rows if row["provider"] in loops)
    assert rows[0]["command"].startswith("python -m benchmarks.selection --quick")


def test_bad_input_leaves_the_ledger(tmp_path):
    ledger = tmp_path / "ledger.csv"
    ledger.write_text("something else\n")
    with pytest.raises(SaccadeError, match="is not a ledger's header"):
        selection.main(["--quick", "--ledger", str(ledger)])
    assert ledger.read_text() == "something else\n"
    with pytest.raises(SaccadeError, match="--only 'unifrom'"):
        selection.main(["--quick", "--only", "unifrom"])


def test_overlap_with_the_released_selection():
    """All of it where bfloat16 tells distances apart as float32 does, and less where it rounds them to ties."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (2, 40, 8), generator=generator) * 2.0 - 1  # cosines are multiples of a quarter
    assert overlaps(iter(signs), 0.7) == [1.0, 1.0]
    (share,) = overlaps(drawn(1, 0.0), 0.9)
    assert 0 < share < 1
