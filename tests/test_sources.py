"""Rows from files, folders and tables: the same in any format, streamed or not, mixed, and never from outside."""

import io
import json
import os
from collections import Counter

import pyarrow.parquet
import pytest
from data_files import bad_records, good_records, jpeg, turn, write_json
from datasets import Dataset, Features, Image, List, Value, load_dataset, load_from_disk
from PIL import Image as Pillow

from saccade import SaccadeError
from saccade.data.folders import ImageFolders
from saccade.data.mixture import SourceOptions, mix, source_options, stream
from saccade.data.sources import TableSource
from saccade.errors import RecordError
from saccade.images import image_size, open_image
from saccade.training import ModelOptions, load_rows


def rows_of(path, **fields):
    return list(load_rows(ModelOptions(dataset=str(path), **fields)))


def content(row):
    return {name: row[name] for name in ("messages", "images", "fault", "kind")}


@pytest.fixture
def records(tmp_path):
    """Good and bad LLaVA records, one of them without image and one with two."""
    good = good_records(tmp_path, 6)
    good[1] = {"id": "text", "conversations": turn("how are you ?", "fine")}
    good[2] = {"image": ["images/good0.jpg", "images/good2.jpg"], "conversations": turn("<image> or <image> ?", "a")}
    return [*good, *bad_records(tmp_path).values()]


def test_a_list_and_lines_give_the_same_rows(tmp_path, records):
    rows = [rows_of(write_json(tmp_path / name, records)) for name in ("a.json", "a.jsonl")]
    assert list(map(content, rows[0])) == list(map(content, rows[1]))
    assert [row["fault"] is None for row in rows[0][:6]] == [True] * 6
    assert rows[0][0]["images"] == [str(tmp_path / "images/good0.jpg")]
    assert rows[0][1]["images"] == []
    assert rows[1][6]["record"] == f"{tmp_path / 'a.jsonl'}, line 7"
    # What only decoding shows is found later; everything else is a fault of the row.
    expected = dict.fromkeys(bad_records(tmp_path))
    late = {"truncated_image", "zero_byte_image", "not_an_image", "decompression_bomb"}
    assert [row["kind"] for row in rows[0][6:]] == [None if kind in late else kind for kind in expected]


def test_parquet_save_to_disk_and_folders_of_parquet(tmp_path):
    records = good_records(tmp_path, 5)
    stored = [
        {
            "messages": [{"role": "user", "content": "<image> ?"}, {"role": "assistant", "content": str(number)}],
            "images": [{"bytes": (tmp_path / record["image"]).read_bytes(), "path": None}],
        }
        for number, record in enumerate(records)
    ]
    features = Features(
        {"messages": List({"role": Value("string"), "content": Value("string")}), "images": List(Image())}
    )
    table = Dataset.from_list(stored, features=features)
    (tmp_path / "folder" / "data").mkdir(parents=True)
    table.to_parquet(tmp_path / "rows.parquet")
    table.to_parquet(tmp_path / "folder" / "data" / "train-00000.parquet")
    table.save_to_disk(tmp_path / "saved")
    for path in ("rows.parquet", "folder", "saved"):
        rows = rows_of(tmp_path / path)
        assert [row["messages"] for row in rows] == [row["messages"] for row in stored], path
        assert [row["images"] for row in rows] == [row["images"] for row in stored], path
        streamed = rows_of(tmp_path / path, dataset_streaming=True, dataset_shuffle_buffer=0)
        assert list(map(content, streamed)) == list(map(content, rows)), path


def test_a_table_does_not_open_what_a_row_names(tmp_path):
    """`datasets` would decode an image column by itself, wherever its path leads."""
    (tmp_path / "data").mkdir()
    Pillow.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    row = {"conversations": turn("<image> ?", "a"), "image": {"bytes": None, "path": str(tmp_path / "secret.png")}}
    types = {"conversations": List({"from": Value("string"), "value": Value("string")}), "image": Image()}
    # Written by hand: `datasets` itself would put the image's bytes in place of its path.
    table = Dataset.from_list([row], features=Features(types))
    path = tmp_path / "data" / "rows.parquet"
    pyarrow.parquet.write_table(table.data.table, path)
    assert load_dataset("parquet", data_files=str(path), split="train")[0]["image"].size == (8, 8)
    (found,) = rows_of(path)
    assert found["kind"] == "outside_image_folders"
    (found,) = rows_of(path, allow_outside_images=True)
    assert found["images"] == [str(tmp_path / "secret.png")]


