"""The dry run of recipes, compared to small formulas and published numbers; QLoRA as far as possible without a GPU."""

import json
import math
import re

import pytest
import torch
from family_models import FAMILIES, RELATIVES
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForImageTextToText, MistralConfig
from transformers.quantizers.quantizers_utils import should_convert_module

from benchmarks.shapes import build_shape, get_shape, shape_config
from saccade import SaccadeError
from saccade.cli.main import main
from saccade.families import get_family
from saccade.recipes import RECIPES
from saccade.training import ModelOptions, load_model, load_recipe, make_recipe, train_recipe
from saccade.training.costs import Costs
from saccade.training.flops import projector_flops, tower_flops
from saccade.training.lengths import SampleLength, recipe_lengths
from saccade.training.models import load_processor, quantization_options, quantized_weights
from saccade.training.plan import meta_model, plan_recipe, published_speedups
from saccade.training.run import lora_config

ALL_FAMILIES = FAMILIES | RELATIVES
REAL = sorted(path for path in RECIPES.rglob("*.yaml") if path.parent.name != "tiny-digits")
TINY = sorted((RECIPES / "tiny-digits").glob("*.yaml"))
BILLIONS = {
    "llava-1.5-7b": 7.063,
    "llava-next-7b": 7.063,
    "qwen2.5-vl-7b": 8.292,
    "qwen3-vl-4b": 4.438,
    "llava-llama3-8b": 8.355,
    "llava-1.5-13b": 13.351,
    "llava-hd-llama3-8b": 8.355,
    "chain-of-sight-224-llama3-8b": 8.36,
    "chain-of-sight-448-llama3-8b": 8.36,
}
TOKENS = {
    "llava-1.5-7b": 576,
    "llava-next-7b": 2928,
    "qwen2.5-vl-7b": 576,
    "qwen3-vl-4b": 441,
    "llava-llama3-8b": 576,
    "llava-1.5-13b": 576,
    "llava-hd-llama3-8b": 2928,
    "chain-of-sight-224-llama3-8b": 80,
    "chain-of-sight-448-llama3-8b": 1296,
}
GLOBAL_BATCH = {
    "pretrain": 256,
    "hd_pretrain": 256,
    "cos_pretrain": 256,
    "vicuna_pretrain": 256,
    "sft_lora": 128,
    "sft_full": 128,
    "sft_qlora": 128,
    "vicuna_64_156": 128,
}


def test_the_real_recipes_are_there():
    names = {str(path.relative_to(RECIPES).with_suffix("")) for path in REAL}
    stages = ("pretrain", "sft_lora", "sft_full", "sft_qlora")
    assert names >= {
        f"{model}/{stage}" for model in ("llava-1.5-7b", "llava-1.5-13b", "llava-next-7b") for stage in stages
    }
    assert names >= {f"{model}/sft_{kind}lora" for model in ("qwen2.5-vl-7b", "qwen3-vl-4b") for kind in ("", "q")}
    assert names >= {"skip-vision/pretrain", "skip-vision/sft_100_156", "skip-vision/sft_256_320"}


TWICE = ("sft_full", "sft_qlora")


def as_slow(path):
    """What differs from another recipe in its model only, or in what of it trains, shows nothing more."""
    again = path.parent.name == "llava-1.5-13b" or (path.stem in TWICE and path.parent.name != "llava-1.5-7b")
    return pytest.param(path, marks=[pytest.mark.slow] if again else [], id=f"{path.parent.name}/{path.stem}")


