"""Every invariant of DESIGN on every model family, with a few reducers; with all of them in the slow tests."""

import pytest
from family_models import FAMILIES, WITH_VIDEO, VideoCase
from helpers import ORDINARY

from saccade.reducers import list_reducers
from saccade.testing import families as tester

CASES = {name: tester.Case(name, tiny) for name, tiny in FAMILIES.items()}
VIDEO_CASES = {name: VideoCase(name, FAMILIES[name]) for name in WITH_VIDEO}
SAMPLED = ("divprune", "avgpool")
PAIRS = [
    pytest.param(name, reducer, marks=[] if reducer in SAMPLED else pytest.mark.slow)
    for name in FAMILIES
    for reducer in list_reducers()
    if reducer != "none"
]


ON_THE_OLDEST = ("ratio zero", "original positions", "cached generation", "several sequences")
"""What rests on the interfaces of the models, with one reducer."""


def with_check(pair, check):
    old = "avgpool" in pair.values and check in ON_THE_OLDEST
    return pytest.param(*pair.values, check, marks=[*pair.marks, *([pytest.mark.interfaces] if old else [])])


@pytest.mark.parametrize(
    ("name", "reducer", "check"), [with_check(pair, check) for pair in PAIRS for check in tester.CHECKS]
)
def test_invariant(name, reducer, check):
    tester.CHECKS[check](CASES[name], reducer)


@pytest.mark.parametrize("name", FAMILIES)
def test_generation_at_ratio_zero(name):
    tester.check_generation_at_ratio_zero(CASES[name])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_without_images_reaches_every_parameter(name):
    tester.check_step_without_images(CASES[name])


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    ("name", "reducer"),
    [pytest.param(*pair.values, marks=[] if pair.values[1] == "divprune" else pytest.mark.slow) for pair in PAIRS],
)
def test_training(name, reducer, lora, tmp_path):
    tester.check_training(CASES[name], reducer, tmp_path, lora)


@pytest.mark.parametrize("options", [{}, ORDINARY], ids=["both modes", "stock steps"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_loss_does_not_depend_on_how_a_batch_is_cut(name, options, tmp_path):
    tester.check_cut_batches(CASES[name], tmp_path, **options)


@pytest.mark.parametrize("name", FAMILIES)
def test_predictions_are_in_the_order_of_the_rows(name, tmp_path):
    tester.check_predictions(CASES[name], tmp_path)


@pytest.mark.parametrize("check", tester.CHECKS)
@pytest.mark.parametrize(("name", "reducer"), [pair for pair in PAIRS if pair.values[0] in WITH_VIDEO])
def test_invariant_with_videos(name, reducer, check):
    tester.CHECKS[check](VIDEO_CASES[name], reducer)


@pytest.mark.parametrize("name", WITH_VIDEO)
def test_generation_at_ratio_zero_with_videos(name):
    tester.check_generation_at_ratio_zero(VIDEO_CASES[name])
