"""Clips of digits that move: what is asked of them is what they show, and no frame alone tells it."""

import random

import numpy as np
import pytest

from experiments.motion.clips import LANE, LANES, MOTION_KINDS, Mover, ask, motion_clips, render_clip, sample_movers
from saccade import SaccadeError
from saccade.tiny.vocabulary import WORDS, build_tokenizer

FRAMES = 8


def test_rows():
    rows = motion_clips("train", 60, seed=1)
    assert {row["kind"] for row in rows} == set(MOTION_KINDS)
    tokenizer = build_tokenizer()
    for row in rows:
        (clip,) = row["videos"]
        assert clip.frames.shape == (FRAMES, LANE * LANES, 48, 3)
        question, answer = (message["content"] for message in row["messages"])
        assert answer == row["answer"]
        assert tokenizer.unk_token_id not in tokenizer(f"{question} {answer}").input_ids
        assert set(question.split()) <= set(WORDS)


def test_a_row_depends_on_its_number_alone():
    short, long = motion_clips("test", 3, seed=2), motion_clips("test", 9, seed=2)
    for number in (2, 0):
        assert np.array_equal(short[number]["videos"][0].frames, long[number]["videos"][0].frames)
        assert short[number]["messages"] == long[number]["messages"]
    other = motion_clips("test", 3, seed=3)
    assert [row["messages"] for row in short] != [row["messages"] for row in other]
    # Questions and answers are read without drawing.
    assert motion_clips("test", 9, seed=2).select_columns("answer")["answer"][:3] == [row["answer"] for row in short]


def test_a_digit_crosses_its_lane():
    mover = Mover(3, 0, lane=1, start=2, frames=4, right=True)
    places = [mover.position(frame, 48) for frame in range(FRAMES)]
    assert places[:2] == [None, None]
    assert places[6:] == [None, None]
    # From one side to the other, at whole patches.
    assert places[2:6] == [0, 8, 24, 32]
    back = Mover(3, 0, lane=1, start=2, frames=4, right=False)
    assert [back.position(frame, 48) for frame in range(2, 6)] == [32 - place for place in places[2:6]]
    clip = render_clip([mover], FRAMES, 48, ground=5)
    changed = [np.argwhere((clip.frames[frame] != clip.frames[0]).any(axis=2)) for frame in range(2, 6)]
    for places_changed, left in zip(changed, places[2:6], strict=True):
        assert places_changed[:, 0].min() >= LANE
        assert places_changed[:, 0].max() < 2 * LANE
        assert places_changed[:, 1].min() >= left
        assert places_changed[:, 1].max() < left + LANE
    assert np.array_equal(clip.frames[0], clip.frames[7])


@pytest.mark.parametrize("kind", MOTION_KINDS)
def test_answers(kind):
    rng = random.Random(0)
    answers = set()
    for _ in range(80):
        movers = sample_movers(rng, "train", FRAMES, kind)
        assert len({mover.value for mover in movers}) == len({mover.lane for mover in movers}) == len(movers)
        assert all(0 <= mover.start <= mover.start + mover.frames <= FRAMES for mover in movers)
        question, answer = ask(movers, kind, rng)
        answers.add(answer)
        named = [mover for mover in movers if f" {mover.value} " in f" {question} "]
        if kind == "passed":
            assert answer == str(len(movers))
        elif kind == "direction":
            assert answer == ("right" if named[0].right else "left")
        else:
            assert answer == str(min(named, key=lambda mover: mover.start).value)
    assert answers >= {"passed": {"1", "2", "3"}, "direction": {"left", "right"}, "first": {"0", "9"}}[kind]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "none"}, "split='none' is unknown"),
        ({"num_rows": -1}, "num_rows is -1"),
        ({"frames": 4}, "frames is 4: give an int of at least 5"),
        ({"width": 40}, "width is 40"),
        ({"kinds": ["speed"]}, "choose from direction, first, passed"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(SaccadeError, match=message):
        motion_clips(**({"split": "train", "num_rows": 1} | options))
