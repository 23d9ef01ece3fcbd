import io
import pickle
import random

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from saccade.data import KINDS, digit_samples, digit_scenes, patch_labels, render_scene, scene_specs, split_indices
from saccade.data.questions import SINGLE_KINDS
from saccade.data.rows import _make_row
from saccade.data.scenes import AMBIGUOUS, BACKGROUND, DISTRACTOR, PlacedDigit, sample_scene
from saccade.evaluation import Inference, evaluate_inferences


def _png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def _samples_of(dataset):
    return {sample for specs in scene_specs(dataset) for spec in specs for sample in spec[3::4]}


def test_splits_share_no_digit_and_cover_all():
    parts = [{index for pool in split_indices(split) for index in pool} for split in ("train", "validation", "test")]
    assert sum(map(len, parts)) == 1797
    assert set().union(*parts) == set(range(1797))
    _, classes = digit_samples()
    for split in ("train", "validation", "test"):
        for digit, pool in enumerate(split_indices(split)):
            assert set(classes[list(pool)]) == {digit}


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_scenes_of_a_split_use_its_digits_only(stage):
    used = [_samples_of(digit_scenes(stage, split, 300)) for split in ("train", "validation", "test")]
    allowed = [{i for pool in split_indices(split) for i in pool} for split in ("train", "validation", "test")]
    for mine, pool in zip(used, allowed, strict=True):
        assert mine <= pool


def test_rows_are_reproducible_and_a_longer_dataset_starts_with_a_shorter_one():
    short, long = digit_scenes("sft", "train", 40), digit_scenes("sft", "train", 90)
    assert short["messages"][:] == long["messages"][:40]
    assert scene_specs(short) == scene_specs(long)[:40]
    other = digit_scenes("sft", "train", 40, seed=1)
    assert scene_specs(other) != scene_specs(short)
    first, again = long[7]["images"], long[7]["images"]
    assert [image.tobytes() for image in first] == [image.tobytes() for image in again]


def test_columns_are_what_trl_takes():
    from trl.data_utils import prepare_multimodal_messages

    dataset = digit_scenes("sft", "train", 600)
    assert set(dataset["kind"]) == set(KINDS) - {"caption"}
    for row in dataset:
        assert row["messages"][-1] == {"role": "assistant", "content": row["answer"]}
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"] * (len(row["messages"]) // 2)
        expected = {"two_images": 2, "text_only": 0}.get(row["kind"], 1)
        assert [image.size for image in row["images"]] == [(96, 96)] * expected
        assert (len(row["messages"]) > 2) == (row["kind"] == "multi_turn")
        prepared = prepare_multimodal_messages(row["messages"], row["images"])
        assert sum(part["type"] == "image" for part in prepared[0]["content"]) == expected


def test_lazy_images_survive_what_trainers_do():
    dataset = digit_scenes("sft", "train", 64).remove_columns(["kind", "answer", "num_digits"])
    shuffled = dataset.shuffle(seed=3).select(range(16))
    assert set(shuffled.column_names) == {"images", "messages"}
    for row in (shuffled[3], shuffled[:4], next(iter(shuffled))):
        assert set(row) == {"images", "messages"}
    one = dataset[5]["images"][0]
    assert one.mode == "RGB"
    again = pickle.loads(pickle.dumps(dataset))[5]["images"][0]
    assert one.tobytes() == again.tobytes()
    loader = DataLoader(shuffled, batch_size=4, num_workers=2, collate_fn=list)
    rows = [row for batch in loader for row in batch]
    assert len(rows) == 16
    assert rows[0]["images"][0].tobytes() == shuffled[0]["images"][0].tobytes()


