"""`saccade data check`: every fault found and named, the same with several processes, lengths as training has them."""

import json
import subprocess
import sys

import pytest
import torch
from data_files import bad_records, good_records, turn, write_json
from datasets import Dataset
from family_models import FAMILIES, RELATIVES
from PIL import Image

from saccade import prune_inputs
from saccade.cli.main import main
from saccade.data import digit_scenes
from saccade.data.check import check_sources
from saccade.data.lengths import TokenCounter, estimate_lengths
from saccade.data.mixture import source_options
from saccade.dualspeed.collator import DualSpeedCollator
from saccade.errors import RecordError
from saccade.recipes import is_recipe
from saccade.reducers import PruningConfig, keep_count
from saccade.training import ModelOptions, load_rows
from saccade.training.checks import check_data


def check(path, *flags):
    output = path.parent / "report.json"
    status = main(["data", "check", str(path), "--output", str(output), *flags])
    return status, json.loads(output.read_text()) if output.is_file() else None


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_every_fault_is_named_with_its_place(tmp_path, name, capsys):
    folder = tmp_path / "data"
    good, bad = good_records(folder, 3), bad_records(folder)
    path = write_json(folder / name, [good[0], *bad.values(), *good[1:]])
    status, report = check(path)
    assert status == 1
    assert [entry["kind"] for entry in report["bad_records"]] == list(bad)
    place = "row" if name == "data.json" else "line"
    names = [f"{path}, {place} {number}" for number in range(2, 2 + len(bad))]
    assert [entry["record"] for entry in report["bad_records"]] == names
    assert [entry["index"] for entry in report["bad_records"]] == list(range(1, 1 + len(bad)))
    assert report["bad_by_kind"] == dict.fromkeys(bad, 1)
    counts = {name: report[name] for name in ("complete", "records", "checked", "images", "text_only", "turns", "bad")}
    assert counts == {
        **{"complete": True, "records": 3 + len(bad), "checked": 3 + len(bad)},
        **{"images": 3, "text_only": 0, "turns": 3, "bad": len(bad)},
    }
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)


def test_a_cut_off_line_and_a_cut_off_list(tmp_path):
    records = good_records(tmp_path, 3)
    for name in ("data.json", "data.jsonl"):
        path = write_json(tmp_path / name, records)
        path.write_text(path.read_text()[:-30])
        status, report = check(path)
        assert status == 1
        assert [(entry["kind"], entry["index"]) for entry in report["bad_records"]] == [("not_json", 2)]
        assert report["images"] == 2


def test_good_data_is_0(tmp_path):
    records = [*good_records(tmp_path, 2), {"conversations": turn("a", "b") + turn("c", "d")}]
    status, report = check(write_json(tmp_path / "data.json", records))
    assert (status, report["bad_records"], report["text_only"], report["turns"]) == (0, [], 1, 4)
    assert report["tokens"] is None
    status, report = check(tmp_path / "data.json", "--rows", "1")
    assert (status, report["records"], report["sources"][0]["records"]) == (0, 1, 1)


def test_several_processes_report_the_same(tmp_path):
    folder = tmp_path / "data"
    records = (good_records(folder, 30) + list(bad_records(folder).values())) * 10
    path = write_json(folder / "data.json", records)
    reports = [check(path, "--jobs", jobs, "--model", "tiny")[1] for jobs in ("1", "3")]
    for report in reports:
        del report["seconds"], report["jobs"]
    assert reports[0] == reports[1]
    assert reports[0]["bad"] == 110


def test_rows_longer_than_max_length_are_counted(tmp_path, capsys):
    records = good_records(tmp_path, 4)
    for record in records[:3]:
        record["conversations"] += turn("how many ? " * 40, "3")
    flags = ["--model", "tiny", "--max-length"]
    tokens = check(write_json(tmp_path / "data.json", records), *flags, "200")[1]["tokens"]
    assert (tokens["max_length"], tokens["longer"]) == (200, 3)
    assert "3 rows are longer than max_length=200" in capsys.readouterr().out
    longest = tokens["full"]["max"]
    assert check(tmp_path / "data.json", *flags, str(longest))[1]["tokens"]["longer"] == 0


