"""Training on data with bad records: skipped in step, counted, listed, and too many of them an end on every rank."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from data_files import bad_records, good_records, turn, write_json
from datasets import Dataset
from family_models import FAMILIES
from forked import forking
from helpers import losses, make_trainer
from PIL import Image

from saccade import DualSpeedTrainer, SaccadeError
from saccade.cli.main import main
from saccade.data import digit_scenes
from saccade.data.lengths import TokenCounter, estimate_lengths
from saccade.dualspeed import DualSpeedCollator
from saccade.dualspeed.bad_records import BAD_RECORDS_FILE, BadRecordLog
from saccade.dualspeed.collator import STANDS_IN
from saccade.errors import RecordError
from saccade.families import get_family
from saccade.launch import make_plan, run_processes
from saccade.reducers import PruningConfig
from saccade.testing.training import make_config
from saccade.tiny import build_tiny_llava
from saccade.training import ModelOptions, load_rows

TINY = ["--max_steps", "4", "--per_device_train_batch_size", "2", "--disable_tqdm", "true", "--save_strategy", "no"]


@pytest.fixture
def data(tmp_path):
    """Good records with all bad ones among them."""
    folder = tmp_path / "data"
    good, bad = good_records(folder, 9), list(bad_records(folder).values())
    return write_json(folder / "data.jsonl", [good[0], *bad, *good[1:]])


@pytest.fixture
def spread(data):
    """Two bad records after every four good ones, so that the first batch of each rank has a good one."""
    bad = [json.loads(line) for line in data.open()][1:12]
    good = good_records(data.parent, 24, "spread")
    rows = [
        row for number in range(6) for row in (*good[4 * number : 4 * number + 4], *bad[2 * number : 2 * number + 2])
    ]
    return write_json(data.parent / "spread.jsonl", rows)


def listed(output):
    return [json.loads(line) for line in (output / BAD_RECORDS_FILE).read_text().splitlines()]


def collate(trainer, indices):
    return trainer.training_collator()([trainer.train_dataset[index] for index in indices])


def test_a_bad_record_is_replaced_by_the_next_good_one(model, processor, tmp_path, data):
    rows = load_rows(ModelOptions(dataset=str(data)))
    trainer = make_trainer(model, processor, tmp_path / "out", rows=rows, max_bad_records=20)
    bad = 11
    good = collate(trainer, [0, bad + 1, bad + 2])
    assert "bad_records" not in good
    # All of the bad ones follow one another, so that the same good one stands in for each.
    for index in (1, 4, bad):
        batch = collate(trainer, [0, index, bad + 2])
        found = batch.pop("bad_records")
        assert [entry["record"] for entry in found] == [f"{data}, line {n + 1}" for n in range(index, bad + 1)]
        for name, value in good.items():
            assert torch.equal(batch[name], value), name
    # The last row is followed by the first one.
    last = write_json(data.parent / "last.jsonl", [json.loads(line) for line in reversed(data.open().readlines())][8:])
    trainer.train_dataset = load_rows(ModelOptions(dataset=str(last)))
    batch = collate(trainer, [1, 0])
    assert batch["input_ids"].shape[0] == 2
    assert len(batch["bad_records"]) == 11


def chat(question, answer="2"):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llava", {"messages": None}, "'messages' is empty"),
        ("llava", {"messages": [{"role": "user", "content": None}, *chat("")[1:]]}, "each message needs a 'role' and"),
        ("llava", {"messages": [{"role": "human", "content": "a <image>"}, *chat("")[1:]]}, "role 'human' is unknown"),
        ("llava", {"messages": chat("a <image>")[:1]}, "there is no answer to learn"),
        ("llava", {"messages": chat("a <image>", " ")}, "there is no answer to learn"),
        ("llava", {"messages": [*chat("a <image>", ""), *chat("b")]}, "an answer is empty"),
        ("llava", {"messages": [*chat("a <image>"), *chat("b", "\n")]}, "an answer is empty"),
        ("llava", {"images": "/nowhere.png"}, "image '/nowhere.png' does not exist"),
        ("qwen2_5_vl", {"images": [Image.new("RGB", (400, 1))]}, "the processor refuses it: absolute aspect ratio"),
        ("qwen2_5_vl", {"messages": chat("a <|video_pad|> <image>")}, r"'<\|video_pad\|>' is in a text"),
    ],
)
def test_bad_rows_of_a_plain_dataset(name, change, message, monkeypatch):
    """Rows that no reader of Saccade has checked: named if one ends the run, otherwise replaced and listed."""
    monkeypatch.setattr("saccade.images.MAX_ASPECT_RATIO", 1000)  # so that Qwen's processor is what refuses a strip
    model, processor = FAMILIES[name].build()
    good = {"messages": chat("how many <image>"), "images": [Image.new("RGB", (32, 16))]}
    collator = DualSpeedCollator(
        processor=processor, assistant_only_loss=True, placeholder_id=get_family(model).placeholder_id
    )
    with pytest.raises(RecordError, match=message):
        collator([good, good | change])
    batch = replace(collator, max_bad_records=1)([good, good | change])
    assert [bool(re.search(message, entry["reason"])) for entry in batch.pop("bad_records")] == [True]
    for key, value in collator([good, good]).items():
        assert torch.equal(batch[key], value), key


@pytest.mark.parametrize("form", ["conversation", "text"])
def test_bad_prompts_and_completions(form, monkeypatch):
    """The same for rows of prompt and completion, which TRL's collator writes into."""
    monkeypatch.setattr("saccade.images.MAX_ASPECT_RATIO", 1000)
    model, processor = FAMILIES["qwen2_5_vl"].build()
    prompt, completion = chat("how many <image>")[:1], chat("")[1:]
    if form == "text":
        part = {"role": "user", "content": [{"type": "image"}]}
        prompt, completion = processor.apply_chat_template([part], tokenize=False), "2"
    good = {"prompt": prompt, "completion": completion, "images": [Image.new("RGB", (32, 16))]}
    placeholder_id = get_family(model).placeholder_id
    collator = DualSpeedCollator(processor=processor, completion_only_loss=True, placeholder_id=placeholder_id)
    empty = " " if form == "text" else chat("", "")[1:]
    cases = (
        ({"images": [Image.new("RGB", (400, 1))]}, "the processor refuses it: absolute aspect ratio"),
        ({"completion": empty}, "there is no answer to learn"),
        *([({"completion": [*completion, *chat("b", " ")]}, "an answer is empty")] if form == "conversation" else []),
        ({"prompt": None}, "'prompt' is empty"),
    )
    expected = collator([good, good])
    for change, message in cases:
        with pytest.raises(RecordError, match=message):
            collator([good, good | change])
        batch = replace(collator, max_bad_records=1)([good, good | change])
        assert [bool(re.search(message, entry["reason"])) for entry in batch.pop("bad_records")] == [True]
        assert torch.equal(batch["input_ids"], expected["input_ids"])
    short = replace(collator, max_length=expected["input_ids"].shape[1], max_bad_records=1)
    long = good | {"completion": "2 " * 9 if form == "text" else chat("", "2 " * 9)[1:]}
    long["images"] = [Image.new("RGB", (64, 64))]
    batch = short([good, long])
    assert [entry["kind"] for entry in batch["bad_records"]] == ["too_long"]


