"""Invariants of splicing on the real forward: what a pruned pass must equal."""

import pytest
import torch
from family_models import FAMILIES

from saccade import SaccadeError, prune_inputs
from saccade.data import digit_scenes
from saccade.evaluation.digits import collate_prompts
from saccade.families import get_family
from saccade.pruning import ModeIsolator
from saccade.reducers import PruningConfig, get_reducer, keep_counts, list_reducers
from saccade.reducers.divprune import DivPrune


def forward(model, inputs):
    return model(**inputs, use_cache=False).logits


def real(logits, mask):
    return logits[mask.bool()]


@pytest.fixture
def batch(collator, mixed_rows):
    batch = dict(collator(mixed_rows))
    batch.pop("labels")
    return batch


@pytest.fixture
def prompts(processor, mixed_rows):
    return dict(collate_prompts(processor, mixed_rows))


@pytest.mark.parametrize(
    ("reducer", "positions"), [*((name, "compact") for name in list_reducers()), ("divprune", "original")]
)
def test_ratio_zero_is_the_stock_model(model, batch, reducer, positions):
    pruned = prune_inputs(model, batch, reducer=reducer, prune_ratio=0.0, positions=positions, padding_side="right")
    assert torch.equal(pruned["input_ids"], batch["input_ids"])
    got = real(forward(model, pruned), pruned["attention_mask"])
    assert torch.equal(got, real(forward(model, batch), batch["attention_mask"]))


@pytest.mark.parametrize("reducer", ["divprune", "random", "uniform"])
def test_original_positions_equal_masking_the_dropped_tokens(model, batch, reducer):
    """The full sequence with the dropped tokens hidden from attention gives the same logits on what stays."""
    pruned = prune_inputs(model, batch, reducer=reducer, prune_ratio=0.8, positions="original", padding_side="right")
    family = get_family(model)
    encoded = family.encode(batch)
    reduction = get_reducer(reducer)(
        encoded.context, keep=keep_counts(encoded.context, PruningConfig(prune_ratio=0.8))
    )
    kept = torch.zeros(encoded.context.shape[:2], dtype=torch.bool).scatter_(1, reduction.index, True)
    hidden = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    hidden[family.placeholder(batch["input_ids"])] = ~kept.reshape(-1)
    mask = batch["attention_mask"].masked_fill(hidden, 0)
    positions = torch.arange(mask.shape[1]).expand_as(mask)
    full = forward(model, {**batch, "attention_mask": mask, "position_ids": positions})
    torch.testing.assert_close(
        real(forward(model, pruned), pruned["attention_mask"]), real(full, mask), rtol=1e-4, atol=1e-4
    )


def test_compact_positions_do_differ_from_original(model, batch):
    compact, original = (
        prune_inputs(model, batch, reducer="uniform", prune_ratio=0.8, positions=positions, padding_side="right")
        for positions in ("compact", "original")
    )
    assert torch.equal(compact["input_ids"], original["input_ids"])
    assert compact["position_ids"].max() < original["position_ids"].max()
    assert not torch.allclose(forward(model, compact), forward(model, original), atol=1e-3)


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("length", [0, 4])
def test_batch_equals_one_by_one(model, processor, mixed_rows, positions, length):
    isolator = ModeIsolator(length, model.config.text_config.hidden_size) if length else None
    together = dict(collate_prompts(processor, mixed_rows))
    pruned = prune_inputs(model, together, reducer="divprune", prune_ratio=0.9, isolator=isolator, positions=positions)
    logits = forward(model, pruned)[:, -1]
    for row, expected in zip(mixed_rows, logits, strict=True):
        alone = prune_inputs(
            model,
            dict(collate_prompts(processor, [row])),
            reducer="divprune",
            prune_ratio=0.9,
            isolator=isolator,
            positions=positions,
        )
        torch.testing.assert_close(forward(model, alone)[0, -1], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("positions", ["compact", "original"])
def test_left_padding_equals_right_padding(model, batch, positions):
    sides = [
        prune_inputs(model, batch, reducer="divprune", prune_ratio=0.9, positions=positions, padding_side=side)
        for side in ("left", "right")
    ]
    left, right = (real(forward(model, side), side["attention_mask"]) for side in sides)
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reducer", ["divprune", "avgpool"])
@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("rows", [slice(0, 4), slice(0, 1)], ids=["padded", "single"])
def test_cached_generation_equals_uncached(model, processor, mixed_rows, reducer, positions, rows):
    """A single row has no padding, and its all-ones mask is dropped by `generate`."""
    inputs = dict(collate_prompts(processor, mixed_rows[rows]))
    pruned = prune_inputs(model, inputs, reducer=reducer, prune_ratio=0.9, positions=positions)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    cached, uncached = (model.generate(**dict(pruned), **options, use_cache=use) for use in (True, False))
    assert torch.equal(cached, uncached)
    assert cached.shape[1] == pruned["input_ids"].shape[1] + 8


def test_beams(model, processor, mixed_rows):
    pruned = prune_inputs(model, dict(collate_prompts(processor, mixed_rows)), prune_ratio=0.9, positions="original")
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 3}
    together = model.generate(**pruned, **options)[:, pruned["input_ids"].shape[1] :]
    for row, expected in zip(mixed_rows, together, strict=True):
        alone = prune_inputs(model, dict(collate_prompts(processor, [row])), prune_ratio=0.9, positions="original")
        alone_out = model.generate(**alone, **options)[0, alone["input_ids"].shape[1] :]
        assert torch.equal(alone_out, expected[: len(alone_out)])


