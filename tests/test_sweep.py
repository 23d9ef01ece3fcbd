"""Sweeps end to end at a size that learns nothing: shared stages, failures, kills and tables."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr
from dataclasses import replace
from io import StringIO
from itertools import chain, repeat
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from forked import Forked

from saccade import SaccadeError
from saccade.cli.main import main
from saccade.files import file_lock, write_json_atomically
from saccade.sweeps import QUICK, digit_run, run_specs
from saccade.sweeps.inputs import inputs_of
from saccade.sweeps.plan import Plan, make_plan, plan_grid
from saccade.sweeps.runner import _Runner, check_folder, same_code
from saccade.sweeps.table import Standing, baselines_of

SMALL = [
    "tiny-digits/sft",
    "--pretrain",
    "tiny-digits/pretrain",
    "--max_steps",
    "2",
    "--pretrain.max_steps",
    "1",
    "--dataset_rows",
    "8",
    "--pretrain.dataset_rows",
    "4",
    "--per_device_train_batch_size",
    "4",
    "--pretrain.per_device_train_batch_size",
    "4",
    "--save_strategy",
    "no",
    "--pretrain.save_strategy",
    "no",
    "--scenes",
    "8",
]
# A limit that cuts image tokens shows in the first batch only, when the run has started.
FAILING = ["--grid", "slow_probability=0.5,0", "--grid", "max_length=2048,30"]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """Four runs, two of which fail, and the output of the command."""
    output = tmp_path_factory.mktemp("sweep")
    # The first run is a process from the start, as all are outside tests.
    kinds = chain([subprocess.Popen], repeat(Forked))
    starting = SimpleNamespace(Popen=lambda *args, **options: next(kinds)(*args, **options), PIPE=subprocess.PIPE)
    with mock.patch("saccade.sweeps.runner.subprocess", starting), redirect_stderr(StringIO()) as said:
        status = main(["sweep", *SMALL, *FAILING, "--jobs", "2", "--output", str(output)])
    return output, status, said.getvalue()


def test_a_failed_run_does_not_lose_the_others(swept) -> None:
    output, status, said = swept
    assert status == 1
    complaints = said.splitlines()
    assert len(complaints) == 3
    for line, probability in zip(complaints, ("0.5", "0"), strict=False):
        assert f"the run slow_probability={probability}-max_length=30-seed=0 ended with status 1" in line
        assert "max_length=30" in line
    assert complaints[2] == "saccade: 2 runs failed; the same command tries them again"
    standing = Standing(Plan.read(output), output)
    assert standing.progress.startswith("2 of 4 runs done, 2 failed: slow_probability=0.5-max_length=30-seed=0, ")
    assert {(row["slow_probability"], row["max_length"]) for row in standing.rows} == {(0.5, 2048), (0, 2048)}


def test_the_first_stage_was_trained_once(swept) -> None:
    output, *_ = swept
    results = list((output / "stages").glob("pretrain-*/result.json"))
    assert len(results) == 1
    seconds = json.loads(results[0].read_text())["seconds"]
    for path in output.glob("runs/*/result.json"):
        assert json.loads(path.read_text())["stages"]["pretrain"]["seconds"] == seconds


def test_results_hold_the_whole_evaluation(swept) -> None:
    output, *_ = swept
    for path in output.glob("runs/*/result.json"):
        result = json.loads(path.read_text())
        assert [entry["inference"] for entry in result["evaluations"]] == ["full", "pruned", "pruned_isolator"]
        assert all(entry["samples"] == 8 for entry in result["evaluations"])
        assert result["stages"]["sft"]["samples"] == 2 * 4
        assert (Path(result["model"]) / "model.safetensors").is_file()


def test_what_is_there_is_not_made_again(swept, capfd) -> None:
    output, *_ = swept
    before = {path: path.stat().st_mtime_ns for path in output.glob("runs/*/result.json")}
    flags = ["--only", "max_length=2048", "--output", str(output)]
    assert main(["sweep", *SMALL, *FAILING, *flags]) == 0
    assert capfd.readouterr().out.count("found, not trained again") == 2
    assert {path: path.stat().st_mtime_ns for path in output.glob("runs/*/result.json")} == before


@pytest.mark.slow
def test_the_table_of_some_folders_has_the_rows_of_all(swept, tmp_path, capsys) -> None:
    output, *_ = swept
    whole = Standing(Plan.read(output), output)
    partial = tmp_path / "partial"
    shutil.copytree(output, partial, ignore=shutil.ignore_patterns("stages"))
    shutil.rmtree(partial / "runs" / "slow_probability=0-max_length=2048-seed=0")
    assert main(["sweep", "--output", str(partial), "--table"]) == 0
    assert "1 of 4 runs done" in capsys.readouterr().out
    table = json.loads((partial / "table.json").read_text())
    assert table["rows"] == [row for row in json.loads(json.dumps(whole.rows)) if row["slow_probability"] == 0.5]
    (line,) = (partial / "table.md").read_text().splitlines()[2:]
    assert line.startswith("| 0.5 | 2048 | 1 |")


@pytest.mark.slow
def test_another_commit_is_made_again_unless_any_will_do(swept, tmp_path, capfd, monkeypatch) -> None:
    output, *_ = swept
    moved = tmp_path / "moved"
    shutil.copytree(output, moved)
    (spec,) = [run for run in Plan.read(moved).runs if run.name == "slow_probability=0-max_length=2048-seed=0"]
    path = moved / "runs" / spec.name / "result.json"
    result = json.loads(path.read_text())
    result["environment"]["commit"] = "another"
    path.write_text(json.dumps(result))
    assert run_specs([spec], moved, any_commit=True).results[spec.name]["environment"]["commit"] == "another"
    outcome = run_specs([spec], moved)
    assert "1 runs are of another commit" in capfd.readouterr().out
    again = outcome.results[spec.name]
    assert again["environment"]["commit"] != "another"
    # The stages are of this commit, so the model is the same.
    assert again["evaluations"] == result["evaluations"]


def test_a_folder_of_another_sweep_is_refused(swept, capsys) -> None:
    output, *_ = swept
    before = {path: path.read_bytes() for path in output.glob("**/*.json")}
    for words in (["--grid", "slow_probability=0.5"], ["--grid", "slow_probability=0.5,0", "--dataset_rows", "12"]):
        flags = ["--grid", "max_length=2048", "--output", str(output)]
        assert main(["sweep", *SMALL, *words, *flags]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "finished runs of another sweep (saccade" in line
        assert "-max_length=2048-seed=0: give another output, or --only" in line
    assert {path: path.read_bytes() for path in output.glob("**/*.json")} == before


def test_a_sweep_may_grow(swept) -> None:
    output, *_ = swept
    plan = Plan.read(output)
    failed = [spec for spec in plan.runs if spec.labels["max_length"] == 30]
    extra = replace(plan.runs[0], name="one more")
    check_folder(replace(plan, runs=(*(spec for spec in plan.runs if spec not in failed), extra)), output)
    with pytest.raises(SaccadeError, match="contains finished runs of another sweep"):
        check_folder(replace(plan, runs=plan.runs[1:]), output)


@pytest.mark.parametrize("damage", ["", "{", "[]", "\0\0", "\udcff"])
def test_damaged_files_of_runs_and_stages_count_as_missing(swept, tmp_path, damage, capsys) -> None:
    output, *_ = swept
    copy = tmp_path / "copy"
    shutil.copytree(output, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    raw = damage.encode("utf-8", "surrogateescape")
    plan = Plan.read(copy)
    for name in ("result.json", "error.json"):
        for path in copy.glob(f"runs/*/{name}"):
            path.write_bytes(raw)
    stages = list(copy.glob("stages/*/result.json"))
    for path in stages:
        path.write_bytes(raw)
    assert main(["sweep", "--output", str(copy), "--table"]) == 0
    assert "0 of 4 runs done" in capsys.readouterr().out
    check_folder(replace(plan, runs=plan.runs[1:]), copy)
    runner = _Runner(copy / "runs", copy / "stages", None, True, "")
    assert not any(runner._has(path.parent.name) for path in stages)
    assert stages


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"title": "a"}', '{"title": "a", "runs": [{"name": "a"}]}'])
def test_a_damaged_plan_is_one_line(swept, tmp_path, damage, capsys) -> None:
    (tmp_path / "sweep.json").write_text(damage)
    for words in (["--table"], [*SMALL]):
        assert main(["sweep", *words, "--output", str(tmp_path)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "sweep.json is damaged, restore it or give another output" in line


def test_same_code() -> None:
    now = {"commit": "a", "packages": {"torch": "1"}, "cpu": "x"}
    assert same_code({**now, "cpu": "y"}, now)
    assert not same_code({**now, "commit": "b"}, now)
    assert not same_code({**now, "packages": {"torch": "2"}}, now)


def test_a_run_is_compared_with_the_all_token_run_that_shares_its_other_labels(tmp_path) -> None:
    grid = {"learning_rate": [1e-4, 1e-3], "prune_ratio": [0, 0.5, 0.9]}
    plan = make_plan("rates", plan_grid({"max_steps": 2}, None, grid, seeds=2))
    accuracies = {
        (1e-4, 0): 0.4,
        (1e-4, 0.5): 0.3,
        (1e-4, 0.9): 0.2,
        (1e-3, 0): 0.8,
        (1e-3, 0.5): 0.8,
        (1e-3, 0.9): 0.6,
    }
    for spec in plan.runs:
        rate, ratio = spec.labels["learning_rate"], spec.labels["prune_ratio"]
        stage = {"seconds": 10.0 * (1 - ratio) / rate, "samples": 1, "step_speedup": 1.0, "log_history": []}
        stage["tokens"] = {"full": 1.0, "trained": 1.0}
        ways = [{**way, "inference": way["name"]} for way in spec.evaluation.inferences]
        found = [{**way, "accuracy": accuracies[rate, ratio], "accuracy_by_kind": {}} for way in ways]
        result = {"spec": spec.as_json(), "stages": {"sft": stage}, "evaluations": found}
        write_json_atomically(tmp_path / "runs" / spec.name / "result.json", result)
    standing = Standing(plan, tmp_path)
    assert len(standing.rows) == 12
    for row in standing.rows:
        base = accuracies[row["learning_rate"], 0]
        assert row["share_of_all_tokens"] == accuracies[row["learning_rate"], row["prune_ratio"]] / base
        assert row["speedup"] == pytest.approx(1 / (1 - row["prune_ratio"]))
        assert row["is_baseline"] == (row["prune_ratio"] == 0)
    # Without the baseline of one rate, its runs are compared with nothing.
    runs = [spec for spec in plan.runs if (spec.labels["learning_rate"], spec.labels["prune_ratio"]) != (1e-3, 0)]
    for row in Standing(replace(plan, runs=tuple(runs)), tmp_path).rows:
        assert (row["share_of_all_tokens"] is None) == (row["speedup"] is None) == (row["learning_rate"] == 1e-3)
    # Without that of one seed, a row's shares are of fewer seeds than its accuracy, and say so.
    runs = [spec for spec in plan.runs if spec.labels != {"learning_rate": 1e-3, "prune_ratio": 0, "seed": 1}]
    columns, cells = Standing(replace(plan, runs=tuple(runs)), tmp_path).table()
    at = {name: place for place, name in enumerate(columns)}
    shown = {
        tuple(row[:2]): [row[at[name]] for name in ("seeds", "accuracy, all tokens", "share of all-token")]
        for row in cells
    }
    assert shown["0.001", "0.9"] == [2, "60.0 %", "75.0 %, n = 1"]
    assert shown["0.0001", "0.9"] == [2, "20.0 %", "50.0 %"]


@pytest.mark.parametrize(
    "grid",
    [
        {"reducer": ["divprune", "random"]},
        {"slow_probability": [0.1, 0.5], "positions": ["compact", "original"]},
        {"max_steps": [2, 4]},
        {"pretrain.learning_rate": [1e-3, 1e-4]},
    ],
)
def test_of_several_all_token_runs_the_one_that_has_most_in_common(grid) -> None:
    runs = plan_grid({"max_steps": 2}, {"max_steps": 1}, {**grid, "prune_ratio": [0, 0.9]}, seeds=2)
    names = {tuple(spec.labels.items()): spec.name for spec in runs}
    expected = {spec.name: names[tuple({**spec.labels, "prune_ratio": 0}.items())] for spec in runs}
    assert baselines_of(runs) == expected
    # How tokens are kept is no reason for no comparison.
    if "reducer" in grid:
        one = [spec for spec in runs if spec.labels["prune_ratio"] or spec.labels["reducer"] == "divprune"]
        assert {baselines_of(one)[spec.name] for spec in one} == {
            f"reducer=divprune-prune_ratio=0-seed={n}" for n in (0, 1)
        }


def children(pid: int) -> list[int]:
    """Processes that any thread of a process started and that still run."""
    lists = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(word) for words in lists for word in words]


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def test_an_interruption_says_what_is_kept_and_is_no_failure_of_the_other_runs(tmp_path, monkeypatch) -> None:
    specs = [digit_run(f"r{seed}", {}, QUICK, "dualspeed", seed) for seed in range(3)]

    def make(runner, spec, folder, task, gpu) -> str | None:
        # The first worker is busy when another one is interrupted.
        if spec is specs[0]:
            wait_for(lambda: runner.stopped, 20)
            return "its process was killed"
        if spec is specs[1]:
            for stage in spec.stage_ids:
                write_json_atomically(runner.stages / stage / "result.json", {})
            stages = {stage: {"seconds": 1.0} for stage in ("pretrain", "sft")}
            write_json_atomically(folder / "result.json", {"spec": {}, "stages": stages, "evaluations": []})
        else:
            raise KeyboardInterrupt
        return None

    monkeypatch.setattr("saccade.sweeps.runner._Runner._run", make)
    kept = f"1 of 3 runs and 2 of their 6 trained stages are kept in {tmp_path}; the same command makes the rest"
    with pytest.raises(KeyboardInterrupt, match=re.escape(kept)):
        run_specs(specs, tmp_path, jobs=2, any_commit=True)
    assert list(tmp_path.rglob("error.json")) == []


SEEN = """
import json, os, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
spec = json.loads((folder / "spec.json").read_text())
(folder / "began").touch()
began = time.monotonic()
while len([*folder.parent.glob("*/began")]) < 2 and time.monotonic() < began + 60:
    pass
