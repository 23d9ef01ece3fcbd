"""Reducers that know time, on grids of several frames: against plain loops, and by the invariants of all reducers."""

import pytest
import torch
from family_models import FAMILIES, VideoCase

from saccade import SaccadeError
from saccade.reducers import PruningConfig, get_reducer, keep_count, reduce
from saccade.reducers.changes import changed_tokens
from saccade.reducers.frames import KNOW_TIME, STEPS
from saccade.testing import families as tester
from saccade.testing.reducers import kept, take_tokens
from saccade.tokens import VisualContext

BACK, BALL = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])


def clip_context(frames: int, high: int, wide: int, rows: int = 1, seed: int = 0, still: float = 0.7) -> VisualContext:
    """Clips in most of whose places nothing changes from a frame to the next."""
    generator = torch.Generator().manual_seed(seed)
    places = high * wide
    features = torch.randn(rows, 1, places, 8, generator=generator).expand(-1, frames, -1, -1).clone()
    for frame in range(1, frames):
        changed = torch.rand(rows, places, generator=generator) > still
        new = torch.randn(rows, places, 8, generator=generator)
        features[:, frame] = torch.where(changed.unsqueeze(2), new, features[:, frame - 1])
    features = features.bfloat16().float().flatten(1, 2)
    return VisualContext(features, grid=torch.tensor([[frames, high, wide]]).expand(rows, 3))


def moving_ball() -> VisualContext:
    """Three frames of four places; a ball moves to the right by one each time."""
    frames = [[BALL, BACK, BACK, BACK], [BACK, BALL, BACK, BACK], [BACK, BACK, BALL, BACK]]
    features = torch.stack([torch.stack(frame) for frame in frames]).flatten(0, 1).unsqueeze(0)
    return VisualContext(features, grid=torch.tensor([[3, 1, 4]]))


def test_the_changed_places_of_a_moving_ball_are_kept():
    reduction = get_reducer("changes", first=1.0)(moving_ball(), 8)
    # Where the ball was and where it is, in the second and the third frame.
    assert kept(reduction) == [[0, 1, 2, 3, 4, 5, 9, 10]]


def test_the_first_frame_takes_a_share():
    context = moving_ball()
    assert len([token for token in kept(get_reducer("changes")(context, 6))[0] if token < 4]) == 3
    assert len([token for token in kept(get_reducer("changes", first=0.2)(context, 6))[0] if token < 4]) == 1
    # All that changed, and no more than there is.
    assert kept(get_reducer("changes")(context, 12)) == [list(range(12))]
    assert len(kept(get_reducer("changes", first=0.1)(context, 11))[0]) == 11


def naive_changes(distance: torch.Tensor, threshold: int) -> set[tuple[int, int]]:
    found = set()
    for place in range(distance.shape[0]):
        last = 0
        for frame in range(1, distance.shape[1]):
            if int(distance[place, frame, last]) > threshold:
                found.add((frame, place))
                last = frame
    return found


@pytest.mark.parametrize("count", [1, 3, 8, 20, 35])
def test_a_threshold_meets_the_budget(count):
    """What is kept is what a threshold keeps, and tokens with the largest changes beyond it."""
    generator = torch.Generator().manual_seed(count)
    x = torch.nn.functional.normalize(torch.randn(6, 7, 5, generator=generator).double(), dim=2)
    distance = ((1 - x @ x.transpose(1, 2)) * STEPS).round().long()
    found = {tuple(place) for place in changed_tokens(distance, count).nonzero().tolist()}
    assert len(found) == count
    assert all(frame > 0 for frame, _ in found)
    by_threshold = [naive_changes(distance, int(value)) for value in distance.unique()]
    within = [each for each in by_threshold if len(each) <= count and each <= found]
    assert len(max(within, key=len)) >= count - 3


