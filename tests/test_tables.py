"""Folders of tables: which files are read, by split, and that nothing outside a folder is."""

import json
import os
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict

from saccade import SaccadeError
from saccade.cli.early import check_dataset
from saccade.data.folders import ImageFolders
from saccade.data.tables import list_splits, split_of
from saccade.errors import RecordError
from saccade.training import ModelOptions, load_rows


def table(answer, count=1):
    rows = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": f"{answer} {number}"}]}
        for number in range(count)
    ]
    return Dataset.from_list(rows)


def write(path, answer, count=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table(answer, max(count, 1)).data.table.slice(0, count), path)
    return path


def answers(path, streaming, **fields):
    options = ModelOptions(dataset=str(path), dataset_streaming=streaming, dataset_shuffle_buffer=0, **fields)
    return [row["messages"][-1]["content"] for row in load_rows(options)]


@pytest.fixture(params=[False, True], ids=["map", "stream"])
def streaming(request):
    return request.param


@pytest.fixture
def secret(tmp_path):
    """The rows of somebody else's folder, beside `tmp_path / "given"`, which names them."""
    write(tmp_path / "secret" / "rows.parquet", "SECRET")
    table("SECRET").save_to_disk(tmp_path / "secret" / "saved")
    return tmp_path / "secret"


@pytest.mark.parametrize("names", ["../secret/rows.parquet", "{secret}/rows.parquet", "hf://datasets/a/b/c.parquet"])
def test_the_readme_of_a_folder_names_nothing_to_read(tmp_path, secret, streaming, names):
    """On the hub its `configs` say which files a dataset has, here they would open those of the reader."""
    write(tmp_path / "given" / "a.parquet", "mine")
    path = names.format(secret=secret)
    (tmp_path / "given" / "README.md").write_text(
        f"---\nconfigs:\n- config_name: default\n  data_files: {path}\n---\n"
    )
    assert answers(tmp_path / "given", streaming) == ["mine 0"]


@pytest.mark.parametrize(
    "name", ["../secret/saved/data-00000-of-00001.arrow", "{secret}/saved/data-00000-of-00001.arrow"]
)
@pytest.mark.parametrize("place", [".", "train"])
def test_the_state_of_a_saved_folder_names_its_own_files(tmp_path, secret, streaming, name, place):
    data = table("mine") if place == "." else DatasetDict({"train": table("mine")})
    data.save_to_disk(tmp_path / "given")
    assert answers(tmp_path / "given", streaming) == ["mine 0"]
    state = tmp_path / "given" / place / "state.json"
    name = os.path.join("." if place == "." else "..", name.format(secret=secret))
    state.write_text(json.dumps(json.loads(state.read_text()) | {"_data_files": [{"filename": name}]}))
    with pytest.raises(SaccadeError, match="leads out of the folder"):
        answers(tmp_path / "given", streaming)


def test_the_splits_of_a_saved_folder_are_its_own(tmp_path, secret, streaming):
    DatasetDict({"train": table("mine")}).save_to_disk(tmp_path / "given")
    (tmp_path / "given" / "dataset_dict.json").write_text(json.dumps({"splits": ["../secret/saved"]}))
    with pytest.raises(SaccadeError, match="leads out of the folder"):
        answers(tmp_path / "given", streaming, dataset_split="../secret/saved")


@pytest.mark.parametrize("link", ["a.parquet", "deeper"])
def test_links_of_a_folder_lead_nowhere_else(tmp_path, secret, streaming, link):
    write(tmp_path / "given" / "b.parquet", "mine")
    (tmp_path / "given" / link).symlink_to(secret if link == "deeper" else secret / "rows.parquet")
    if link == "deeper":  # not followed
        assert answers(tmp_path / "given", streaming) == ["mine 0"]
    else:
        with pytest.raises(SaccadeError, match=r"a\.parquet, which leads out of the folder"):
            answers(tmp_path / "given", streaming)


def test_every_file_of_a_folder_is_read(tmp_path, streaming):
    """Whatever it is called, and in whichever folder."""
    for number, name in enumerate(("b[1].parquet", "a b.parquet", "x/y/z.parquet", "empty.parquet")):
        write(tmp_path / "given" / name, number, count=0 if name == "empty.parquet" else 2)
    write(tmp_path / "given" / ".cache" / "c.parquet", "hidden")
    assert sorted(answers(tmp_path / "given", streaming)) == ["0 0", "0 1", "1 0", "1 1", "2 0", "2 1"]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.parquet", "train"),
        ("data/train-00000-of-00002.parquet", "train"),
        ("default/train/0000.parquet", "train"),
        ("my_test_photos.parquet", "test"),
        ("dev/a.parquet", "validation"),
        ("Val-1.parquet", "validation"),
        ("data/mine-00000-of-00001.parquet", "mine"),
        ("part-00000-of-00002.parquet", None),
        ("trains.parquet", None),
        ("latest.parquet", None),
    ],
)
def test_the_split_of_a_file_is_in_its_name(name, split):
    assert split_of(Path(name)) == split


