"""Records found in JSON lists and JSON lines, against the json module, and files that are broken."""

import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saccade import SaccadeError
from saccade.data.records import RecordFile, parse, stream_records
from saccade.errors import RecordError

text = st.text(alphabet=st.sampled_from('ab"\\{}[],:\n é\u2028😀'), max_size=8)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)
records = st.lists(st.dictionaries(text, values, max_size=4), min_size=1, max_size=6)


def read_all(path):
    """Each record, or None where it is bad; the same from the index as from the stream."""
    file = RecordFile(path)
    found = [or_none(file.read, index) for index in range(len(file))]
    streamed = [(name, or_none(parse, content)) for name, content in stream_records(path)]
    assert streamed == [(file.name(index), record) for index, record in enumerate(found)]
    return found


def or_none(read, argument):
    try:
        return read(argument)
    except RecordError as error:
        return None if error.kind == "not_json" else error


@given(rows=records, indent=st.sampled_from([None, 0, 2]), ascii_only=st.booleans(), mark=st.booleans())
def test_a_list_equals_the_json_module(tmp_path_factory, rows, indent, ascii_only, mark):
    path = tmp_path_factory.mktemp("list") / "data.json"
    content = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    path.write_bytes(b"\xef\xbb\xbf" * mark + content.encode())
    assert read_all(path) == rows
    assert RecordFile(path).name(0) == f"{path}, row 1"


@given(rows=records, blank=st.booleans(), ending=st.booleans())
def test_lines_equal_the_json_module(tmp_path_factory, rows, blank, ending):
    path = tmp_path_factory.mktemp("lines") / "data.jsonl"
    separator = "\n\n" if blank else "\n"
    path.write_text(separator.join(json.dumps(row) for row in rows) + "\n" * ending)
    assert read_all(path) == rows
    step = 2 if blank else 1
    assert RecordFile(path).name(len(rows) - 1) == f"{path}, line {(len(rows) - 1) * step + 1}"


@given(rows=records, cut=st.integers(1, 200))
def test_a_file_that_was_cut_off_keeps_its_whole_records_and_shows_one_bad(tmp_path_factory, rows, cut):
    path = tmp_path_factory.mktemp("cut") / "data.json"
    content = json.dumps(rows)
    kept = content[: max(1, len(content) - cut)]
    path.write_text(kept)
    found = read_all(path)
    assert found[-1] is None
    assert found[:-1] == rows[: len(found) - 1]
    # Every record that still ends within the file is there.
    ends = [len(json.dumps(rows[: number + 1])) - 1 for number in range(len(rows))]
    assert len(found) - 1 == sum(end <= len(kept) for end in ends)


def test_elements_that_are_no_objects(tmp_path):
    path = tmp_path / "data.json"
    path.write_text('[3, {"a": 1}, "text with { and ]", {"b": 2}, [4]]  trailing')
    good = [record for record in read_all(path) if record]
    assert good == [{"a": 1}, {"b": 2}]
    assert read_all(path).count(None) >= 3


def test_each_element_that_is_no_object_is_told_by_its_type_and_number(tmp_path):
    path = tmp_path / "data.json"
    path.write_text('[{"a": 1}, 3, "x, {", null, {"b": 2}, 4.5, [5], true]')
    file, told = RecordFile(path), []
    for index in range(len(file)):
        try:
            file.read(index)
        except RecordError as error:
            told.append((file.name(index).rpartition(" ")[2], str(error).partition(":")[0]))
    kinds = {"2": "an int", "3": "a str", "4": "a NoneType", "6": "a float", "7": "a list", "8": "a bool"}
    assert told == [(number, f"this is {kind}") for number, kind in kinds.items()]


def test_json_lines_may_be_called_json(tmp_path):
    path = tmp_path / "data.json"
    path.write_text('{"a": 1}\n{"a": 2}\nnot json\n')
    assert read_all(path) == [{"a": 1}, {"a": 2}, None]
    assert RecordFile(path).name(2) == f"{path}, line 3"


def test_the_first_of_json_lines_may_be_long(tmp_path):
    path = tmp_path / "data.json"
    path.write_text('\n{"a": "' + "b" * (1 << 17) + '"}\n{"a": 2}\n')
    assert [len(str(row["a"])) for row in read_all(path)] == [1 << 17, 1]


def test_a_list_in_one_line_of_json_lines_is_bad(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('[1]\n{"a": 1}\n')
    assert read_all(path) == [None, {"a": 1}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.json", None, "does not exist"),
        ("empty.json", "", "has no rows"),
        ("blank.jsonl", " \n\n", "has no rows"),
        ("list.json", "[]", "has no rows"),
        ("dict.json", '{\n"a": 1}', "is a single object: expected"),
        ("large.json", '{\n"a": "' + "b" * (1 << 16) + '"}', "is a single object, or not valid JSON: expected"),
        ("cut.json", '{"a":', "is not valid JSON .*: expected a list"),
        ("deep.json", '{"a":' * 9000, "is not valid JSON .*: expected a list"),
    ],
)
def test_files_without_rows(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(SaccadeError, match=message):
        RecordFile(tmp_path / name)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_a_file_in_another_encoding_is_told(tmp_path, name, encoding):
    (tmp_path / name).write_text('[{"a": 1}]\n' if name == "rows.json" else '{"a": 1}\n', encoding=encoding)
    message = f"{name}' starts like a file in {encoding.upper()}: save it as UTF-8"
    with pytest.raises(SaccadeError, match=message):
        RecordFile(tmp_path / name)
    with pytest.raises(SaccadeError, match=message):
        next(stream_records(tmp_path / name))


def test_shards_are_disjoint_and_whole(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(f'{{"a": {number}}}\n' for number in range(11)))
    parts = [[json.loads(content)["a"] for _, content in stream_records(path, shard, 3)] for shard in range(3)]
    assert parts == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8]]


def test_a_copy_in_another_process_reads_the_same(tmp_path):
    path = tmp_path / "data.json"
    path.write_text('[{"a": 1}, {"a": 2}]')
    file = RecordFile(path)
    assert file.read(1) == pickle.loads(pickle.dumps(file)).read(1) == {"a": 2}
