"""The loss and the gradients of one fast and one slow micro-batch, against the formulas on whole logits."""

import pytest
import torch
import torch.nn.functional as F

from saccade import prune_inputs
from saccade.dualspeed.parts import Part
from saccade.families import get_family
from saccade.pruning import ModeIsolator
from saccade.reducers import get_reducer
from saccade.testing.training import fast_slow_step


def shifted(logits, labels):
    """Rows of logits that predict a label, and those labels."""
    wanted = labels[:, 1:] != -100
    return logits[:, :-1][wanted], labels[:, 1:][wanted]


def pruned_labels(model, batch, pruned):
    """Labels of a pruned batch, found by walking over both batches side by side."""
    image = model.config.image_token_id
    result = torch.full_like(pruned["input_ids"], -100)
    for row in range(len(result)):
        full = [
            int(label)
            for token, label, mask in zip(
                batch["input_ids"][row], batch["labels"][row], batch["attention_mask"][row], strict=True
            )
            if token != image and mask
        ]
        for column, token in enumerate(pruned["input_ids"][row]):
            if token != image and pruned["attention_mask"][row, column]:
                result[row, column] = full.pop(0)
        assert not full
    return result


@pytest.fixture
def batch(collator, mixed_rows):
    return dict(collator(mixed_rows))


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("length", [0, 4])
def test_fast_loss_is_the_cross_entropy_of_the_pruned_sequence(model, batch, positions, length):
    isolator = ModeIsolator(length, model.config.text_config.hidden_size) if length else None
    got = fast_slow_step(model, isolator=isolator, positions=positions)("fast", batch, normaliser=10.0)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    pruned = prune_inputs(
        model,
        inputs,
        reducer="divprune",
        prune_ratio=0.9,
        isolator=isolator,
        positions=positions,
        padding_side="right",
    )
    rows, targets = shifted(model(**pruned).logits, pruned_labels(model, batch, pruned))
    torch.testing.assert_close(got.loss, F.cross_entropy(rows, targets, reduction="sum") / 10)
    assert got.kl is None
    assert got.tokens_in == pruned["attention_mask"].sum()
    assert got.tokens_full == batch["attention_mask"].sum()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_slow_loss_is_cross_entropy_plus_divergence_from_the_fast_pass(model, batch, temperature):
    isolator = ModeIsolator(4, model.config.text_config.hidden_size)
    step = fast_slow_step(model, isolator=isolator, distill_weight=0.5, distill_temperature=temperature)
    got = step("slow", batch, normaliser=10.0)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    pruned = prune_inputs(model, inputs, reducer="divprune", prune_ratio=0.9, isolator=isolator, padding_side="right")
    teacher, _ = shifted(model(**pruned).logits, pruned_labels(model, batch, pruned))
    student, targets = shifted(model(**inputs).logits, batch["labels"])
    p = (teacher / temperature).softmax(-1)
    kl = (p * (p.log() - (student / temperature).log_softmax(-1))).sum()
    ce = F.cross_entropy(student, targets, reduction="sum")
    torch.testing.assert_close(got.cross_entropy, ce.detach() / 10, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.kl, kl.detach() / 10, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(got.loss, (ce + 0.5 * kl) / 10, rtol=1e-5, atol=1e-5)
    assert got.tokens_teacher == pruned["attention_mask"].sum()


def test_the_images_are_encoded_once_in_either_mode(model, batch):
    calls = []
    model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    step = fast_slow_step(model, isolator=ModeIsolator(4, model.config.text_config.hidden_size))
    for mode in ("fast", "slow"):
        calls.clear()
        step(mode, batch, 1.0)
        assert len(calls) == 1


def test_gradients_of_a_fast_step(model, batch):
    """Kept tokens, projector, isolator and language model get one, dropped tokens and a frozen tower get none."""
    family = get_family(model)
    family.vision_tower.requires_grad_(False)
    isolator = ModeIsolator(4, model.config.text_config.hidden_size)
    seen = {}
    original = family.encode

    def encode(inputs, *args, **kwargs):
        encoded = original(inputs, *args, **kwargs)
        encoded.context.features.retain_grad()
        seen["features"] = encoded.context.features
        return encoded

    family.encode = encode
    step = fast_slow_step(model, isolator=isolator)
    step.family = family
    step("fast", batch, 1.0).loss.backward()
    grad = seen["features"].grad
    reduction = get_reducer("divprune")(family.encode(batch).context, keep=14)
    kept = torch.zeros(grad.shape[:2], dtype=torch.bool).scatter_(1, reduction.index, True)
    assert torch.equal(grad.abs().sum(-1) > 0, kept)
    for parameter in (*family.projector.parameters(), *isolator.parameters()):
        assert parameter.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in family.vision_tower.parameters())
    assert all(parameter.grad is not None for parameter in family.language_layers.parameters())