def test_columns_that_a_row_does_not_use(collator):
    row = {"messages": chat("how many <image>"), "images": [Image.new("RGB", (32, 16))]}
    expected = collator([row])
    for unused in ({"prompt": None, "completion": None}, {"prompt": "", "completion": []}):
        assert torch.equal(collator([row | unused])["input_ids"], expected["input_ids"])
    with pytest.raises(RecordError, match="'messages' is a str"):
        collator([row | {"messages": "how many"}])


def test_an_answer_may_be_a_call(collator):
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "count"}}]}
    row = {"messages": [chat("how many <image>")[0], call, *chat("")[1:]], "images": [Image.new("RGB", (32, 16))]}
    assert (collator([row])["labels"] != -100).any()


@pytest.mark.parametrize("change", [{"messages": None}, {"messages": chat("a")[:1] * 2}, {"images": "/none.png"}])
def test_rows_are_grouped_whatever_is_wrong_with_one(processor, change):
    good = {"messages": chat("how many <image>"), "images": [Image.new("RGB", (32, 16))]}
    counter = TokenCounter(
        processor, processor.tokenizer.convert_tokens_to_ids("<image>"), PruningConfig(prune_ratio=0.9)
    )
    lengths = estimate_lengths([good, good | change, good], counter, shortened=True)
    assert lengths[0] == lengths[2] > 1
    assert lengths[1] >= 1
    assert estimate_lengths([good | {"images": good["images"][0]}], counter, shortened=True) == lengths[:1]