@pytest.mark.parametrize(("name", "shards"), [("a.json", 1), ("a.jsonl", 3)])
def test_a_stream_equals_the_rows_in_memory(tmp_path, records, name, shards):
    path = write_json(tmp_path / name, records)
    rows = rows_of(path)
    options = source_options([str(path)])
    streamed = list(stream(options, shards=shards))
    assert [row["record"] for row in streamed] == [
        row["record"] for shard in range(shards) for row in rows[shard::shards]
    ]
    by_record = {row["record"]: content(row) for row in streamed}
    assert by_record == {row["record"]: content(row) for row in rows}
    shuffled = [row["record"] for row in stream(options, shuffle_buffer=8, seed=1)]
    assert sorted(shuffled) == sorted(by_record)
    assert shuffled != list(by_record)
    assert shuffled == [row["record"] for row in stream(options, shuffle_buffer=8, seed=1)]


def test_every_part_of_a_stream_has_rows_of_every_source(tmp_path):
    """So the ranks that read the parts end together, and `rows` are the first rows, however many ranks there are."""
    paths = [
        write_json(tmp_path / f"{name}.json", [{"conversations": turn("?", f"{name}{row}")} for row in range(count)])
        for name, count in (("a", 2), ("b", 4), ("c", 4))
    ]
    sources = source_options([str(paths[0]), {"path": str(paths[1]), "rows": 3}, str(paths[2])])
    for rows, expected in (
        (None, [["a0", "b0", "b2", "c0", "c2"], ["a1", "b1", "c1", "c3"]]),
        (4, [["a0", "b0"], ["a1", "b1"]]),
    ):
        streamed = stream(sources, shards=2, rows=rows)
        assert [[row["messages"][1]["content"] for row in streamed.shard(2, rank)] for rank in range(2)] == expected


@pytest.mark.parametrize("streaming", [False, True])
def test_mixtures_draw_by_weight(tmp_path, streaming):
    """Shares within four standard deviations, every row of every source at least once, and the same by seed."""
    sources = []
    for stem, count in (("a", 300), ("b", 100)):
        records = [{"id": f"{stem}{number}", "conversations": turn("?", f"{stem}{number}")} for number in range(count)]
        sources.append(
            {"path": str(write_json(tmp_path / f"{stem}.json", records)), "weight": 3 if stem == "b" else 1}
        )
    options = {"dataset_streaming": streaming, "dataset_shuffle_buffer": 0}
    rows = [row["messages"][1]["content"] for row in rows_of_list(sources, **options)]
    share = sum(answer.startswith("b") for answer in rows) / len(rows)
    assert abs(share - 0.75) < 4 * (0.75 * 0.25 / len(rows)) ** 0.5
    assert len(set(rows)) == 400
    assert rows == [row["messages"][1]["content"] for row in rows_of_list(sources, **options)]
    other = [row["messages"][1]["content"] for row in rows_of_list(sources, **options, dataset_seed=1)]
    assert rows[:200] != other[:200]


def rows_of_list(sources, **fields):
    return list(load_rows(ModelOptions(dataset=sources, **fields)))


@pytest.mark.parametrize("streaming", [False, True])
def test_without_weights_sources_follow_one_another(tmp_path, streaming):
    chat = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "chat"}]}
    one = write_json(tmp_path / "one.json", [{"conversations": turn("?", str(number))} for number in range(5)])
    two = write_json(tmp_path / "two.jsonl", [chat] * 3)
    sources = [{"path": str(one), "rows": 2, "format": "llava"}, str(two)]
    rows = rows_of_list(sources, dataset_streaming=streaming, dataset_shuffle_buffer=0)
    assert [row["messages"][1]["content"] for row in rows] == ["0", "1", "chat", "chat", "chat"]
    if not streaming:
        assert [row["index"] for row in rows] == list(range(5))
    assert len(rows_of_list(sources, dataset_streaming=streaming, dataset_rows=3)) == 3