@pytest.mark.parametrize("path", [as_slow(path) for path in REAL])
def test_real_recipes_are_planned(path):
    plan = plan_recipe(path)
    shape = plan["shape"]
    assert plan["parameters"]["total"] == pytest.approx(BILLIONS[shape] * 1e9, rel=0.01)
    assert plan["visual_tokens"] == TOKENS[shape]
    assert plan["batch"]["global"] == GLOBAL_BATCH.get(path.stem, 64)
    assert sum(mode["probability"] for mode in plan["modes"]) == pytest.approx(1)
    assert plan["memory"]["total"] == pytest.approx(sum(v for k, v in plan["memory"].items() if k != "total"))
    # Full fine-tuning with float32 masters is for devices that share them, as the papers have it.
    full = plan["parameters"]["trainable"] > 1e9
    assert (plan["memory"]["total"] > 80 * 2**30) == full
    shared = sum(plan["memory"][name] for name in ("weights", "gradients", "masters", "optimizer")) / 8
    assert shared + plan["memory"]["activations"] < 80 * 2**30
    if "fast" in {mode["name"] for mode in plan["modes"]}:
        fast = plan["modes"][0]
        # A tenth of each picture, rounded; with newlines in the large one's share.
        assert fast["kept"] == {576: 58, 441: 44, 2928: 58 + 235}[plan["visual_tokens"]]
        # Some samples of the instruction mixture have no image.
        images, text = plan["lengths"]["images"], plan["lengths"]["text_tokens"]
        assert fast["length"] == pytest.approx(images * (fast["kept"] + 4) + text)
        assert plan["expected"]["speedup"] > 1.8
    if path.parent.name == "skip-vision" and "pretrain" not in path.stem:
        retained, skipped = map(int, re.findall(r"\d+", path.stem))
        assert (plan["modes"][0]["kept"], plan["modes"][0]["skipped"]) == (retained, skipped)


def as_tiny(path):
    return pytest.param(
        path,
        marks=[] if path.stem in ("sft_lora", "multi_speed", "chain_of_sight", "llava_hd") else [pytest.mark.slow],
        id=path.stem,
    )


