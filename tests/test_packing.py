"""Batches without padding: the same losses and gradients as with it, on every family that can."""

import copy

import pytest
import torch
import torch.nn.attention.varlen as varlen
import torch.nn.functional as F
from family_models import FAMILIES, WITH_VIDEO, VideoCase
from helpers import ORDINARY, losses, make_trainer
from transformers import LlavaForConditionalGeneration, MistralConfig, TrainerCallback

from saccade import SaccadeError
from saccade.data import digit_scenes
from saccade.dualspeed import packing
from saccade.dualspeed.packing import PACKED, PackedRows, allow_packing, pack, packed_attention, packing_pays
from saccade.families import get_family
from saccade.pruning import ModeInputs
from saccade.testing import families as tester
from saccade.testing.training import make_config
from saccade.tiny import build_tiny_llava
from saccade.training.console import opening

CAUSAL = [name for name in FAMILIES if name != "gemma3"]
CASES = {name: tester.Case(name, FAMILIES[name]) for name in FAMILIES}
VIDEO_CASES = {name: VideoCase(name, FAMILIES[name]) for name in WITH_VIDEO}


@pytest.mark.interfaces
@pytest.mark.parametrize("reducer", ["divprune", "avgpool"])
@pytest.mark.parametrize("name", CAUSAL)
def test_packed_rows_train_as_padded_ones(name, reducer):
    tester.check_padding_free(CASES[name], reducer)


@pytest.mark.parametrize("name", WITH_VIDEO)
def test_packed_rows_of_videos_train_as_padded_ones(name):
    tester.check_padding_free(VIDEO_CASES[name], "divprune")


