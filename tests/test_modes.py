"""Modes as a list: what a configuration makes of them, and how often each one comes."""

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade import ModeConfig, SaccadeError, SkipVisionConfig
from saccade.dualspeed.modes import ModeSchedule
from saccade.reducers import PruningConfig
from saccade.testing.training import make_config

SPEEDS = [
    {"name": "fast", "probability": 0.6, "isolator": True},
    {"name": "middle", "probability": 0.25, "prune_ratio": 0.5, "reducer": "random", "teacher": "fast"},
    {"name": "skipping", "probability": 0.05, "action": "skip", "teacher": "fast"},
    {"name": "slow", "probability": 0.1, "action": "keep", "teacher": "fast"},
]


def test_without_a_list_there_are_the_published_two(tmp_path):
    fast, slow = make_config(tmp_path, prune_ratio=0.8, slow_probability=0.25).all_modes()
    assert (fast.name, fast.action, fast.pruning.prune_ratio, fast.isolator, fast.teacher) == (
        "fast",
        "drop",
        0.8,
        True,
        None,
    )
    assert (slow.name, slow.action, slow.teacher, slow.probability) == ("slow", "keep", "fast", 0.25)
    assert make_config(tmp_path, distill_weight=0.0).all_modes()[1].teacher is None


def test_a_list_takes_what_it_leaves_out_from_the_configuration(tmp_path):
    config = make_config(tmp_path, modes=SPEEDS, reducer="cdpruner", keep_tokens=12, isolator_length=4)
    fast, middle, skipping, slow = config.all_modes()
    assert (fast.pruning.reducer, fast.pruning.keep_tokens, fast.isolator) == ("cdpruner", 12, True)
    # A ratio of its own is meant, though the run counts in tokens.
    assert middle.pruning == PruningConfig("random", prune_ratio=0.5)
    assert (skipping.skip_vision.split, skipping.skip_vision.retained) == ("cdpruner", 12)
    assert not skipping.isolator
    assert slow.keeps_all
    assert dict(config.mode_schedule().shares) == {"fast": 0.6, "middle": 0.25, "skipping": 0.05, "slow": 0.1}


RANDOM = PruningConfig("random", prune_ratio=0.5)
TYPED = [
    ModeConfig("fast", 0.6, isolator=True),
    ModeConfig("middle", 0.25, pruning=RANDOM, teacher="fast"),
    ModeConfig("skipping", 0.05, "skip", teacher="fast"),
    ModeConfig("slow", 0.1, "keep", teacher="fast"),
]


def test_typed_modes_and_mappings_are_the_same(tmp_path):
    written, typed = (make_config(tmp_path, modes=modes, keep_tokens=12) for modes in (SPEEDS, TYPED))
    assert typed.modes == written.modes == list(typed.all_modes())
    assert all(isinstance(mode, ModeConfig) for mode in written.modes)
    assert typed.resume_state() == written.resume_state()
    assert json.loads(typed.to_json_string())["modes"][1]["reducer"] == "random"


@pytest.mark.parametrize(
    "modes",
    [
        SPEEDS,
        TYPED,
        [{"name": "skip", "probability": 1.0, "action": "skip", "skip_vision": "64/156"}],
        [ModeConfig("skip", 1.0, "skip", skip_vision=SkipVisionConfig.preset("272/256"))],
        [{"name": "fast", "probability": 1.0, "fit_length": 30, "isolator": False}],
    ],
)
def test_what_is_saved_of_modes_reads_back_whatever_the_run_says(modes, tmp_path):
    config = make_config(tmp_path, modes=modes, keep_tokens=12)
    saved = json.loads(json.dumps(config.to_dict()["modes"]))
    other = make_config(tmp_path / "other", modes=saved, reducer="dpp", prune_ratio=0.3, positions="original")
    assert other.all_modes() == config.all_modes()


def test_a_mode_that_skips_may_have_its_own_options(tmp_path):
    own = SkipVisionConfig.preset("100/156", summary=False)
    modes = [ModeConfig("fast", 0.9), ModeConfig("skipping", 0.1, "skip", skip_vision=own)]
    assert make_config(tmp_path, modes=modes).all_modes()[1].skip_vision == own


def test_a_skip_in_the_fast_slow_recipe(tmp_path):
    """The tokens that the reducer does not keep skip, instead of what the mode does with them otherwise."""
    fast, slow = make_config(tmp_path, skip_vision={"summary": False}, prune_ratio=0.75).all_modes()
    assert (fast.action, fast.isolator, fast.skip_vision.retained, fast.skip_vision.merge) == (
        "skip",
        False,
        0.25,
        "none",
    )
    assert not fast.skip_vision.summary
    assert (slow.action, slow.teacher) == ("keep", "fast")
    fast, slow = make_config(tmp_path, skip_vision="100/156", skip_mode="slow").all_modes()
    assert (fast.action, fast.isolator) == ("drop", True)
    assert (slow.action, slow.skip_vision.split, slow.teacher) == ("skip", "divprune", "fast")


