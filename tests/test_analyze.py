"""`saccade analyze` and the benchmark of generation: what they write is what was measured, and slips are one line."""

import csv
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from saccade.benchmark.flops import TextShape, VisualRows, cache_bytes, prefill_flops
from saccade.benchmark.generation import generation_model, measure_generation
from saccade.benchmark.shapes import shape_config
from saccade.cli.main import main
from saccade.errors import SaccadeError
from saccade.skip_vision import SkipVisionConfig

ROOT = Path(__file__).resolve().parent.parent


def is_drawn(path: Path) -> bool:
    """A picture with more than one colour."""
    with Image.open(path) as image:
        return image.format == "PNG" and len(image.convert("RGB").getcolors(2**24)) > 20


def test_ffn_on_digit_scenes(tmp_path, capsys):
    output = tmp_path / "new" / "ffn.png"
    assert main(["analyze", "ffn", "--count", "2", "--output", str(output)]) == 0
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
        assert main(["analyze", "ffn", "--count", "1", "--seed", "5", "--output", str(tmp_path / name)]) == 0
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
    assert main(["analyze", "skip-error", *files, *flags]) == 0
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


def test_flops_of_a_budget(tmp_path, capsys):
    output = tmp_path / "flops.json"
    flags = ["--shape", "llama3-8b", "--budget", "full,58,100/156,10+20", "--output", str(output)]
    assert main(["analyze", "flops", *flags]) == 0
    [found] = json.loads(output.read_text())["shapes"]
    text = TextShape.of(shape_config("llama3-8b"))
    expected = {"full": (576, 0, 0), "58": (58, 0, 0), "100/156": (100, 2, 156), "10+20": (10, 2, 20)}
    for name, rows in expected.items():
        rows = VisualRows(*rows)
        assert found["budgets"][name]["prefill"] == prefill_flops(text, rows, 60)
        assert found["budgets"][name]["cache_bytes"] == cache_bytes(text, rows.kept + 60)
    assert "100 + 2 + 156" in capsys.readouterr().out


def test_flops_measured(tmp_path):
    output = tmp_path / "flops.json"
    flags = ["--shape", "tiny", "--budget", "full,100/156", "--measure", "--repeats", "2", "--output", str(output)]
    assert main(["analyze", "flops", *flags]) == 0
    report = json.loads(output.read_text())
    [measured] = report["measured"]
    counts = report["shapes"][0]["budgets"]
    # The measured model is in float32, the count in two bytes a value.
    assert measured["full"]["cache"] == 2 * counts["full"]["cache_bytes"]
    assert measured["skip"]["cache"] == 2 * counts["100/156"]["cache_bytes"]
    assert measured["skip"]["cache_peak"] == 2 * counts["100/156"]["cache_bytes_prompt"]
    assert all(len(measured[kind][name]) == 2 for kind in ("full", "skip") for name in ("prefill", "decode"))


def test_generation_of_several_images_of_a_cut_shape():
    model = generation_model("llama3-8b", layers=1, width=512)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = measure_generation(model, SkipVisionConfig(), images=2, text_tokens=5, new_tokens=2, repeats=1)
    assert found["full"].prompt_rows == {"text": 5, "visual": 1152}
    assert found["skip"].prompt_rows == {"text": 5, "retained": 200, "summary": 4, "skipped": 312}
    text = TextShape.of(model.config)
    assert (found["full"].cache, found["full"].cache_peak) == (cache_bytes(text, 1157, 4),) * 2
    assert found["skip"].cache == cache_bytes(text, 209, 4)
    assert found["skip"].cache_peak == cache_bytes(text, 521, 4)
    assert before.keys() == model.state_dict().keys()


def test_the_benchmark_appends_to_its_ledger(tmp_path):
    ledger = tmp_path / "ledger.csv"
    flags = ["--images", "1,2", "--repeats", "2", "--new-tokens", "2"]
    assert main(["bench", "generate", "--ledger", str(ledger), *flags]) == 0
    rows = list(csv.DictReader(ledger.open()))
    metrics = ["prefill", "decode", "layout", "cache_peak", "cache"]
    kinds = [("full", name) for name in metrics if name != "layout"] + [("skip 100/156", name) for name in metrics]
    assert [(row["provider"], row["metric"]) for row in rows] == 2 * kinds
    by_metric = {(row["provider"], row["metric"]): row for row in rows[:9]}
    assert by_metric["full", "prefill"]["ratio_to_baseline"] == "1"
    text = TextShape.of(shape_config("tiny"))
    assert int(by_metric["skip 100/156", "cache"]["p50"]) == cache_bytes(text, 27 + 60, 4)
    assert float(by_metric["skip 100/156", "cache"]["ratio_to_baseline"]) == pytest.approx(87 / 204, rel=1e-3)


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
        (["flops", "--shape", "gpt"], "shape='gpt'"),
        (["flops", "--shape", "tiny", "--budget", "1000"], "budget='1000'"),
        (["flops", "--shape", "tiny", "--budget", "10/20"], "budget='10/20'"),
        (["flops", "--shape", "tiny", "--budget", "576/576"], "no thumbnail"),
        (["flops", "--attention", "flash"], "attention='flash'"),
        (["flops", "--text-tokens", "-1"], "text_tokens=-1"),
        (["flops", "--shape", "tiny", "--layers", "9"], "layers=9"),
        (["flops", "--measure"], "need one shape"),
        (["flops", "--shape", "qwen2.5-vl-7b", "--measure"], "cannot be measured yet"),
        (["flops", "--shape", "tiny", "--measure", "--dtype", "int8"], "dtype='int8'"),
        (["flops", "--output", "flops.txt"], "output='flops.txt'"),
        (["loss"], "invalid choice"),
        ([], "required"),
    ],
)
def test_bad_input_is_one_line(flags, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["analyze", *flags]) == 2
    complaint = capsys.readouterr().err
    assert message in complaint
    assert [line for line in complaint.splitlines() if line.startswith("saccade:")] == [complaint.splitlines()[-1]]
    assert list(tmp_path.iterdir()) == []


def test_bad_counts():
    with pytest.raises(SaccadeError, match="images=0"):
        measure_generation(generation_model("tiny"), SkipVisionConfig(), images=0)