def test_a_row_that_is_learned_whole_needs_no_answer(collator):
    row = {"messages": chat("how many <image>")[:1], "images": [Image.new("RGB", (32, 16))]}
    batch = replace(collator, assistant_only_loss=False)([row])
    assert (batch["labels"] != -100).any()


def test_a_batch_is_given_up_beyond_the_limit_and_where_nothing_is_good(model, processor, tmp_path, data):
    rows = load_rows(ModelOptions(dataset=str(data)))
    trainer = make_trainer(model, processor, tmp_path / "out", rows=rows, max_bad_records=3)
    assert set(collate(trainer, [0, 1])) == {"bad_records"}
    assert len(collate(trainer, [0, 1])["bad_records"]) == 4
    trainer.args.max_bad_records = 100
    trainer.train_dataset = rows.select(range(1, 5))
    assert len(collate(trainer, [0, 1])["bad_records"]) == 4
    strict = trainer.data_collator
    with pytest.raises(SaccadeError, match=r"data.jsonl, line 2: image 'images/none.jpg' does not exist"):
        strict([rows[0], rows[1]])


def test_rows_without_a_number_are_replaced_within_the_batch(model, processor, tmp_path, data):
    streamed = load_rows(ModelOptions(dataset=str(data), dataset_streaming=True, dataset_shuffle_buffer=0))
    rows = list(streamed)
    trainer = make_trainer(model, processor, tmp_path / "out", rows=streamed, max_bad_records=20)
    collator = trainer.training_collator()
    batch = collator([rows[0], rows[1], rows[13]])
    expected = collator([rows[0], rows[13], rows[13]])
    assert [entry["kind"] for entry in batch.pop("bad_records")] == ["missing_image"]
    assert all(torch.equal(batch[name], value) for name, value in expected.items())
    # What takes the place of a row that only fills up the batch has no labels either.
    filled = collator([rows[0], {**rows[1], STANDS_IN: True}, {**rows[13], STANDS_IN: True}])
    assert torch.equal(filled["labels"][0], batch["labels"][0])
    assert (filled["labels"][1:] == -100).all()
    # In a batch without any, the last sample before stands in.
    batch = collator([rows[1], rows[2]])
    assert len(batch["bad_records"]) == 2
    assert torch.equal(batch["input_ids"], expected["input_ids"][1:])
    assert set(trainer.training_collator()([rows[1], rows[2]])) == {"bad_records"}


@pytest.mark.parametrize(
    "columns",
    [
        {"fault": "cracked", "kind": "metal", "index": "a7"},
        {"record": {"lot": 3}, "index": 1007},
        {"stands_in": True},
    ],
    ids=["fault", "record", "stands_in"],
)
def test_a_dataset_may_have_columns_of_the_names_that_mark_rows(model, processor, tmp_path, columns):
    """Only together are they those of `mix`."""
    scenes = list(digit_scenes("sft", "train", 6))
    scenes[1]["messages"][-1]["content"] = ""
    counter = TokenCounter(processor, get_family(model).placeholder_id, PruningConfig())

    def look(name, columns):
        rows = [{"messages": row["messages"], "images": row["images"], **columns} for row in scenes]
        rows = Dataset.from_list(rows)
        trainer = make_trainer(model, processor, tmp_path / name, rows=rows, max_bad_records=1)
        return collate(trainer, range(4)), estimate_lengths(rows, counter, True)

    (batch, lengths), (expected, plain) = look("named", columns), look("plain", {})
    (bad,) = batch.pop("bad_records")
    assert [bad] == expected.pop("bad_records")
    assert bad["kind"] == "no_answer"
    assert bad["record"].startswith("a row without a number (")
    assert all(torch.equal(batch[name], value) for name, value in expected.items())
    assert lengths == plain


def test_a_run_whose_first_batch_holds_nothing_good_stops(model, processor, tmp_path, data):
    path = write_json(data.parent / "bad.jsonl", [json.loads(line) for line in data.open()][1:3])
    rows = load_rows(ModelOptions(dataset=str(path)))
    with pytest.raises(SaccadeError, match="no record of a batch can be used"):
        make_trainer(model, processor, tmp_path / "out", rows=rows, max_bad_records=9).train()
    assert len(listed(tmp_path / "out")) == 2