def test_a_split_has_its_files_alone(tmp_path, streaming):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        write(tmp_path / "given" / "data" / f"{name}.parquet", name)
    assert len(answers(tmp_path / "given", streaming)) == 2
    assert answers(tmp_path / "given", streaming, dataset_split="test") == ["test-00000-of-00001 0"]
    with pytest.raises(SaccadeError, match=r"dataset_split='dev' is not in .*: use one of test, train"):
        answers(tmp_path / "given", streaming, dataset_split="dev")


def test_the_state_of_a_split_elsewhere_is_not_read(tmp_path, secret, streaming):
    """It was read before the files that it names were refused."""
    DatasetDict({"train": table("mine")}).save_to_disk(tmp_path / "given")
    (tmp_path / "given" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "../secret/saved"]}))
    (secret / "saved" / "state.json").write_text("not ours to read")
    with pytest.raises(SaccadeError, match=r"state\.json, which leads out of the folder"):
        answers(tmp_path / "given", streaming)


def test_files_of_which_some_name_a_split_are_refused(tmp_path, streaming):
    """Either those with a split were dropped or those without, in silence."""
    for name in ("part_train", "part_b"):
        write(tmp_path / "given" / f"{name}.parquet", name)
    with pytest.raises(SaccadeError, match=r"part_train\.parquet is named by a split and part_b\.parquet is not"):
        answers(tmp_path / "given", streaming)
    pattern = str(tmp_path / "given" / "*.parquet")
    check_dataset(pattern)
    assert sorted(answers(pattern, streaming)) == ["part_b 0", "part_train 0"]


def test_a_split_of_a_folder_without_any_is_refused(tmp_path, streaming):
    write(tmp_path / "given" / "a.parquet", "a")
    table("b").save_to_disk(tmp_path / "saved")
    for folder in ("given", "saved"):
        assert len(answers(tmp_path / folder, streaming)) == 1
        with pytest.raises(SaccadeError, match=r"dataset_split='test': .*remove it"):
            answers(tmp_path / folder, streaming, dataset_split="test")
    Dataset.from_list([*table("c")], split="test").save_to_disk(tmp_path / "named")
    assert answers(tmp_path / "named", streaming, dataset_split="test") == ["c 0"]


@pytest.mark.parametrize("kind", ["cut", "empty"])
def test_a_damaged_file_of_several_is_named(tmp_path, streaming, kind):
    for name in "abc":
        write(tmp_path / "given" / f"{name}.parquet", name, count=30)
    middle = tmp_path / "given" / "b.parquet"
    middle.write_bytes(middle.read_bytes()[:-50] if kind == "cut" else b"")
    with pytest.raises(SaccadeError, match=r"b\.parquet is not a whole Parquet file"):
        answers(tmp_path / "given", streaming)


@pytest.mark.parametrize(
    ("count", "line"), [(0, "rows.json' has no rows"), (1, "the only row is bad"), (2, "first 2 rows")]
)
def test_a_stream_says_how_many_rows_are_bad(tmp_path, count, line):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{}] * count))
    with pytest.raises(SaccadeError, match=line):
        answers(path, True)


@pytest.mark.parametrize("name", ["data-00000-of-00001.arrow", "state.json", "dataset_info.json"])
@pytest.mark.parametrize("content", ["", "{", "{}"])
def test_a_damaged_saved_folder_is_one_line(tmp_path, streaming, name, content):
    table("a").save_to_disk(tmp_path / "given")
    (tmp_path / "given" / name).write_text(content)
    if (name, content) == ("dataset_info.json", "{}"):
        assert answers(tmp_path / "given", streaming) == ["a 0"]
    else:
        with pytest.raises(SaccadeError, match="given', a folder written by save_to_disk, cannot be read: "):
            answers(tmp_path / "given", streaming)


def test_a_file_without_rows(tmp_path, streaming):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(table("a").data.table.slice(0, 0), path)
    with pytest.raises(SaccadeError, match="has no rows"):
        answers(path, streaming)


