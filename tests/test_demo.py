"""The demo end to end at a size that learns nothing: the runs, the report, the pictures, going on after a stop."""

import json
import re
from dataclasses import replace

import pytest
from forked import forking
from PIL import Image

from saccade import SaccadeError
from saccade.cli.main import main
from saccade.demo.plan import plan_runs
from saccade.demo.run import FULL, run_demo
from saccade.demo.summary import COLUMNS, finding, markdown
from saccade.pages import write_report
from saccade.sweeps import METHODS, QUICK, DigitSettings, RunSpec

SMALL = DigitSettings(pretrain_steps=2, sft_steps=4, batch_size=4, test_scenes=12)
KEYS = {
    "method",
    "positions",
    "seed",
    "accuracy_full",
    "accuracy_pruned",
    "share_of_all_tokens",
    "train_seconds",
    "speedup",
    "mean_sequence_length",
}


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    with forking("saccade.sweeps.runner"):
        run_demo(folder, settings=SMALL, jobs=2)
    return folder


def test_report(output):
    report = json.loads((output / "report.json").read_text())
    assert {run["method"] for run in report["runs"]} == {"all_tokens", "prune_only", "dualspeed"}
    assert {(run["method"], run["positions"]) for run in report["runs"]} >= {
        ("dualspeed", "compact"),
        ("dualspeed", "original"),
    }
    for run in report["runs"]:
        assert run.keys() >= KEYS
        assert 0 <= run["accuracy_full"] <= 1
        assert run["train_seconds"] > 0
    assert report["environment"]["packages"]["torch"]
    lengths = {(run["method"], run["positions"]): run["mean_sequence_length"] for run in report["runs"]}
    assert lengths["prune_only", "compact"] < lengths["dualspeed", "compact"] < lengths["all_tokens", "compact"]
    baseline = next(run for run in report["runs"] if run["method"] == "all_tokens")
    assert baseline["speedup"] == 1
    assert baseline["speedup_tokens"] == pytest.approx(1)


def test_pictures(output):
    for name in ("accuracy_over_time.png", "kept_tokens.png", "loss.png"):
        with Image.open(output / name) as image:
            assert image.width >= 400


def test_its_page(output):
    page = write_report(output).read_text()
    record = json.loads((output / "report" / "report.json").read_text())
    assert [entry["file"] for entry in record["pictures"]] == ["loss.png"]
    summary = json.loads((output / "report.json").read_text())["summary"]
    for entry in summary:
        assert f">{100 * entry['accuracy_full']['mean']:.1f} %<" in page
        assert f">{entry['mean_sequence_length']['mean']:.0f}<" in page


def test_its_finding():
    def entry(method, positions, share, speedup):
        values = {"share_of_all_tokens": share, "speedup": speedup}
        figures = {name: {"mean": value, "min": value, "max": value} for name, value in values.items()}
        return {"method": method, "positions": positions, "seeds": 1, **figures}

    summary = [
        entry("all_tokens", "compact", 1.0, 1.0),
        entry("prune_only", "compact", 0.9, 4.0),
        entry("dualspeed", "compact", 0.983, 2.5),
        entry("dualspeed", "original", 0.999, 2.5),
    ]
    assert finding({"summary": summary}) == (
        "DualSpeed reaches 98.3 % of the accuracy of all-token training in 40 % of its training time, and pruning "
        "only reaches 90.0 % of the accuracy of all-token training in 25 % of its training time (answering from all "
        "tokens, compact positions, 1 seed)."
    )
    for entry in summary:
        del entry["share_of_all_tokens"]
    assert "nothing to compare" in finding({"summary": summary})


def test_markdown_table(output):
    table = markdown(json.loads((output / "report.json").read_text())).splitlines()
    assert table[0].count("|") == len(COLUMNS) + 1
    assert len(table) == 2 + 5


@pytest.mark.slow
def test_going_on_takes_finished_runs_as_they_are(output, capsys):
    before = (output / "report.json").read_text()
    (output / "runs" / "dualspeed-original-seed0" / "result.json").unlink()
    report = run_demo(output, settings=SMALL)
    printed = capsys.readouterr().out
    assert len(re.findall("found, not trained again", printed)) == 4
    accuracies = [run["accuracy_full"] for run in report["runs"]]
    assert accuracies == [run["accuracy_full"] for run in json.loads(before)["runs"]]


@pytest.mark.slow
def test_a_run_that_fails_is_named(tmp_path):
    with pytest.raises(SaccadeError, match=r"the run all_tokens-compact-seed0 ended with status 1: .*'nope'.*log.txt"):
        run_demo(tmp_path, settings=replace(SMALL, reducer="nope"))


def test_plan_of_the_full_demo():
    runs = plan_runs(FULL, seeds=3, full=True)
    assert {run.labels["method"] for run in runs} == set(METHODS)
    assert len({run.name for run in runs}) == len(runs)
    for run in runs:
        assert RunSpec.from_json(json.loads(json.dumps(run.as_json()))) == run
    assert QUICK.split == FULL.split == "test"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seeds", "0"], "seeds=0"),
        (["--jobs", "0"], "jobs=0"),
        (["--steps", "-3"], "steps=-3"),
        (["--scenes", "0"], "scenes=0"),
    ],
)
def test_bad_flags(tmp_path, flags, message, capsys):
    assert main(["demo", "--output", str(tmp_path), *flags]) == 2
    assert message in capsys.readouterr().err