def test_images_are_drawn_when_their_row_is_read(monkeypatch):
    drawn = []
    monkeypatch.setattr("saccade.data.rows.render_scene", lambda spec: drawn.append(tuple(spec)) or render_scene(spec))
    made = []
    monkeypatch.setattr("saccade.data.rows._make_row", lambda *args: made.append(args) or _make_row(*args))
    dataset = digit_scenes("sft", "train", 200)
    assert not made
    assert dataset.select_columns("answer")[3] == {"answer": dataset[3]["answer"]}
    drawn.clear()
    specs = scene_specs(dataset)
    assert not drawn
    row = next(number for number, several in enumerate(specs) if several)
    assert len(dataset[row]["images"]) == len(specs[row])
    assert drawn == specs[row]


@pytest.mark.parametrize(("grid", "size"), [(24, (192, 192)), ((12, 24), (192, 96)), (9, (72, 72))])
def test_other_sizes(grid, size):
    dataset = digit_scenes("pretrain", "validation", 30, grid=grid)
    assert {image.size for row in dataset for image in row["images"]} == {size}
    for (spec,), row in zip(scene_specs(dataset), dataset, strict=True):
        content, owner = patch_labels(spec)
        assert content.shape == (size[1] // 8, size[0] // 8)
        assert set(owner[owner >= 0]) == set(range(row["num_digits"]))


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32), count=st.integers(0, 9), grid=st.sampled_from([(12, 12), (9, 20), (24, 24)]))
def test_every_digit_shows_in_its_place(seed, count, grid):
    spec, digits = sample_scene(random.Random(seed), "train", grid, count)
    content, owner = patch_labels(spec)
    assert content.shape == owner.shape == grid
    assert set(np.unique(content)) <= {AMBIGUOUS, *range(10), DISTRACTOR, BACKGROUND}
    for number, digit in enumerate(digits):
        rows, cols = np.nonzero(owner == number)
        assert len(rows) >= 1
        assert set(content[owner == number]) == {digit.value}
        assert {(r * 3 // grid[0], c * 3 // grid[1]) for r, c in zip(rows, cols, strict=True)} <= {
            # Places are whole patches, so a side not divisible by three may round a patch into the next third.
            (digit.row + down, digit.column + right)
            for down in ((0,) if grid[0] % 3 == 0 else (-1, 0, 1))
            for right in ((0,) if grid[1] % 3 == 0 else (-1, 0, 1))
        }


def test_labels_agree_with_pixels():
    (spec,) = scene_specs(digit_scenes("pretrain", "train", 1, seed=4))[0]
    pixels = np.asarray(render_scene(spec), dtype=float).mean(2).reshape(12, 8, 12, 8).mean((1, 3))
    content, _ = patch_labels(spec)
    assert pixels[content == BACKGROUND].max() < pixels[(content >= 0) & (content < DISTRACTOR)].min()


_DIGITS = (PlacedDigit(7, 0, 1), PlacedDigit(3, 1, 0), PlacedDigit(7, 2, 2))


@pytest.mark.parametrize(
    ("kind", "answers"),
    [
        ("count", {"how many digits ?": "3"}),
        ("leftmost", {"which digit is leftmost ?": "3"}),
        ("rightmost", {"which digit is rightmost ?": "7"}),
        ("max", {"what is the maximum ?": "7"}),
        ("min", {"what is the minimum ?": "3"}),
        ("read", {"read all digits .": "7 3 7"}),
        ("where", {"where is the 3 ?": "middle left"}),
        ("sum", {}),
        ("relation", {}),
    ],
)
def test_answers_of_a_known_scene(kind, answers):
    turns = {SINGLE_KINDS[kind](_DIGITS, random.Random(seed)) for seed in range(20)} - {None}
    assert dict(turns) == answers


def test_answers_that_depend_on_what_is_asked():
    for seed in range(50):
        question, answer = SINGLE_KINDS["has"](_DIGITS, random.Random(seed))
        assert (answer == "yes") == (question.split()[3] in {"7", "3"})
        question, answer = SINGLE_KINDS["count_of"](_DIGITS, random.Random(seed))
        assert answer == {"7": "2", "3": "1"}.get(question.split()[3], "0")
    pair = (PlacedDigit(2, 0, 2), PlacedDigit(5, 2, 0))
    seen = {SINGLE_KINDS["relation"](pair, random.Random(seed)) for seed in range(60)}
    assert dict(seen) == {
        "is the 2 above the 5 ?": "yes",
        "is the 2 below the 5 ?": "no",
        "is the 5 above the 2 ?": "no",
        "is the 5 below the 2 ?": "yes",
    }
    assert SINGLE_KINDS["sum"](pair, random.Random(0)) == ("what is the sum ?", "7")


def test_kinds_can_be_chosen():
    dataset = digit_scenes("sft", "test", 30, kinds=["two_images", "where"])
    assert set(dataset["kind"]) == {"two_images", "where"}


def test_written_files_are_read_back(tmp_path):
    import json

    from PIL import Image

    from saccade.data import write_jsonl

    dataset = digit_scenes("sft", "validation", 12, kinds=["two_images", "count", "text_only"])
    path = write_jsonl(dataset, tmp_path / "out")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line, row in zip(lines, dataset, strict=True):
        assert line["messages"] == row["messages"]
        images = [Image.open(path.parent / name).tobytes() for name in line["images"]]
        assert images == [image.tobytes() for image in row["images"]]
    assert not [name for name in path.parent.iterdir() if name.name.startswith(".")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": "finetune"}, "stage='finetune' is unknown"),
        ({"split": "dev"}, "split='dev' is unknown"),
        ({"num_rows": -1}, "num_rows is -1"),
        ({"grid": 8}, "grid is 8"),
        ({"grid": (12, 4)}, r"grid is \(12, 4\)"),
        ({"kinds": ["colour"]}, r"kinds is \['colour'\]"),
        ({"stage": "pretrain", "kinds": ["count"]}, "captions only"),
    ],
)
def test_bad_input_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        digit_scenes(**{"stage": "sft", "split": "train", "num_rows": 1} | changes)


