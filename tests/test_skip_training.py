"""Training with skipped tokens: alone, as one speed of the fast-slow recipe or of several, under LoRA, resumed."""

import copy

import pytest
import torch
from helpers import ORDINARY, losses, make_trainer
from peft import LoraConfig
from safetensors.torch import load_file
from skip_tester import masked_ffn, without_roles
from transformers import LlavaForConditionalGeneration

from saccade import SaccadeError
from saccade.dualspeed.loss import cross_entropy_and_kl_sum, cross_entropy_sum, label_rows
from saccade.pruning import prune
from saccade.skip_vision import SUMMARY_FILE, apply_skip_vision
from saccade.testing.training import make_config
from saccade.tiny import build_tiny_llava
from saccade.tokens import Role

SKIP = {"skip_vision": "100/156", **ORDINARY}
SPEEDS = [
    {"name": "fast", "probability": 0.25, "isolator": True},
    {"name": "middle", "probability": 0.25, "prune_ratio": 0.5, "teacher": "fast"},
    {"name": "skipping", "probability": 0.25, "action": "skip", "teacher": "fast"},
    {"name": "slow", "probability": 0.25, "action": "keep", "teacher": "middle"},
]


@pytest.fixture
def batch(collator, mixed_rows):
    return dict(collator(mixed_rows))


def train(model, processor, output, **options):
    trainer = make_trainer(model, processor, output, **options)
    trainer.train()
    return trainer


def step_in(trainer, mode, batch):
    """The output of one micro-batch in a mode."""
    return trainer._step(mode, dict(batch), 1.0)


def test_the_loss_is_that_of_a_model_whose_networks_are_masked(model, processor, batch, tmp_path):
    trainer = make_trainer(model, processor, tmp_path, **SKIP)
    output = step_in(trainer, "skip", batch)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    prepared = trainer.skip.prepare(inputs, labels=batch["labels"], padding_side="right")
    labels = prepared.pop("labels")
    trainer.skip.remove()
    stock, roles = without_roles(prepared)
    with masked_ffn(model, roles == Role.SKIPPED):
        logits = model(**stock, use_cache=False).logits
    wanted = labels[:, 1:] != -100
    expected = torch.nn.functional.cross_entropy(logits[:, :-1][wanted], labels[:, 1:][wanted], reduction="sum")
    torch.testing.assert_close(output.loss, expected)
    whole = int(prepared["attention_mask"].sum())
    skipped = int((roles == Role.SKIPPED).sum())
    assert whole - skipped < float(output.tokens_in) < whole < int(output.tokens_full)


@pytest.mark.interfaces
def test_a_run_of_skip_vision_trains_the_summary_head_and_saves_it(model, processor, tmp_path):
    trainer = make_trainer(model, processor, tmp_path, max_steps=6, **SKIP)
    before = copy.deepcopy(trainer.skip.summary.state_dict())
    trainer.train()
    after = trainer.skip.summary.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert set(trainer.meter.steps) == {"skip"}
    trainer.save_model(str(tmp_path / "final"))
    trained = LlavaForConditionalGeneration.from_pretrained(tmp_path / "final")
    skip = apply_skip_vision(trained, tmp_path / "final")
    for name, value in skip.summary.state_dict().items():
        assert torch.equal(value, after[name])
    skip.remove()
    trainer.skip.remove()
    stock = trainer.model.state_dict()
    assert all(torch.equal(value, stock[name]) for name, value in trained.state_dict().items())


@pytest.mark.parametrize("mode", ["fast", "slow"])
def test_either_mode_of_the_fast_slow_recipe_may_skip(model, processor, batch, tmp_path, mode):
    """The slow loss is CE + KL of the two sequences' own rows."""
    options = {"skip_vision": {"summary": True}, "skip_mode": mode, "prune_ratio": 0.75}
    trainer = make_trainer(model, processor, tmp_path, **options)
    model.eval()
    output = step_in(trainer, "slow", batch)
    plan = trainer._step.modes["slow"]
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    text, labels = trainer.family.without_vision(inputs), batch["labels"]
    encoded = trainer.family.encode(inputs, plan.needs, labels=labels)

    def rows_of(method):
        laid = prune(trainer.family, text, method, lambda laid: laid, encoded=encoded, labels=labels)
        return label_rows(trainer.family.hidden_states(**laid.inputs), laid.labels)

    rows = [rows_of(plan.teacher.method), rows_of(plan.method)]
    (teacher, same), (student, targets) = rows
    assert torch.equal(same, targets)
    ce, kl = cross_entropy_and_kl_sum(student, teacher.detach(), targets, trainer.family.logits, 1.0)
    torch.testing.assert_close(output.loss, ce + kl)
    output.loss.backward()
    head = trainer.skip.summary
    moved = [bool(parameter.grad.abs().sum() > 0) for parameter in head.parameters()]
    # The teacher's pass is without gradient, so the head learns in the mode that skips.
    assert all(moved) if mode == "slow" else not any(moved)
    fast = step_in(trainer, "fast", batch)
    fast.loss.backward()
    if mode == "fast":
        assert trainer.isolator is None
        assert all(parameter.grad.abs().sum() > 0 for parameter in head.parameters())
        rows, targets = rows_of(trainer._step.modes["fast"].method)
        torch.testing.assert_close(fast.loss, cross_entropy_sum(rows, targets, trainer.family.logits))


