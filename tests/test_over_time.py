"""Accuracy over training time: which steps are saved and when, what a stage is, and the page of the study."""

import io
import json
import os
import signal
from contextlib import redirect_stdout
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_studies import made_up

from experiments.studies.checkpoints import CheckpointSaver, checkpoint_steps, evaluate_checkpoints
from experiments.studies.over_time import seconds_to
from experiments.studies.results_page import write_docs
from experiments.studies.studies import plan_study
from experiments.studies.worker import run_study
from saccade import SaccadeError
from saccade.dualspeed.folder import PARTIAL_DIR
from saccade.sweeps import QUICK, DigitSettings, Evaluation, RunSpec, digit_run

METHODS = ("all_tokens", "dualspeed", "prune_only")


class TestSteps:
    @given(st.integers(1, 400), st.data())
    def test_they_are_evenly_spread(self, total: int, data) -> None:
        count = data.draw(st.integers(1, total))
        steps = checkpoint_steps(total, count)
        gaps = [after - before for before, after in pairwise([0, *steps])]
        assert len(steps) == count
        assert steps[-1] == total
        assert min(gaps) >= 1
        assert max(gaps) - min(gaps) <= 1

    def test_tenths(self) -> None:
        assert checkpoint_steps(320, 10) == list(range(32, 321, 32))
        assert checkpoint_steps(25, 10) == [3, 5, 8, 10, 13, 15, 18, 20, 23, 25]


def test_times_are_those_of_steps_without_saving() -> None:
    now = [100.0, 1000.0]  # CPU seconds, seconds
    step, save = (3.0, 5.0), (7.0, 11.0)

    def spend(seconds) -> None:
        now[:] = [before + more for before, more in zip(now, seconds, strict=True)]

    saver = CheckpointSaver(3, clock=lambda: (now[0], now[1]))
    state, saved = SimpleNamespace(max_steps=8, global_step=0), []
    saver.on_train_begin(None, state, None)
    for number in range(1, 9):
        spend(step)
        state.global_step = number
        # The fifth step is saved for another reason, such as a signal.
        control = SimpleNamespace(should_save=number == 5)
        saver.on_step_end(None, state, control)
        if control.should_save:
            saved.append(number)
            spend(save)
            saver.on_save(None, state, control)
    assert saved == [3, 5, 6, 8]
    assert saver.saved == [{"step": n, "cpu_seconds": 3.0 * n, "seconds": 5.0 * n} for n in (3, 6, 8)]
    assert list(saver.saving) == [4 * 7.0, 4 * 11.0]


def test_an_interrupted_evaluation_goes_on(tmp_path: Path) -> None:
    saved = [{"step": step} for step in (2, 4, 6)]
    for entry in saved:
        (tmp_path / f"checkpoint-{entry['step']}").mkdir()
    seen, kept = [], []

    def evaluate(folder: Path, number: int) -> dict:
        assert folder.is_dir()
        seen.append((folder.name, number))
        if len(seen) == 2:
            raise KeyboardInterrupt
        return {"accuracy": number / 10}

    def keep() -> None:
        kept[:] = [dict(entry) for entry in saved]

    with pytest.raises(KeyboardInterrupt):
        evaluate_checkpoints(saved, tmp_path, evaluate, keep)
    assert kept == [{"step": 2, "accuracy": 0.0}, {"step": 4}, {"step": 6}]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-6"]
    saved = kept.copy()
    evaluate_checkpoints(saved, tmp_path, evaluate, keep)
    assert seen == [("checkpoint-2", 0), ("checkpoint-4", 1), ("checkpoint-4", 1), ("checkpoint-6", 2)]
    assert [entry["accuracy"] for entry in kept] == [0.0, 0.1, 0.2]
    assert not list(tmp_path.iterdir())


class TestIdentity:
    def test_a_run_with_checkpoints_survives_json(self) -> None:
        for spec in plan_study("over_time", QUICK, 2).runs:
            again = RunSpec.from_json(json.loads(json.dumps(spec.as_json())))
            assert again == spec
            assert again.stage_ids == spec.stage_ids
            assert again.extra == {"checkpoints": 10, "scenes": 300, "split": "test"}

    def test_a_stage_serves_one_evaluation_of_its_checkpoints(self) -> None:
        def ids(**settings) -> tuple[str, ...]:
            return plan_study("over_time", replace(QUICK, **settings), 1).runs[1].stage_ids

        plain, ten = digit_run("a", {}, QUICK, "dualspeed", 0).stage_ids, ids()
        assert ten[0] == plain[0]
        assert ids(test_scenes=500) == ten, "the scenes of the final evaluation change nothing"
        assert len({plain[1], ten[1], ids(split="validation")[1], ids(test_scenes=8)[1]}) == 4