def test_the_isolator_gets_a_zero_gradient_in_a_slow_step(model, batch):
    isolator = ModeIsolator(4, model.config.text_config.hidden_size)
    fast_slow_step(model, isolator=isolator)("slow", batch, 1.0).loss.backward()
    assert torch.equal(isolator.weight.grad, torch.zeros_like(isolator.weight))


def test_the_teacher_runs_without_dropout_and_leaves_the_mode_alone(model, batch):
    model.train()
    for layer in model.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.5
    step = fast_slow_step(model)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    encoded = step.family.encode(inputs)
    text = step.family.without_vision(inputs)
    first, _ = step._teacher_rows(step.modes["slow"].teacher, Part(encoded, text, batch["labels"]))
    second, _ = step._teacher_rows(step.modes["slow"].teacher, Part(encoded, text, batch["labels"]))
    assert torch.equal(first, second)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("mode", ["fast", "slow"])
def test_text_only_batch(model, collator, mixed_rows, mode):
    """One plain pass without a teacher; the isolator gets a gradient nevertheless."""
    batch = dict(collator(mixed_rows[2:3]))
    isolator = ModeIsolator(4, model.config.text_config.hidden_size)
    got = fast_slow_step(model, isolator=isolator)(mode, batch, 1.0)
    rows, targets = shifted(model(**{k: v for k, v in batch.items() if k != "labels"}).logits, batch["labels"])
    torch.testing.assert_close(got.loss, F.cross_entropy(rows, targets, reduction="sum"))
    assert got.kl is None
    got.loss.backward()
    assert torch.equal(isolator.weight.grad, torch.zeros_like(isolator.weight))


def test_random_reducer_draws_anew_each_step(model, batch):
    step = fast_slow_step(model, reducer="random")
    one, again, other = (step("fast", batch, 1.0, row_seed=seed).loss for seed in (1, 1, 2))
    assert one == again
    assert one != other


def test_labels_of_placeholders_are_ignored(model, batch):
    image = batch["input_ids"] == model.config.image_token_id
    spoilt = {**batch, "labels": batch["labels"].masked_fill(image, model.config.image_token_id)}
    step = fast_slow_step(model)
    for mode in ("fast", "slow"):
        assert step(mode, batch, 1.0).loss == step(mode, spoilt, 1.0).loss


def test_padding_on_the_left_equals_padding_on_the_right(model, collator, mixed_rows):
    """With a label on all that a row has: nothing predicts its first token, wherever the padding is."""
    batch = dict(collator([mixed_rows[0], mixed_rows[2], mixed_rows[3]]))
    batch["labels"] = batch["input_ids"].clone()
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    left = {
        name: torch.stack([row.roll(-length) for row, length in zip(value, lengths, strict=True)])
        if value.shape == batch["labels"].shape
        else value
        for name, value in batch.items()
    }
    step = fast_slow_step(model)
    for mode in ("fast", "slow"):
        torch.testing.assert_close(step(mode, left, 1.0).loss, step(mode, batch, 1.0).loss)