@pytest.mark.parametrize("path", [as_tiny(path) for path in TINY])
def test_tiny_recipes_are_planned_before_stage_one_has_run(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    plan = plan_recipe(path)
    others = {"chain_of_sight": 16 + 64 + 144, "llava_hd": 36 + 144 + 12}
    assert plan["visual_tokens"] == others.get(path.stem, 144)
    assert plan["parameters"]["total"] == sum(p.numel() for p in build_shape(plan["shape"]).parameters())
    assert list(tmp_path.iterdir()) == []


def forward(visual: int, text: int, label_rows: int) -> tuple[int, int]:
    """Forward of Vicuna-7B: products with weights, and scores."""
    rows, width, inner, layers = visual + text, 4096, 11008, 32
    weights = layers * rows * (4 * width**2 + 3 * width * inner) + label_rows * width * 32064
    return 2 * weights, 2 * layers * 2 * rows**2 * width


@pytest.mark.parametrize(("ratio", "slow"), [(0.9, 0.1), (0.5, 0.3), (0.9, 0.0)])
def test_the_speedup_of_full_fine_tuning(ratio, slow):
    text, labels = 100, 40
    head = 2 * labels * 4096 * 32064
    kept = math.floor(576 * (1 - ratio) + 0.5)
    overrides = ["--prune_ratio", str(ratio), "--slow_probability", str(slow)]
    plan = plan_recipe("llava-1.5-7b/sft_full", overrides, text_tokens=text, label_rows=labels)

    def trained(visual: int) -> int:
        # Forward, a backward of twice as much, and the layers' forward again, for checkpointing.
        whole = sum(forward(visual, text, labels))
        return 3 * whole + whole - head

    full, fast = trained(576), trained(kept + 4)
    teacher = sum(forward(kept + 4, text, labels))
    language = (1 - slow) * fast + slow * (full + teacher)
    shape, config = get_shape("llava-1.5-7b"), shape_config("llava-1.5-7b")
    vision = tower_flops(config, 1, shape.grid) + 3 * projector_flops(config, 1, shape.grid)
    assert plan["expected"]["speedup_language"] == pytest.approx(full / language, rel=1e-9)
    assert plan["expected"]["speedup"] == pytest.approx((full + vision) / (language + vision), rel=1e-9)
    assert plan["expected"]["length"] == pytest.approx((1 - slow) * (text + kept + 4) + slow * (text + 576))


def test_adapters_are_counted_and_frozen_weights_get_no_gradient():
    options = ["--lora_r", "8", "--gradient_checkpointing", "false"]
    plan = plan_recipe("llava-1.5-7b/sft_lora", options, text_tokens=124, label_rows=62)
    assert plan["parameters"]["adapters"] == 32 * 8 * (4 * 2 * 4096 + 3 * (4096 + 11008))
    assert plan["parameters"]["trainable"] == plan["parameters"]["adapters"] + 1024 * 4096 + 4096**2 + 2 * 4096
    weights, scores = forward(576, 124, 62)
    adapters = 2 * 700 * plan["parameters"]["adapters"]
    assert plan["baseline"]["language_flops"] == 2 * weights + 3 * scores + 3 * adapters


def test_images_of_a_sample_are_counted():
    """Each has its tokens and its pass through the tower, and the scores of a row grow with its square."""
    flags = ["--max_length", "9000", "--gradient_checkpointing", "false", "--slow_probability", "0"]
    plan = plan_recipe("llava-1.5-7b/sft_full", flags, text_tokens=100, label_rows=40, images=8)
    assert (plan["lengths"]["images"], plan["baseline"]["length"]) == (8, 8 * 576 + 100)
    assert plan["modes"][0]["length"] == 8 * (58 + 4) + 100
    assert plan["baseline"]["language_flops"] == 3 * sum(forward(8 * 576, 100, 40))
    shape, config = get_shape("llava-1.5-7b"), shape_config("llava-1.5-7b")
    vision = tower_flops(config, 1, shape.grid) + 3 * projector_flops(config, 1, shape.grid)
    assert plan["baseline"]["flops"] - plan["baseline"]["language_flops"] == 8 * vision


def test_memory_of_weights_gradients_and_optimizer():
    full = plan_recipe("llava-1.5-7b/sft_full")
    count, trained = full["parameters"]["total"], full["parameters"]["trainable"]
    own = full["parameters"]["own"]
    assert own == 4 * 4096
    assert full["memory"]["weights"] == 2 * count + 4 * own
    assert full["memory"]["gradients"] == 2 * trained + 4 * own
    assert full["memory"]["masters"] == 4 * trained
    assert full["memory"]["optimizer"] == 8 * (trained + own)
    assert full["memory"]["activations"] >= 2 * trained
    without = plan_recipe("llava-1.5-7b/sft_full", ["--float32_masters", "false"])["memory"]
    assert without["masters"] == 0
    assert without["optimizer"] == 4 * trained + 8 * own
    assert without["total"] < 80 * 2**30
    eight = plan_recipe("llava-1.5-7b/sft_full", ["--optim", "adamw_8bit"])["memory"]
    assert (eight["masters"], eight["optimizer"]) == (4 * trained, 2 * (trained + own))
    shared = plan_recipe("llava-1.5-7b/sft_full", ["--dtype", "float32"], shards=8)
    assert shared["memory"]["weights"] == pytest.approx((4 * count + 4 * own) / 8)
    assert shared["memory"]["masters"] == 0
    four = plan_recipe("llava-1.5-7b/sft_qlora", ["--lora_r", "8"])
    inside = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    outside = 4 * (count - inside + four["parameters"]["trainable"] + own)
    assert four["memory"]["weights"] == pytest.approx(inside * 4.127 / 8 + outside, rel=1e-4)


def test_activations_of_slow_steps_in_parts():
    """Those of as many samples at a time, or of a whole fast step where that is more."""
    base, half, one = (
        plan_recipe("tiny-digits/sft", ["--slow_micro_batch_size", size], text_tokens=40)["memory"]["activations"]
        for size in ("32", "16", "1")
    )
    fast = plan_recipe("tiny-digits/sft", ["--slow_probability", "0"], text_tokens=40)["memory"]["activations"]
    assert half == max(base / 2, fast)
    assert one == fast < base


def test_samples_that_do_not_fit_are_counted():
    """One image of 144 tokens and a text of 100: the bound holds where it is said, and nothing is refused."""
    ordinary = ["--prune_ratio", "0", "--slow_probability", "1", "--distill_weight", "0"]
    lengths = {}
    for name, flags in (
        ("free", []),
        ("fast", ["--fit_length", "110"]),
        ("both", ["--fit_length", "110", "--fit_slow", "true"]),
        ("wide", ["--fit_length", "244", "--fit_slow", "true", "--max_length", "120"]),
        ("ordinary", ordinary),
        ("ordinary fits", [*ordinary, "--fit_length", "150", "--fit_slow", "true"]),
    ):
        plan = plan_recipe("tiny-digits/sft", flags, text_tokens=100, label_rows=50)
        lengths[name] = [(mode["length"], mode["cut"]) for mode in plan["modes"]]
    fast = 100 + 4 + 14
    assert lengths == {
        "free": [(fast, 0), (244, 0)],
        "fast": [(110, 1), (244, 0)],
        "both": [(110, 1), (110, 1)],
        "wide": [(fast, 0), (244, 0)],
        "ordinary": [(244, 0)],
        "ordinary fits": [(150, 1)],
    }


def test_lengths_come_from_the_recipes_own_rows(tmp_path):
    """Of a file that is there: its tokens, its images, its number of rows; or characters, without a tokenizer."""
    answer = "one two three four five six seven"
    rows = [
        {"messages": [{"role": "user", "content": "<image> what ?"}, {"role": "assistant", "content": answer}]},
        {"messages": [{"role": "user", "content": "what ?"}, {"role": "assistant", "content": answer}]},
    ]
    for row, images in zip(rows, (["a.png"], []), strict=True):
        row["images"] = images
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows * 3))
    (tmp_path / "a.png").write_bytes(b"never opened")
    words = ["--model", "tiny", "--dataset", str(path), "--max_steps", "-1"]
    plan = plan_recipe("tiny-digits/sft", words)
    held_out = plan_recipe("tiny-digits/sft", [*words, "--eval_share", "0.3", "--eval_strategy", "epoch"])
    recipe = make_recipe({"model": "tiny", "dataset": str(path), "use_cpu": True, "bf16": False})
    counted = recipe_lengths(recipe, "tiny")
    assert (counted.records, len(counted.samples)) == (6, 6)
    assert {sample.images for sample in counted.samples} == {0, 1}
    processor = load_processor(recipe.options)[0]
    texts = [processor.apply_chat_template(row["messages"], tokenize=False) for row in rows]
    # The placeholder of an image counts as one of its visual tokens, elsewhere.
    ids = [len(processor.tokenizer(text.replace("<image>", ""))["input_ids"]) for text in texts]
    assert plan["lengths"]["text_tokens"] == pytest.approx(sum(ids) / 2, abs=1)
    assert plan["lengths"]["images"] == 0.5
    assert plan["lengths"]["source"].endswith("counted by its tokenizer")
    epochs = load_recipe("tiny-digits/sft").trainer.num_train_epochs
    assert plan["schedule"]["stages"][-1]["samples"] == 6 * epochs
    assert held_out["schedule"]["stages"][-1]["samples"] == 4 * epochs
    by_characters = recipe_lengths(recipe, str(tmp_path))
    assert by_characters.samples[0].learned == len(answer) // 4 + 1
    assert "without a tokenizer" in by_characters.source


