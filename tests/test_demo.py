"""The demo end to end at a size that learns nothing: the runs, the report, the pictures, going on after a stop."""

import json
import re
import shutil
from dataclasses import replace

import pytest
from forked import forking
from PIL import Image

from saccade import SaccadeError
from saccade.cli.main import main
from saccade.demo.run import FULL, MAIN_METHODS, SHORT, conclusion, plan_runs, run_demo
from saccade.files import write_json_atomically
from saccade.pages import write_report
from saccade.sweeps import METHODS, DigitSettings, RunSpec
from saccade.sweeps.plan import make_plan
from saccade.sweeps.table import Standing

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


def test_its_table(output):
    table = json.loads((output / "table.json").read_text())
    rows = {(row["method"], row["positions"]): row for row in table["rows"]}
    assert set(rows) == {
        ("all_tokens", "compact"),
        ("prune_only", "compact"),
        ("dualspeed", "compact"),
    }
    for row in rows.values():
        assert row.keys() >= KEYS
        assert 0 <= row["accuracy_full"] <= 1
        assert row["train_seconds"] > 0
    assert table["environment"]["packages"]["torch"]
    lengths = {key: row["mean_sequence_length"] for key, row in rows.items()}
    assert lengths["prune_only", "compact"] < lengths["dualspeed", "compact"] < lengths["all_tokens", "compact"]
    baseline = rows["all_tokens", "compact"]
    assert baseline["speedup"] == 1
    assert baseline["speedup_tokens"] == pytest.approx(1)
    assert len((output / "table.md").read_text().splitlines()) == 2 + 3


def test_pictures(output):
    for name in ("accuracy_over_time.png", "kept_tokens.png", "loss.png"):
        with Image.open(output / name) as image:
            assert image.width >= 400


def test_its_page(output):
    page = write_report(output).read_text()
    record = json.loads((output / "report" / "report.json").read_text())
    names = [entry["file"].removeprefix(f"{output.name}-") for entry in record["pictures"]]
    assert names == ["trade-off.png", "loss.png"]
    for entry in json.loads((output / "table.json").read_text())["summary"]:
        assert f">{100 * entry['accuracy_full']['mean']:.1f} %<" in page


def result_of(spec, accuracy, seconds):
    stage = {"seconds": seconds, "samples": 4, "tokens": {"full": 40.0, "trained": 20.0}, "step_speedup": 2.0}
    entry = {"inference": "full", "accuracy": accuracy, "accuracy_by_kind": {}, "mean_prompt_length": 9.0}
    stages = {"sft": {**stage, "log_history": [{"step": 1, "loss": 1.0 - accuracy}]}}
    return {"spec": spec.as_json(), "environment": {}, "stages": stages, "evaluations": [entry]}


def test_its_finding(tmp_path):
    """DualSpeed at compact positions, as published, beside all-token training; the ranks are by accuracy."""
    runs = [spec for spec in plan_runs(FULL, seeds=1, full=True) if spec.labels["method"] in MAIN_METHODS]
    plan = make_plan("demo", runs)
    for spec, accuracy, seconds in zip(plan.runs, (1.0, 0.9, 0.983, 0.95, 0.999), (100, 20, 37, 20, 40), strict=True):
        write_json_atomically(tmp_path / "runs" / spec.name / "result.json", result_of(spec, accuracy, seconds))
    standing = Standing(plan, tmp_path)
    assert standing.finding() == "DualSpeed, compact: 98.3 % of all-token accuracy in 37 % of the time"
    assert conclusion(standing) == (
        "Answering from all tokens, DualSpeed reaches 98.3 % after 37 % of the time in which training on all tokens "
        "reaches 100.0 %; pruning only reaches 90.0 %."
    )
    early = tmp_path / "runs" / plan.runs[0].name / "result.json"
    write_json_atomically(early, result_of(plan.runs[0], 0.9, 100))
    assert conclusion(Standing(plan, tmp_path)).endswith(
        "training on all tokens reaches 90.0 %; pruning only reaches 90.0 %. "
        "All-token training has not converged in so few steps."
    )
    write_json_atomically(early, result_of(plan.runs[0], 1.0, 100))
    ranked = [entry["name"] for entry in standing.ranked()]
    assert ranked[:3] == ["all tokens, compact", "DualSpeed, original", "DualSpeed, compact"]
    shutil.rmtree(tmp_path / "runs" / plan.runs[0].name)
    finding = Standing(plan, tmp_path).finding()
    assert finding == "DualSpeed, compact: 98.3 % right from all tokens, best of 2"


@pytest.mark.slow
def test_going_on_takes_finished_runs_as_they_are(output, capsys):
    before = [row["accuracy_full"] for row in json.loads((output / "table.json").read_text())["rows"]]
    (output / "runs" / "dualspeed-compact-seed0" / "result.json").unlink()
    standing = run_demo(output, settings=SMALL)
    printed = capsys.readouterr().out
    assert len(re.findall("found, not trained again", printed)) == 2
    assert [row["accuracy_full"] for row in standing.rows] == before


def test_bad_settings_are_refused_before_anything_runs(tmp_path):
    with pytest.raises(SaccadeError, match=r"run all_tokens-compact-seed0: .*'nope'"):
        run_demo(tmp_path / "out", settings=replace(SMALL, reducer="nope"))
    assert not (tmp_path / "out").exists()


def test_plan_of_the_full_demo():
    runs = plan_runs(FULL, seeds=3, full=True)
    assert {run.labels["method"] for run in runs} == set(METHODS)
    assert len({run.name for run in runs}) == len(runs)
    for run in runs:
        assert RunSpec.from_json(json.loads(json.dumps(run.as_json()))) == run
    assert SHORT.split == FULL.split == "test"


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
