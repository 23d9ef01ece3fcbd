"""What skipping changes: ratios, errors, the bound and the identity, compared to plain loops."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from experiments.skip_analysis.__main__ import main
from experiments.skip_analysis.measure import ffn_ratio, kv_drop_error, rows_of, skip_error, spectral_bound
from saccade.cli.main import guarded
from saccade.data import digit_scenes
from saccade.errors import SaccadeError
from saccade.families import get_family
from saccade.skip_vision import SkipVisionConfig, apply_skip_vision
from saccade.tiny import load_tiny
from saccade.tokens import Role


@pytest.fixture(scope="module")
def model_and_inputs():
    model, processor = load_tiny()
    rows = digit_scenes("sft", "test", 3, kinds=["count", "max"])
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        )
        for text in (row["messages"][0]["content"] for row in rows)
    ]
    processor.tokenizer.padding_side = "left"
    images = [row["images"] for row in rows]
    inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
    skip = apply_skip_vision(model, SkipVisionConfig())
    with torch.no_grad():
        prepared = skip.prepare(inputs)
    skip.remove()
    return model, prepared


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(2, 9), st.sampled_from([1, 2]))
def test_error_of_dropping_keys_and_values(seed, batch, columns, share):
    """Softmax over the kept columns alone, in float64."""
    generator = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(batch, 4, 5, columns, generator=generator, dtype=torch.float64)
    values = torch.randn(batch, 4 // share, columns, 6, generator=generator, dtype=torch.float64)
    skipped = torch.rand(batch, columns, generator=generator) < 0.5
    skipped[:, 0] = False
    repeated = values.repeat_interleave(share, dim=1)
    full = scores.softmax(dim=-1) @ repeated
    kept = scores.masked_fill(skipped[:, None, None], -torch.inf).softmax(dim=-1) @ repeated
    error, mass = kv_drop_error(scores.softmax(dim=-1), values, skipped)
    torch.testing.assert_close(error, full - kept, rtol=1e-12, atol=1e-13)
    for sample in range(batch):
        there = [column for column in range(columns) if skipped[sample, column]]
        expected = scores.softmax(dim=-1)[sample][..., there].sum(dim=-1)
        torch.testing.assert_close(mass[sample], expected, rtol=1e-12, atol=1e-13)


def test_ratio_is_that_of_a_loop_over_layers(model_and_inputs):
    model, prepared = model_and_inputs
    ratios = ffn_ratio(model, prepared)
    inputs = {name: value for name, value in prepared.items() if name != "skip_roles"}
    roles = prepared["skip_roles"]
    layers = get_family(model).language_layers
    seen = []
    handles = [layer.mlp.register_forward_hook(lambda m, args, out: seen.append((args[0], out))) for layer in layers]
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True, use_cache=False).hidden_states
    for handle in handles:
        handle.remove()
    assert len(ratios) == len(layers) == len(seen)
    for number in range(len(layers) - 1):  # the last state has passed the final norm
        after, added = states[number + 1], seen[number][1]
        ratio = added.norm(dim=-1) / (after - added).norm(dim=-1)
        for group, members in (("visual", {Role.RETAINED, Role.SKIPPED}), ("text", {Role.TEXT, Role.ANSWER})):
            expected = [ratio[b, t] for b in range(3) for t in range(roles.shape[1]) if int(roles[b, t]) in members]
            torch.testing.assert_close(ratios[number][group], torch.stack(expected), rtol=1e-3, atol=1e-4)
    assert ratios[0]["summary"].shape == (6,)
    assert ratios[0]["retained"].shape[0] + ratios[0]["skipped"].shape[0] == ratios[0]["visual"].shape[0]


def test_error_is_that_of_a_skipping_model(model_and_inputs):
    model, prepared = model_and_inputs
    report = skip_error(model, prepared)
    inputs = {name: value for name, value in prepared.items() if name != "skip_roles"}
    text = rows_of(prepared["skip_roles"], "text")
    skip = apply_skip_vision(model, SkipVisionConfig(drop_kv=False))
    try:
        with torch.no_grad():
            part = model(**prepared, use_cache=False, output_hidden_states=True)
    finally:
        skip.remove()
    with torch.no_grad():
        whole = model(**inputs, use_cache=False, output_hidden_states=True)
    change = part.logits[text] - whole.logits[text]
    assert report["logits"]["max_change"] == pytest.approx(change.abs().max().item(), rel=1e-3)
    same = (part.logits[text].argmax(-1) == whole.logits[text].argmax(-1)).float().mean().item()
    assert report["logits"]["same_choice"] == pytest.approx(same)
    for number, layer in enumerate(report["layers"][:-1]):
        moved = (part.hidden_states[number + 1] - whole.hidden_states[number + 1]).norm(dim=-1)
        for group in ("text", "skipped", "summary"):
            expected = moved[rows_of(prepared["skip_roles"], group)].max().item()
            assert layer["deviation"][group] == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_bounds_hold(model_and_inputs):
    model, prepared = model_and_inputs
    layers = skip_error(model, prepared)["layers"]
    assert layers[0]["deviation_all"] == pytest.approx(layers[0]["injection"], rel=1e-4)
    for layer in layers:
        assert layer["deviation_all"] <= layer["bound"] * (1 + 1e-5)
        assert layer["injection"] <= layer["spectral"]
        assert layer["deviation_all"] == pytest.approx(max(filter(None, layer["deviation"].values())))
    product = sum(
        layer["injection"] * torch.tensor([late["gain"] for late in layers[number + 1 :]]).prod().item()
        for number, layer in enumerate(layers)
    )
    assert layers[-1]["bound"] == pytest.approx(product, rel=1e-5)


def test_attention_mass_is_that_of_the_maps(model_and_inputs):
    model, prepared = model_and_inputs
    report = skip_error(model, prepared)
    roles = prepared["skip_roles"]
    inputs = {name: value for name, value in prepared.items() if name != "skip_roles"}
    before = model.config.text_config._attn_implementation
    language = get_family(model).language_model
    language.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True, use_cache=False).attentions
    language.set_attn_implementation(before)
    for layer, weights in zip(report["layers"], maps, strict=True):
        masses = []
        for sample in range(roles.shape[0]):
            columns = [t for t in range(roles.shape[1]) if roles[sample, t] == Role.SKIPPED]
            rows = [t for t in range(roles.shape[1]) if roles[sample, t] in (1, 2) and t > columns[-1]]
            masses += [weights[sample, :, row, columns].sum(dim=-1) for row in rows]
        assert layer["attention_mass"] == pytest.approx(torch.stack(masses).mean().item(), rel=1e-4)
        assert layer["attention_mass_max"] == pytest.approx(torch.stack(masses).max().item(), rel=1e-4)
        assert 0 < layer["kv_drop"] < 2


def test_the_model_is_left_as_it_was(model_and_inputs):
    model, prepared = model_and_inputs
    kind = model.config.text_config._attn_implementation
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    skip_error(model, prepared)
    ffn_ratio(model, prepared)
    assert model.config.text_config._attn_implementation == kind
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks


def test_spectral_bound_of_a_layer_by_hand(model_and_inputs):
    layer = get_family(model_and_inputs[0]).language_layers[0]
    mlp, gamma = layer.mlp, layer.post_attention_layernorm.weight.double()
    bound = gamma.numel() * gamma.abs().max() ** 2
    for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
        bound = bound * torch.linalg.svdvals(part.weight.double())[0]
    assert spectral_bound(layer) == pytest.approx(bound.item(), rel=1e-4)


def test_no_skipped_rows(model_and_inputs):
    model, prepared = model_and_inputs
    roles = prepared["skip_roles"].masked_fill(prepared["skip_roles"] == Role.SKIPPED, int(Role.RETAINED))
    with pytest.raises(SaccadeError, match="no skipped rows"):
        skip_error(model, {**prepared, "skip_roles": roles})


def is_drawn(path: Path) -> bool:
    """A picture with more than one colour."""
    with Image.open(path) as image:
        return image.format == "PNG" and len(image.convert("RGB").getcolors(2**24)) > 20


def test_ffn_on_digit_scenes(tmp_path, capsys):
    output = tmp_path / "new" / "ffn.png"
    assert main(["ffn", "--count", "2", "--output", str(output)]) == 0
    report = json.loads(output.with_suffix(".json").read_text())
    assert is_drawn(output)
    assert len(report["layers"]) == 4
    assert report["layers"][0]["visual"]["rows"] == 2 * 144
    assert report["layers"][0]["summary"]["rows"] == 2 * 2
    for layer in report["layers"]:
        assert all(0 < spread["p20"] <= spread["p50"] <= spread["p80"] for spread in layer.values())
    printed = capsys.readouterr().out
    assert str(round(report["layers"][3]["visual"]["p50"], 4)) in printed
    assert report["environment"]["packages"]["torch"]
    assert len(report["prompts"]) == 2


def test_the_same_seed_gives_the_same_figures(tmp_path):
    layers = []
    for name in ("one.png", "two.png"):
        assert main(["ffn", "--count", "1", "--seed", "5", "--output", str(tmp_path / name)]) == 0
        layers.append(json.loads((tmp_path / name).with_suffix(".json").read_text())["layers"])
    assert layers[0] == layers[1]


def test_skip_error_on_image_files(tmp_path, capsys):
    files = []
    for number in range(2):
        pixels = torch.randint(0, 256, (60, 80, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))
        files.append(str(tmp_path / f"{number}.png"))
        Image.fromarray(pixels.numpy()).save(files[-1])
    output = tmp_path / "error.png"
    flags = ["--retained", "30", "--skipped", "40", "--prompt", "How many digits are there?", "--output", str(output)]
    assert main(["skip-error", *files, *flags]) == 0
    report = json.loads(output.with_suffix(".json").read_text())
    assert is_drawn(output)
    assert report["prompts"] == ["How many digits are there?"] * 2
    assert report["skip_vision"]["retained"] == 30
    one, two = report["samples"]
    for number, layer in enumerate(report["layers"]):
        assert layer["deviation_all"] <= layer["bound"] * (1 + 1e-5)
        assert layer["injection"] <= layer["spectral"]
        pair = [sample["layers"][number] for sample in (one, two)]
        assert layer["deviation"]["text"] == max(entry["deviation"]["text"] for entry in pair)
        assert layer["attention_mass"] == pytest.approx(sum(entry["attention_mass"] for entry in pair) / 2)
        assert layer["relative"]["text"] == pytest.approx(sum(entry["relative"]["text"] for entry in pair) / 2)
    assert "logits of text" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["ffn", "no.png"], "'no.png' does not exist"),
        (["ffn", "--output", "ratio.svg"], "output='ratio.svg'"),
        (["ffn", "--count", "0"], "count=0"),
        (["ffn", "--model", "no/such/folder"], "no/such/folder"),
        (["skip-error", "--preset", "1/2"], "preset='1/2'"),
        (["skip-error", "--retained", "many"], "--retained"),
        (["skip-error", "--skipped", "0"], "no skipped rows"),
        (["skip-error", "--preset", "576/576"], "thumbnail"),
        (["loss"], "invalid choice"),
        ([], "required"),
    ],
)
def test_bad_input_is_one_line(flags, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert guarded(lambda: main(flags)) == 2
    complaint = capsys.readouterr().err
    assert message in complaint
    assert [line for line in complaint.splitlines() if line.startswith("saccade:")] == [complaint.splitlines()[-1]]
    assert list(tmp_path.iterdir()) == []