def test_a_mixture_is_counted_by_the_weights_of_its_sources(tmp_path):
    """However few rows a source has: training draws it as often as its weight says."""
    parts = []
    for name, rows, words, weight in (("short", 10, 5, 0.9), ("long", 500, 400, 0.1)):
        turns = [{"role": "user", "content": "how many ?"}, {"role": "assistant", "content": "3 " * words}]
        (tmp_path / f"{name}.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * rows)
        parts.append({"path": str(tmp_path / f"{name}.jsonl"), "weight": weight})
    alone = [
        recipe_lengths(make_recipe({"model": "tiny", "dataset": [part], "use_cpu": True}), "tiny").means()
        for part in parts
    ]
    both = recipe_lengths(make_recipe({"model": "tiny", "dataset": parts, "use_cpu": True}), "tiny")
    expected = 0.9 * alone[0]["text_tokens"] + 0.1 * alone[1]["text_tokens"]
    assert both.means()["text_tokens"] == pytest.approx(expected, rel=0.03)
    assert both.source.startswith("36 rows of the recipe's own data")


def test_images_of_a_sample_share_a_budget():
    recipe = load_recipe("llava-1.5-7b/sft_full", ["--use_cpu", "true", "--keep_tokens", "20", "--budget", "sample"])
    shape, config = get_shape("llava-1.5-7b"), shape_config("llava-1.5-7b", layers=1)
    isolator = recipe.trainer.isolator_length
    for images in (1, 3):
        fast, _ = Costs(recipe, meta_model(recipe, config), shape, config, {SampleLength(100, 50, images): 1}).modes()
        assert fast.length == 100 + 20 + images * isolator


def test_captions_and_conversations_have_lengths_of_their_own():
    one, two = plan_recipe("llava-1.5-7b/pretrain"), plan_recipe("llava-1.5-7b/sft_lora")
    assert one["lengths"]["text_tokens"] < 40 < 150 < two["lengths"]["text_tokens"]
    assert "LLaVA-Pretrain" in one["lengths"]["source"]
    assert "estimates" in two["lengths"]["source"]
    assert one["expected"]["speedup"] > 2 * two["expected"]["speedup"]
    first, second = two["schedule"]["stages"]
    assert (first["samples"], second["samples"]) == (558_000, 664_000)
    assert first["speedup"] == pytest.approx(one["expected"]["speedup"])
    baseline, expected = (
        sum(stage["samples"] * stage[name] for stage in (first, second)) for name in ("baseline_flops", "flops")
    )
    assert two["schedule"]["speedup"] == pytest.approx(baseline / expected)
    assert second["speedup"] < two["schedule"]["speedup"] < first["speedup"]
    assert (one["published"], two["published"]) == (
        {"stage one": 5.8},
        {"stage two": 1.9, "both stages": 2.1},
    )


@pytest.mark.parametrize(
    ("name", "shape", "overrides", "expected"),
    [
        ("llava-next-7b/sft_lora", "llava-next-7b", [], {"both stages": 4.0}),
        ("llava-1.5-7b/sft_lora", "llava-1.5-7b", ["--prune_ratio", "0.8"], {}),
        ("llava-1.5-7b/sft_full", "llava-1.5-7b", [], {}),
        ("llava-1.5-13b/sft_lora", "llava-1.5-13b", [], {}),
        ("skip-vision/sft_100_156", "llava-llama3-8b", [], {}),
    ],
)
def test_published_speedups_are_for_their_setting_alone(name, shape, overrides, expected):
    recipe = load_recipe(name, [*overrides, "--use_cpu", "true"])
    assert published_speedups(recipe, shape, stages=2) == expected


def test_a_sample_without_images_is_not_sped_up():
    with_image = SampleLength(100, 50, 1)
    recipe = load_recipe("llava-1.5-7b/sft_full", ["--use_cpu", "true"])
    shape, config = get_shape("llava-1.5-7b"), shape_config("llava-1.5-7b", layers=1)
    model = meta_model(recipe, config)
    costs = Costs(recipe, model, shape, config, {SampleLength(100, 50, 0): 1})
    fast, slow = costs.modes()
    assert fast.length == slow.length == 100
    assert fast.flops == slow.flops == fast.language_flops
    mixed = Costs(recipe, model, shape, config, {SampleLength(100, 50, 0): 3, with_image: 1}).modes()[0]
    alone = Costs(recipe, model, shape, config, {with_image: 1}).modes()[0]
    assert mixed.flops == pytest.approx((3 * fast.flops + alone.flops) / 4)
    assert mixed.activations == alone.activations
    assert SampleLength(4000, 3000, 1).cut(2048, 576) == SampleLength(2048 - 576, 2048 - 576, 1)


def test_padding_free_is_checked_against_the_model(tmp_path):
    config = shape_config("llava-1.5-7b", layers=2)
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
    text = {name: getattr(config.text_config, name) for name in names}
    config.text_config = MistralConfig(**text, sliding_window=4096)
    config.save_pretrained(tmp_path)
    options = ["--model", str(tmp_path), "--padding_free"]
    with pytest.raises(SaccadeError, match="padding_free=True: model_type='llava' with a language model of 'mistral'"):
        plan_recipe("llava-1.5-7b/sft_full", [*options, "true"])
    plan_recipe("llava-1.5-7b/sft_full", [*options, "false"])


def test_activations_shrink_with_checkpointing_and_grow_with_the_batch():
    base = plan_recipe("tiny-digits/sft")["memory"]["activations"]
    assert plan_recipe("tiny-digits/sft", ["--gradient_checkpointing", "true"])["memory"]["activations"] < base
    twice = plan_recipe("tiny-digits/sft", ["--per_device_train_batch_size", "64"])["memory"]["activations"]
    assert twice == 2 * base


def test_a_local_folder_with_a_config_alone(tmp_path):
    shape_config("llava-1.5-7b", layers=2).save_pretrained(tmp_path)
    plan = plan_recipe("llava-1.5-7b/sft_full", ["--model", str(tmp_path)])
    assert plan["visual_tokens"] == 576
    whole = build_shape("llava-1.5-7b", layers=2, device="meta")
    assert plan["parameters"]["total"] == sum(p.numel() for p in whole.parameters())


def test_the_command_prints_and_writes_json_and_nothing_else(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--dry-run", "--devices", "4", "--output", "plan.json", "--output_dir", "here"]
    assert main(["train", "llava-1.5-7b/sft_full", *flags]) == 0
    printed = capsys.readouterr().out
    assert "7,063,427,072" in printed
    assert "64 = 16 x 1 steps x 4 devices" in printed
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert f"{plan['expected']['speedup']:.2f}x" in printed
    assert f"{plan['schedule']['speedup']:.2f}x" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_the_published_speedup_stands_beside_the_counted_one(capsys):
    assert main(["train", "llava-1.5-7b/pretrain", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "published, in seconds on one L40: 5.8x (stage one)" in printed
    assert "LLaVA-Pretrain-558K; tokens are estimates" in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--dry-run", "--model", "someone/unknown"],
            "model='someone/unknown' is not a folder .* put its config.json",
        ),
        (["--dry-run", "--max_length", "500"], "max_length=500 cuts image tokens"),
        (["--dry-run", "--patch_tolerance", "0.1"], "patch_tolerance"),
        (["--dry-run", "--devices", "0"], "devices=0"),
        (["--dry-run", "--shards", "3"], "shards=3"),
        (["--dry-run", "--images", "8"], "images=8 without text_tokens"),
        (["--dry-run", "--text-tokens", "9", "--images", "0"], "images=0: give at least 1"),
        (["--dry-run", "--text-tokens", "9", "--images", "8"], "8 images of llava-1.5-7b have 4608, give more"),
        (["--dry-run", "--label-rows", "500"], "label_rows=500 without text_tokens"),
        (["--dry-run", "--text-tokens", "9", "--label-rows", "500"], "label_rows=500"),
        (["--dry-run", "--prune_ratio", "2"], "prune_ratio=2"),
        (["--dry-run", "--dtype", "int4"], "dtype='int4'"),
        (["--dry-run", "--load_in_4bit", "true"], "train adapters with lora=true"),
        (["--devices", "8"], "--devices goes with --dry-run"),
    ],
)
def test_bad_dry_runs_end_in_one_line(flags, message, capsys):
    assert main(["train", "llava-1.5-7b/sft_full", *flags]) == 2
    assert re.search(message, capsys.readouterr().err.strip().splitlines()[-1])


def test_images_of_other_families_are_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "gemma3"}')
    assert main(["train", "llava-1.5-7b/sft_full", "--dry-run", "--model", str(tmp_path)]) == 2
    assert "model_type='gemma3' cannot be counted yet" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["llava-1.5-7b", "qwen2.5-vl-7b", "qwen3-vl-4b"])
