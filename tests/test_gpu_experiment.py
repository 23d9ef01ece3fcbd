"""The GPU experiment: each part runs at toy size, what is done is kept, and one failure does not stop the others."""

import json
import sys

import pytest

from benchmarks.train import RESULT_FILE
from experiments import gpu
from experiments.gpu import LEDGER_FILE, PART_FILE, PARTS, Part, run_parts
from saccade.cli.main import guarded


def part(name: str, code: str) -> Part:
    """A part that runs a line of Python."""

    class Line(Part):
        def command(self, folder, size, device, dtype):
            return [sys.executable, "-c", code]

    return Line(name, "a line of Python", "", (), ())


def test_a_failure_is_reported_and_the_rest_goes_on(tmp_path):
    lines = []
    parts = [part("good", "print(1)"), part("bad", "raise SystemExit('no such kernel')"), part("last", "pass")]
    state = run_parts(parts, tmp_path, "small", "cpu", "float32", 60, lines.append)
    assert state == {"good": "done", "bad": "failed", "last": "done"}
    assert any("no such kernel" in line for line in lines)
    assert not (tmp_path / "bad" / PART_FILE).exists()


def test_a_part_that_has_failed_is_tried_after_those_that_have_not(tmp_path):
    order = tmp_path / "order"
    lines = {
        name: f"open({str(order)!r}, 'a').write({name!r}); raise SystemExit({code})"
        for name, code in (("a", 1), ("b", 0), ("c", 0))
    }
    a, b, c = (part(name, line) for name, line in lines.items())
    run_parts([a], tmp_path, "small", "cpu", "float32", 60)
    assert run_parts([a, b, c], tmp_path, "small", "cpu", "float32", 60) == {"a": "failed", "b": "done", "c": "done"}
    assert order.read_text() == "abca"


def test_a_part_goes_on_with_what_it_had_left_unless_its_command_is_another(tmp_path):
    def counting(seconds):
        line = (
            f"import pathlib, time; p = pathlib.Path({str(tmp_path / 'a')!r}, 'count'); "
            "p.open('a').write('x'); time.sleep(60 if len(p.read_text()) < 2 else 0)"
        )
        return part("a", f"{line}  # {seconds}")

    assert run_parts([counting(1)], tmp_path, "small", "cpu", "float32", 2) == {"a": "not reached"}
    assert run_parts([counting(1)], tmp_path, "small", "cpu", "float32", 60) == {"a": "done"}
    assert (tmp_path / "a" / "count").read_text() == "xx"
    assert run_parts([counting(2)], tmp_path, "small", "cpu", "float32", 2) == {"a": "not reached"}
    assert (tmp_path / "a" / "count").read_text() == "x"


def test_what_is_done_is_kept_and_what_is_not_goes_on(tmp_path):
    slow = part("slow", "import time; time.sleep(60)")
    late = part("late", "pass")
    quick = part("quick", f"open({str(tmp_path / 'runs')!r}, 'a').write('x')")
    run_parts([quick], tmp_path, "small", "cpu", "float32", 60)
    state = run_parts([quick, slow, late], tmp_path, "small", "cpu", "float32", 1)
    assert state == {"quick": "done", "slow": "not reached", "late": "not reached"}
    mended = part("slow", "pass")
    assert run_parts([quick, mended], tmp_path, "small", "cpu", "float32", 60) == {"quick": "done", "slow": "done"}
    assert (tmp_path / "runs").read_text() == "x"
    # Of another size, device or command line it is another measurement.
    other = part("quick", f"open({str(tmp_path / 'runs')!r}, 'a').write('y')")
    run_parts([other], tmp_path, "small", "cpu", "float32", 60)
    assert (tmp_path / "runs").read_text() == "xy"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--device", "cpu"], "device='cpu'"),
        (["--only", "selection"], "only='selection'"),
        (["--only", "train"], "only='train'"),
        (["--size", "tiny"], "size='tiny'"),
        (["--size", "small", "--device", "cpu", "--budget", "0"], "budget=0"),
        (["--size", "small", "--device", "cpu", "--dtype", "int4"], "dtype='int4'"),
    ],
)
def test_bad_input_is_one_line(flags, message, capsys, tmp_path):
    assert guarded(lambda: gpu.main([*flags, "--output", str(tmp_path / "out")])) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", PARTS)
def test_every_part_runs_at_toy_size(name, tmp_path):
    flags = ["--size", "small", "--device", "cpu", "--dtype", "float32", "--only", name, "--output", str(tmp_path)]
    assert gpu.main(flags) == 0, (tmp_path / name / "log.txt").read_text()
    facts = json.loads((tmp_path / name / PART_FILE).read_text())
    assert facts["seconds"] > 0
    assert (tmp_path / name / LEDGER_FILE).read_text().count("\n") > 2
    if name.startswith("train"):
        timings = json.loads((tmp_path / name / RESULT_FILE).read_text())["timings"]
        assert {"stock TRL, all tokens", "DualSpeed, slow step"} <= {entry["variant"] for entry in timings["sft"]}