def test_four_speeds(model, processor, tmp_path):
    trainer = train(
        model, processor, tmp_path, max_steps=8, modes=SPEEDS, schedule="stratified", gradient_accumulation_steps=2
    )
    assert set(trainer.meter.steps) == {mode["name"] for mode in SPEEDS}
    seen = {name for entry in trainer.state.log_history for name in entry if name.startswith("loss_")}
    assert seen == {f"loss_{name}" for name, count in trainer.schedule.count(8).items() if count}
    assert trainer.meter.full == "slow"
    assert trainer.meter.taught == ("middle", "skipping", "slow")
    own = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    for module in (trainer.isolator, trainer.skip.summary):
        assert all(id(parameter) in own for parameter in module.parameters())


def test_every_speed_gives_every_module_a_gradient(model, processor, batch, tmp_path):
    """Engines wait for a gradient of each parameter in every step, whatever its mode, and batches without images."""
    trainer = make_trainer(model, processor, tmp_path, modes=SPEEDS)
    text = trainer.data_collator([row for row in trainer.train_dataset if not row["images"]][:2])
    for mode in trainer.meter.modes:
        for inputs in (batch, text):
            model.zero_grad(set_to_none=True)
            step_in(trainer, mode, inputs).loss.backward()
            missing = [name for name, value in model.named_parameters() if value.requires_grad and value.grad is None]
            assert not missing


def test_resuming_gives_the_same_run(processor, tmp_path):
    options = {"modes": SPEEDS, "max_steps": 6, "save_steps": 3, "save_strategy": "steps"}
    whole = train(build_tiny_llava(processor, seed=0), processor, tmp_path / "whole", **options)
    part = make_trainer(build_tiny_llava(processor, seed=0), processor, tmp_path / "whole", **options)
    part.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert losses(part)[-3:] == losses(whole)[-3:]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, part.model.state_dict()[name]), name
    other = {**options, "modes": [*SPEEDS[:2], {**SPEEDS[2], "action": "drop"}, SPEEDS[3]]}
    changed = make_trainer(build_tiny_llava(processor, seed=0), processor, tmp_path / "whole", **other)
    with pytest.raises(SaccadeError, match="modes"):
        changed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))


@pytest.mark.interfaces
def test_lora_with_gradient_checkpointing(model, processor, tmp_path):
    lora = LoraConfig(r=4, target_modules=r".*language_model.*_proj")
    options = {**SKIP, "gradient_checkpointing": True, "max_steps": 3}
    trainer = make_trainer(model, processor, tmp_path, peft_config=lora, **options)
    before = copy.deepcopy(trainer.skip.summary.state_dict())
    trainer.train()
    assert any(not torch.equal(value, before[name]) for name, value in trainer.skip.summary.state_dict().items())
    trainer.save_model(str(tmp_path / "final"))
    assert (tmp_path / "final" / SUMMARY_FILE).is_file()
    assert not any("summary" in key for key in load_file(tmp_path / "final" / "adapter_model.safetensors"))


def test_gradient_checkpointing_changes_no_loss(processor, tmp_path):
    found = [
        losses(
            train(
                build_tiny_llava(processor, seed=0),
                processor,
                tmp_path / str(checkpointing),
                gradient_checkpointing=checkpointing,
                **SKIP,
            )
        )
        for checkpointing in (False, True)
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_evaluation_during_training_skips_where_inference_does(model, processor, scenes, tmp_path):
    """A run whose only mode skips is evaluated as it will be used; one with a mode on all tokens on all of them."""
    for options, mode in ((SKIP, "skip"), ({"modes": SPEEDS}, "slow")):
        trainer = make_trainer(build_tiny_llava(processor, seed=0), processor, tmp_path / mode, **options)
        trainer.eval_dataset = scenes.select(range(8))
        trainer.args.per_device_eval_batch_size = 8
        measured = trainer.evaluate()["eval_loss"]
        batch = trainer.data_collator(list(scenes.select(range(8))))
        with torch.no_grad():
            count = int((batch["labels"][:, 1:] != -100).sum())
            expected = trainer._step(mode, dict(batch), count).cross_entropy
        assert measured == pytest.approx(float(expected), rel=1e-4)


def test_the_projector_stage_is_always_in_the_first_mode(model, processor, tmp_path):
    trainer = make_trainer(model, processor, tmp_path, modes=SPEEDS, freeze_language_model=True)
    assert {trainer.mode_of(step) for step in range(50)} == {"fast"}


def test_a_head_of_another_model_is_refused(model, processor, tmp_path):
    trainer = make_trainer(model, processor, tmp_path, **SKIP)
    trainer.skip.save_pretrained(tmp_path)
    saved = load_file(tmp_path / SUMMARY_FILE)
    wrong = {name: torch.zeros(*value.shape[:-1], value.shape[-1] + 1) for name, value in saved.items()}
    trainer.skip.save_pretrained(tmp_path, tensors=wrong)
    with pytest.raises(SaccadeError, match="another model"):
        trainer.skip.load_summary(tmp_path)
    assert make_config(tmp_path, **SKIP).skip_options.retained == pytest.approx(100 / 576)