def test_slow_change_adds_up():
    """A place that turns a little each time is kept again once it has turned enough, not never."""
    angles = torch.linspace(0, 1.5, 16)
    turning = torch.stack([angles.cos(), angles.sin()], dim=1)
    features = torch.stack([turning, BACK.expand(16, 2)], dim=1).flatten(0, 1).unsqueeze(0)  # (1, 32, 2)
    context = VisualContext(features, grid=torch.tensor([[16, 1, 2]]))
    row = kept(get_reducer("changes", first=1.0)(context, 5))[0]
    assert row[:2] == [0, 1]
    turned = [token // 2 for token in row[2:]]
    assert all(token % 2 == 0 for token in row[2:])
    assert min(later - earlier for earlier, later in zip([0, *turned], turned, strict=False)) >= 3


def test_distinct_frames_get_more():
    generator = torch.Generator().manual_seed(0)
    still = torch.randn(1, 9, 8, generator=generator)
    other = torch.randn(1, 9, 8, generator=generator)
    features = torch.cat([still, still, other, still], dim=1)
    context = VisualContext(features, grid=torch.tensor([[4, 3, 3]]))
    row = kept(get_reducer("frames")(context, 20))[0]
    counts = [sum(9 * frame <= token < 9 * frame + 9 for token in row) for frame in range(4)]
    assert sum(counts) == 20
    # The second equals the first; the fourth equals two of three.
    assert counts[2] == counts[0] > counts[3] > counts[1] == 1
    fewer = kept(get_reducer("frames")(context, 2))[0]
    assert [token // 9 for token in fewer] == [0, 2]


def test_within_a_frame_another_reducer_chooses():
    context = clip_context(3, 4, 4)
    saliency = torch.rand(1, 48, generator=torch.Generator().manual_seed(1))
    reducer = get_reducer("frames", within="fastervlm")
    assert reducer.needs == {"saliency"}
    row = kept(reducer(context.replace(saliency=saliency), 9))[0]
    for frame in range(3):
        mine = [token for token in row if token // 16 == frame]
        best = saliency[0, 16 * frame : 16 * frame + 16].topk(len(mine)).indices + 16 * frame
        assert mine == sorted(best.tolist())


def test_within_each_frame_a_random_choice_is_its_own():
    """In training, rows have seeds: a frame keeps what `random` keeps of the row of features that it is."""
    frames, places = 4, 16
    clip = clip_context(frames, 4, 4, still=0.0)
    rows = VisualContext(
        clip.features.reshape(frames, places, 8),
        grid=torch.tensor([[1, 4, 4]]).expand(frames, 3),
        group=torch.zeros(frames, dtype=torch.long),
        seed=torch.arange(frames) + 5,
    )
    reduction = reduce(rows, PruningConfig("frames", {"within": "random"}, prune_ratio=0.75, budget="image"))
    assert kept(reduction) == kept(get_reducer("random")(rows, reduction.counts))
    assert len(set(map(tuple, kept(reduction)))) == frames


@pytest.mark.parametrize("name", KNOW_TIME)
@pytest.mark.parametrize(
    ("options", "message"),
    [({"within": "changes"}, "within='changes' is unknown"), ({"within": "tome"}, "within='tome' merges tokens")],
)
def test_bad_options(name, options, message):
    with pytest.raises(SaccadeError, match=message):
        get_reducer(name, **options)(clip_context(3, 2, 2), 3)


@pytest.mark.parametrize("first", [0, 1.5, "all", True])
def test_bad_share_of_the_first_frame(first):
    with pytest.raises(SaccadeError, match=r"first=.* is outside \(0, 1\]"):
        get_reducer("changes", first=first)


@pytest.mark.parametrize("name", KNOW_TIME)
@pytest.mark.parametrize("keep", [1, 2, 7, 12, 30, 47, 48, 60])
def test_the_number_is_exact(name, keep):
    reduction = get_reducer(name)(clip_context(4, 3, 4, rows=3), keep)
    assert reduction.index.shape == (3, min(keep, 48))
    assert reduction.dense
    assert (reduction.index.diff(dim=1) > 0).all()


@pytest.mark.parametrize("name", KNOW_TIME)
def test_a_row_depends_neither_on_its_batch_nor_on_padding(name):
    """Clips of several lengths and shapes, and an image, in one batch, in either precision."""
    alone = [clip_context(4, 3, 4, seed=1), clip_context(2, 2, 3, seed=2), clip_context(1, 5, 5, seed=3)]
    width = max(context.shape[1] for context in alone) + 5
    padded = []
    for number, context in enumerate(alone):
        tokens = context.shape[1]
        place = torch.full((width,), -1)
        place[torch.randperm(width, generator=torch.Generator().manual_seed(number))[:tokens].sort().values] = (
            torch.arange(tokens)
        )
        padded.append((place, take_tokens(context, place, float("nan"))))
    together = VisualContext(
        torch.cat([context.features for _, context in padded]),
        valid=torch.cat([context.valid for _, context in padded]),
        grid=torch.cat([context.grid for _, context in padded]),
    )
    reducer = get_reducer(name)
    keep = torch.tensor([13, 5, 7])
    for context in (together, together.replace(features=together.features.bfloat16())):
        rows = kept(reducer(context, keep))
        for number, (place, _) in enumerate(padded):
            expected = kept(reducer(alone[number], int(keep[number])))[0]
            assert [int(place[token]) for token in rows[number]] == expected


@pytest.mark.parametrize("name", KNOW_TIME)
def test_frames_that_are_rows_share_a_budget(name):
    """As families give them: a row of features per frame, a group per clip."""
    clip = clip_context(4, 3, 4)
    rows = VisualContext(
        clip.features.reshape(4, 12, 8), grid=torch.tensor([[1, 3, 4]]).expand(4, 3), group=torch.zeros(4).long()
    )
    shared = reduce(rows, PruningConfig(name, prune_ratio=0.75, budget="image"))
    joint = kept(get_reducer(name)(clip, keep_count(48, 0.75)))[0]
    assert [12 * frame + token for frame, row in enumerate(kept(shared)) for token in row] == joint
    # With a budget per frame there is nothing to compare.
    single = reduce(rows, PruningConfig(name, prune_ratio=0.75))
    assert kept(single) == kept(reduce(rows, PruningConfig("divprune", prune_ratio=0.75)))


@pytest.mark.parametrize("name", KNOW_TIME)
def test_crops_are_not_frames(name):
    """An image of four crops beside a clip of four frames: the image is left to the reducer within, as one row."""
    both = clip_context(4, 3, 4, rows=2)
    rows = VisualContext(
        both.features.reshape(8, 12, 8),
        grid=torch.tensor([[1, 3, 4]]).expand(8, 3),
        group=torch.arange(2).repeat_interleave(4),
        sample=torch.arange(2).repeat_interleave(4),
        video=torch.arange(8) >= 4,
    )
    for budget in ("image", "sample"):
        shared, plain, all_video = (
            kept(reduce(context, PruningConfig(reducer, prune_ratio=0.75, budget=budget)))
            for reducer, context in ((name, rows), ("divprune", rows), (name, rows.replace(video=None)))
        )
        assert shared == plain[:4] + all_video[4:]
        assert plain[:4] != all_video[:4]


@pytest.mark.parametrize("name", ["internvl", "smolvlm", "qwen3_vl", "llava_onevision"])
def test_families_tell_crops_from_frames(name):
    """Rows of several crops are not of a video; where a processor gives frames as images, a row by itself may be."""
    images = tester.Case(name, FAMILIES[name])
    context = images.family.encode(images.inputs).context
    group = context.group.tolist()
    if name in ("internvl", "smolvlm"):
        assert context.video.tolist() == [group.count(one) == 1 for one in group]
        assert max(map(group.count, group)) > 1
        return
    assert not context.video.any()
    clips = VideoCase(name, FAMILIES[name])
    encoded = clips.family.encode(clips.inputs)
    assert encoded.context.video.tolist() == list(encoded.videos)
    assert any(encoded.videos)


@pytest.mark.parametrize("name", KNOW_TIME)
def test_degenerate_features(name):
    for features in (torch.zeros(1, 24, 4), torch.full((1, 24, 4), 0.3), torch.full((1, 24, 4), float("nan"))):
        context = VisualContext(features, grid=torch.tensor([[4, 2, 3]]))
        for keep in (1, 5, 9, 24):
            assert len(set(kept(get_reducer(name)(context, keep))[0])) == keep
