"""The mode of a step is a pure function of (seed, step)."""

import sys

import pytest
from forked import run_forked
from helpers import fast_slow_schedule
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.errors import SaccadeError


@pytest.mark.parametrize("kind", ["bernoulli", "stratified"])
@pytest.mark.parametrize("rate", [0.0, 0.05, 0.1, 0.37, 0.5, 0.9, 1.0])
def test_share_of_slow_steps(kind: str, rate: float) -> None:
    steps = 4000
    slow = fast_slow_schedule(3, rate, kind).count(steps)["slow"]
    tolerance = 1 if kind == "stratified" else 4 * (steps * rate * (1 - rate)) ** 0.5
    assert abs(slow - steps * rate) <= tolerance


@settings(max_examples=50)
@given(seed=st.integers(0, 2**31), rate=st.floats(0, 1), block=st.integers(0, 50))
def test_stratified_blocks_hold_their_share(seed: int, rate: float, block: int) -> None:
    schedule = fast_slow_schedule(seed, rate, "stratified")
    slow = sum(schedule.mode(step) == "slow" for step in range(20 * block, 20 * block + 20))
    assert abs(slow - 20 * rate) < 1 + 1e-9


def test_does_not_depend_on_order_process_or_global_random_state() -> None:
    schedule = fast_slow_schedule(11, 0.3)
    here = [schedule.mode(step) for step in range(60)]
    assert [schedule.mode(step) for step in reversed(range(60))] == here[::-1]
    code = (
        "import random; random.seed(99); from saccade.dualspeed.modes import ModeSchedule; "
        "s = ModeSchedule(11, {'fast': 0.7, 'slow': 0.3}); print(''.join(s.mode(i)[0] for i in range(60)))"
    )
    there = run_forked([sys.executable, "-c", code])
    assert there.stdout.strip() == "".join(mode[0] for mode in here)


def test_seeds_differ() -> None:
    sequences = {tuple(fast_slow_schedule(seed, 0.5).mode(step) for step in range(40)) for seed in range(20)}
    assert len(sequences) == 20


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_bad_probability(rate: float) -> None:
    with pytest.raises(SaccadeError, match="probability="):
        fast_slow_schedule(0, rate)


def test_bad_kind() -> None:
    with pytest.raises(SaccadeError, match="bernoulli, stratified"):
        fast_slow_schedule(0, 0.1, "annealed")