class TestStudy:
    def test_the_order_of_the_runs(self) -> None:
        runs = plan_study("over_time", QUICK, 3).runs
        assert [(run.labels["seed"], run.labels["method"]) for run in runs] == [
            (seed, method) for seed in range(3) for method in METHODS
        ]


TINY = DigitSettings(pretrain_steps=1, sft_steps=5, batch_size=2, test_scenes=6)
EXTRA = {"checkpoints": 3, "scenes": 6, "split": "test"}
SPEC = digit_run("a", {"method": "dualspeed"}, TINY, "dualspeed", 0, inferences=({"name": "full"},), extra=EXTRA)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A complete run after a kill in its second stage left checkpoints: the stages, the result, and its output."""
    stages = tmp_path_factory.mktemp("stages")
    killed = stages / SPEC.stage_ids[1]
    for name in ("checkpoint-2", f"{PARTIAL_DIR}/checkpoint-4"):
        (killed / name).mkdir(parents=True)
        (killed / name / "model.safetensors").write_text("half-written")
    said = io.StringIO()
    with redirect_stdout(said):
        result = run_study(SPEC, stages)
    return stages, result, said.getvalue()


class TestRun:
    def test_checkpoints_are_evaluated_and_removed(self, made) -> None:
        stages, result, _ = made
        checkpoints = result["checkpoints"]
        assert [entry["step"] for entry in checkpoints] == [2, 4, 5]
        for name in ("cpu_seconds", "seconds"):
            times = [entry[name] for entry in checkpoints]
            assert 0 < times[0] < times[1] < times[2]
        assert all(entry["samples"] == 6 for entry in checkpoints)
        # The last checkpoint is the trained model, here on the same scenes.
        (full,) = result["evaluations"]
        assert checkpoints[-1]["accuracy_by_kind"] == full["accuracy_by_kind"]
        assert result["spec"]["extra"] == EXTRA
        assert all("checkpoints" not in stage for stage in result["stages"].values())
        stage = stages / SPEC.stage_ids[1]
        assert (stage / "model.safetensors").is_file()
        assert not [path for path in stage.rglob("*") if "checkpoint" in path.name]

    def test_every_part_is_told_of(self, made) -> None:
        *_, said = made
        lines = [line.split()[1:] for line in said.splitlines() if line.startswith("progress ")]
        assert {stage for stage, *_ in lines} == {"pretrain", "sft", "evaluate", "checkpoints"}
        assert [line[1:] for line in lines if line[0] == "checkpoints"] == [["1", "3"], ["2", "3"], ["3", "3"]]

    def test_what_was_evaluated_is_not_evaluated_again(self, made) -> None:
        stages, result, _ = made
        assert run_study(SPEC, stages)["checkpoints"] == result["checkpoints"]

    def test_saving_changes_nothing_in_training(self, made) -> None:
        stages, *_ = made
        plain = replace(SPEC, evaluation=Evaluation(({"name": "full"},), scenes=1), extra={})
        assert "checkpoints" not in run_study(plain, stages)
        first, other = (stages / one.stage_ids[1] / "model.safetensors" for one in (SPEC, plain))
        assert first != other
        assert first.read_bytes() == other.read_bytes()


def test_a_stage_that_was_asked_to_stop_is_not_done(tmp_path: Path, monkeypatch) -> None:
    spec = RunSpec("a", {"seed": 0}, ({**SPEC.stages[1], "model": "tiny"},), Evaluation(()), extra=EXTRA)
    with monkeypatch.context() as patch:
        patch.setattr("saccade.sweeps.worker.tell", lambda *words: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SaccadeError, match="stage sft was asked to stop after step 1 of 5"):
            run_study(spec, tmp_path)
    assert not list(tmp_path.rglob("result.json"))


class TestSecondsTo:
    def test_by_hand(self) -> None:
        points = [(10, 0.2), (20, 0.6), (30, 0.4), (40, 0.8)]
        goals = (0.1, 0.2, 0.4, 0.6, 0.7, 0.8, 0.9)
        assert [seconds_to(points, goal) for goal in goals] == [
            10,
            10,
            pytest.approx(15),
            20,
            pytest.approx(37.5),
            40,
            None,
        ]

    @given(st.lists(st.integers(0, 20), min_size=1, max_size=8), st.integers(0, 20))
    def test_against_small_steps_along_the_lines(self, heights: list[int], goal: int) -> None:
        points = [(10.0 * number, float(height)) for number, height in enumerate(heights, start=1)]
        fine = 2000
        path = [points[0]]
        for (x, y), (x2, y2) in pairwise(points):
            path += [(x + (x2 - x) * part / fine, y + (y2 - y) * part / fine) for part in range(1, fine + 1)]
        wanted = next((x for x, y in path if y >= goal - 1e-9), None)
        found = seconds_to(points, goal)
        assert (found is None) == (wanted is None)
        assert found == pytest.approx(wanted, abs=10 / fine + 1e-6)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """All three seeds of all-token training, two of DualSpeed, one of them too low, and one of pruning only."""
    plan = plan_study("over_time", QUICK, 3)
    plan.write(tmp_path / "over_time")
    # (seconds a tenth, accuracy at the last checkpoint), from which accuracies rise in equal steps.
    figures = {
        "all_tokens-seed0": (10, 0.8),
        "all_tokens-seed1": (10, 0.8),
        "all_tokens-seed2": (10, 0.5),
        "dualspeed-seed0": (4, 0.8),
        "dualspeed-seed1": (4, 0.7),
        "prune_only-seed0": (2, 0.3),
    }
    for spec in plan.runs:
        if spec.name in figures:
            seconds, end = figures[spec.name]
            result = made_up(spec, end)
            result["checkpoints"] = [
                {"step": 32 * n, "cpu_seconds": seconds * n, "seconds": 2 * seconds * n, "accuracy": end * n / 10}
                for n in range(1, 11)
            ]
            folder = tmp_path / "over_time" / "runs" / spec.name
            folder.mkdir(parents=True)
            (folder / "result.json").write_text(json.dumps(result))
    return tmp_path


def rows_of(text: str, heading: str) -> dict[str, list[str]]:
    """The rows of the table with that heading row, by their first cell."""
    lines = text.partition(heading + "\n")[2].splitlines()[1:]
    table = lines[: lines.index("")]
    return {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line.strip("|").split("|")] for line in table)}


class TestPage:
    def test_accuracies_and_times_at_each_checkpoint(self, study: Path) -> None:
        text = write_docs(study, study / "docs").read_text()
        assert "It does not include stage one" in text
        assert "on 300 scenes, which gives one run a standard error of up to 2.9 points" in text
        rows = rows_of(text, "| step | all tokens | CPU time | DualSpeed | CPU time | pruning only | CPU time |")
        assert list(rows) == [str(32 * n) for n in range(1, 11)]
        assert rows["320"] == [
            "70.0 % (50.0-80.0)", "100.0 s", "75.0 % (70.0-80.0), n = 2", "40.0 s", "30.0 %, n = 1", "20.0 s",
        ]  # fmt: skip
        assert "6 of 9 runs done" in text

    def test_times_to_shares_of_the_final_accuracy(self, study: Path) -> None:
        text = write_docs(study, study / "docs").read_text()
        rows = rows_of(text, "| method | 50 % | 75 % | 90 % | 100 % |")
        # On the straight line of a curve, half its own end is at half its time.
        assert rows["all tokens"] == ["50.0 s", "75.0 s", "90.0 s", "100.0 s"]
        half = [40 * 0.4 / 0.8, 40 * 0.4 / 0.7]
        mean = sum(half) / 2
        cell = f"{mean:.1f} s ({half[0]:.1f}-{half[1]:.1f}), {50 / mean:.2f}x, n = 2"
        assert rows["DualSpeed"][0] == cell
        assert rows["DualSpeed"][3] == "40.0 s, 2.50x, reached by 1 of 2"
        assert rows["pruning only"] == ["not reached, n = 1"] * 4

    def test_the_picture(self, study: Path) -> None:
        page = write_docs(study, study / "docs")
        assert "![Accuracy over training time](images/study_over_time.png)" in page.read_text()
        with Image.open(study / "docs" / "images" / "study_over_time.png") as image:
            assert image.width >= 800
            # The colours of the three methods and of the line at the end of all-token training.
            found = {color for _, color in image.convert("RGB").getcolors(1 << 24)}
        assert {(0, 0, 0), (0, 0x72, 0xB2), (0xD5, 0x5E, 0), (0x8A, 0x8A, 0x8A)} <= found

    def test_without_all_token_training_there_is_nothing_to_compare_with(self, study: Path) -> None:
        for seed in range(3):
            (study / "over_time" / "runs" / f"all_tokens-seed{seed}" / "result.json").unlink()
        text = write_docs(study, study / "docs").read_text()
        assert "| step | DualSpeed | CPU time | pruning only | CPU time |" in text
        assert "| method | 50 % |" not in text
