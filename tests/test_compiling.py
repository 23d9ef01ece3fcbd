"""`torch_compile`: the losses, gradients and names of weights of the plain run."""

import copy

import pytest
import torch
from family_models import FAMILIES
from helpers import losses, make_trainer
from peft import LoraConfig
from safetensors.torch import load_file

from saccade import SaccadeError
from saccade.data import digit_scenes
from saccade.dualspeed.compiling import compile_layers
from saccade.families import get_family
from saccade.pruning import ModeIsolator
from saccade.reducers import PruningConfig
from saccade.testing import families as tester
from saccade.testing.training import fast_slow_step, make_config
from saccade.tiny import build_tiny_llava


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_compiled_layers_train_as_plain_ones(name):
    case = tester.Case(name, FAMILIES[name])
    isolator = ModeIsolator(3, case.model.config.get_text_config().hidden_size)
    found = []
    for compiled in (False, True):
        family = get_family(copy.deepcopy(case.model))
        if compiled:
            compile_layers(family, backend="aot_eager")
        step = fast_slow_step(family, "divprune", PruningConfig(prune_ratio=tester.RATIO), isolator)
        values = tester.losses_and_gradients(case, step, isolator)
        found.append({name: value.clone() for name, value in values.items()})
    assert found[0].keys() == found[1].keys()
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"torch_compile_backend": "aot_eager"},
        {"torch_compile_backend": "aot_eager", "padding_free": True},
        {"torch_compile_backend": "aot_eager", "gradient_checkpointing": True},
        {"torch_compile_backend": "aot_eager", "slow_micro_batch_size": 3, "lora": True},
        {"torch_compile": True},
    ],
    ids=["plain", "without padding", "checkpointing", "lora in parts", "inductor"],
)
@pytest.mark.slow
def test_a_compiled_run_is_the_plain_run(processor, tmp_path, options):
    """Lengths differ from step to step; compiled code is made anew for a few kinds of passes, and not for lengths."""
    runs, options = [], dict(options)
    targets = r".*language_model.*_proj"
    lora = LoraConfig(r=4, target_modules=targets) if options.pop("lora", False) else None
    for given in ({}, options):
        folder = tmp_path / str(bool(given))
        model = build_tiny_llava(processor, seed=0)
        torch.manual_seed(0)
        trainer = make_trainer(model, processor, folder, None, lora, slow_probability=0.5, max_steps=6, **given)
        torch._dynamo.utils.counters.clear()
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            trainer.train()
            evaluated = trainer.evaluate(digit_scenes("sft", "validation", 8))["eval_loss"]
        trainer.save_model(str(folder))
        saved = "model.safetensors" if lora is None else "adapter_model.safetensors"
        runs.append(([*losses(trainer), evaluated], load_file(folder / saved)))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    (plain, weights), (compiled, same) = runs
    assert compiled == pytest.approx(plain, abs=1e-4)
    assert weights.keys() == same.keys()
    for name, value in weights.items():
        torch.testing.assert_close(same[name], value, rtol=1e-3, atol=1e-4)


def test_layers_that_skip_are_not_compiled(tmp_path):
    with pytest.raises(SaccadeError, match="torch_compile=True does not go with modes that skip"):
        make_config(tmp_path, torch_compile=True, skip_vision="100/156")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"torch_compile_backend": "nonsense"}, "torch_compile_backend='nonsense' is unknown: use one of .*inductor"),
        ({"torch_compile_mode": "max"}, "torch_compile_mode='max' is unknown: use one of .*max-autotune"),
    ],
)
def test_what_torch_does_not_know_is_refused(tmp_path, options, message):
    with pytest.raises(SaccadeError, match=message):
        make_config(tmp_path, **options)