def test_four_bits_for_the_decoder_alone(name):
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(shape_config(name, layers=2))
    options = quantization_options(model)
    assert options["bnb_4bit_quant_type"] == "nf4"
    assert options["bnb_4bit_use_double_quant"]
    assert options["bnb_4bit_compute_dtype"] == torch.bfloat16
    assert quantization_options(model, "float16")["bnb_4bit_compute_dtype"] == torch.float16
    skipped = options["llm_int8_skip_modules"]
    inside = {id(weight) for weight in quantized_weights(model)}
    assert len(inside) == 7 * 2
    for place, module in model.named_modules():
        if isinstance(module, nn.Linear):
            left_out = any(place == prefix or place.startswith(f"{prefix}.") for prefix in skipped)
            assert left_out == (id(module.weight) not in inside), place


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_every_linear_layer_of_the_decoder_is_adapted_and_quantized(name):
    """And no other: Gemma 4, LFM2-VL and Qwen3.5 have layers with names of their own."""
    model, _ = ALL_FAMILIES[name].build()
    names = {id(module): name for name, module in model.named_modules()}
    layers = get_family(model).language_layers
    inside = {names[id(module)] for module in layers.modules() if isinstance(module, nn.Linear)}
    assert inside
    config = lora_config(model, make_recipe({"lora": True, "use_cpu": True, "bf16": False, "freeze_projector": True}))
    assert {name for name in names.values() if re.fullmatch(config.target_modules, name)} == inside
    skipped = quantization_options(model)["llm_int8_skip_modules"]
    linear = {names[id(module)] for module in model.modules() if isinstance(module, nn.Linear)}
    assert {name for name in linear if should_convert_module(name, skipped)} == inside