def test_rows_that_do_not_fit_are_counted(tmp_path, capsys):
    """A row with much text, one with three images, and one whose text alone is too long."""
    records = good_records(tmp_path, 4)
    records[1]["conversations"] += turn("how many ? " * 10, "3")
    records[2]["conversations"][0]["value"] = "<image>" * 3 + "how many ?"
    records[2]["image"] = [records[2]["image"]] * 3
    records[3]["conversations"] += turn("how many ? " * 40, "3")
    path = write_json(tmp_path / "data.json", records)
    flags = ["--model", "tiny", "--prune-ratio", "0.9"]
    free = check(path, *flags)[1]["tokens"]
    status, report = check(path, *flags, "--fit-length", "62")
    assert status == 1
    assert [(entry["index"], entry["kind"]) for entry in report["bad_records"]] == [(3, "too_long")]
    assert "fit_length=62 is too short: its text has" in report["bad_records"][0]["reason"]
    tokens = report["tokens"]
    three = free["full"]["max"] - 3 * (144 - 14 - 4)
    assert (tokens["shortened"]["max"], tokens["fit_length"], tokens["longer"]) == (62, 62, 0)
    assert (tokens["cut"], free["cut"]) == (1, 0)
    assert tokens["lost"] == three - 62 > 0
    assert "1 rows do not fit under fit_length=62" in capsys.readouterr().out
    check(path, "--model", "tiny", "--keep-tokens", "16")
    assert "16 visual tokens per crop" in capsys.readouterr().out


def test_text_that_the_model_takes_for_an_image(tmp_path):
    """A placeholder of the model's own in a text: without the check, its processor fails in the middle of a run."""
    model, processor = FAMILIES["qwen2_5_vl"].build()
    counter = TokenCounter(processor, model.config.image_token_id, budget=PruningConfig(prune_ratio=0.5))
    records = good_records(tmp_path, 2)
    records[1]["conversations"][1]["value"] = f"3 {processor.image_token}"
    (options,) = source_options([str(write_json(tmp_path / "data.json", records))])
    (entry,) = check_sources([options.open()], counter)["bad_records"]
    assert (entry["index"], entry["kind"]) == (1, "placeholder_count")
    assert processor.image_token in entry["reason"]
    collator = DualSpeedCollator(processor, placeholder_id=counter.placeholder_id)
    rows = load_rows(ModelOptions(dataset=str(tmp_path / "data.json")))
    collator([rows[0]])
    with pytest.raises(RecordError, match=r"data.json, row 2: .* is in a text"):
        collator([rows[1]])


@pytest.mark.parametrize("unit", ["crop", "image", "sample"])
@pytest.mark.parametrize("amount", [{"keep_tokens": 20}, {"prune_ratio": 0.75}])
def test_lengths_are_those_of_pruned_inference(amount, unit, model, processor):
    budget = PruningConfig(**amount, budget=unit)
    counter = TokenCounter(processor, model.config.image_token_id, budget)
    for images in (1, 3):
        content = [{"type": "image"}] * images + [{"type": "text", "text": "how many digits are there ?"}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(images=[Image.new("RGB", (96, 96))] * images, text=text, return_tensors="pt")
        full, shortened = counter.lengths(0, [(96, 96)] * images)
        pruned = prune_inputs(model, inputs, budget)
        assert inputs["input_ids"].shape[1] - pruned["input_ids"].shape[1] == full - shortened


def test_lengths_are_those_of_training(processor, collator):
    """Against the collator's own tokens, and the pruned length by the formula."""
    scenes = digit_scenes("sft", "train", 40, seed=5)
    counter = TokenCounter(
        processor, collator.placeholder_id, budget=PruningConfig(prune_ratio=0.9), isolator_length=4
    )
    report = check_data(
        "digits", {"model": "tiny", "dataset_rows": 40, "dataset_seed": 5, "isolator_length": 4, "prune_ratio": 0.9}
    )
    full, shortened = [], []
    for row in scenes:
        batch = collator([row])
        ids = batch["input_ids"][0]
        images = len(row["images"])
        assert int((ids == collator.placeholder_id).sum()) == 144 * images
        full.append(len(ids))
        shortened.append(len(ids) - images * (144 - keep_count(144, 0.9) - 4))
        assert counter.lengths(counter.text_tokens(row), [(96, 96)] * images) == (full[-1], shortened[-1])
    assert report["tokens"]["full"]["max"] == max(full)
    assert report["tokens"]["full"]["mean"] == pytest.approx(sum(full) / 40, abs=0.05)
    assert report["tokens"]["shortened"]["mean"] == pytest.approx(sum(shortened) / 40, abs=0.05)
    assert report["tokens"]["visual"] == 144 * sum(len(row["images"]) for row in scenes)
    for p in ("p5", "p50", "p95"):
        rank = int(p[1:]) / 100
        values = sorted(full)
        assert sum(value <= report["tokens"]["full"][p] for value in values) >= rank * 40 - 1


def test_a_recipe_is_checked_with_all_of_its_sources(tmp_path):
    folder = tmp_path / "data"
    one = write_json(folder / "one.json", good_records(folder, 2)) if folder.mkdir() is None else None
    two = write_json(folder / "two.jsonl", [bad_records(folder)["empty_answer"], *good_records(folder, 1, "more")])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"dataset:\n- path: {one}\n- path: {two}\nmodel: tiny\nbf16: false\nuse_cpu: true\n")
    status, report = check(recipe, "--prune-ratio", "0.5")
    assert status == 1
    assert report["sources"] == [{"path": str(one), "records": 2}, {"path": str(two), "records": 2}]
    assert [(entry["source"], entry["index"], entry["kind"]) for entry in report["bad_records"]] == [
        (1, 0, "empty_answer")
    ]
    assert report["tokens"]["prune_ratio"] == 0.5


