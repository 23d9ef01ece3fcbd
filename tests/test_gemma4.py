"""What is Gemma 4's own: attention by positions along two axes. tests/test_relatives.py has the invariants."""

import pytest
import torch
from family_models import RELATIVES, build_gemma4
from skip_tester import masked_ffn, options_for, skipping, without_roles

from saccade.errors import SaccadeError
from saccade.reducers import Needs
from saccade.skip_vision import apply_skip_vision
from saccade.testing import families as tester
from saccade.testing.tiny_models import WIDTH
from saccade.tokens import Role

CASE = tester.Case("gemma4", RELATIVES["gemma4"])


@torch.no_grad()
def test_saliency_of_gemma4_is_the_towers_own_attention():
    """The attention that each patch receives, by positions along two axes, as the mean over the patches of a token."""
    tower, positions = CASE.model.model.vision_tower, CASE.inputs["image_position_ids"]
    context = CASE.family.encode(CASE.inputs, Needs(frozenset({"saliency"}))).context
    tower.set_attn_implementation("eager")
    attention = tower(CASE.inputs["pixel_values"], positions, output_attentions=True).attentions[-1].mean(dim=1)
    tower.set_attn_implementation("sdpa")
    for number, (_, height, width) in enumerate(context.grid.tolist()):
        real = (positions[number] >= 0).all(dim=1)
        received = attention[number][real][:, real].mean(dim=0).reshape(height, 2, width, 2).mean(dim=(1, 3))
        torch.testing.assert_close(context.saliency[number][context.valid[number]], received.flatten())


def test_what_gemma4_cannot_do_is_refused():
    with pytest.raises(SaccadeError, match="model_type='gemma4': 'pixel_values_videos' is not supported"):
        CASE.family.encode({**CASE.inputs, "pixel_values_videos": CASE.inputs["pixel_values"]})
    with pytest.raises(SaccadeError, match="padding_free=True: model_type='gemma4'"):
        tester.check_padding_free(CASE, "divprune")
    experts = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": WIDTH}
    model, _ = build_gemma4(**experts)
    with pytest.raises(SaccadeError, match="model_type='gemma4': its layers have experts beside"):
        apply_skip_vision(model, split="divprune")


def test_skipped_tokens_are_those_of_masked_feed_forward_networks():
    with skipping(CASE.model, options_for(CASE.name, drop_kv=False)) as skip:
        prepared = skip.prepare(CASE.inputs)
        got = tester.logits(CASE.model, prepared)
    inputs, roles = without_roles(prepared)
    assert (roles == Role.SKIPPED).any()
    with masked_ffn(CASE.model, roles == Role.SKIPPED):
        expected = tester.logits(CASE.model, inputs)
    seen = (roles != Role.SKIPPED) & (roles != Role.PADDING)
    torch.testing.assert_close(got[seen], expected[seen], **tester.CLOSE)
