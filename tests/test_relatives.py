"""The invariants on families that share the code of another, with one reducer; with all of them in the slow tests."""

import pytest
import torch
from family_models import RELATIVES, build_qwen
from skip_tester import masked_ffn, options_for, skipping, without_roles

from saccade.errors import SaccadeError
from saccade.reducers import list_reducers
from saccade.skip_vision import apply_skip_vision
from saccade.testing import families as tester
from saccade.testing.tiny_models import Tiny
from saccade.tokens import Role

CASES = {name: tester.Case(name, tiny) for name, tiny in RELATIVES.items()}
PAIRS = [
    pytest.param(name, reducer, marks=[] if reducer == "divprune" else pytest.mark.slow)
    for name in RELATIVES
    for reducer in list_reducers()
    if reducer != "none"
]
RECURRENT = ("qwen3_5", "qwen3_5_moe")


@pytest.mark.parametrize("check", tester.CHECKS)
@pytest.mark.parametrize(("name", "reducer"), PAIRS)
def test_invariant(name, reducer, check):
    tester.CHECKS[check](CASES[name], reducer)


@pytest.mark.parametrize("name", RELATIVES)
def test_generation_at_ratio_zero(name):
    tester.check_generation_at_ratio_zero(CASES[name])


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(("name", "reducer"), PAIRS)
def test_training(name, reducer, lora, tmp_path):
    tester.check_training(CASES[name], reducer, tmp_path, lora)


@pytest.mark.parametrize("name", RELATIVES)
def test_merging_and_saliency(name):
    """A reducer that merges, and one that reads the tower's attention."""
    tester.check_original_equals_masked(CASES[name], "avgpool")
    tester.check_original_equals_masked(CASES[name], "visionzip")


@pytest.mark.parametrize("name", RECURRENT)
def test_what_recurrent_layers_cannot_do_is_refused(name):
    assert CASES[name].family.recurrent
    with pytest.raises(SaccadeError, match=f"padding_free=True: model_type='{name}'"):
        tester.check_padding_free(CASES[name], "divprune")
    with pytest.raises(SaccadeError, match=f"model_type='{name}': layers of its language model carry a state"):
        apply_skip_vision(CASES[name].model, split="divprune")


def test_without_recurrent_layers_original_positions_equal_masking():
    """What a dropped token leaves behind in Qwen3.5 is due to its linear attention alone."""
    tiny = Tiny(lambda: build_qwen("3_5", layer_types=["full_attention"] * 2), RELATIVES["qwen3_5"].model_class)
    case = tester.Case("qwen3_5", tiny)
    assert not case.family.recurrent
    tester.check_original_equals_masked(case, "divprune")


def test_experts_run_on_tokens_that_do_not_skip():
    """Skip-Vision's feed-forward network may be a router and its experts: neither sees a skipped token."""
    case = CASES["qwen3_vl_moe"]
    routed = []
    with skipping(case.model, options_for(case.name)) as skip:
        prepared = skip.prepare(case.inputs)
        gate = skip.family.language_layers[0].mlp.gate
        handle = gate.register_forward_pre_hook(lambda module, args: routed.append(len(args[0])))
        got = tester.logits(case.model, prepared)
        handle.remove()
    inputs, roles = without_roles(prepared)
    skipped = roles == Role.SKIPPED
    assert skipped.any()
    assert routed == [int((~skipped).sum())]
    with masked_ffn(case.model, skipped):
        expected = tester.logits(case.model, inputs)
    seen = ~skipped & (roles != Role.PADDING)
    torch.testing.assert_close(got[seen], expected[seen], **tester.CLOSE)
