"""Counts in closed form, compared to torch's counter on stock models, and to the published budgets."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from benchmarks.flops import cache_bytes, count, decode_flops, prefill_flops
from benchmarks.shapes import SHAPES, build_shape, get_shape, shape_config
from saccade.data import digit_scenes
from saccade.errors import SaccadeError
from saccade.pruning import prune_inputs
from saccade.pruning.cache import cache_of
from saccade.skip_vision import PRESETS, SkipVisionConfig, apply_skip_vision
from saccade.skip_vision.cache import cache_name
from saccade.tiny import load_tiny
from saccade.tokens import Role
from saccade.training.flops import (
    TextShape,
    VisualRows,
    linear_flops,
    projector_flops,
    score_flops,
    skip_rows,
    tower_flops,
    training_flops,
)

VOCABULARY, PLACEHOLDER = 50, 49


def counted(work) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def small_llava() -> LlavaForConditionalGeneration:
    """Grouped keys, and all widths different, so that no two letters of a formula can be confused."""
    vision = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=24,
        patch_size=4,
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=PLACEHOLDER,
        vision_feature_layer=-2,
        image_seq_length=36,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    model.set_attn_implementation("eager")
    return model


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    return small_llava()


def prompt(text_tokens: int) -> dict:
    ids = torch.randint(0, PLACEHOLDER, (1, text_tokens + 36), generator=torch.Generator().manual_seed(0))
    ids[:, 2:38] = PLACEHOLDER
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(1)),
    }


def test_tower_and_projector_of_llava(model):
    pixels = prompt(3)["pixel_values"]
    both = counted(lambda: model.get_image_features(pixels))
    config = model.config
    assert both == tower_flops(config, 1, (6, 6)) + projector_flops(config, 1, (6, 6))
    projector = counted(lambda: model.model.multi_modal_projector(torch.zeros(1, 36, 24)))
    assert projector == projector_flops(config, 1, (6, 6))


@pytest.mark.parametrize("grid", [(8, 8), (12, 6)])
def test_tower_and_merger_of_qwen(grid):
    config = shape_config("qwen2.5-vl-7b", layers=1, width=7 * 128)
    config.text_config.vocab_size = 64
    vision = config.vision_config
    vision.depth, vision.hidden_size, vision.intermediate_size, vision.num_heads = 3, 48, 68, 2
    vision.fullatt_block_indexes, vision.window_size, vision.out_hidden_size = [1, 7], 56, 7 * 128
    assert isinstance(config, Qwen2_5_VLConfig)
    config._attn_implementation = "eager"
    tower = Qwen2_5_VLModel._from_config(config, attn_implementation="eager").visual
    patches = torch.zeros(grid[0] * grid[1], 3 * 2 * 14 * 14)
    total = counted(lambda: tower(patches, grid_thw=torch.tensor([[1, *grid]])))
    assert total == tower_flops(config, 1, grid) + projector_flops(config, 1, grid)


@pytest.mark.parametrize("grid", [(8, 8), (12, 6)])
def test_tower_and_mergers_of_qwen3(grid):
    config = shape_config("qwen3-vl-4b", layers=1)
    config.text_config.vocab_size = 64
    vision = config.vision_config
    vision.depth, vision.hidden_size, vision.intermediate_size, vision.num_heads = 3, 48, 68, 2
    vision.deepstack_visual_indexes, vision.out_hidden_size = [0, 1], 56
    tower = Qwen3VLVisionModel._from_config(vision, attn_implementation="eager")
    patches = torch.zeros(grid[0] * grid[1], 3 * 2 * 16 * 16)
    total = counted(lambda: tower(patches, grid_thw=torch.tensor([[1, *grid]])))
    assert total == tower_flops(config, 1, grid) + projector_flops(config, 1, grid)


@pytest.mark.parametrize("keep", [36, 20, 4])
def test_prefill_on_all_and_on_kept_tokens(model, keep):
    inputs = prompt(9)
    inputs = prune_inputs(model, inputs, reducer="uniform", prune_ratio=1 - keep / 36)
    assert int((inputs["input_ids"] == PLACEHOLDER).sum()) == keep
    text = TextShape.of(model.config)
    with torch.no_grad():
        assert counted(lambda: model(**inputs, logits_to_keep=1)) == prefill_flops(text, VisualRows(keep), 9)


@pytest.mark.parametrize(("retained", "skipped"), [(7, 11), (20, 16), (30, 0)])
def test_prefill_decoding_and_cache_with_skips(retained, skipped):
    model = small_llava()
    skip = apply_skip_vision(model, SkipVisionConfig(retained=retained, skipped=skipped, split="uniform"))
    inputs = skip.prepare(prompt(9))
    rows = skip_rows(skip.config, 36)
    roles = inputs["skip_roles"][0].tolist()
    assert rows == VisualRows(*(roles.count(role) for role in (Role.RETAINED, Role.SUMMARY, Role.SKIPPED)))
    text = TextShape.of(model.config)
    with torch.no_grad():
        output = model(**inputs, logits_to_keep=1, use_cache=True)
        stored = sum(x.nbytes for layer in cache_of(output).layers for x in (layer.keys, layer.values))
        assert stored == cache_bytes(text, rows.kept + 9, 4)
        step = {"input_ids": torch.tensor([[5]]), cache_name(model.forward): cache_of(output)}
        assert counted(lambda: model(**step)) == decode_flops(text, rows.kept + 9)
    with torch.no_grad():
        assert counted(lambda: model(**inputs, logits_to_keep=1)) == prefill_flops(text, rows, 9)


@pytest.mark.parametrize("trained", ["language", "projector"])
@pytest.mark.parametrize("skipped", [0, 10])
def test_training(trained, skipped):
    model = small_llava()
    if skipped:
        config = SkipVisionConfig(retained=8, skipped=skipped, split="uniform", summary=False)
        inputs, rows = apply_skip_vision(model, config).prepare(prompt(9)), VisualRows(8, 0, skipped)
    else:
        inputs, rows = prune_inputs(model, prompt(9), reducer="uniform", prune_ratio=0.5), VisualRows(18)
    features = inputs["mm_encoder_outputs"]["image"]
    features.pooler_output = [x.detach().requires_grad_() for x in features.pooler_output]
    for parameter in model.parameters():
        parameter.requires_grad_(trained == "language")
    total = counted(lambda: model(**inputs, logits_to_keep=5, use_cache=False).logits.sum().backward())
    assert total == training_flops(TextShape.of(model.config), rows, 9, 5, trained)


TABLE = {  # visual rows only, prompt with 60 text tokens, cache rows: per cent of the full model; Llama-3-8B
    (100, 156, 576): (22.9, 30.1, 25.5),
    (256, 320, 576): (55.5, 60.2, 50.0),
    (576, 576, 2880): (23.9, 25.0, 21.7),
    (272, 256, 1296): (24.9, 28.0, 24.6),
}


@pytest.mark.parametrize("budget", TABLE)
def test_published_budgets(budget):
    retained, skipped, full = budget
    text = TextShape.of(shape_config("llama3-8b"))
    whole, rows = VisualRows(full), VisualRows(retained, 2, skipped)

    def prompt_flops(rows: VisualRows) -> int:
        return linear_flops(text, rows, 60) + score_flops(text, rows.total + 60, "causal")

    shares = (
        linear_flops(text, rows) / linear_flops(text, whole),
        prompt_flops(rows) / prompt_flops(whole),
        cache_bytes(text, rows.kept + 60) / cache_bytes(text, whole.total + 60),
    )
    assert [round(100 * share, 1) for share in shares] == list(TABLE[budget])


def test_the_share_of_a_skipped_row():
    shares = {name: TextShape.of(shape_config(name)).skipped_share for name in ("llama3-8b", "llava-1.5-7b")}
    assert {name: round(100 * share, 1) for name, share in shares.items()} == {"llama3-8b": 19.2, "llava-1.5-7b": 33.2}


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "576/576"])
def test_rows_of_presets_are_those_of_the_embedded_model(preset):
    model, processor = load_tiny()
    skip = apply_skip_vision(model, SkipVisionConfig.preset(preset))
    row = digit_scenes("sft", "test", 1, kinds=["count"])[0]
    text = processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}])
    inputs = skip.prepare(processor(images=row["images"], text=text, return_tensors="pt"))
    roles = inputs["skip_roles"][0].tolist()
    found = VisualRows(*(roles.count(role) for role in (Role.RETAINED, Role.SUMMARY, Role.SKIPPED)))
    assert skip_rows(skip.config, 144) == found


def test_rows_of_a_thumbnail():
    assert skip_rows(SkipVisionConfig.preset("576/576"), 576) == VisualRows(576, 2, 576)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llava-1.5-7b", 7.06),
        ("llava-next-7b", 7.06),
        ("qwen2.5-vl-7b", 8.29),
        ("qwen3-vl-4b", 4.44),
        ("llama3-8b", 8.03),
        ("llava-llama3-8b", 8.36),
    ],
)
def test_shapes_have_the_published_number_of_weights(name, billions):
    model = build_shape(name, device="meta")
    assert round(sum(p.numel() for p in model.parameters()) / 1e9, 2) == billions
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_is_counted(name):
    shape = get_shape(name)
    full = count(shape, shape_config(name), VisualRows(shape.visual_tokens))
    few = count(shape, shape_config(name), VisualRows(shape.visual_tokens // 10))
    assert all(0 < few[key] < full[key] for key in ("prefill", "decode_step", "training", "cache_bytes"))
    assert few["tower"] == full["tower"]


def test_a_cut_shape_keeps_its_heads():
    text = shape_config("llama3-8b", layers=2, width=1024).get_text_config()
    assert (text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads) == (2, 8, 2)
    assert build_shape("llama3-8b", layers=1, width=512, device="meta").config.intermediate_size == 1792


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (lambda: get_shape("llava"), "shape='llava'"),
        (lambda: shape_config("tiny", layers=0), "layers=0"),
        (lambda: shape_config("llama3-8b", width=100), "width=100"),
        (lambda: VisualRows(-1), "retained=-1"),
        (lambda: count(get_shape("tiny"), shape_config("tiny"), VisualRows(4), 5, 6), "label_rows=6"),
        (lambda: score_flops(TextShape.of(shape_config("tiny")), 4, "flash"), "attention='flash'"),
        (lambda: skip_rows(SkipVisionConfig(split="scale"), 150), "tokens=150"),
        (lambda: training_flops(TextShape.of(shape_config("tiny")), VisualRows(4), 5, 5, "tower"), "trained='tower'"),
    ],
)
def test_bad_input(work, message):
    with pytest.raises(SaccadeError, match=message):
        work()
