"""Ratios that change between steps, and modes that follow one another."""

import json
from collections import Counter

import pytest
import torch
from helpers import fast_slow_schedule, make_config, make_trainer
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade import ModeConfig, PruningConfig, SaccadeError
from saccade.cli.main import main
from saccade.dualspeed.modes import ModeSchedule
from saccade.reducers import PRUNING_FILE
from saccade.tiny import build_tiny_llava
from saccade.training.console import _what

LINEAR = {"ratio_schedule": "linear", "prune_ratio_start": 0.5, "prune_ratio": 0.9}


def ratios(config, name: str, steps: int) -> list[float]:
    (mode,) = (mode for mode in config.all_modes() if mode.name == name)
    return [mode.pruning_at(config.seed, step, steps).prune_ratio for step in range(steps)]


class TestRatio:
    def test_linear_leads_from_the_start_to_the_ratio(self, tmp_path) -> None:
        assert ratios(make_config(tmp_path, **LINEAR), "fast", 5) == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9])
        falling = make_config(tmp_path, **{**LINEAR, "prune_ratio_start": 0.98})
        assert ratios(falling, "fast", 3) == pytest.approx([0.98, 0.94, 0.9])
        assert ratios(falling, "fast", 1) == [0.98]

    def test_random_is_drawn_between_the_two(self, tmp_path) -> None:
        config = make_config(tmp_path, **{**LINEAR, "ratio_schedule": "random"})
        found = ratios(config, "fast", 2000)
        assert 0.5 <= min(found) < 0.51
        assert 0.89 < max(found) <= 0.9
        assert sum(found) / 2000 == pytest.approx(0.7, abs=0.01)
        # A pure function of seed and step.
        assert ratios(config, "fast", 2000)[1234] == found[1234]
        config.seed += 1
        assert ratios(config, "fast", 2000)[1234] != found[1234]

    def test_a_mode_has_its_own(self, tmp_path) -> None:
        modes = [
            {"name": "fast", "probability": 0.7, "teacher": "milder"},
            {"name": "milder", "probability": 0.2, "prune_ratio": 0.5, "prune_ratio_start": 0.3},
            {"name": "fixed", "probability": 0.05, "ratio_schedule": "constant", "prune_ratio": 0.4},
            {"name": "drawn", "probability": 0.05, "ratio_schedule": "random"},
        ]
        config = make_config(tmp_path, modes=modes, **LINEAR)
        assert ratios(config, "fast", 3) == pytest.approx([0.5, 0.7, 0.9])
        assert ratios(config, "milder", 3) == pytest.approx([0.3, 0.4, 0.5])
        assert ratios(config, "fixed", 3) == [0.4] * 3
        means = [mode.mean_pruning.prune_ratio for mode in config.all_modes()]
        assert means == pytest.approx([0.7, 0.4, 0.4, 0.7])
        assert [mode.mildest_pruning.prune_ratio for mode in config.all_modes()] == pytest.approx([0.5, 0.3, 0.4, 0.5])
        assert make_config(tmp_path, modes=config.to_dict()["modes"], **LINEAR).all_modes() == config.all_modes()

    def test_the_console_says_how_it_changes(self, tmp_path) -> None:
        (linear, _), (drawn, _) = (
            make_config(tmp_path, **{**LINEAR, "ratio_schedule": kind}).all_modes() for kind in ("linear", "random")
        )
        assert _what(linear, 100).startswith("from 50 to 10 % of the visual tokens (10 of 100) by divprune")
        assert _what(drawn, 0).startswith("between 50 and 10 % of the visual tokens by divprune")

    def test_the_dry_run_counts_the_mean_and_holds_the_mildest(self, capsys, tmp_path) -> None:
        plans = {}
        for name, options in {
            "changing": LINEAR,
            "mean": {"prune_ratio": 0.7},
            "mildest": {"prune_ratio": 0.5},
        }.items():
            file = tmp_path / f"{name}.json"
            fields = [f"--{key}={value}" for key, value in {**options, "slow_probability": 0.0}.items()]
            assert main(["train", "tiny-digits/sft", "--dry-run", "--output", str(file), *fields]) == 0
            plans[name] = json.loads(file.read_text())
        changing, mean, mildest = plans.values()
        assert changing["expected"]["flops"] == mean["expected"]["flops"]
        assert changing["memory"] == mildest["memory"]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"ratio_schedule": "growing"}, "ratio_schedule='growing' is unknown: use one of constant, linear"),
            ({"ratio_schedule": "linear"}, "ratio_schedule='linear' of mode 'fast' has no other end"),
            ({"prune_ratio_start": 0.5}, "prune_ratio_start=0.5 of mode 'fast', whose ratio is constant"),
            ({**LINEAR, "prune_ratio_start": 1.0}, r"prune_ratio_start=1.0 of mode 'fast' is outside \[0, 1\)"),
            ({**LINEAR, "prune_ratio": None, "keep_tokens": 8}, "set prune_ratio above 0, and leave out keep_tokens"),
            ({**LINEAR, "prune_ratio": 0.0}, "set prune_ratio above 0"),
            (
                {**LINEAR, "skip_vision": "100/156"},
                "this run has none that takes it",
            ),
        ],
    )
    def test_bad_input_is_one_line(self, tmp_path, options, message: str) -> None:
        with pytest.raises(SaccadeError, match=message):
            make_config(tmp_path, **options)
        with pytest.raises(SaccadeError, match="only a mode that drops tokens has a ratio that changes"):
            ModeConfig("slow", 0.1, "keep", ratio_schedule="linear", prune_ratio_start=0.5)