stages = {name: {"seconds": 1.0} for name in ("pretrain", "sft")}
seen = os.environ.get("CUDA_VISIBLE_DEVICES")
(folder / "result.json").write_text(json.dumps({"spec": spec, "stages": stages, "evaluations": [], "seen": seen}))
"""


@pytest.mark.parametrize(
    ("named", "there", "expected"),
    [("2,5,7", 0, {"2", "5"}), (None, 4, {"0", "1"}), (None, 1, {None}), ("3", 1, {"3"}), ("", 0, {""})],
)
def test_runs_at_a_time_have_gpus_of_their_own(named, there, expected, tmp_path, monkeypatch) -> None:
    (tmp_path / "seen.py").write_text(SEEN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("torch.cuda.device_count", lambda: there)
    if named is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    specs = [digit_run(f"r{seed}", {}, QUICK, "dualspeed", seed) for seed in range(2)]
    outcome = run_specs(specs, tmp_path / "out", jobs=2, any_commit=True, worker="seen")
    assert not outcome.failures
    assert {result["seen"] for result in outcome.results.values()} == expected


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="children are looked up in /proc")
def test_a_killed_sweep_goes_on(tmp_path, capfd) -> None:
    # The second run is long enough to be killed in the middle of its second stage.
    words = [*SMALL, "--grid", "sft.max_steps=2,60", "--dataset_rows", "240", "--output", str(tmp_path)]
    process = subprocess.Popen([sys.executable, "-m", "saccade.cli.main", "sweep", *words], stdout=subprocess.PIPE)
    wait_for((tmp_path / "sweep.json").is_file)
    short, long = Plan.read(tmp_path).runs
    first, second = (tmp_path / "runs" / spec.name / "result.json" for spec in (short, long))
    stage = tmp_path / "stages" / long.stage_ids[1]
    wait_for((stage / "spec.json").is_file)
    (worker,) = children(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    # Nobody is left who would write into the folders of the next sweep.
    wait_for(lambda: not runs(worker), 20)
    assert first.is_file()
    assert not second.exists()
    assert not (stage / "result.json").exists()
    before = first.stat().st_mtime_ns
    assert main(["sweep", *words]) == 0
    printed = capfd.readouterr().out
    assert f"{short.name}: found, not trained again" in printed
    assert f"{long.name}: trained in" in printed
    assert first.stat().st_mtime_ns == before
    assert json.loads(second.read_text())["stages"]["sft"]["samples"] == 60 * 4


def test_two_sweeps_do_not_share_a_folder(tmp_path) -> None:
    with (
        file_lock(tmp_path / "stages" / ".lock", "taken"),
        pytest.raises(SaccadeError, match="another sweep is at work in"),
    ):
        run_specs([], tmp_path)
    assert run_specs([], tmp_path).results == {}


def test_runs_that_have_read_other_data_are_made_again(tmp_path: Path, capfd) -> None:
    def write(answer: str) -> None:
        turns = [{"role": "user", "content": "how many ?"}, {"role": "assistant", "content": answer}]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(4)))

    recipe = {"model": "tiny", "dataset": str(tmp_path / "rows.jsonl"), "max_steps": 1, "use_cpu": True, "bf16": False}
    recipe |= {"per_device_train_batch_size": 2, "disable_tqdm": True, "gradient_checkpointing": False}
    (tmp_path / "mine.yaml").write_text(json.dumps(recipe))
    command = ["sweep", str(tmp_path / "mine.yaml"), "--output", str(tmp_path / "out"), "--any-commit"]
    losses = []
    for answer, said in (
        ("3", "trained in"),
        ("3", "found, not trained again"),
        ("12", "1 runs have read a data file"),
    ):
        if not losses or said.startswith("1 runs"):
            write(answer)
        assert main(command) == 0
        assert said in " ".join(capfd.readouterr().out.split())
        (result,) = (json.loads(path.read_text()) for path in (tmp_path / "out").glob("runs/*/result.json"))
        losses.append(result["stages"]["sft"]["log_history"][-1]["train_loss"])
    assert losses[0] == losses[1] != losses[2]


def test_what_a_stage_reads(tmp_path: Path) -> None:
    """Rows and weights, however they are named; neither pictures nor what is written beside weights."""
    names = ("a.json", "mixed/b.parquet", "mixed/photo.png", "model/model.safetensors", "model/eval.json")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    parts = [str(tmp_path / "a.json"), {"path": str(tmp_path / "mixed"), "weight": 2}, "someone/rows"]
    values = {"model": str(tmp_path / "model"), "dataset": parts, "eval_dataset": "digits"}
    found = inputs_of(values)
    assert sorted(found) == sorted(str(tmp_path / name) for name in (names[0], names[1], names[3]))
    assert {size for size, _ in found.values()} == {len(Path(name).relative_to(tmp_path).as_posix()) for name in found}
