"""LoRA under autocast: what `spare_casts` leaves out changes no bit, and is left out only where autocast undoes it."""

import copy

import pytest
import torch
from helpers import make_trainer
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from saccade.dualspeed.casts import CAST, spare_casts
from saccade.tiny import build_tiny_llava


class Copies(TorchDispatchMode):
    """Counts copies to another dtype."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._to_copy.default
        return func(*args, **kwargs or {})


def adapted(**options):
    """Two layers in bfloat16, with float32 adapters that do something."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)).to(torch.bfloat16)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["0", "2"], **options))
    for name, weight in model.named_parameters():
        if "lora" in name:
            weight.data = torch.randn(weight.shape)
    return model


def run(model, dtype, *, autocast=True, recompute=False):
    """Output, gradients of input and adapters, and the copies to another dtype."""
    torch.manual_seed(1)
    x = torch.randn(5, 16, dtype=dtype, requires_grad=True)
    with Copies() as copies, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = checkpoint(model, x, use_reentrant=False) if recompute else model(x)
        out.float().square().sum().backward()
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return {"out": out.detach(), "x": x.grad, **found}, copies.count


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_the_same_bits_in_fewer_copies(recompute):
    stock = adapted()
    spared = copy.deepcopy(stock)
    spare_casts(spared)
    expected, before = run(stock, torch.bfloat16, recompute=recompute)
    found, after = run(spared, torch.bfloat16, recompute=recompute)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.abs().max() > 0
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)
    # Each of the two layers: its input to float32 and back, and the same of the gradient.
    assert before - after >= 2 * 4


@pytest.mark.parametrize(
    ("options", "dtype", "autocast", "left_out"),
    [
        ({}, torch.bfloat16, False, 0),
        ({}, torch.float16, True, 4),  # the second layer's, whose input is autocast's
        ({"use_dora": True}, torch.bfloat16, True, 0),
        ({"lora_dropout": 0.05}, torch.bfloat16, True, 0),  # bfloat16 rounds 1 / 0.95
    ],
    ids=["without autocast", "of another dtype", "DoRA", "dropout"],
)
def test_a_cast_that_is_needed_stays(options, dtype, autocast, left_out):
    stock = adapted(**options)
    spared = copy.deepcopy(stock)
    spare_casts(spared)
    (expected, before), (found, after) = (run(model, dtype, autocast=autocast) for model in (stock, spared))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)
    assert before - after == left_out


def test_a_copy_of_the_model_casts_for_itself():
    spared = adapted()
    spare_casts(spared)
    other = copy.deepcopy(spared)
    for layer, one in zip(other.modules(), spared.modules(), strict=True):
        if isinstance(layer, Linear):
            assert layer.__dict__[CAST].args[0] is layer is not one


def test_dropout_matters_in_training_only():
    stock = adapted(lora_dropout=0.05).eval()
    spared = copy.deepcopy(stock)
    spare_casts(spared)
    (expected, before), (found, after) = (run(model, torch.bfloat16) for model in (stock, spared))
    torch.testing.assert_close(found["out"], expected["out"], rtol=0, atol=0)
    assert before - after == 2 * 4


def test_a_model_saved_as_a_whole_is_loaded(tmp_path):
    spared = adapted()
    spare_casts(spared)
    torch.save(spared, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    torch.testing.assert_close(run(loaded, torch.bfloat16)[0]["out"], run(spared, torch.bfloat16)[0]["out"])


def test_the_trainer_spares_them(processor, tmp_path):
    lora = LoraConfig(target_modules="all-linear")
    trainer = make_trainer(build_tiny_llava(processor), processor, tmp_path, peft_config=lora)
    layers = [layer for layer in trainer.model.modules() if isinstance(layer, Linear)]
    assert layers
    assert all(CAST in layer.__dict__ for layer in layers)
