"""Float32 masters of weights that train in bfloat16: what they change, on disk, on resume, with other options."""

import copy
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from helpers import losses, make_trainer
from peft import LoraConfig
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback

from saccade import DualSpeedTrainer, SaccadeError, prune_inputs
from saccade.data import digit_scenes
from saccade.dualspeed.masters import MASTERS_FILE, Float32Masters, wants_masters
from saccade.families import get_family
from saccade.testing.training import make_config
from saccade.tiny import build_tiny_llava

STAGE_ONE = {"freeze_language_model": True, "learning_rate": 2e-5, "max_steps": 20, "per_device_train_batch_size": 1}
STEPS = {
    "save_strategy": "steps",
    "save_steps": 2,
    "max_steps": 4,
    "slow_probability": 0.5,
    "learning_rate": 2e-5,
    "per_device_train_batch_size": 1,
}


def in_bf16(processor):
    return build_tiny_llava(processor, seed=0).bfloat16()


def run(model, processor, output, resume=None, **options):
    trainer = make_trainer(model, processor, output, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def projector(tensors):
    return torch.cat(
        [value.float().flatten() for name, value in sorted(tensors.items()) if "multi_modal_projector" in name]
    )


def test_twenty_small_steps_move_every_projector_weight_as_in_float32(processor, tmp_path):
    start = in_bf16(processor)
    before = projector(dict(start.named_parameters())).detach().clone()
    exact = run(copy.deepcopy(start).float(), processor, tmp_path / "float32", **STAGE_ONE)
    with_masters = run(copy.deepcopy(start), processor, tmp_path / "masters", bf16=True, **STAGE_ONE)
    without = run(start, processor, tmp_path / "plain", bf16=True, float32_masters=False, **STAGE_ONE)
    assert without.masters is None
    moved = {
        "float32": projector(dict(exact.model.named_parameters())) - before,
        "masters": projector(with_masters.masters.weights) - before,
        "plain": projector(dict(without.model.named_parameters())) - before,
    }
    share = {name: (change != 0).float().mean().item() for name, change in moved.items()}
    # A unit that was never active has no gradient.
    assert min(share["float32"], share["masters"]) > 0.999
    assert share["plain"] < 0.5
    # Signs of noisy gradients differ here and there between bfloat16 and float32, which Adam's steps are made of.
    assert torch.cosine_similarity(moved["masters"], moved["float32"], dim=0) > 0.9
    assert moved["masters"].norm() == pytest.approx(moved["float32"].norm().item(), rel=0.05)
    # What the model has, and what is saved of it, are the masters rounded.
    held = dict(with_masters.model.named_parameters())
    for name, master in with_masters.masters.weights.items():
        assert master.dtype == torch.float32
        assert torch.equal(held[name], master.bfloat16())
    assert {parameter.dtype for name, parameter in held.items() if "isolator" not in name} == {torch.bfloat16}
    with_masters.save_model()
    saved = load_file(tmp_path / "masters" / "model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "masters" / "config.json").read_text())["dtype"] == "bfloat16"
    assert not (tmp_path / "masters" / MASTERS_FILE).exists()


def test_a_resumed_run_is_the_unbroken_one(processor, tmp_path):
    whole = run(in_bf16(processor), processor, tmp_path / "whole", **STEPS)
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "broken" / "checkpoint-2")
    # The rounded weights alone would not do: the masters are between them.
    held = load_file(tmp_path / "broken" / "checkpoint-2" / MASTERS_FILE)
    assert any((value != value.bfloat16()).any() for value in held.values())
    resumed = run(build_tiny_llava(processor, seed=1).bfloat16(), processor, tmp_path / "broken", resume=True, **STEPS)
    assert losses(resumed) == losses(whole)
    for name, master in whole.masters.weights.items():
        assert torch.equal(resumed.masters.weights[name], master), name
    options = {**STEPS, "float32_masters": False}
    with pytest.raises(SaccadeError, match=r"float32_masters=False \(checkpoint: True\)"):
        run(in_bf16(processor), processor, tmp_path / "broken", resume=True, **options)


class Averaging(torch.optim.SGD):
    """Evaluates at other weights than it trains, as schedule-free optimizers do."""

    distance = 0.0

    def eval(self):
        self._move(1.0)

    def train(self):
        self._move(0.0)

    def _move(self, distance):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(distance - self.distance)
        self.distance = distance


def test_weights_follow_an_optimizer_that_evaluates_at_others(processor, tmp_path):
    trainer = DualSpeedTrainer(
        in_bf16(processor),
        args=make_config(tmp_path, bf16=True, max_steps=2),
        train_dataset=digit_scenes("sft", "train", 8),
        eval_dataset=digit_scenes("sft", "validation", 2),
        processing_class=processor,
        optimizer_cls_and_kwargs=(Averaging, {"lr": 1e-3}),
    )
    trainer.train()
    held = dict(trainer.model.named_parameters())
    before = {name: master.clone() for name, master in trainer.masters.weights.items()}
    trainer.evaluate()
    for name, master in before.items():
        torch.testing.assert_close(held[name], (master + 1).bfloat16())
    trainer.optimizer.train()
    for name, master in before.items():
        torch.testing.assert_close(trainer.masters.weights[name], master)
        torch.testing.assert_close(held[name], master.bfloat16(), rtol=1e-2, atol=1e-6)
    # What is loaded in between is what it goes on with.
    with torch.no_grad():
        held[name].zero_()
    trainer.optimizer.eval()
    assert torch.equal(held[name], torch.ones_like(held[name]))


class Generates(TrainerCallback):
    """Generates in the middle of training, on all tokens and on few, as a callback of a user would."""

    def __init__(self, model, inputs):
        self.model, self.inputs, self.count = model, inputs, 0

    def on_step_end(self, args, state, control, **kwargs):
        training = self.model.training
        self.model.eval()
        stock = get_family(self.model).model
        for inputs in (self.inputs, prune_inputs(stock, self.inputs, reducer="divprune", prune_ratio=0.9)):
            self.count += stock.generate(**inputs, max_new_tokens=2, do_sample=False).shape[0]
        self.model.train(training)


@pytest.mark.parametrize(
    "options",
    [
        {"padding_free": True, "gradient_checkpointing": True, "slow_micro_batch_size": 2},
        {"skip_vision": "100/156", "prune_ratio": 0.0, "slow_probability": 1.0, "distill_weight": 0.0},
        {"peft_config": True, "projector_learning_rate": 1e-4},
        {"torch_compile": True, "torch_compile_backend": "eager"},
    ],
    ids=["padding_free", "skip_vision", "lora", "compile"],
)
@pytest.mark.slow
def test_beside_other_options(processor, collator, scenes, tmp_path, options):
    lora = LoraConfig(r=4, target_modules=r".*language_model.*_proj", modules_to_save=["multi_modal_projector"])
    options = {"slow_probability": 0.5, "max_steps": 3, "per_device_train_batch_size": 3, **options}
    if options.get("peft_config"):
        options["peft_config"] = lora
    exact = run(in_bf16(processor).float(), processor, tmp_path / "exact", **options)
    trainer = make_trainer(in_bf16(processor), processor, tmp_path / "bf16", bf16=True, **options)
    inputs = {name: value[:1] for name, value in collator([scenes[0]]).items() if name != "labels"}
    generates = Generates(trainer.model, inputs)
    if "skip_vision" not in options:
        trainer.add_callback(generates)
    trainer.train()
    assert losses(trainer) == pytest.approx(losses(exact), rel=0.03)
    few = scenes.select(range(4))
    assert trainer.evaluate(few)["eval_loss"] == pytest.approx(exact.evaluate(few)["eval_loss"], rel=0.03)
    assert generates.count == (0 if "skip_vision" in options else 6)
    trained = {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    in_half = {name for name, weight in trained.items() if weight.dtype == torch.bfloat16}
    assert trainer.masters.weights.keys() == in_half
    assert all("lora_" in name or "isolator" in name or "skip_summary" in name for name in trained.keys() - in_half)
    rates = {group["initial_lr"] for group in trainer.optimizer.param_groups if "peft_config" in options}
    assert len(rates) == (2 if "peft_config" in options else 0)
    held = trainer.masters
    trainer.create_optimizer()  # as a second call of `train` does
    assert trainer.masters is held
    trainer.optimizer = None
    trainer.create_optimizer()
    assert trainer.masters is not held
    groups = {weight for group in trainer.optimizer.param_groups for weight in group["params"]}
    assert {weight.dtype for weight in groups} == {torch.float32}


def test_weights_that_something_else_changes_are_taken_over():
    layer = nn.Linear(4, 4).bfloat16()
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
    masters = Float32Masters(layer, optimizer)
    layer(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    between = masters.weights["weight"].clone()
    assert not torch.equal(between, between.bfloat16().float())
    assert layer.weight.grad is None
    with torch.no_grad():
        layer.weight[0].fill_(5)
    layer(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    expected = torch.cat((torch.full((1, 4), 5.0), between[1:])) - 1e-3
    torch.testing.assert_close(masters.weights["weight"], expected, rtol=0, atol=1e-7)


def test_who_keeps_masters():
    half, whole = nn.Linear(2, 2).bfloat16(), nn.Linear(2, 2)

    def wants(given, engine="ddp", model=half, mixed=True, fp16=False):
        return wants_masters(SimpleNamespace(float32_masters=given, fp16=fp16), model, engine, mixed)

    assert wants(None)
    assert wants(True)
    assert not wants(False)
    assert not wants(None, model=whole)
    assert not wants(None, model=half.requires_grad_(False))
    half.requires_grad_(True)
    for engine in ("fsdp", "deepspeed"):
        assert not wants(None, engine)
        assert not wants(True, engine)
        with pytest.raises(SaccadeError, match=r"float32_masters=False: .* leave the option out"):
            wants(False, engine)
    assert not wants(None, "fsdp", mixed=False)
    with pytest.raises(SaccadeError, match=r"float32_masters=True: FSDP .* bf16=True"):
        wants(True, "fsdp", mixed=False)
    with pytest.raises(SaccadeError, match="float32_masters=True: with fp16=True"):
        wants(True, fp16=True)


def test_what_a_checkpoint_holds(tmp_path, caplog):
    layer, small = nn.Linear(3, 3).bfloat16(), nn.Linear(2, 3).bfloat16()
    first = Float32Masters(layer, torch.optim.SGD(layer.parameters(), lr=1.0))
    first.weights["weight"].add_(1e-5)
    first.save(tmp_path)
    again = Float32Masters(layer, torch.optim.SGD(layer.parameters(), lr=1.0))
    assert not torch.equal(again.weights["weight"], first.weights["weight"])
    again.load(tmp_path)
    assert all(torch.equal(value, first.weights[name]) for name, value in again.weights.items())
    with pytest.raises(SaccadeError, match=f"{MASTERS_FILE} is of other weights"):
        Float32Masters(small, torch.optim.SGD(small.parameters(), lr=1.0)).load(tmp_path)
    again.load(tmp_path / "nothing")
    assert f"has no {MASTERS_FILE}" in caplog.text


def test_an_optimizer_that_does_not_step_all_of_them_is_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).bfloat16()
    with pytest.raises(SaccadeError, match=r"SGD does not step 2 of the weights .* such as 1\.weight"):
        Float32Masters(model, torch.optim.SGD(model[0].parameters(), lr=1.0))
