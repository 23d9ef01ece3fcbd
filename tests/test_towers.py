"""LLaVA with towers that it was not made with: the invariants, and attention that is the tower's own."""

from functools import partial

import pytest
import torch
import transformers
from family_models import build_llava, build_pixtral

from saccade.errors import SaccadeError
from saccade.families import get_family
from saccade.families.fitting import check_processor
from saccade.reducers import Needs
from saccade.testing import families as tester
from saccade.testing.tiny_models import Tiny

TOWERS = {
    "aimv2": transformers.Aimv2VisionConfig,
    "dinov2": transformers.Dinov2Config,
    "dinov2_with_registers": transformers.Dinov2WithRegistersConfig,
    "dinov3": partial(transformers.DINOv3ViTConfig, num_register_tokens=4),
    "ijepa": transformers.IJepaConfig,
    "mlcd": transformers.MLCDVisionConfig,
    "siglip": transformers.SiglipVisionConfig,
    "vit": transformers.ViTConfig,
}
MODEL = transformers.LlavaForConditionalGeneration
CASES = {
    **{name: tester.Case(name, Tiny(lambda tower=tower: build_llava(tower), MODEL)) for name, tower in TOWERS.items()},
    "pixtral": tester.Case("pixtral", Tiny(lambda: build_pixtral("Llava"), MODEL)),
}
EACH = ("ratio zero", "original positions")
WHOLE = ("dinov3", "pixtral")
"""Rotary positions, registers and a class token; images of many sizes, packed."""


@pytest.mark.parametrize(
    ("name", "check"),
    [
        pytest.param(name, check, marks=[] if check in EACH or name in WHOLE else pytest.mark.slow)
        for name in CASES
        for check in tester.CHECKS
    ],
)
def test_invariant(name, check):
    """With a reducer that reads the tower's attention, and merges."""
    tester.CHECKS[check](CASES[name], "visionzip")


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", CASES)
def test_training(name, lora, tmp_path):
    tester.check_training(CASES[name], "divprune", tmp_path, lora)


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_saliency_is_the_towers_own_attention(name):
    """That of the class token, or the attention received, of the block whose output is the features."""
    case = CASES[name]
    encoded = case.family.encode(case.inputs, Needs(frozenset({"saliency"})))
    tower = case.model.model.vision_tower
    tower.set_attn_implementation("eager")
    attention = tower(case.inputs["pixel_values"], output_attentions=True).attentions[-2].mean(dim=1)  # (R, P, P)
    tower.set_attn_implementation("sdpa")
    patches = 64
    before = attention.shape[1] - patches
    expected = attention[:, 0, before:] if before else attention.mean(dim=1)
    context = encoded.context
    among = torch.zeros_like(context.valid) if context.protected is None else context.protected
    torch.testing.assert_close(context.saliency[~among].reshape(-1, patches), expected)
    assert context.grid.tolist() == [[1, 8, 8]] * len(context.grid)
    assert among.sum() == len(among) * max(before - 1, 0)  # the class token is left out, registers are not


@pytest.mark.parametrize("name", TOWERS)
def test_unused_blocks_do_not_run(name):
    case = CASES[name]
    block = case.family.attention_block().attention
    ran = []
    handles = [
        module.register_forward_hook(lambda module, args, output: ran.append(module))
        for module in case.model.model.vision_tower.modules()
        if type(module) is type(block)
    ]
    case.family.encode(case.inputs)
    for handle in handles:
        handle.remove()
    assert len(handles) == 3
    assert ran[-1] is block
    assert len(ran) == 2


def test_a_processor_that_counts_no_registers_is_refused():
    model, processor = CASES["dinov3"].built
    check_processor(processor, model.config)
    processor.num_additional_image_tokens -= 1
    with pytest.raises(SaccadeError, match="num_additional_image_tokens=4 of the processor"):
        check_processor(processor, model.config)
    processor.num_additional_image_tokens += 1


def test_a_tower_that_takes_patches_is_refused():
    model, _ = build_llava(transformers.Siglip2VisionConfig)
    with pytest.raises(SaccadeError, match=r"vision_config\.model_type='siglip2_vision_model': LLaVA's processor"):
        get_family(model)
