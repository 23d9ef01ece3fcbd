"""The benchmark of selection covers every reducer, and what it compares does the same."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from saccade.reducers import list_reducers

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def selection():
    sys.path.insert(0, str(BENCHMARKS))
    import selection

    yield selection
    sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize("shape", [(3, 144, 14), (2, 180, 24)])
def test_batched_and_loop_choose_the_same(selection, shape):
    results = selection.measure(selection.providers(), shape, 48, torch.float32, torch.device("cpu"), repeats=1)
    batched = {name: result["equal"] for name, result in results.items() if not name.endswith(selection.LOOP)}
    assert set(list_reducers()) <= set(batched)
    assert {name for name, equal in batched.items() if equal is None} == {"random", selection.SEEDED}
    assert {equal for equal in batched.values() if equal is not None} == {shape[0]}
    for name, result in results.items():
        assert [len(result[metric]) for metric in selection.METRICS] == [1, 1, 1], name


def test_quick_run_appends_to_a_ledger(tmp_path):
    ledger = tmp_path / "ledger.csv"
    script = [sys.executable, str(BENCHMARKS / "selection.py"), "--quick", "--repeats", "1", "--width", "32"]
    for runs in (1, 2):
        done = subprocess.run([*script, "--ledger", str(ledger)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        rows = list(csv.DictReader(ledger.open()))
        assert len(rows) == runs * 2 * 3 * 2 * (len(list_reducers()) + 4)  # shapes, metrics, a loop each
    assert {row["metric"] for row in rows} == {"time", "cpu_time", "operations"}
    assert all(float(row["ratio_to_baseline"]) == 1 for row in rows if row["provider"].endswith("loop over images"))
    ledger.write_text("something else\n")
    done = subprocess.run([*script, "--ledger", str(ledger)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "is not a ledger's header" in done.stderr
    assert ledger.read_text() == "something else\n"


def test_some_providers_only(tmp_path):
    script = [sys.executable, str(BENCHMARKS / "selection.py"), "--quick", "--repeats", "1", "--width", "32"]
    ledger = tmp_path / "ledger.csv"
    chosen = [*script, "--only", "uniform; random, seeded", "--ledger", str(ledger)]
    done = subprocess.run(chosen, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = {row["provider"] for row in csv.DictReader(ledger.open())}
    assert found == {"uniform", "random, seeded", "uniform, loop over images", "random, seeded, loop over images"}
    done = subprocess.run([*script, "--only", "unifrom"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "--only 'unifrom'" in done.stderr


def test_overlap_with_the_released_selection():
    """All of it where bfloat16 tells distances apart as float32 does, and less where it rounds them to ties."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        from selection_overlap import drawn, overlaps
    finally:
        sys.path.remove(str(BENCHMARKS))
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (2, 40, 8), generator=generator) * 2.0 - 1  # cosines are multiples of a quarter
    assert overlaps(iter(signs), 0.7) == [1.0, 1.0]
    (share,) = overlaps(drawn(1, 0.0), 0.9)
    assert 0 < share < 1
