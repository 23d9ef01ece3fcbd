"""An interrupted stage: it resumes from its checkpoint if it has one, and its times cover all its parts."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import TrainerCallback

from saccade.errors import SaccadeError
from saccade.sweeps.worker import TIMES_FILE, TrainingClock, train_stage
from saccade.training import make_recipe, train_recipe

VALUES = {
    "model": "tiny",
    "dataset": "digits",
    "dataset_rows": 8,
    "max_steps": 3,
    "save_steps": 1,
    "per_device_train_batch_size": 2,
    "slow_probability": 0.0,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "report_to": "none",
}


class BrokenOff(TrainerCallback):
    """Ends the process's work in the middle of step `step`, as an error does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise SaccadeError("broken off")


class Watch(TrainerCallback):
    started: int | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = state.global_step


@pytest.mark.parametrize(("save_steps", "starts_at"), [(1, 2), (3, 0)])
def test_a_stage_goes_on_from_its_checkpoint_or_anew(tmp_path: Path, save_steps: int, starts_at: int) -> None:
    recipe = {**VALUES, "save_steps": save_steps, "resume": "auto", "output_dir": str(tmp_path)}
    with pytest.raises(SaccadeError, match="broken off"):
        train_stage("sft", VALUES, recipe, [BrokenOff(2)])
    before = json.loads((tmp_path / TIMES_FILE).read_text()) if starts_at else {}
    assert list(before) == [str(step) for step in range(1, starts_at + 1)]
    watch = Watch()
    result = train_stage("sft", VALUES, recipe, [watch])
    assert watch.started == starts_at
    assert result["samples"] == 3 * 2
    # Also what was counted since the last log before the checkpoint.
    assert result["tokens"] == train_stage("sft", VALUES, {**VALUES, "output_dir": str(tmp_path / "whole")})["tokens"]
    if starts_at:
        # More than what the first part took, in both clocks.
        assert result["cpu_seconds"] > before["2"][0] > 0
        assert result["seconds"] > before["2"][1] > 0


def test_the_last_batch_of_an_epoch_may_be_smaller(tmp_path: Path) -> None:
    values = {**{name: value for name, value in VALUES.items() if name != "max_steps"}, "num_train_epochs": 2}
    values |= {"dataset_rows": 5, "per_device_train_batch_size": 4}
    result = train_stage("sft", values, {**values, "output_dir": str(tmp_path)})
    assert result["samples"] == 2 * 5


@pytest.mark.parametrize("times", [None, "{", '{"1": [1.0, 1.0]}'])
def test_a_stage_whose_times_are_not_known_is_trained_anew(tmp_path: Path, times: str | None) -> None:
    recipe = {**VALUES, "save_steps": 1, "resume": "auto", "output_dir": str(tmp_path)}
    with pytest.raises(SaccadeError, match="broken off"):
        train_stage("sft", VALUES, recipe, [BrokenOff(2)])
    (tmp_path / TIMES_FILE).unlink()
    if times is not None:
        (tmp_path / TIMES_FILE).write_text(times)
    watch = Watch()
    train_stage("sft", VALUES, recipe, [watch])
    assert watch.started == 0


def test_a_process_that_is_killed_after_a_checkpoint_has_told_its_times(tmp_path: Path) -> None:
    class Killed(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            raise SaccadeError("killed")

    recipe = {**VALUES, "save_steps": 2, "resume": "auto", "output_dir": str(tmp_path)}
    with pytest.raises(SaccadeError, match="killed"):
        train_recipe(make_recipe(recipe), callbacks=[Killed(), TrainingClock(tmp_path)])
    before = json.loads((tmp_path / TIMES_FILE).read_text())["2"]
    watch = Watch()
    result = train_stage("sft", {**VALUES, "save_steps": 2}, recipe, [watch])
    assert watch.started == 2
    assert result["cpu_seconds"] > before[0] > 0


def test_the_clock_counts_every_part_and_nothing_that_was_lost(tmp_path: Path) -> None:
    now = [0.0, 0.0]

    def clock_of(step: int) -> tuple[TrainingClock, SimpleNamespace]:
        clock, state = TrainingClock(tmp_path, lambda: tuple(now)), SimpleNamespace(global_step=step)
        clock.on_train_begin(None, state, None)
        return clock, state

    def work(cpu: float, wall: float) -> None:
        now[0] += cpu
        now[1] += wall

    work(100, 100)  # what came before training
    clock, state = clock_of(0)
    work(3, 4)
    state.global_step = 5
    clock.on_save(None, state, None)
    work(50, 60)  # lost
    clock, state = clock_of(5)
    work(2, 7)
    clock.on_train_end(None, state, None)
    assert clock.spent == (5, 11)
