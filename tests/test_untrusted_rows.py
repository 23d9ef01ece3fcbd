"""Untrusted rows: fields that affect what is learned are honoured or refused, and nothing else is opened.

An audit hook of the interpreter records what is opened and connected to, so the code under test is not relied on.
"""

import json

import pytest
from data_files import good_records, turn, write_json
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from watching import OUTSIDE, check_inside, used_or_refused, watched

from saccade.cli.main import main
from saccade.data.check import check_sources
from saccade.data.conversation import convert
from saccade.data.folders import ImageFolders
from saccade.data.lengths import check_words
from saccade.data.sources import JsonSource, found
from saccade.dualspeed.collator import prepare_example
from saccade.errors import RecordError
from saccade.training import ModelOptions, load_rows


def chat(content, answer="3", **fields):
    return [{"role": "user", "content": content, **fields}, {"role": "assistant", "content": answer}]


TEXT = {"type": "text", "text": "how many ?"}
IMAGE = {"type": "image"}
PARTS = {
    "a path": IMAGE | {"path": OUTSIDE},
    "a URL": IMAGE | {"url": "http://127.0.0.1:9/image.png"},
    "base64": IMAGE | {"base64": "aGVsbG8="},
    "an image": IMAGE | {"image": OUTSIDE},
    "an image_url part": {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/image.png"}},
    "a video": {"type": "video", "path": OUTSIDE},
    "an audio": {"type": "audio", "audio": OUTSIDE},
    "no type": {"text": "how many ?"},
    "an unknown type": {"type": "file", "file": OUTSIDE},
    "a type that is a number": {"type": 3, "text": "a"},
    "a text that is a number": {"type": "text", "text": 3},
    "a text that is a list": {"type": "text", "text": ["a"]},
    "a text with a path": TEXT | {"path": OUTSIDE},
    "half a character": {"type": "text", "text": "how \ud800 many"},
    "a part that is a text": "how many ?",
}
ROWS = {
    "null messages": {"messages": None},
    "no messages": {"messages": []},
    "messages that are a text": {"messages": "hello"},
    "a message that is a text": {"messages": ["hello"]},
    "a content that is a number": {"messages": chat(3)},
    "half a character": {"messages": chat("how \ud800 many <image>")},
    "half a character in LLaVA's turns": {"messages": None, "conversations": turn("how \udc80 many <image>", "3")},
    "tools": {"tools": [{"type": "function", "function": {"name": "count"}}]},
    "videos": {"videos": ["a.mp4"]},
    "audio": {"audio": "a.wav"},
    "boxes": {"objects": {"bbox": [[1, 2, 3, 4]], "category": ["cat"]}},
    "an image in a column that is not known": {"picture": "images/good0.jpg"},
    "bytes in a column that is not known": {"img": {"bytes": b"\xff\xd8", "path": None}},
    "two columns of images": {"image": "images/good0.jpg"},
    "an empty image": {"images": [None]},
    "bytes that are a text": {"images": [{"bytes": "/9j/4AAQ", "path": None}]},
    "a weight of a turn": {"messages": chat("<image> how many ?", weight=0)},
    "a turn without loss": {"messages": chat("<image> how many ?", loss=False)},
    "a mask of a row": {"loss_mask": [0, 1]},
    "reasoning": {"messages": [*chat("<image> a")[:1], {**chat("")[1], "content": "3", "reasoning_content": "so"}]},
    "an image in a message": {"messages": chat("<image> a", image="images/good0.jpg")},
    "a system prompt beside another": {
        "system": "be brief",
        "messages": [{"role": "system", "content": "be long"}, *chat("<image> how many ?")],
    },
    "a system prompt that is a list": {"system": ["be brief"]},
}
BAD = {
    **{f"a part: {name}": {"messages": chat([IMAGE, TEXT, part])} for name, part in PARTS.items()},
    **{f"a row: {name}": change for name, change in ROWS.items()},
}


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "data"
    good_records(path, 1)
    return path


def bad_row(name):
    row = {"messages": chat("<image> how many ?"), "images": ["images/good0.jpg"]} | BAD[name]
    return {key: value for key, value in row.items() if not (key == "messages" and value is None and len(row) > 2)}


def convert_and_find(row, folders):
    return found(convert(row), folders)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_a_bad_record_and_opens_nothing(folder, name):
    """In a file for training, in the check, and in a dataset that no reader of Saccade has seen."""
    row = bad_row(name)
    folders = ImageFolders([folder])
    with watched() as events, pytest.raises(RecordError) as error:
        convert_and_find(row, folders)
    assert "\n" not in str(error.value)
    check_inside(events, folder)
    if "conversations" in row or "bytes that are a text" in name:
        return
    inside = [str(folder / image) if isinstance(image, str) else image for image in row["images"]]
    with watched() as events, pytest.raises(RecordError):
        prepare_example({**row, "images": inside})
    check_inside(events, folder)


def test_options_of_a_template_are_read_from_a_dataset_of_the_users_own_alone(folder):
    row = {"messages": chat("how many ?"), "chat_template_kwargs": {"enable_thinking": True}}
    with pytest.raises(RecordError, match="'chat_template_kwargs', which is only read from datasets passed in Python"):
        convert(row)
    assert prepare_example(row)["chat_template_kwargs"] == {"enable_thinking": True}


def test_training_and_the_check_agree(folder, tmp_path):
    """Every bad row of a file is reported by the check and replaced in training, and the good ones alone are used."""
    names = [name for name in BAD if "bytes in a column" not in name]
    good = {"messages": chat("<image> how many ?"), "images": ["images/good0.jpg"], "id": "a", "source": "b"}
    path = write_json(folder / "rows.jsonl", [good, *map(bad_row, names), good])
    report = check_sources([JsonSource(path, "auto", ImageFolders([folder]))])
    assert report["bad"] == len(names)
    assert report["ignored"]["id"] == 2
    rows = load_rows(ModelOptions(dataset=str(path)))
    assert [row["fault"] is None for row in rows] == [True, *[False] * len(names), True]
    by_place = {entry["record"]: entry["reason"] for entry in report["bad_records"]}
    assert by_place == {row["record"]: row["fault"] for row in rows if row["fault"]}


def test_a_control_token_in_a_text_is_a_bad_record(processor):
    end = processor.tokenizer.eos_token
    placeholder = processor.tokenizer.convert_tokens_to_ids("<image>")
    good = {"messages": chat("<image> how many ?")}
    check_words(good, processor, placeholder)
    for messages in (chat(f"how many {end} <user> ?"), chat("a", f"3 {end}"), chat([{**TEXT, "text": f"a{end}"}])):
        with pytest.raises(RecordError, match="is a control token of the model") as error:
            check_words({"messages": messages}, processor, placeholder)
        assert error.value.kind == "control_token"


@pytest.mark.parametrize("column", ["system", "system_prompt"])
def test_a_rows_own_system_prompt_is_read(column):
    row = {column: "be brief", "image": "a.jpg", "conversations": turn("<image>\nhow many ?", "3")}
    assert convert(row)["messages"][0] == {"role": "system", "content": "be brief"}
    prepared = prepare_example({column: "be brief", "messages": chat("how many ?"), "images": []})
    assert [message["role"] for message in prepared["messages"]] == ["system", "user", "assistant"]
    assert column not in prepared
    same = [{"role": "system", "content": "be brief"}, *chat("how many ?")]
    assert len(convert({column: "be brief", "messages": same})["messages"]) == 3


def test_weights_of_one_and_empty_fields_say_nothing():
    """Tables have every field in every row."""
    row = {
        "messages": chat("how many ?", weight=1, loss=True),
        "videos": [],
        "audio": None,
        "image": "",
        "objects": {},
    }
    assert len(convert(row)["messages"]) == 2


def test_where_an_image_was_found_is_not_an_image_itself(folder, tmp_path):
    """As in ALLaVA's rows. Without the image, the address could be meant as one."""
    rows = good_records(folder, 3)
    rows[0]["url"] = rows[1]["image_url"] = "https://example.org/good.jpg"
    rows[2] |= {"url": "https://example.org/good.jpg", "image": None}
    path = write_json(folder / "data.json", rows)
    assert main(["data", "check", str(path), "--jobs", "1", "--output", str(tmp_path / "report.json")]) == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert [(entry["index"], entry["kind"]) for entry in report["bad_records"]] == [(2, "field")]
    assert report["ignored"]["url"] == 2
    assert report["ignored"]["image_url"] == 1
    with pytest.raises(RecordError, match="'second_url', which looks like an image"):
        convert({"messages": chat("how many ?"), "images": ["a.png"], "second_url": "b.png"})


def test_the_check_lists_what_it_left_aside(folder, capsys, tmp_path):
    rows = good_records(folder, 3)
    rows[1] |= {"source": "vqa", "metadata": {"a": 1}}
    rows[2]["conversations"][0]["lang"] = "en"
    path = write_json(folder / "data.json", rows)
    assert main(["data", "check", str(path), "--jobs", "1", "--output", str(tmp_path / "report.json")]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["ignored"] == {"id": 3, "metadata": 1, "source": 1, "conversations.lang": 1}
    printed = " ".join(capsys.readouterr().out.split())
    assert "ignored fields: id (3 rows)" in printed
    assert "metadata (1 row)" in printed


def test_a_dataset_without_images_is_told(folder, capsys, tmp_path, caplog):
    path = write_json(folder / "data.json", [{"messages": chat("how many ?")}] * 2)
    assert main(["data", "check", str(path), "--jobs", "1", "--output", str(tmp_path / "report.json")]) == 0
    assert "no row has an image" in capsys.readouterr().out
    load_rows(ModelOptions(dataset=str(path)))
    assert "no image" in caplog.text


NAMES = (
    *("a", "b", "type", "text", "path", "url", "image", "images", "image_url", "base64", "bytes", "video", "content"),
    *("role", "messages", "conversations", "from", "value", "system", "weight", "prompt", "completion", "tools"),
)
KEYS = st.sampled_from(NAMES)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-2, 2)
    | st.floats(allow_nan=True)
    | st.binary(max_size=3)
    | st.sampled_from(["user", "assistant", "human", "gpt", "text", "image", "<image>", "3", "\ud800", "\x00", ""])
    | st.sampled_from(
        [OUTSIDE, "../data.json", "images/good0.jpg", "http://127.0.0.1:9/a.png", "data:image/png;base64,"]
    )
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": VALUES})
    | st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt"]), "value": VALUES})
    | VALUES,
    max_size=3,
)
RECORDS = st.fixed_dictionaries(
    {}, optional={"messages": MESSAGES, "conversations": MESSAGES, "images": VALUES, "image": VALUES, "system": VALUES}
) | st.dictionaries(KEYS, VALUES, max_size=4)


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz")
    good_records(path, 1)
    return path


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(record=RECORDS)
def test_whatever_a_row_holds_it_is_used_or_refused(image_folder, collator, record):
    used_or_refused(lambda: convert_and_find(record, ImageFolders([image_folder])), collator, image_folder)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(record=RECORDS)
def test_the_words_of_a_plain_row_are_used_or_refused(image_folder, collator, record):
    """In a user's own dataset, whose images may be anywhere; this one has none."""
    words = {name: value for name, value in record.items() if name not in ("image", "images")}
    used_or_refused(lambda: words, collator, image_folder)