def test_a_shipped_recipe_is_checked_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["data", "check", "tiny-digits/pretrain", "--rows", "3", "--jobs", "1"]) == 0
    assert json.loads((tmp_path / "data_check.json").read_text())["sources"] == [{"path": "digits", "records": 3}]
    # A folder of this name is data.
    (tmp_path / "tiny-digits" / "pretrain").mkdir(parents=True)
    assert not is_recipe("tiny-digits/pretrain")
    assert not is_recipe("someone/rows")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["none.json"], "none.json' does not exist"),
        (["data.json", "--format", "csv"], "format='csv'"),
        (["data.json", "--image-folder", "/nowhere"], "image_folder='/nowhere' is not a folder"),
        (["data.json", "--jobs", "0"], "jobs=0"),
        (["data.json", "--model", "/nowhere"], "model='/nowhere'"),
        (["data.json", "--prune-ratio", "1"], "prune_ratio=1.0"),
        (["data.json", "--max-image-pixels", "0"], "max_image_pixels=0"),
        (["data.json", "--rows", "0"], "dataset_rows=0"),
        (["data.json", "--max-length", "0"], "max_length=0"),
        (["empty"], "dataset='empty' has no rows"),
        (["none.yaml"], "none.yaml' does not exist"),
    ],
)
def test_bad_input_is_2(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    write_json(tmp_path / "data.json", good_records(tmp_path, 1))
    Dataset.from_dict({"messages": []}).save_to_disk(tmp_path / "empty")
    assert main(["data", "check", *flags]) == 2
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert printed.startswith("saccade: error: ")
    assert message in printed
    assert not (tmp_path / "data_check.json").exists()


# As a terminal does, to the whole group of processes, once the first rows were read.
INTERRUPTED = """
import os, signal, sys
from saccade.cli.main import main
from saccade.training import checks

# Ignored where whoever runs the tests put them into the background.
signal.signal(signal.SIGINT, signal.default_int_handler)
check_data = checks.check_data

def interrupted(*args, progress, **options):
    return check_data(*args, progress=lambda count: os.killpg(0, signal.SIGINT), **options)

checks.check_data = interrupted
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("jobs", [pytest.param("1", marks=pytest.mark.slow), "2"])
def test_an_interruption_leaves_a_whole_report(tmp_path, jobs):
    records = good_records(tmp_path, 20) * 150
    path = write_json(tmp_path / "data.json", records)
    output = tmp_path / "report.json"
    command = [sys.executable, "-c", INTERRUPTED, "data", "check", str(path), "--jobs", jobs, "--output", str(output)]
    done = subprocess.run(command, start_new_session=True, capture_output=True, text=True, timeout=120)
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    report = json.loads(output.read_text())
    assert report["complete"] is False
    assert 0 < report["checked"] < len(records)
    assert report["images"] == report["checked"]


@pytest.mark.parametrize("name", [*FAMILIES, *RELATIVES])
@pytest.mark.parametrize("size", [(640, 480), (333, 1000), (50, 50)])
def test_visual_tokens_of_every_family(size, name):
    """Against what the family's processor makes of a real image of that size."""
    model, processor = (FAMILIES | RELATIVES)[name].build()
    placeholder = model.config.image_token_id
    counter = TokenCounter(processor, placeholder, budget=PruningConfig(prune_ratio=0.5))
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}
    text = processor.apply_chat_template([message], tokenize=False)
    image = Image.effect_noise(size, 50).convert("RGB")
    ids = processor(images=[image], text=[text], return_tensors="pt")["input_ids"][0]
    bare = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert counter.tokens(size) == (len(ids) - len(bare), sum(int(token) == placeholder for token in ids))


