"""Where the time went, from what a trainer logs: against windows whose times are known."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.report.training_log import (
    EVALUATION,
    OTHER,
    TEACHER,
    curve,
    last,
    losses,
    modes_of,
    not_finite,
    time_parts,
)

SECONDS = st.floats(0.01, 5)
WINDOWS = st.lists(
    st.fixed_dictionaries(
        {
            "fast": st.lists(SECONDS, max_size=4),
            "slow": st.lists(st.tuples(SECONDS, SECONDS), max_size=3),  # the rest of the step, and its teacher
            "waited": st.floats(0, 3),
            "evaluated": st.floats(0, 2),
        }
    ).filter(lambda window: window["fast"] or window["slow"]),
    min_size=1,
    max_size=6,
)
FULL, SHORT, SAMPLES = 150.0, 40.0, 4  # tokens of a sample before and after pruning, samples a step


def log_of(windows: list[dict], with_teacher: bool) -> list[dict]:
    """What the trainer would log of such windows."""
    log, tokens, steps = [], 0.0, {"fast": 0, "slow": 0}
    for number, window in enumerate(windows, start=1):
        fast, slow = window["fast"], window["slow"]
        trained = SAMPLES * (SHORT * len(fast) + FULL * len(slow))
        tokens += trained
        wall = sum(fast) + sum(map(sum, slow)) + window["waited"] + window["evaluated"]
        steps["fast"] += len(fast)
        steps["slow"] += len(slow)
        samples = SAMPLES * (len(fast) + len(slow))
        entry = {"step": sum(steps.values()), "loss": 1.0, "num_tokens": tokens, "length_full": FULL}
        entry |= {"length_in": trained / samples, "tokens_per_second": samples * FULL / wall}
        entry |= {f"steps_{mode}": float(count) for mode, count in steps.items()}
        if fast:
            entry |= {"loss_fast": 1.0, "step_seconds_fast": sum(fast) / len(fast)}
        if slow:
            entry |= {"loss_slow": 1.0, "step_seconds_slow": sum(map(sum, slow)) / len(slow), "kl": 0.1}
            if with_teacher:
                entry["teacher_seconds_slow"] = sum(teacher for _, teacher in slow) / len(slow)
        if window["evaluated"]:
            log.append({"step": number, "eval_loss": 1.0, "eval_runtime": window["evaluated"]})
        log.append(entry)
    return [*log, {"step": sum(steps.values()), "train_runtime": 99.0}]


@settings(max_examples=60)
@given(WINDOWS, st.booleans())
def test_the_parts_are_those_of_the_windows(windows, with_teacher) -> None:
    rest = sum(step for window in windows for step, _ in window["slow"])
    teacher = sum(seconds for window in windows for _, seconds in window["slow"])
    expected = {
        "fast steps": sum(sum(window["fast"]) for window in windows),
        "slow steps": rest if with_teacher else rest + teacher,
        TEACHER: teacher if with_teacher else 0,
        EVALUATION: sum(window["evaluated"] for window in windows),
        OTHER: sum(window["waited"] for window in windows),
    }
    log = log_of(windows, with_teacher)
    found = time_parts(log)
    assert {name: found.get(name, 0) for name in expected} == pytest.approx(expected, abs=1e-6)


def test_modes_of_any_name() -> None:
    log = [{"step": 1, "loss_half_way": 1.0}, {"step": 2, "loss_slow": 2.0, "loss": 2.0, "eval_loss": 1.0}]
    assert modes_of(log) == ["half_way", "slow"]
    log = [{**entry, "num_tokens": 8, "length_in": 4, "length_full": 8, "tokens_per_second": 2} for entry in log[:1]]
    log[0] |= {"steps_half_way": 2, "step_seconds_half_way": 3.0}
    assert time_parts(log) == pytest.approx({"half way steps": 6.0, OTHER: 2.0})


def test_losses_by_mode_or_of_all_steps() -> None:
    log = [{"step": 1, "loss": 3.0, "loss_slow": 3.0}, {"step": 2, "loss": None, "loss_fast": 2.0}, {"loss": 1.0}]
    assert losses(log) == {"fast steps": [(2, 2.0)], "slow steps": [(1, 3.0)]}
    assert losses([{"step": 1, "loss": 3.0}]) == {"all steps": [(1, 3.0)]}


def test_a_log_of_another_trainer_has_no_times() -> None:
    assert time_parts([{"step": 1, "loss": 2.0}, {"train_runtime": 3.0}]) is None
    assert time_parts([]) is None


def test_numbers_that_are_none_are_left_out_and_named() -> None:
    log = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": math.nan}, {"step": 3, "loss": None}, {"loss": 1.0}]
    assert curve(log, "loss") == [(1, 2.0)]
    assert not_finite(log) == [2, 3]
    assert last(log, "loss") == 1.0
    assert last(log, "kl") is None