class TestSequence:
    @settings(max_examples=50)
    @given(weights=st.lists(st.integers(0, 20), min_size=2, max_size=4), steps=st.integers(1, 200))
    def test_modes_follow_one_another(self, weights: list[int], steps: int) -> None:
        weights[0] += 1
        shares = {f"mode{number}": weight / sum(weights) for number, weight in enumerate(weights)}
        schedule = ModeSchedule(0, shares, "sequential")
        order = [schedule.mode(step, steps) for step in range(steps)]
        assert order == sorted(order)
        for name, count in Counter(order).items():
            assert abs(count - shares[name] * steps) < 1 + 1e-6
        assert schedule.count(steps) == {name: order.count(name) for name in shares}

    def test_steps_outside_of_the_run(self) -> None:
        schedule = fast_slow_schedule(0, 0.1, "sequential")
        assert schedule.mode(0, 0) == "slow"
        assert schedule.mode(100, 100) == "slow"
        assert fast_slow_schedule(0, 0.0, "sequential").mode(100, 100) == "fast"
        # A resumed run has done fast steps alone.
        assert schedule.count(50, 100) == {"fast": 50, "slow": 0}

    def test_slow_steps_are_the_last(self) -> None:
        schedule = fast_slow_schedule(0, 0.1, "sequential")
        assert [step for step in range(200) if schedule.mode(step, 200) == "slow"] == list(range(180, 200))


@pytest.mark.parametrize(
    ("options", "held"),
    [({}, False), (LINEAR, True), ({**LINEAR, "ratio_schedule": "random"}, False), ({"schedule": "sequential"}, True)],
)
def test_a_resumed_run_keeps_the_length_that_its_steps_depend_on(tmp_path, options, held: bool) -> None:
    state = make_config(tmp_path, lr_scheduler_type="constant", max_steps=7, **options).resume_state()
    assert (state["max_steps"] == 7) == held


def test_training_prunes_by_the_ratio_of_its_step(processor, tmp_path) -> None:
    """And the model is saved with the ratio that inference uses."""
    options = {**LINEAR, "schedule": "sequential", "slow_probability": 0.5, "max_steps": 4, "logging_steps": 1}
    trainer = make_trainer(build_tiny_llava(processor, seed=0), processor, tmp_path / "run", **options)
    seen = []
    run = trainer._step

    def watched(mode, *args, **kwargs):
        plan = trainer._step_of_mode.modes[mode]
        teacher = plan.teacher and plan.teacher.method.config.prune_ratio
        seen.append((mode, plan.method and plan.method.config.prune_ratio, teacher))
        return run(mode, *args, **kwargs)

    trainer._step_of_mode, trainer._step = run, watched
    trainer.train()
    modes, own, teachers = zip(*seen, strict=True)
    assert modes == ("fast", "fast", "slow", "slow")
    assert own == (0.5, pytest.approx(0.5 + 0.4 / 3), None, None)
    assert teachers == (None, None, pytest.approx(0.5 + 0.8 / 3), pytest.approx(0.9))
    lengths = [entry["length_in"] for entry in trainer.state.log_history if "length_in" in entry]
    assert lengths[0] > lengths[1]
    with torch.no_grad():
        trainer.model.eval()
        trainer._run_step(trainer.model, "fast", trainer.data_collator([trainer.train_dataset[0]]), 1.0)
    assert trainer._changing[0][1].config.prune_ratio == 0.9
    trainer.save_model(str(tmp_path / "run"))
    assert (tmp_path / "run" / PRUNING_FILE).is_file()
    assert PruningConfig.from_pretrained(tmp_path / "run").prune_ratio == 0.9