def test_skip_vision_on_its_own_is_one_mode(tmp_path):
    options = {"prune_ratio": 0.0, "slow_probability": 1.0, "distill_weight": 0.0}
    config = make_config(tmp_path, skip_vision={"preset": "64/156", "merge_order": "raster"}, **options)
    (mode,) = config.all_modes()
    assert (mode.action, mode.probability, mode.skip_vision.merge_order) == ("skip", 1.0, "raster")
    assert mode.skip_vision.retained == pytest.approx(64 / 576)
    assert not config.is_ordinary
    assert make_config(tmp_path, **options).is_ordinary


@pytest.mark.parametrize("kind", ["bernoulli", "stratified"])
def test_each_mode_has_its_share_of_steps(kind):
    shares = {"fast": 0.6, "middle": 0.25, "skipping": 0.05, "slow": 0.1}
    steps = 4000
    counts = ModeSchedule(5, shares, kind).count(steps)
    assert sum(counts.values()) == steps
    for name, share in shares.items():
        tolerance = 2 if kind == "stratified" else 4 * (steps * share * (1 - share)) ** 0.5
        assert abs(counts[name] - steps * share) <= tolerance


@settings(max_examples=50)
@given(
    seed=st.integers(0, 2**31), weights=st.lists(st.integers(0, 20), min_size=2, max_size=5), block=st.integers(0, 9)
)
def test_stratified_blocks_are_whole(seed, weights, block):
    """Rounding never asks for more steps than a block has, and no mode strays by a step of each other one."""
    total = sum(weights) or 1
    shares = {f"mode{number}": weight / total for number, weight in enumerate(weights)}
    if not sum(weights):
        shares["mode0"] = 1.0
    schedule = ModeSchedule(seed, shares, "stratified")
    counts = Counter(schedule.mode(step) for step in range(20 * block, 20 * block + 20))
    assert sum(counts.values()) == 20
    for name, share in shares.items():
        assert abs(counts[name] - 20 * share) <= len(shares)


def one(**changes):
    return [{"name": "fast", "probability": 1.0, **changes}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modes": "fast"}, "modes='fast' is a str, expected list"),
        ({"modes": []}, r"modes=\[\]: give a list"),
        ({"modes": ["fast"]}, "'fast' is not a mapping"),
        ({"modes": [{"name": "fast"}]}, "has no 'probability'"),
        ({"modes": one(reducers="random")}, "unknown field 'reducers': did you mean 'reducer'"),
        ({"modes": one(name="Fast!")}, "name='Fast!'"),
        ({"modes": one(probability=0.5)}, "add up to 0.5, not to 1"),
        ({"modes": one(probability="often")}, "probability='often'"),
        ({"modes": one(probability=1.5)}, r"probability=1.5 .* outside \[0, 1\]"),
        ({"modes": one(action="prune")}, "action='prune' .* keep, drop, skip"),
        ({"modes": one(teacher="slow")}, "teacher='slow' of mode 'fast' is not another mode"),
        ({"modes": one(isolator="yes")}, "isolator='yes'"),
        ({"modes": one(isolator=True, action="keep")}, "only a mode that drops"),
        ({"modes": one(reducer="best")}, "best"),
        ({"modes": one(prune_ratio=1.0)}, "prune_ratio=1.0"),
        ({"modes": one(action="keep", prune_ratio=0.5)}, "mode 'fast' keeps all tokens, so options of pruning"),
        ({"modes": one(skip_vision="100/156")}, "skip_vision of mode 'fast', whose action is 'drop'"),
        ({"modes": one(action="skip", skip_vision={"retain": 5})}, "skip_vision: unknown option 'retain'"),
        ({"modes": one(action="skip", skip_vision="64/156", keep_tokens=5)}, "both say which tokens stay"),
        ({"modes": one() * 2}, "two of them have name='fast'"),
        ({"modes": one(action="skip"), "adaptive": True}, "adaptive=True: a mode that skips"),
        ({"skip_vision": "99/1"}, "preset='99/1'"),
        ({"skip_vision": "fast_then_slow"}, "skip_vision: preset='fast_then_slow' is unknown"),
        ({"skip_vision": {"summary": "maybe"}}, "skip_vision: summary='maybe'"),
        ({"skip_vision": 3}, "skip_vision=3 is an int, expected dict or str"),
        ({"skip_vision": {"retain": 5}}, "skip_vision: unknown option 'retain'"),
        ({"skip_vision": "100/156", "skip_mode": "medium"}, "skip_mode='medium'"),
        ({"skip_mode": "slow"}, "skip_mode='slow' says which mode skips, and without skip_vision none does"),
    ],
)
def test_what_makes_no_list_of_modes_is_one_line(options, message, tmp_path):
    with pytest.raises(SaccadeError, match=message) as caught:
        make_config(tmp_path, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pruning": {"prune_ratio": 0.5}}, "pruning={'prune_ratio': 0.5} of mode 'fast' is not a PruningConfig"),
        ({"pruning": PruningConfig(isolator="out")}, "pruning.isolator='out' of mode 'fast'"),
        ({"skip_vision": "100/156", "action": "skip"}, "is not a SkipVisionConfig"),
        ({"isolator": 1}, "isolator=1 of mode 'fast': use true or false"),
    ],
)
def test_a_mode_checks_itself(options, message):
    with pytest.raises(SaccadeError, match=message):
        ModeConfig("fast", 1.0, **options)