def test_isolator_rows_stand_before_each_image(model, prompts):
    isolator = ModeIsolator(3, model.config.text_config.hidden_size)
    family = get_family(model)
    without = prune_inputs(model, prompts, reducer="uniform", prune_ratio=0.9)
    with_rows = prune_inputs(model, prompts, reducer="uniform", prune_ratio=0.9, isolator=isolator)
    images = prompts["pixel_values"].shape[0]
    extra = family.placeholder(with_rows["input_ids"]).sum() - family.placeholder(without["input_ids"]).sum()
    assert extra == 3 * images
    for plain, isolated in zip(
        without["mm_encoder_outputs"]["image"].pooler_output,
        with_rows["mm_encoder_outputs"]["image"].pooler_output,
        strict=True,
    ):
        assert torch.equal(isolated, torch.cat((isolator.weight, plain)))


def test_text_only_batch_passes_through(model, processor, mixed_rows):
    inputs = dict(collate_prompts(processor, mixed_rows[2:3]))
    pruned = prune_inputs(model, inputs, reducer="divprune", prune_ratio=0.9)
    assert torch.equal(pruned["input_ids"], inputs["input_ids"])
    assert torch.equal(forward(model, pruned), forward(model, inputs))


def test_text_only_batch_is_padded_on_the_side_asked_for(model, collator, processor):
    texts = list(digit_scenes("sft", "train", 8, kinds=["text_only"]))
    inputs = dict(collator(texts))
    inputs.pop("labels")
    assert not inputs["attention_mask"].all()
    pruned = prune_inputs(model, inputs, reducer="divprune", prune_ratio=0.9)
    assert pruned["attention_mask"][:, -1].all()
    got, expected = (real(forward(model, batch), batch["attention_mask"]) for batch in (pruned, inputs))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_under_peft(model, prompts):
    from peft import LoraConfig, get_peft_model

    expected = prune_inputs(model, prompts, prune_ratio=0.9)
    wrapped = get_peft_model(model, LoraConfig(target_modules=r".*language_model.*q_proj", init_lora_weights=False))
    got = prune_inputs(wrapped, prompts, prune_ratio=0.9)
    assert torch.equal(got["input_ids"], expected["input_ids"])
    output = wrapped.generate(**got, max_new_tokens=4, do_sample=False)
    merged = wrapped.merge_and_unload()
    assert torch.equal(merged.generate(**got, max_new_tokens=4, do_sample=False), output)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prune_ratio": 1.0}, r"prune_ratio=1.0 is outside \[0, 1\)"),
        ({"prune_ratio": float("nan")}, "prune_ratio"),
        ({"reducer": "divprun"}, "divprune"),
        ({"positions": "shifted"}, "compact, original"),
        ({"isolator": "/nowhere"}, "has no mode_isolator"),
        ({"isolator": torch.zeros(4, 7)}, "width 7"),
        ({"isolator": torch.zeros(7)}, "isolator is a Tensor and not rows"),
        ({"padding_side": "middle"}, "padding_side='middle' is unknown"),
        ({"reducer_options": ["seed"]}, r"reducer_options=.* give a mapping"),
    ],
)
def test_bad_options(model, prompts, options, message):
    with pytest.raises(SaccadeError, match=message):
        prune_inputs(model, prompts, **options)


def test_inputs_that_lack_something(model, prompts):
    without_pixels = {name: value for name, value in prompts.items() if name != "pixel_values"}
    cases = [
        ({"input_ids": prompts["input_ids"]}, "inputs has no 'attention_mask'"),
        ({**prompts, "input_ids": prompts["input_ids"][0]}, r"'input_ids' is not a tensor \(samples, tokens\)"),
        (without_pixels, r"inputs has \d+ placeholders of visual tokens, but no 'pixel_values'"),
        (prune_inputs(model, prompts), "is pruned already"),
    ]
    for inputs, message in cases:
        with pytest.raises(SaccadeError, match=message):
            prune_inputs(model, inputs)


@pytest.mark.parametrize(("name", "missing"), [("llava_next", "image_sizes"), ("qwen2_5_vl", "image_grid_thw")])
def test_inputs_that_lack_sizes(name, missing, mixed_rows):
    model, processor = FAMILIES[name].build()
    inputs = {name: value for name, value in collate_prompts(processor, mixed_rows).items() if name != missing}
    with pytest.raises(SaccadeError, match=f"inputs has no '{missing}': pass all"):
        prune_inputs(model, inputs)


def test_a_reducer_s_own_key_error_is_its_own(model, prompts, monkeypatch):
    monkeypatch.setattr(DivPrune, "__call__", lambda self, context, keep: {}["mine"])
    with pytest.raises(KeyError, match="mine"):
        prune_inputs(model, prompts)


def test_placeholders_without_an_image(model, prompts):
    with pytest.raises(SaccadeError, match="placeholders"):
        prune_inputs(model, {**prompts, "pixel_values": prompts["pixel_values"][:-1]})


def test_model_without_a_family():
    from transformers import LlamaConfig, LlamaForCausalLM

    llama = LlamaForCausalLM(
        LlamaConfig(hidden_size=8, num_attention_heads=2, intermediate_size=8, num_hidden_layers=1, vocab_size=9)
    )
    with pytest.raises(SaccadeError, match=r"model_type='llama' has no family.*llava.*add-a-family"):
        get_family(llama)