@pytest.mark.parametrize(
    ("dtype", "short", "block"),
    [("float32", 512, 256), ("bfloat16", 512, 256), ("bfloat16", 512, 2), ("bfloat16", 3, 2), ("bfloat16", 0, 256)],
)
def test_attention_of_a_row_is_to_itself_alone(dtype, short, block, monkeypatch):
    """Against softmax(QK^T) under a block-diagonal causal mask, with fewer key heads than query heads."""
    monkeypatch.setattr(packing, "SHORT", short)
    monkeypatch.setattr(packing, "BLOCK", block)
    torch.manual_seed(0)
    lengths, width = [3, 1, 5], 4
    query = torch.randn(1, 4, 9, width).to(getattr(torch, dtype)).requires_grad_()
    key, value = (torch.randn(1, 2, 9, width).to(query.dtype).requires_grad_() for _ in range(2))
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    rows = PackedRows(lengths, torch.tensor([0, 3, 4, 9], dtype=torch.int32))
    got, _ = packed_attention(module, query, key, value, None, scaling=0.3, packed_rows=rows)
    row = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 2])
    seen = (row[:, None] == row[None]) & torch.ones(9, 9).tril().bool()
    exact = [x.detach().float().requires_grad_() for x in (query, key, value)]
    heads = []
    for head in range(4):
        scores = 0.3 * exact[0][0, head] @ exact[1][0, head // 2].T
        heads.append(scores.masked_fill(~seen, -torch.inf).softmax(-1) @ exact[2][0, head // 2])
    expected = torch.stack(heads, dim=1)[None]
    near = {"rtol": 0.02, "atol": 0.03} if dtype == "bfloat16" else {}
    torch.testing.assert_close(got.float(), expected, **near)
    weights = torch.randn_like(expected)
    (got.float() * weights).sum().backward()
    (expected * weights).sum().backward()
    for one, other in zip((query, key, value), exact, strict=True):
        torch.testing.assert_close(one.grad.float(), other.grad, **near)


@pytest.mark.parametrize("takes_groups", [False, True])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_torch_that_takes_no_grouped_heads_is_given_as_many_keys_as_queries(key_heads, takes_groups, monkeypatch):
    """With stand-ins that have the parameters of torch 2.11 and 2.13, on a CPU, where neither runs."""
    heads = []

    def attention(query, key, value, ends, scale, groups):
        heads.append(key.shape[1])
        rows = (x.split(ends.diff().tolist()) for x in (query, key, value))
        options = {"is_causal": True, "scale": scale, "enable_gqa": groups}
        return torch.cat(
            [
                F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in row), **options).transpose(0, 1)
                for row in zip(*rows, strict=True)
            ]
        )

    def torch_2_11(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)):
        assert window_size == (-1, 0)
        assert q.shape[1] == k.shape[1] == v.shape[1]
        return attention(q, k, v, cu_seq_q, scale, False)

    def torch_2_13(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
        assert window_size == (-1, 0)
        assert enable_gqa == (q.shape[1] != k.shape[1])
        return attention(q, k, v, cu_seq_q, scale, enable_gqa)

    monkeypatch.setattr(varlen, "varlen_attn", torch_2_13 if takes_groups else torch_2_11)
    query, key, value = (torch.randn(1, count, 9, 8) for count in (4, key_heads, key_heads))
    rows = PackedRows([3, 1, 5], torch.tensor([0, 3, 4, 9], dtype=torch.int32))
    module = torch.nn.Module()
    module.num_key_value_groups = 4 // key_heads
    expected, _ = packed_attention(module, query, key, value, None, scaling=0.3, packed_rows=rows)
    got = packing._variable_length_attention(query, key, value, 0.3, rows)
    torch.testing.assert_close(got, expected)
    assert heads == [key_heads if takes_groups else 4]


def test_no_padding_runs_and_no_row_is_a_label_of_another(monkeypatch):
    """Every word is learned here, the first of each row too: it has no token before it."""
    case = CASES["llava"]
    family = get_family(copy.deepcopy(case.model))
    allow_packing(family)
    batch = {**case.batch, "labels": case.batch["input_ids"].masked_fill(case.batch["attention_mask"] == 0, -100)}
    step = tester.make_step(family, "divprune", None)
    expected = step("slow", batch, 1.0).loss
    seen = []
    original = family.hidden_states
    monkeypatch.setattr(family, "hidden_states", lambda **inputs: seen.append(inputs) or original(**inputs))
    step.padding_free = True
    torch.testing.assert_close(step("slow", batch, 1.0).loss, expected)
    fast, slow = seen
    assert slow["input_ids"].shape == slow["position_ids"].shape == (1, batch["attention_mask"].sum())
    assert fast["input_ids"].shape[1] < slow["input_ids"].shape[1]


def test_batches_with_padding_and_generation_run_as_before():
    case = CASES["llava"]
    model = copy.deepcopy(case.model)
    options = tester.generation_options(case)
    expected = [tester.logits(model, case.inputs), model.generate(**case.prompts(), **options)]
    allow_packing(get_family(model))
    assert model.config.text_config._attn_implementation == PACKED
    assert PACKED not in str(model.config.to_dict())
    got = [tester.logits(model, case.inputs), model.generate(**case.prompts(), **options)]
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


def test_attention_that_cannot_be_cut_is_refused():
    with pytest.raises(SaccadeError, match=r"padding_free=True: model_type='gemma3'.*set it to false"):
        allow_packing(get_family(copy.deepcopy(CASES["gemma3"].model)))
    # Mistral windows every layer by a mask alone, and names no types of layers.
    config = copy.deepcopy(CASES["llava"].model.config)
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config.text_config = MistralConfig(**text, num_key_value_heads=2, vocab_size=200, sliding_window=16)
    with pytest.raises(SaccadeError, match=r"model_type='llava' with a language model of 'mistral'"):
        allow_packing(get_family(LlavaForConditionalGeneration(config)))
    config.text_config.sliding_window = None
    allow_packing(get_family(LlavaForConditionalGeneration(config)))
    model = copy.deepcopy(CASES["llava"].model)
    model.set_attn_implementation("eager")
    with pytest.raises(SaccadeError, match=r"attn_implementation='eager': use 'sdpa'"):
        allow_packing(get_family(model))


@pytest.mark.gpu
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("autocast", [False, True])
def test_variable_length_attention_on_a_gpu_is_that_of_the_loop(key_heads, autocast):
    """Forward and backward; under autocast rotary embeddings leave queries and keys in float32."""
    torch.manual_seed(0)
    drawn = [torch.randn(1, heads, 202, 64, device="cuda").bfloat16() for heads in (4, key_heads, key_heads)]
    dtypes = [torch.float32, torch.float32, torch.bfloat16] if autocast else [torch.bfloat16] * 3
    module = torch.nn.Module()
    module.num_key_value_groups = 4 // key_heads
    rows = PackedRows([70, 3, 129], torch.tensor([0, 70, 73, 202], dtype=torch.int32, device="cuda"))
    found = []
    for given, on in ((dtypes, autocast), ([torch.float32] * 3, False)):
        tensors = [x.to(dtype).requires_grad_() for x, dtype in zip(drawn, given, strict=True)]
        with torch.autocast("cuda", torch.bfloat16, enabled=on):
            output, _ = packed_attention(module, *tensors, None, packed_rows=rows)
        output.float().square().sum().backward()
        found.append([output, *(x.grad for x in tensors)])
    assert found[0][0].dtype == torch.bfloat16
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got.float(), expected, rtol=5e-2, atol=5e-2)


def test_autocast_casts_what_rotary_embeddings_leave():
    query, key, value = torch.randn(3, 1, 2, 5, 4)
    rows = PackedRows([2, 3], torch.tensor([0, 2, 5], dtype=torch.int32))
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = packed_attention(torch.nn.Module(), query, key, value.bfloat16(), None, packed_rows=rows)
    assert got.dtype == torch.bfloat16


def test_the_loop_and_flash_agree_on_what_a_row_is():
    """What a stock flash implementation is told, which no CPU can run."""
    case = CASES["llava"]
    family = get_family(copy.deepcopy(case.model))
    family.language_model.config._attn_implementation_internal = "flash_attention_2"
    allow_packing(family)
    text = family.without_vision(case.inputs)
    laid = pack(ModeInputs(dict(text), case.batch["labels"], text["attention_mask"].sum()), family)
    lengths = text["attention_mask"].sum(dim=1)
    assert laid.inputs["attention_mask"] is None
    assert laid.inputs["max_length_q"] == laid.inputs["max_length_k"] == lengths.max()
    ends = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    assert torch.equal(laid.inputs["cu_seq_lens_q"], ends)
    assert torch.equal(laid.inputs["cu_seq_lens_k"], ends)