def test_digits_mix_with_files(tmp_path):
    path = write_json(tmp_path / "one.json", [{"conversations": turn("?", "a")}])
    rows = rows_of_list([{"path": "digits", "rows": 4}, str(path)])
    assert len(rows) == 5
    assert isinstance(rows[0]["images"], list)
    assert rows[4]["messages"][1]["content"] == "a"


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ([], "is empty"),
        ([{"weight": 1}], "a mapping with a 'path'"),
        ([{"path": "a.json", "wieght": 1}], "unknown field 'wieght'"),
        ([{"path": "a.json", "weight": 1}, "b.json"], "some sources a weight"),
        ([{"path": "a.json", "weight": 0}], "weight=0"),
        ([{"path": "a.json", "rows": 0}], "rows=0"),
        ([{"path": "a.json", "format": "csv"}], "format='csv'"),
        ([{"path": "a.json", "image_folder": "/nowhere"}], "does not exist"),
        ([{"path": "a.json", "image_folder": 5}], "dataset image_folder=5 is an int, expected list or str"),
        ([{"path": "a.json", "split": None}], "dataset split=None, expected str"),
        (["none.json"], "none.json' does not exist"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_bad_mixtures(dataset, message, streaming):
    with pytest.raises(SaccadeError, match=message) as error:
        load_rows(ModelOptions(dataset=dataset, dataset_streaming=streaming))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("names", ["other,images", "other, images", ["other", "images"]])
def test_several_image_folders_are_named_alike_everywhere(tmp_path, monkeypatch, names):
    """In a recipe and in a source of its dataset."""
    monkeypatch.chdir(tmp_path)
    record = {"image": "a.png", "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "b"}]}
    write_json(tmp_path / "a.json", [record])
    for name in ("other", "images"):
        (tmp_path / name).mkdir()
    Pillow.new("RGB", (4, 4)).save(tmp_path / "images" / "a.png")
    for options in (
        ModelOptions(dataset="a.json", image_folder=names),
        ModelOptions(dataset=[{"path": "a.json", "image_folder": names}]),
    ):
        (row,) = load_rows(options)
        assert (row["fault"], [os.path.basename(image) for image in row["images"]]) == (None, ["a.png"])


@pytest.mark.parametrize("names", ["", "images,", ["images", ""]])
def test_a_folder_without_a_name_is_not_the_current_one(tmp_path, monkeypatch, names):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(SaccadeError, match="image_folder='' is not a folder"):
        SourceOptions("a.json", image_folder=names).folders(False)


def test_the_wrong_image_folder_shows_at_once(tmp_path):
    path = write_json(tmp_path / "a.json", good_records(tmp_path, 4) * 30)
    (tmp_path / "other").mkdir()
    for streaming in (False, True):
        with pytest.raises(SaccadeError, match=r"first 100 rows are all bad; .*a.json, row 1: image .*other"):
            load_rows(
                ModelOptions(dataset=str(path), image_folder=str(tmp_path / "other"), dataset_streaming=streaming)
            )
    with pytest.raises(SaccadeError, match="image_folder='/nowhere' is not a folder"):
        load_rows(ModelOptions(dataset=str(path), image_folder="/nowhere"))


def test_sources_with_other_columns_are_refused(tmp_path):
    prompt = {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}
    one = write_json(tmp_path / "one.json", [{"conversations": turn("?", "a")}])
    two = write_json(tmp_path / "two.json", [prompt])
    with pytest.raises(SaccadeError, match="mixes sources"):
        load_rows(ModelOptions(dataset=[str(one), str(two)]))


class TestFolders:
    @pytest.fixture
    def folders(self, tmp_path):
        for name in ("one", "two", "away"):
            (tmp_path / name / "sub").mkdir(parents=True)
            (tmp_path / name / f"{name}.png").write_bytes(b"x")
        (tmp_path / "one" / "both.png").write_bytes(b"1")
        (tmp_path / "two" / "both.png").write_bytes(b"2")
        os.symlink(tmp_path / "away" / "away.png", tmp_path / "one" / "link.png")
        os.symlink(tmp_path / "away", tmp_path / "one" / "linked")
        os.symlink(tmp_path / "two" / "two.png", tmp_path / "one" / "within.png")
        return [tmp_path / "one", tmp_path / "two"]

    def test_the_first_folder_that_has_it(self, folders, tmp_path):
        found = ImageFolders(folders)
        assert found.find("both.png") == str(tmp_path / "one" / "both.png")
        assert found.find("two.png") == str(tmp_path / "two" / "two.png")
        assert found.find("sub/../one.png") == str(tmp_path / "one" / "sub" / ".." / "one.png")
        assert found.find(str(tmp_path / "two" / "two.png")) == str(tmp_path / "two" / "two.png")
        assert found.find("within.png") == str(tmp_path / "one" / "within.png")

    @pytest.mark.parametrize("name", ["../away/away.png", "link.png", "linked/away.png", "/etc/hostname", "{away}"])
    def test_what_leaves_them_is_refused(self, folders, tmp_path, name):
        name = name.format(away=tmp_path / "away" / "away.png")
        with pytest.raises(RecordError, match=r"leads out of the image folder .* allow_outside_images") as error:
            ImageFolders(folders).find(name)
        assert error.value.kind == "outside_image_folders"
        if name != "/etc/hostname":
            assert os.path.isfile(ImageFolders(folders, allow_outside=True).find(name))

    def test_a_folder_whose_name_only_starts_alike_is_outside(self, tmp_path):
        for name in ("data", "data2"):
            (tmp_path / name).mkdir()
        (tmp_path / "data2" / "a.png").write_bytes(b"x")
        with pytest.raises(RecordError, match="leads out"):
            ImageFolders([tmp_path / "data"]).find("../data2/a.png")

    @pytest.mark.parametrize("name", ["none.png", "sub", "", "a\0b"])
    def test_what_is_not_there(self, folders, name):
        with pytest.raises(RecordError, match=r"does not exist in|is not a path"):
            ImageFolders(folders).find(name)


class TestImages:
    def test_turned_upright(self, tmp_path):
        """Orientation 6: the camera lay on its side, and the file has to be turned a quarter clockwise."""
        image = Pillow.new("RGB", (40, 20), "white")
        image.paste("red", (0, 0, 10, 20))
        exif = Pillow.Exif()
        exif[0x0112] = 6
        image.save(tmp_path / "a.png", exif=exif)
        upright = open_image(tmp_path / "a.png")
        assert upright.size == image_size(tmp_path / "a.png") == (20, 40)
        assert upright.getpixel((10, 2)) == (255, 0, 0)
        assert upright.getpixel((10, 30)) == (255, 255, 255)

    def test_the_size_limit_holds_before_decoding(self, tmp_path):
        Pillow.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
        for read in (open_image, image_size):
            with pytest.raises(
                RecordError, match=r"bomb.png' is too large \(Image size \(400000000 pixels\)"
            ) as error:
                read(tmp_path / "bomb.png")
            assert error.value.kind == "decompression_bomb"
        with pytest.raises(RecordError, match="max_image_pixels=100"):
            open_image({"bytes": jpeg()}, max_pixels=100)
        assert open_image({"bytes": jpeg()}, max_pixels=40_000).size == (200, 200)

    def test_a_program_is_no_image(self, tmp_path):
        """PostScript under the name of a photo, which Pillow would hand to Ghostscript."""
        Pillow.new("RGB", (8, 8)).save(tmp_path / "a.eps")
        photo = (tmp_path / "a.eps").rename(tmp_path / "a.jpg")
        with pytest.raises(RecordError, match="is not an image in a supported format: replace it") as error:
            open_image(photo)
        assert error.value.kind == "not_an_image"

    @pytest.mark.parametrize("size", [9000, 12_000])
    def test_a_size_at_which_pillow_only_warns_is_an_error(self, tmp_path, size, recwarn):
        """81 million pixels are within the limit, 144 million are not, and Pillow refuses only from 179 million on."""
        stream = io.BytesIO()
        Pillow.new("1", (size, size)).save(stream, "PNG")
        if size == 9000:
            assert image_size({"bytes": stream.getvalue()}) == (9000, 9000)
        else:
            with pytest.raises(RecordError, match="12000 x 12000"):
                image_size({"bytes": stream.getvalue()})
        assert not [warning for warning in recwarn if "Decompression" in warning.category.__name__]

    @pytest.mark.parametrize("image", [{"bytes": None, "path": None}, {}])
    def test_neither_bytes_nor_path(self, image):
        with pytest.raises(RecordError, match="neither 'bytes' nor a 'path'"):
            open_image(image)


def test_the_table_behind_rows_is_numbers_only(tmp_path):
    """What a large file costs: three numbers per row, whatever its records contain."""
    path = write_json(tmp_path / "a.json", [{"conversations": turn("long " * 500, "b")}] * 200)
    rows = load_rows(ModelOptions(dataset=str(path)))
    assert rows.with_format(None).data.nbytes <= 20 * 200
    assert Counter(len(row["messages"]) for row in rows) == {2: 200}


def test_saved_rows_keep_their_numbers(tmp_path):
    """A subset and a shuffle of the rows still read the right records."""
    path = write_json(tmp_path / "a.json", [{"conversations": turn("?", str(number))} for number in range(20)])
    rows = load_rows(ModelOptions(dataset=str(path)))
    shuffled = rows.shuffle(seed=0).select(range(5))
    assert [row["messages"][1]["content"] for row in shuffled] == [str(row["index"]) for row in shuffled]
    assert mix([rows_source(path)])[3]["record"].endswith("row 4")
    assert json.loads(path.read_text())[3]["conversations"][1]["value"] == "3"


def rows_source(path):
    (options,) = source_options([str(path)])
    return options.open()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("change", ["shorter", "other", "replaced", "removed"])
def test_a_file_that_is_rewritten_while_it_is_read(tmp_path, change, streaming):
    """Its rows lie where they lay, or nowhere: a mapped file that became shorter kills the process that looks."""
    path = tmp_path / "rows.jsonl"
    line = json.dumps({"messages": [{"role": "user", "content": "a ?"}, {"role": "assistant", "content": "b"}]})
    path.write_text((line + "\n") * 3000)
    rows = load_rows(ModelOptions(dataset=str(path), dataset_streaming=streaming, dataset_shuffle_buffer=0))
    reader = iter(rows)
    assert next(reader)["messages"]
    if change == "shorter":
        path.write_text(line + "\n")
    elif change == "other":
        with path.open("r+") as file:
            file.write("x" * 10)
    elif change == "replaced":
        (tmp_path / "new").write_text((line + "\n") * 3000)
        (tmp_path / "new").rename(path)
    else:
        path.unlink()
    with pytest.raises(SaccadeError, match=r"rows.jsonl was changed while it was being read"):
        for _ in reader:
            pass


def test_a_table_that_is_rewritten_while_it_is_read(tmp_path):
    Dataset.from_dict({"messages": ["a"] * 10}).save_to_disk(tmp_path / "rows")
    source = TableSource(load_from_disk(tmp_path / "rows"), "rows", "chat")
    source._stamps.check()
    source._stamps.every_seconds = 0
    Dataset.from_dict({"messages": ["b"] * 10}).save_to_disk(tmp_path / "others")
    (file,) = (tmp_path / "others").glob("*.arrow")
    file.rename(tmp_path / "rows" / file.name)
    with pytest.raises(SaccadeError, match=r"\.arrow was changed while it was being read"):
        source.read(3)


def test_a_folder_that_holds_something_else(tmp_path):
    (tmp_path / "text.txt").write_text("a")
    with pytest.raises(SaccadeError, match="not a folder written by save_to_disk, and has no Parquet"):
        load_rows(ModelOptions(dataset=str(tmp_path)))
    with pytest.raises(FileNotFoundError):
        load_from_disk(str(tmp_path))