def test_training_skips_counts_and_lists(processor, tmp_path, data):
    """The same losses whatever the workers, each bad record counted once though it is met in every epoch."""
    outputs = []
    for run, workers in (("one", 2), ("two", 0)):
        rows = load_rows(ModelOptions(dataset=str(data)))
        trainer = make_trainer(
            *(build_tiny_llava(processor, seed=0), processor, tmp_path / run),
            rows=rows,
            max_steps=15,
            max_bad_records=11,
            dataloader_num_workers=workers,
        )
        trainer.train()
        outputs.append(losses(trainer))
        entries = listed(tmp_path / run)
        assert sorted(entry["record"] for entry in entries) == sorted(f"{data}, line {n}" for n in range(2, 13))
        assert {entry["kind"] for entry in entries} == set(bad_records(data.parent))
        assert trainer.state.log_history[-2]["bad_records"] == 11
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) == 15


def test_a_resumed_run_goes_on_with_the_list_and_a_new_one_starts_anew(processor, tmp_path, data):
    options = {"max_steps": 8, "max_bad_records": 11, "save_strategy": "steps", "save_steps": 5}
    options["lr_scheduler_type"] = "constant"

    def run(output, resume=None, **more):
        rows = load_rows(ModelOptions(dataset=str(data)))
        model = build_tiny_llava(processor, seed=0)
        trainer = make_trainer(model, processor, output, rows=rows, **{**options, **more})
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "whole")
    run(tmp_path / "parts", max_steps=5)
    first = listed(tmp_path / "parts")
    resumed = run(tmp_path / "parts", resume=True)
    assert losses(resumed) == pytest.approx(losses(whole), abs=1e-6)
    assert {entry["record"] for entry in first} <= {entry["record"] for entry in listed(tmp_path / "parts")}
    assert resumed.bad_records.records == whole.bad_records.records
    good = write_json(data.parent / "good.json", good_records(data.parent, 4))
    trainer = make_trainer(
        build_tiny_llava(processor, seed=0),
        processor,
        tmp_path / "parts",
        rows=load_rows(ModelOptions(dataset=str(good))),
        max_steps=1,
        overwrite=True,
    )
    trainer.train()
    assert not (tmp_path / "parts" / BAD_RECORDS_FILE).exists()


def evaluating(processor, output, rows, **options):
    """A trainer that evaluates one row at a time."""
    return DualSpeedTrainer(
        build_tiny_llava(processor, seed=0),
        args=make_config(output, **{"per_device_eval_batch_size": 1, "prediction_loss_only": True, **options}),
        train_dataset=digit_scenes("sft", "train", 16),
        eval_dataset=rows,
        processing_class=processor,
    )


def test_a_bad_row_is_skipped_in_evaluation_and_not_counted(processor, tmp_path, data):
    """The loss is that of the good rows; the replacement of a bad row in `predict` has no labels."""
    good = write_json(data.parent / "good.jsonl", [json.loads(line) for line in data.open()][12:])
    whole, alone = (load_rows(ModelOptions(dataset=str(path))) for path in (data, good))
    trainer = evaluating(processor, tmp_path / "out", whole.select(range(1, len(whole))), max_bad_records=11)
    expected = trainer.evaluate(alone)["eval_loss"]
    assert not trainer.bad_records
    for _ in range(2):
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-5)
        names = sorted(f"{data}, line {number}" for number in range(2, 13))
        assert sorted(entry["record"] for entry in listed(tmp_path / "out")) == names
    trainer.args.per_device_eval_batch_size = 3
    # Another mean, of batches of other rows.
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=0.2)
    batches = list(trainer.get_test_dataloader(whole))
    learned = torch.cat([(batch["labels"] != -100).any(dim=1) for batch in batches])
    assert learned.tolist() == [True, *[False] * 11, *[True] * 8]
    assert trainer.predict(whole).metrics["test_loss"] == pytest.approx(expected, rel=0.2)