def test_evaluation_takes_rows_that_are_stored_as_well(model, processor):
    dataset = digit_scenes("sft", "test", 12, kinds=["read", "two_images", "text_only"])
    stored = [{**row, "images": [_png(image) for image in row["images"]]} for row in dataset]
    drawn, read = (
        evaluate_inferences(model, processor, rows, [Inference()], 5) for rows in (dataset, Dataset.from_list(stored))
    )
    assert read == drawn


def test_evaluation_asks_for_one_greedy_answer_whatever_a_model_generates_with(model, processor, monkeypatch):
    rows = digit_scenes("sft", "test", 6, kinds=["read"])
    expected = evaluate_inferences(model, processor, rows, [Inference()], 3)
    for name, value in (("num_beams", 3), ("num_return_sequences", 2)):
        monkeypatch.setattr(model.generation_config, name, value)
    assert evaluate_inferences(model, processor, rows, [Inference()], 3) == expected


@pytest.mark.parametrize(
    ("after", "accuracy"), [(["</s>"], 1), (["</s>", "<user>", "3"], 1), (["3"], 0), (["<image>"], 0), ([], 0)]
)
def test_an_answer_counts_up_to_its_end_and_only_if_it_has_one(model, processor, monkeypatch, after, accuracy):
    """What a model says when it is cut off may begin with the right answer."""
    rows = digit_scenes("sft", "test", 1, kinds=["read"])
    words = processor.tokenizer
    said = [*words(rows["answer"][0], add_special_tokens=False).input_ids, *words.convert_tokens_to_ids(after)]
    generate = model.generate

    def answer(input_ids, max_new_tokens, **given):
        if max_new_tokens == 1:
            return generate(input_ids=input_ids, max_new_tokens=1, **given)
        return torch.cat([input_ids, torch.tensor([said])], dim=1)

    monkeypatch.setattr(model, "generate", answer)
    (result,) = evaluate_inferences(model, processor, rows, [Inference()])
    assert result["accuracy"] == accuracy