@pytest.mark.parametrize("name", [name for name in (*FAMILIES, *RELATIVES) if name != "chain_of_sight"])
@pytest.mark.parametrize("size", [(64, 48), (24, 70), (50, 50)])
def test_a_number_of_tokens_per_crop_is_counted_for_every_crop(size, name):
    """Of every family, against the prompt that is pruned."""
    model, processor = (FAMILIES | RELATIVES)[name].build()
    # More than newlines, which are kept beyond the budget.
    keep = 10 if name in ("llava_next", "llava_onevision") else 3
    budget = PruningConfig(reducer="random", keep_tokens=keep, budget="crop")
    counter = TokenCounter(processor, model.config.image_token_id, budget)
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}
    text = processor.apply_chat_template([message], tokenize=False)
    inputs = processor(images=[Image.new("RGB", size)], text=[text], return_tensors="pt")
    pruned = prune_inputs(model, inputs, budget)
    full, shortened = counter.lengths(0, [size])
    assert inputs["input_ids"].shape[1] - pruned["input_ids"].shape[1] == full - shortened


def test_estimates_know_the_largest_image():
    model, processor = FAMILIES["qwen2_5_vl"].build()
    counter = TokenCounter(processor, model.config.image_token_id, PruningConfig(prune_ratio=0.0))
    messages = [{"role": "user", "content": "how many ?"}, {"role": "assistant", "content": "3"}]
    rows = [{"images": [Image.new("RGB", (side, side))], "messages": messages} for side in (64, 32)]
    assert counter.fixed is None
    large, small = estimate_lengths(rows, counter, shortened=False)
    assert min(large, small) > 1
    assert estimate_lengths(rows, counter, shortened=False, max_pixels=2000) == [1, small]


class ReadOnce:
    """Rows that may be drawn or decoded anew whenever they are read."""

    def __init__(self, rows):
        self.count, self.left = len(rows), iter(rows)

    def __len__(self):
        return self.count

    def __iter__(self):
        return self.left


def test_estimates_follow_the_exact_lengths(processor, collator, tmp_path):
    records = good_records(tmp_path, 40)
    for number, record in enumerate(records):
        record["conversations"] += turn("how many digits ? " * number, "3 ")
    records[3] = {"conversations": [{"from": "robot", "value": "x"}]}
    rows = load_rows(ModelOptions(dataset=str(write_json(tmp_path / "data.json", records))))
    counter = TokenCounter(processor, collator.placeholder_id, PruningConfig(prune_ratio=0.9), isolator_length=4)
    for shortened in (False, True):
        estimates = estimate_lengths(rows, counter, shortened)
        assert estimates[3] == 1
        good = [number for number in range(40) if number != 3]
        exact = [counter.lengths(counter.text_tokens(rows[n]), [(96, 96)])[shortened] for n in good]
        assert [estimates[number] for number in good] == pytest.approx(exact, rel=0.15, abs=6)
        assert torch.tensor([estimates[number] for number in good]).diff().ge(0).all()
    once = ReadOnce(rows)
    assert estimate_lengths(once, counter, shortened=True) == estimates
    assert next(once.left, None) is None