def test_a_bad_row_of_an_evaluation_ends_it_in_one_line_beyond_the_limit(processor, tmp_path, data):
    rows = load_rows(ModelOptions(dataset=str(data)))
    trainer = evaluating(processor, tmp_path / "none", rows)
    for call in (trainer.evaluate, lambda: trainer.predict(rows)):
        with pytest.raises(SaccadeError, match=r"data.jsonl, line 2: image 'images/none.jpg' does not exist"):
            call()
    trainer = evaluating(processor, tmp_path / "few", rows, max_bad_records=10)
    with pytest.raises(SaccadeError, match="11 bad records, more than max_bad_records=10"):
        trainer.evaluate()
    assert len(listed(tmp_path / "few")) == 11


def test_an_evaluation_in_the_middle_counts_with_the_training(processor, tmp_path, data):
    rows = load_rows(ModelOptions(dataset=str(data)))
    options = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}
    trainer = evaluating(processor, tmp_path / "out", rows, max_bad_records=11, **options)
    trainer.train()
    assert sum("eval_loss" in entry for entry in trainer.state.log_history) == 2
    assert trainer.state.log_history[-2]["eval_loss"] > 0
    assert len(listed(tmp_path / "out")) == 11
    with pytest.raises(SaccadeError, match="bad records, more than max_bad_records=10"):
        evaluating(processor, tmp_path / "few", rows, max_bad_records=10, **options).train()


@pytest.mark.slow
def test_two_ranks_evaluate_together(processor, tmp_path, data):
    """A bad row of one rank is taken up by all, and none waits for one that stops or whose stream is shorter."""
    good, bad = good_records(data.parent, 7), list(bad_records(data.parent).values())
    whole = write_json(data.parent / "whole.jsonl", good)
    # In turns of two rows: the first bad ones are the second rank's, and the last batch is its alone to fill up.
    mixed = write_json(data.parent / "mixed.jsonl", [*good[:2], *bad[:2], *good[2:5], bad[2], good[5]])
    without = write_json(data.parent / "without.jsonl", good[:6])
    expected = [
        evaluating(processor, tmp_path / path.stem, load_rows(ModelOptions(dataset=str(path)))).evaluate()["eval_loss"]
        for path in (without, whole)
    ]
    cases = [
        {"data": str(mixed), "max_bad_records": 3},
        {"data": str(mixed), "max_bad_records": 1, "call": "predict", "prediction_loss_only": False},
        {"data": str(whole), "stream": True},
        {"data": str(mixed), "stream": True},
    ]
    words = [json.dumps({"per_device_eval_batch_size": 2, **case}) for case in cases]
    command = [sys.executable, str(Path(__file__).parent / "evaluation_process.py"), str(tmp_path), *words]
    quick = forking("saccade.launch.processes")
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1"), quick:
        assert run_processes(make_plan("ddp", 2), command) == 0
    both = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert both[0] == both[1]
    skipped, beyond, streamed, stopped = both[0]
    names = [f"{mixed}, line {number}" for number in (3, 4, 8)]
    assert skipped == {"loss": pytest.approx(expected[0], abs=1e-5), "listed": names}
    assert sorted(entry["record"] for entry in listed(tmp_path / "0")) == names
    assert re.match(r"2 bad records, more than max_bad_records=1; .*line 3: .*; .*line 4: ", beyond["error"])
    assert beyond["listed"] == [entry["record"] for entry in listed(tmp_path / "1")] == names[:2]
    assert streamed == {"loss": pytest.approx(expected[1], abs=1e-5), "listed": []}
    assert re.match(rf"{mixed}, line 3: .*max_bad_records=0 stops at the first", stopped["error"])


