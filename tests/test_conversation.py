"""LLaVA and chat records to messages, against a plain reading of the format."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saccade.data.conversation import IMAGE_TAG, as_parts, convert, media_count, place_row_media
from saccade.data.turns import with_places
from saccade.errors import RecordError

words = st.text(alphabet="ab c.\n", min_size=0, max_size=12)
answers = st.text(alphabet="abc ", min_size=1, max_size=12).filter(str.strip)
tags = st.sampled_from(["<image>", "<image>\n", "\n<image>", "<image>\r\n"])


@st.composite
def questions(draw):
    """A question with no, one or several tags anywhere in it."""
    pieces = draw(st.lists(words, min_size=1, max_size=4))
    return "".join(draw(tags) + piece if number else piece for number, piece in enumerate(pieces))


@given(
    turns=st.lists(st.tuples(questions(), answers), min_size=1, max_size=4),
    system=st.booleans(),
    greeting=st.booleans(),
    single=st.booleans(),
)
def test_llava_records(turns, system, greeting, single):
    count = sum(question.count(IMAGE_TAG) for question, _ in turns)
    names = [f"{number}.jpg" for number in range(count)]
    conversation = [{"from": "system", "value": "be brief"}] * system + [{"from": "gpt", "value": "hello"}] * greeting
    for question, answer in turns:
        conversation += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    record = {"id": 1, "conversations": conversation}
    if count:
        record["image"] = names[0] if single and count == 1 else names
    row = convert(record)
    assert row == convert(record)
    assert row["images"] == names
    roles = [message["role"] for message in row["messages"]]
    # What the model says before anybody asked is left out.
    assert roles == ["system"] * system + ["user", "assistant"] * len(turns)
    said = [message["content"] for message in row["messages"][system:]]
    assert said == [text for pair in turns for text in pair]


@given(question=questions())
def test_parts_keep_the_words_and_the_places_of_images(question):
    parts = as_parts({"role": "user", "content": question})["content"]
    assert media_count({"content": parts}, "image") == question.count(IMAGE_TAG)
    pieces = [""]
    for part in parts:
        if part["type"] == "image":
            pieces.append("")
        else:
            pieces[-1] += part["text"]
    expected = [piece if piece.strip() else "" for piece in question.split(IMAGE_TAG)]
    assert [piece.strip("\r\n") for piece in pieces] == [piece.strip("\r\n") for piece in expected]
    if IMAGE_TAG in question:
        assert not any(part.get("text", "").startswith(("\r", "\n")) for part in parts[1:])


@given(count=st.integers(0, 3), given_images=st.integers(0, 3))
def test_tags_that_differ_in_number_from_the_images_are_refused(count, given_images):
    record = {
        "conversations": [{"from": "human", "value": "<image>" * count + "what ?"}, {"from": "gpt", "value": "a"}],
        "image": [f"{number}.jpg" for number in range(given_images)],
    }
    # Without any tag the images stand before the first question.
    if count in (0, given_images):
        assert len(convert(record)["images"]) == given_images
    else:
        with pytest.raises(RecordError, match=f"{count} <image> placeholder.* images has {given_images}") as error:
            convert(record)
        assert error.value.kind == "placeholder_count"


HUMAN, GPT = {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}
IMAGE = {"type": "image"}
TAGGED = {"role": "user", "content": "see <image>"}
ASKED, ANSWERED = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("record", "kind", "message"),
    [
        ({"conversations": [HUMAN]}, "no_answer", "no answer"),
        ({"conversations": []}, "no_answer", "no answer"),
        ({"conversations": [GPT]}, "no_answer", "no answer"),
        ({"conversations": [HUMAN, {"from": "gpt", "value": "\n"}]}, "empty_answer", "answer is empty"),
        ({"conversations": [HUMAN, {"from": "bing", "value": "b"}]}, "unknown_role", "role 'bing'"),
        ({"conversations": "hello"}, "malformed", "no 'conversations' list"),
        ({"conversations": [HUMAN, {"from": "gpt"}]}, "malformed", "'from' and a 'value'"),
        ({"conversations": [HUMAN, {"from": "gpt", "value": "see <image>"}]}, "placeholder_count", "in an answer"),
        ({"messages": [ASKED]}, "no_answer", "no answer"),
        ({"messages": [ASKED, {"role": "assistant", "content": []}]}, "empty_answer", "answer is empty"),
        ({"messages": [ASKED, {"role": "bot", "content": "b"}]}, "unknown_role", "role 'bot'"),
        ({"messages": [ASKED, {"role": "assistant"}]}, "malformed", "'role' and a 'content'"),
        ({"messages": [ASKED, {"role": "assistant", "content": ["b"]}]}, "malformed", "list of parts"),
        ({"messages": [ASKED, {**ANSWERED, "tool_calls": [{"function": {}}]}]}, "malformed", "'tool_calls' are not"),
        ({"messages": [ASKED, {"role": "assistant", "tool_calls": [{}]}]}, "malformed", "'tool_calls' are not"),
        (
            {
                "messages": [{"role": "user", "content": [IMAGE, {"type": "text", "text": "<image>"}]}, ANSWERED],
                "image": "a",
            },
            "placeholder_count",
            "2 <image> placeholder",
        ),
        (
            {"messages": [ASKED, {"role": "assistant", "content": [{"type": "text", "text": "<image>"}]}]},
            "placeholder_count",
            "in an answer",
        ),
        ({"prompt": [ASKED]}, "malformed", "'completion' is a NoneType"),
        (
            {"prompt": [ASKED], "completion": [ANSWERED, TAGGED, ANSWERED]},
            "placeholder_count",
            "1 <image> placeholder.* images has 0",
        ),
        (
            {"prompt": [TAGGED], "completion": [ANSWERED, TAGGED, ANSWERED], "image": "a"},
            "placeholder_count",
            "2 <image> placeholder.* images has 1",
        ),
        ({"messages": [ANSWERED]}, "no_answer", "no answer"),
        ({"messages": [ASKED, ANSWERED], "system": "a", "system_prompt": "b"}, "field", "say different things"),
        ({"text": "a"}, "malformed", "no 'messages' list"),
    ],
)
def test_bad_records(record, kind, message):
    with pytest.raises(RecordError, match=message) as error:
        convert(record)
    assert error.value.kind == kind
    assert kind in RecordError.KINDS
    assert "\n" not in str(error.value)


def test_chat_records():
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "what ?"}]
    record = {"messages": [{"role": "user", "content": parts, "name": "x"}, ANSWERED], "images": "a.png"}
    row = convert(record)
    assert row["images"] == ["a.png"]
    assert row["messages"][0]["content"] == [{"type": "image"}, {"type": "text", "text": "what ?"}]
    assert convert({"prompt": [ASKED], "completion": [ANSWERED], "images": None}) == {
        "prompt": [ASKED],
        "completion": [ANSWERED],
        "images": [],
        "videos": [],
    }


def test_images_may_be_in_the_questions_of_a_completion():
    record = {"prompt": [TAGGED], "completion": [ANSWERED, TAGGED, ANSWERED], "images": ["a", "b"]}
    row = convert(record)
    assert row == {**record, "videos": []}
    placed = place_row_media(row, 2)
    assert [len(message["content"]) for message in (*placed["prompt"], *placed["completion"])] == [2, 1, 2, 1]


@pytest.mark.parametrize("before", [[], [{"role": "system", "content": "s"}]])
def test_answers_before_the_first_question_are_left_out(before):
    """Whatever the form of the row, as in LLaVA."""
    turns = [{"from": message["role"], "value": message["content"]} for message in before]
    wanted = [*before, ASKED, ANSWERED]
    assert convert({"conversations": [*turns, GPT, HUMAN, GPT]})["messages"] == wanted
    assert convert({"messages": [*before, ANSWERED, ASKED, ANSWERED]})["messages"] == wanted
    row = convert({"prompt": [*before, ANSWERED, ASKED], "completion": [ANSWERED]})
    assert [*row["prompt"], *row["completion"]] == wanted


@pytest.mark.parametrize("empty", [None, []])
def test_an_empty_column_is_none(empty):
    """Of a table that is joined of several, which fills those that a row lacks."""
    chat, completed = {"messages": [ASKED, ANSWERED]}, {"prompt": [ASKED], "completion": [ANSWERED]}
    for row in ({"conversations": [HUMAN, GPT]}, chat, completed):
        others = {name: empty for name in ("conversations", "messages", "prompt", "completion") if name not in row}
        assert convert({**others, **row}) == convert(row)
    assert convert({**chat, "system": "s", "system_prompt": " s "}) == convert({**chat, "system": "s"})


def test_tags_within_parts_are_images_too():
    text = {"type": "text", "text": "this\n<image>\nor that <image> ?"}
    parts = as_parts({"role": "user", "content": [IMAGE, text]})["content"]
    assert parts == [
        IMAGE,
        {"type": "text", "text": "this"},
        IMAGE,
        {"type": "text", "text": "or that "},
        IMAGE,
        {"type": "text", "text": " ?"},
    ]
    answered = {**ANSWERED, "tool_calls": None}  # the empty field that `datasets` adds
    row = convert({"messages": [{"role": "user", "content": [IMAGE, text]}, answered], "images": ["a", "b", "c"]})
    assert row["messages"][1] == ANSWERED


def test_line_breaks_of_windows_beside_a_tag_are_removed():
    asked = as_parts({"role": "user", "content": "how\r\n<image>\r\nmany\r\nare there ?"})
    assert [part.get("text") for part in asked["content"]] == ["how", None, "many\r\nare there ?"]


def test_an_answer_in_parts_says_nothing_of_images():
    """They come before the first question, unless a question in parts says where they are."""
    answer = {"role": "assistant", "content": [{"type": "text", "text": "3"}]}
    for others in ([], [{"role": "system", "content": [{"type": "text", "text": "s"}]}]):
        row = convert({"messages": [*others, ASKED, answer], "images": ["a"]})
        places = with_places(row["messages"], 1)
        assert places[len(others)]["content"] == [IMAGE, {"type": "text", "text": ASKED["content"]}]


def test_a_format_that_is_named_is_not_guessed():
    both = {"conversations": [HUMAN, GPT], "messages": [ASKED, ANSWERED]}
    assert convert(both)["messages"] == convert(both, "llava")["messages"] == [ASKED, ANSWERED]
    with pytest.raises(RecordError, match="no 'conversations' list"):
        convert({"messages": [ASKED, ANSWERED]}, "llava")
    with pytest.raises(RecordError, match="no 'messages' list"):
        convert({"conversations": [HUMAN, GPT]}, "chat")