@pytest.mark.parametrize(
    ("options", "packs"),
    [
        ({}, True),
        ({"padding_free": False}, False),
        (ORDINARY, False),
        ({"skip_vision": "100/156"}, False),
        ({"neftune_noise_alpha": 5.0}, False),
        ({"neftune_noise_alpha": 0.0}, True),
    ],
    ids=["by default", "told not to", "stock steps", "a mode that skips", "noise", "no noise"],
)
def test_rows_are_packed_on_a_cpu_unless_something_is_against_it(processor, tmp_path, options, packs):
    trainer = make_trainer(build_tiny_llava(processor, seed=0), processor, tmp_path, **options)
    assert trainer.packs_rows == packs
    assert (trainer.family.language_model.config._attn_implementation == PACKED) == packs
    assert opening(trainer, "tiny", "digits", 144)[-2].endswith(", without padding") == packs


@pytest.mark.parametrize("name", CASES)
def test_packing_pays_on_a_cpu_and_where_layers_are_simply_causal(name):
    family = CASES[name].family
    assert packing_pays(family, torch.device("cpu")) == (name in CAUSAL)
    assert not packing_pays(family, torch.device("cuda"))


@pytest.mark.parametrize(
    "options",
    [
        {"slow_probability": 0.5, "gradient_checkpointing": True},
        {**ORDINARY, "gradient_accumulation_steps": 2},
        {"slow_probability": 0.5, "slow_micro_batch_size": 3},
    ],
    ids=["checkpointing", "ordinary", "in parts"],
)
def test_a_run_without_padding_is_the_run_with_it(processor, tmp_path, options):
    """Losses and weights; rows of similar length leave nothing to test, so that they come as they are."""
    runs = []
    for free in (False, True):
        trainer = make_trainer(
            build_tiny_llava(processor, seed=0), processor, tmp_path / str(free), padding_free=free, **options
        )
        trainer.train()
        assert trainer.args.padding_free == free
        runs.append(trainer)
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), abs=1e-4)
    assert len(losses(runs[0])) == 4
    for name, value in runs[0].model.state_dict().items():
        torch.testing.assert_close(runs[1].model.state_dict()[name], value, rtol=1e-3, atol=1e-4)
    evaluated = [run.evaluate(digit_scenes("sft", "validation", 8))["eval_loss"] for run in runs]
    assert evaluated[0] == pytest.approx(evaluated[1], abs=1e-4)


@pytest.mark.parametrize("slow", [0.0, 1.0])
def test_noise_is_scaled_by_the_length_of_the_rows_that_run(processor, tmp_path, slow):
    """alpha / sqrt(length x width), of the pruned row in a fast step; neither packing nor parts change the length."""
    model = build_tiny_llava(processor, seed=0)
    options = {"slow_probability": slow, "max_steps": 1, "neftune_noise_alpha": 5.0, "distill_weight": 0.0}
    trainer = make_trainer(model, processor, tmp_path, **options, **({"slow_micro_batch_size": 3} if slow else {}))
    embed, found, whole = model.get_input_embeddings(), [], []

    def spy(module, given, output):
        noise = (output - F.embedding(given[0], module.weight)).abs().max().item()
        found.append((output.shape, noise))

    def attach(args, state, control, **kwargs):
        embed.register_forward_hook(spy)  # after that of the noise

    def see(mode, batch, *rest):
        whole.append(batch["input_ids"].shape)
        return run(mode, batch, *rest)

    callback = TrainerCallback()
    callback.on_train_begin = attach
    trainer.add_callback(callback)
    run, trainer._step = trainer._step, see
    trainer.train()
    (batch,) = whole
    rows, length, width = (sum(shape[0] for shape, _ in found), found[0][0][1], found[0][0][2])
    assert rows == batch[0] == 4
    assert {shape[1] for shape, _ in found} == {length}
    assert (length == batch[1]) == bool(slow)
    for _, noise in found:
        assert noise == pytest.approx(5.0 / (length * width) ** 0.5, rel=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"padding_free": True, "skip_vision": "100/156"}, "padding_free=True does not go with modes that skip"),
        ({"packing": True}, "packing=True .*set padding_free=True"),
        ({"padding_free": True, "neftune_noise_alpha": 5.0}, "padding_free=True with neftune_noise_alpha=5.0: "),
        (
            {"slow_micro_batch_size": 2, "neftune_noise_alpha": 5.0, "fit_length": 64, "fit_slow": True},
            "slow_micro_batch_size=2 with neftune_noise_alpha=5.0 and rows that are made to fit",
        ),
    ],
)
def test_what_cannot_be_packed_is_refused(tmp_path, options, message):
    with pytest.raises(SaccadeError, match=message):
        make_config(tmp_path, **options)