@pytest.mark.parametrize("name", ["qwen2.5-vl-7b", "qwen3-vl-4b"])
def test_adapters_on_qwen_save_the_mergers_in_full(name):
    recipe = make_recipe({"lora": True, "lora_r": 2, "use_cpu": True, "bf16": False})
    with torch.device("meta"):
        model = build_shape(name, layers=1, device="meta")
        mergers = sum(p.numel() for p in get_family(model).projector.parameters())
        model = get_peft_model(model, lora_config(model, recipe))
    trained = {key: p.numel() for key, p in model.named_parameters() if p.requires_grad}
    assert sum(count for key, count in trained.items() if "merger" in key) == mergers
    assert all("lora_" in key or "merger" in key for key in trained)


def test_quantization_is_refused_where_it_cannot_be(monkeypatch):
    options = ModelOptions(model="llava-hf/llava-1.5-7b-hf", lora=True, load_in_4bit=True)
    monkeypatch.setattr("saccade.training.models.find_spec", lambda name: None)
    with pytest.raises(SaccadeError, match=r"needs bitsandbytes, .* pip install \"saccade\[quant\]\""):
        load_model(options)
    with pytest.raises(SaccadeError, match="'tiny' is too small"):
        load_model(ModelOptions(load_in_4bit=True, lora=True))
    with pytest.raises(SaccadeError, match="train adapters with lora=true"):
        train_recipe(make_recipe({"load_in_4bit": True, "use_cpu": True, "bf16": False}))


def test_a_stage_one_recipe_trains_the_projector_alone():
    recipe = load_recipe("llava-1.5-7b/pretrain", ["--use_cpu", "true"])
    model = meta_model(recipe, shape_config("llava-1.5-7b", layers=1))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all("multi_modal_projector" in name for name in trained)
