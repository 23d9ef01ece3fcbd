"""Patch embeddings as matrix products: the same values and gradients, and the same weights saved."""

import copy
import logging

import pytest
import torch
from datasets import Dataset
from family_models import FAMILIES
from torch import nn

from saccade.dualspeed import DualSpeedTrainer
from saccade.families import get_family
from saccade.families.linear_patches import patch_convolutions, slow_patches, use_linear_patches
from saccade.testing.families import CLOSE, Case
from saccade.testing.tiny_models import mixed_rows
from saccade.testing.training import make_config

CASE = Case("qwen3_vl", FAMILIES["qwen3_vl"])


def features_and_gradients(model):
    family = get_family(model)
    features = family.encode(CASE.inputs).context.features
    features.square().sum().backward()
    named = dict(family.vision_tower.named_parameters())
    return features.detach(), {name: value.grad for name, value in named.items() if value.grad is not None}


def test_features_gradients_and_saved_weights_are_the_same():
    models = [copy.deepcopy(CASE.model), copy.deepcopy(CASE.model)]
    tower = get_family(models[1]).vision_tower
    ran = []
    assert slow_patches(tower)
    assert use_linear_patches(tower) == 1
    assert not slow_patches(tower)
    (conv,) = patch_convolutions(tower)
    conv._conv_forward = lambda *args: ran.append(args)  # what nn.Conv3d runs
    models[1] = copy.deepcopy(models[1])  # as trainers and PEFT do
    (plain, gradients), (linear, others) = map(features_and_gradients, models)
    assert not ran
    torch.testing.assert_close(linear, plain, **CLOSE)
    assert gradients.keys() == others.keys()
    assert any(name.endswith("proj.weight") for name in gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            others[name], gradient, rtol=1e-3, atol=1e-3, msg=lambda text, n=name: f"{n}: {text}"
        )
    assert models[0].state_dict().keys() == models[1].state_dict().keys()


@pytest.mark.parametrize(
    "options", [{"stride": 1}, {"padding": 1}, {"groups": 3}, {"dilation": 2}, {"stride": (2, 4, 2)}], ids=str
)
def test_other_convolutions_are_left_alone(options):
    assert use_linear_patches(nn.Sequential(nn.Conv3d(3, 6, **{"kernel_size": 2, "stride": 2, **options}))) == 0


def test_input_of_several_patches_is_convolved():
    conv, pixels = nn.Conv3d(3, 6, kernel_size=2, stride=2), torch.randn(2, 3, 4, 4, 4)
    expected = conv(pixels)
    use_linear_patches(conv)
    assert torch.equal(conv(pixels), expected)


def test_the_trainer_warns_or_uses_them(tmp_path, caplog):
    def make(**options):
        caplog.clear()
        model, rows = copy.deepcopy(CASE.model), Dataset.from_list(mixed_rows())
        args = make_config(tmp_path, max_steps=1, **options)
        DualSpeedTrainer(model, args=args, train_dataset=rows, processing_class=CASE.processor)
        return get_family(model).vision_tower, "linear_patches=True" in caplog.text

    with caplog.at_level(logging.WARNING):
        tower, warned = make()
        assert warned
        assert slow_patches(tower)
        tower, warned = make(linear_patches=True)
        assert not warned
        assert not slow_patches(tower)