def test_a_link_out_of_the_first_image_folder_is_not_replaced_by_another_picture(tmp_path):
    for name in ("first", "second", "store"):
        (tmp_path / name).mkdir()
    (tmp_path / "store" / "1.jpg").write_text("meant")
    shutil.copy(tmp_path / "store" / "1.jpg", tmp_path / "second" / "1.jpg")
    (tmp_path / "first" / "1.jpg").symlink_to(tmp_path / "store" / "1.jpg")
    folders = [tmp_path / "first", tmp_path / "second"]
    with pytest.raises(RecordError) as error:
        ImageFolders(folders).find("1.jpg")
    assert error.value.kind == "outside_image_folders"
    assert ImageFolders(folders, allow_outside=True).find("1.jpg") == str(tmp_path / "first" / "1.jpg")
    (tmp_path / "first" / "1.jpg").unlink()
    assert ImageFolders(folders).find("1.jpg") == str(tmp_path / "second" / "1.jpg")


@pytest.mark.parametrize("name", ["{}2017.parquet", "{}0.parquet", "{}2017/a.parquet", "my_{}1.parquet"])
def test_digits_end_the_word_of_a_split(tmp_path, streaming, name):
    write(tmp_path / name.format("train"), "to learn")
    write(tmp_path / name.format("val"), "held out")
    assert answers(tmp_path, streaming) == ["to learn 0"]
    assert answers(tmp_path, streaming, dataset_split="validation") == ["held out 0"]


def test_parts_of_splits_are_taken_as_datasets_takes_them(tmp_path):
    write(tmp_path / "train.parquet", "to learn", 3)
    write(tmp_path / "test.parquet", "asked", 2)
    assert answers(tmp_path, False, dataset_split="train[:2]") == ["to learn 0", "to learn 1"]
    assert answers(tmp_path, False, dataset_split="train[2:]+test") == ["to learn 2", "asked 0", "asked 1"]
    with pytest.raises(SaccadeError, match=r"dataset_split='train\+dev' is not in .*: use one of test, train"):
        answers(tmp_path, False, dataset_split="train+dev")
    write(tmp_path / "plain" / "a.parquet", "unnamed", 3)
    assert answers(tmp_path / "plain", False, dataset_split="train[1:]") == ["unnamed 1", "unnamed 2"]


@pytest.mark.parametrize("names", [("dev", "validation"), ("train_sft", "train_gen"), ("train", "train_hard")])
def test_shards_in_data_are_of_the_split_that_they_name_whole(tmp_path, streaming, names):
    for name in names:
        write(tmp_path / "data" / f"{name}-00000-of-00001.parquet", name)
    for name in names:
        assert answers(tmp_path, streaming, dataset_split=name) == [f"{name} 0"]


def test_a_folder_may_be_named_like_a_file(tmp_path, streaming):
    """As other tools write tables. Its files are of no split, so that one that is asked for is not passed over."""
    write(tmp_path / "table.parquet" / "part-00000.parquet", "mine")
    assert answers(tmp_path / "table.parquet", streaming) == ["mine 0"]
    with pytest.raises(SaccadeError, match=r"no Parquet file in .* is named by a split, remove it"):
        answers(tmp_path / "table.parquet", streaming, dataset_split="test")


def test_two_words_for_one_split_are_refused(tmp_path, streaming):
    """As in a clone whose README.md tells `dev` from `validation`: both were read as one split."""
    for name in ("dev", "validation", "test"):
        write(tmp_path / "given" / "accounting" / f"{name}-00000-of-00001.parquet", name)
    with pytest.raises(SaccadeError, match=r"dev-\S+ and \S+/validation-\S+ may be of one split, 'validation', or of"):
        answers(tmp_path / "given", streaming, dataset_split="validation")
    assert answers(tmp_path / "given", streaming, dataset_split="test") == ["test 0"]
    assert answers(tmp_path / "given" / "**" / "dev-*.parquet", streaming) == ["dev 0"]


def test_all_splits_are_read_together(tmp_path):
    for name in ("train", "test"):
        write(tmp_path / "given" / f"{name}.parquet", name)
    write(tmp_path / "plain" / "a.parquet", "a")
    assert sorted(answers(tmp_path / "given", False, dataset_split="all")) == ["test 0", "train 0"]
    assert answers(tmp_path / "plain", False, dataset_split="all") == ["a 0"]


def test_a_saved_folder_is_read_whatever_else_lies_in_it(tmp_path, streaming):
    DatasetDict({"train": table("saved")}).save_to_disk(tmp_path / "given")
    write(tmp_path / "given" / "raw" / "test.parquet", "raw")
    assert answers(tmp_path / "given", streaming) == ["saved 0"]
    assert list_splits(str(tmp_path / "given")) == ["train"]


def test_a_linked_folder_of_tables_is_not_left_out_in_silence(tmp_path, streaming, caplog):
    write(tmp_path / "given" / "a.parquet", "a")
    write(tmp_path / "elsewhere" / "b.parquet", "b")
    (tmp_path / "given" / "more").symlink_to(tmp_path / "elsewhere")
    assert answers(tmp_path / "given", streaming) == ["a 0"]
    assert "given/more is a link to a folder, which is not followed" in caplog.text