def launch(data, output, *flags):
    """`saccade train` on two processes."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    recipe = ["saccade.cli.main", "train", "tiny-digits/sft", "--model", "tiny", "--dataset", str(data)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [*run, *recipe, "--output_dir", str(output), "--dataloader_num_workers", "1", *TINY, *flags]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=180)


@pytest.mark.slow
def test_two_processes_skip_in_step_and_stop_together(tmp_path, spread):
    done = launch(spread, tmp_path / "out", "--max_bad_records", "11", "--max_steps", "12")
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(listed(tmp_path / "out")) == 11
    assert len(json.loads((tmp_path / "out" / "log.json").read_text())["log_history"]) >= 1
    done = launch(spread, tmp_path / "few", "--max_bad_records", "2", "--max_steps", "12")
    assert done.returncode != 0
    # Both ranks say so, rather than one that raises and one that waits for it.
    errors = re.findall(r"saccade: error: (\d+) bad records, more than max_bad_records=2; ", done.stderr)
    assert len(errors) == 2, done.stderr[-2000:]
    assert errors[0] == errors[1]
    assert 2 < len(listed(tmp_path / "few")) <= 11


@pytest.mark.slow
def test_a_stream_on_two_processes(tmp_path, spread):
    flags = ["--max_bad_records", "11", "--dataset_streaming", "true", "--max_steps", "12"]
    done = launch(spread, tmp_path / "out", *flags, "--dataset_shuffle_buffer", "4")
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(listed(tmp_path / "out")) == 11


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_without_a_limit_the_first_one_ends_the_run(tmp_path, data, capsys, streaming):
    flags = ["--dataset", str(data), "--dataset_streaming", streaming, "--dataset_shuffle_buffer", "0"]
    assert (
        main(["train", "tiny-digits/sft", "--model", "tiny", "--output_dir", str(tmp_path / "o"), *flags, *TINY]) == 2
    )
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert printed.startswith(
        f"saccade: error: {data}, line 2: image 'images/none.jpg' does not exist in {data.parent}"
    )
    assert "max_bad_records=0 stops at the first" in printed


def test_what_max_length_leaves_unusable_is_bad(model, processor, tmp_path, collator):
    """Cut images, and answers that are cut entirely; a row that keeps some of its answer is cut as before."""
    folder = tmp_path / "data"
    records = good_records(folder, 4)
    records[1]["conversations"] = turn("<image>\n" + "how many digits ? " * 30, "3")
    records[2] = {"image": ["images/good2.jpg"] * 2, "conversations": turn("<image> <image> how many ?", "3")}
    records[3]["conversations"] = turn("<image>\nhow many ?", "3") + turn("how many digits ? " * 30, "3")
    rows = load_rows(ModelOptions(dataset=str(write_json(folder / "data.json", records))))
    options = {"rows": rows, "max_bad_records": 2, "max_length": 200}
    trainer = make_trainer(model, processor, tmp_path / "out", **options)
    batch = collate(trainer, [0, 1, 2, 3])
    assert [(entry["record"][-5:], entry["kind"]) for entry in batch["bad_records"]] == [
        ("row 2", "too_long"),
        ("row 3", "too_long"),
    ]
    assert "cuts every answer" in batch["bad_records"][0]["reason"]
    assert "cuts image tokens" in batch["bad_records"][1]["reason"]
    assert batch["input_ids"].shape == (4, 200)
    assert (batch["labels"] != -100).any(dim=1).all()
    # Both were replaced by the last row.
    assert torch.equal(batch["input_ids"][1], batch["input_ids"][3])
    with pytest.raises(SaccadeError, match=r"row 2: max_length=200 cuts every answer: it has 2.. tokens"):
        trainer.data_collator([rows[0], rows[1]])


def test_what_the_chat_template_refuses_is_bad(model, processor, tmp_path):
    folder = tmp_path / "data"
    records = good_records(folder, 3)
    records[1]["conversations"] = turn("forbidden <image>", "3")
    rows = load_rows(ModelOptions(dataset=str(write_json(folder / "data.json", records))))
    trainer = make_trainer(model, processor, tmp_path / "out", rows=rows, max_bad_records=1)
    template = processor.chat_template
    word = "messages[0]['content'][0].get('text', '')"
    check = f"{{% if 'forbidden' in {word} %}}{{{{ raise_exception('no such word') }}}}{{% endif %}}"
    trainer.data_collator.chat_template = check + template
    batch = collate(trainer, [0, 1])
    assert [entry["reason"] for entry in batch["bad_records"]] == [
        "the chat template (chat_template.jinja) refuses it: no such word"
    ]
    assert batch["input_ids"].shape[0] == 2


def test_the_log_counts_each_record_once(tmp_path):
    log = BadRecordLog(tmp_path, limit=2)
    entries = [{"record": f"a, line {number}", "kind": "not_json", "reason": "bad"} for number in range(3)]
    log.add(entries[:2])
    log.add(entries[:1])
    log.check()
    log.write()
    again = BadRecordLog(tmp_path, limit=2)
    again.read()
    assert again.unknown(entries) == entries[2:]
    again.add(entries)
    with pytest.raises(SaccadeError, match=r"3 bad records, more than max_bad_records=2; a, line 0: bad; ") as error:
        again.check()
    assert "\n" not in str(error.value)
