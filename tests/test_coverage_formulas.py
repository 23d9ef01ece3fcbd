"""HoloV, SCOPE and MMTok against loops written from their formulas, one image, one token and one word at a time."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saccade.errors import SaccadeError
from saccade.reducers import get_reducer
from saccade.reducers.holov import share_budget
from saccade.testing.reducers import kept, take_tokens
from saccade.tokens import VisualContext

EQUAL = 1e-9
"""Gains and shares that differ by less are rounding errors of one another."""


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cosines(tokens: Tensor) -> list[list[float]]:
    """Cosines of each pair of tokens `(N, D)`; 0 with a zero token."""
    values = [[float(x) for x in token] for token in tokens.double()]
    norm = [math.sqrt(math.fsum(x * x for x in token)) for token in values]
    return [
        [
            math.fsum(x * y for x, y in zip(one, other, strict=True)) / (norm[i] * norm[j]) if norm[i] * norm[j] else 0
            for j, other in enumerate(values)
        ]
        for i, one in enumerate(values)
    ]


def first_best(scores: dict[int, float]) -> int:
    """The token of the highest score, the first of those that are equal to it."""
    most = max(scores.values())
    return min(token for token, score in scores.items() if score >= most - EQUAL * max(1.0, abs(most)))


@st.composite
def images(draw: st.DrawFn) -> VisualContext:
    """One image of up to 40 tokens whose features are often equal, opposite or zero, with distinct saliencies."""
    tokens, seed = draw(st.integers(1, 40)), draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    whole = draw(st.booleans())
    features = (
        torch.randint(-1, 2, (1, tokens, 3), generator=generator).float() if whole else drawn(seed, 1, tokens, 5)
    )
    saliency = torch.rand(1, tokens, generator=generator) + 0.01
    words = draw(st.integers(0, 4))
    return VisualContext(
        features=features,
        encoder_features=features.flip(1) if whole else drawn(seed + 1, 1, tokens, 4),
        saliency=saliency,
        word_relevance=torch.rand(1, tokens, words, generator=generator) * 2 - 1,
    )


def scope_oracle(image: VisualContext, keep: int, alpha: float) -> list[int]:
    similarity = cosines(image.features[0])
    saliency = [float(value) for value in image.saliency[0].double()]
    tokens = range(len(saliency))
    weight = [(value / max(saliency)) ** alpha for value in saliency]
    cover, chosen = [0.0 for _ in tokens], []
    while len(chosen) < keep:
        left = [token for token in tokens if token not in chosen]
        gain = {i: math.fsum(max(0.0, similarity[i][j] - cover[j]) for j in left) for i in left}
        if max(gain.values()) > EQUAL:
            newest = first_best({i: weight[i] * gain[i] for i in left})
        else:
            newest = min(left, key=lambda i: (-weight[i], i))
        chosen.append(newest)
        cover = [max(best, similarity[newest][j]) for j, best in enumerate(cover)]
    return sorted(chosen)


def softmax(values: list[float]) -> list[float]:
    parts = [math.exp(value - max(values)) for value in values]
    return [part / math.fsum(parts) for part in parts]


def mmtok_oracle(image: VisualContext, keep: int, weight: float = 0.5) -> list[int]:
    tokens = range(image.shape[1])
    similarity = cosines(image.encoder_features[0])
    words = image.word_relevance[0].double().T.tolist()
    rows = [[share / len(words) for share in softmax([value / 0.02 for value in word])] for word in words]
    rows += [
        [weight * share / len(tokens) for share in softmax([similarity[j][i] / 0.2 for i in tokens])] for j in tokens
    ]
    best, chosen = [0.0 for _ in rows], []
    while len(chosen) < keep:
        left = [token for token in tokens if token not in chosen]
        gain = {i: math.fsum(max(0.0, row[i] - most) for row, most in zip(rows, best, strict=True)) for i in left}
        # Rounding errors of a softmax are far smaller than these, and so is what a cover of 1e-10 decides.
        newest = min(i for i in left if gain[i] >= max(gain.values()) - 1e-10)
        chosen.append(newest)
        best = [max(row[newest], most) for row, most in zip(rows, best, strict=True)]
    return sorted(chosen)


def holov_runs(image: VisualContext, runs: list[list[int]], alpha: float) -> list[float]:
    """The weight of each run of tokens."""
    scores = []
    for run in runs:
        n = len(run)
        attention = [1000 * float(image.saliency[0, token]) for token in run]
        similarity = cosines(image.features[0, run]) if run else []
        variance = []
        for i in range(n):
            row = [0.0 if i == j else similarity[i][j] for j in range(n)]
            mean = sum(row) / (n - 1) if n > 1 else 0.0
            variance.append(sum((value - mean) ** 2 for value in row) / (n - 1) if n > 1 else 0.0)
        scale = (sum(map(abs, attention)) / n) / (sum(map(abs, variance)) / n + 1e-6) if n else 0.0
        scores.append(sum(a + alpha * scale * v for a, v in zip(attention, variance, strict=True)) / n if n else 0.0)
    return [score / sum(scores) for score in scores]


def shared_out(count: int, shares: list[float], room: list[int]) -> list[int]:
    """The shares of `count`, rounded down, one more each for the largest; what has no room again, among the others."""
    given = [0 for _ in room]
    while count > sum(given):
        left = count - sum(given)
        opened = sorted(
            (run for run in range(len(room)) if given[run] < room[run]), key=lambda run: (-round(shares[run], 9), run)
        )
        total = sum(shares[run] for run in opened)
        more = {run: math.floor(left * (shares[run] / total if total else 1 / len(opened)) + EQUAL) for run in opened}
        for run in opened[: left - sum(more.values())]:
            more[run] += 1
        for run in opened:
            given[run] = min(room[run], given[run] + more[run])
    return given


def holov_oracle(image: VisualContext, keep: int, count: int = 16, alpha: float = 0.09) -> list[int]:
    tokens = image.shape[1]
    sizes = [tokens // count + (run < tokens % count) for run in range(count)]
    starts = [sum(sizes[:run]) for run in range(count)]
    runs = [list(range(start, start + size)) for start, size in zip(starts, sizes, strict=True)]
    budgets = shared_out(keep, holov_runs(image, runs, alpha), sizes)
    found = []
    for run, budget in zip(runs, budgets, strict=True):
        found += sorted(run, key=lambda token: (-float(image.saliency[0, token]), token))[:budget]
    return sorted(found)


@settings(max_examples=60)
@given(images(), st.integers(1, 40), st.sampled_from([0.0, 1.0, 2.5]))
def test_scope_equals_the_loop(image, keep, alpha):
    keep = min(keep, image.shape[1])
    assert kept(get_reducer("scope", alpha=alpha)(image, keep)) == [scope_oracle(image, keep, alpha)]


@settings(max_examples=60)
@given(images(), st.integers(1, 40), st.sampled_from([0.0, 0.5, 3.0]))
def test_mmtok_equals_the_loop(image, keep, weight):
    keep = min(keep, image.shape[1])
    assert kept(get_reducer("mmtok", vision_weight=weight)(image, keep)) == [mmtok_oracle(image, keep, weight)]


@settings(max_examples=60)
@given(images(), st.integers(1, 40), st.sampled_from([1, 3, 16]))
def test_holov_equals_the_loop(image, keep, runs):
    keep = min(keep, image.shape[1])
    assert kept(get_reducer("holov", runs=runs)(image, keep)) == [holov_oracle(image, keep, runs)]


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 12)), min_size=1, max_size=12),
    st.floats(0, 1),
)
def test_a_budget_is_shared_out_whole_and_by_the_shares(runs, part):
    weights, room = map(list, zip(*runs, strict=True))
    total = sum(weights)
    count = round(part * sum(room))
    shares = [float(Fraction(weight, total)) if total else 0.0 for weight in weights]
    (found,) = share_budget(torch.tensor([count]), torch.tensor([shares]).double(), torch.tensor([room])).tolist()
    assert sum(found) == count
    assert all(given <= most for given, most in zip(found, room, strict=True))
    assert found == shared_out(count, shares, room)


def test_holov_gives_the_surplus_of_a_full_run_to_others():
    """The first of four runs is to get all five, and has room for two. Of the other three the shares are 0.9, 1.2 and
    0.9, so that the third gets one and, of the two that are left, one more; the other goes to the second."""
    image = VisualContext(drawn(0, 1, 8, 4), saliency=torch.tensor([[0.5, 0.4, 0.02, 0.01, 0.03, 0.01, 0.01, 0.02]]))
    assert kept(get_reducer("holov", runs=4)(image, 5)) == [[0, 1, 2, 4, 5]]


def test_attention_decides_how_holov_shares_the_budget():
    """The mean of alpha c v is alpha times that of the attention, however the cosines of a run are spread."""
    saliency = torch.linspace(0.1, 1, 16).repeat(2) * torch.tensor([2.0, 1.0]).repeat_interleave(16)
    context = VisualContext(drawn(1, 1, 32, 6), saliency=saliency.unsqueeze(0))
    closer = context.features.clone()
    closer[:, 16:] = closer[:, 16:17] + 0.1 * closer[:, 16:]
    for features in (context.features, closer):
        for alpha in (0.0, 0.09, 5.0):
            found = get_reducer("holov", runs=2, alpha=alpha)(context.replace(features=features), 10)
            assert kept(found) == [[9, 10, 11, 12, 13, 14, 15, 29, 30, 31]]  # two thirds of ten, and one more


def test_square_windows_of_holov():
    """With the whole budget on one window of 2 x 2, its four tokens are kept; a run of the raster is half a row."""
    saliency = torch.full((8, 8), 1e-6)
    saliency[2:4, 4:6] = 1.0
    context = VisualContext(drawn(2, 1, 64, 4), saliency=saliency.reshape(1, 64))
    window = [20, 21, 28, 29]
    assert kept(get_reducer("holov", windows="square")(context, 4)) == [window]
    # Four runs of 4 x 4: the window's budget is the quadrant's.
    spread = torch.full((8, 8), 0.01)
    spread[:4, 4:] = 1.0
    context = context.replace(saliency=spread.reshape(1, 64))
    quadrant = [8 * row + column for row in range(4) for column in range(4, 8)]
    assert kept(get_reducer("holov", windows="square", runs=4)(context, 16))[0] == quadrant


@pytest.mark.parametrize("windows", ["runs", "square"])
@pytest.mark.parametrize(("frames", "height", "width"), [(1, 7, 9), (3, 4, 5), (1, 1, 40)])
def test_windows_of_any_grid_keep_what_is_asked_for(windows, frames, height, width):
    tokens = frames * height * width
    context = VisualContext(
        drawn(3, 2, tokens, 4),
        saliency=drawn(4, 2, tokens).softmax(dim=1),
        grid=torch.tensor([[frames, height, width]]).expand(2, 3),
    )
    reducer = get_reducer("holov", windows=windows)
    place = torch.cat((torch.full((5,), -1), torch.arange(tokens)))
    for keep in (1, 17, tokens):
        bare = reducer(context, keep)
        assert [len(row) for row in kept(bare)] == [keep, keep]
        padded = reducer(take_tokens(context, place, float("nan")), keep)
        assert [[int(place[token]) for token in row] for row in kept(padded)] == kept(bare)


def test_scope_without_saliency_needs_none():
    reducer = get_reducer("scope", alpha=0)
    assert reducer.needs == frozenset()
    assert get_reducer("scope").needs == {"saliency"}
    features = torch.tensor([[[1.0, 0.0], [0.9, 0.1], [0.8, 0.3], [0.0, 1.0]]])
    assert kept(reducer(VisualContext(features), 2)) == [[2, 3]]  # sums of 2.93, 3.07, 3.26 and 1.46


def test_scope_takes_the_most_salient_of_duplicates_when_all_is_covered():
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat_interleave(3, dim=0).unsqueeze(0)
    context = VisualContext(features, saliency=torch.tensor([[0.1, 0.2, 0.3, 0.6, 0.5, 0.4]]))
    assert kept(get_reducer("scope")(context, 4)) == [[2, 3, 4, 5]]


def test_words_of_mmtok_beyond_a_rows_own_have_no_say():
    image = VisualContext(
        drawn(5, 2, 30, 4), encoder_features=drawn(6, 2, 30, 4), word_relevance=drawn(7, 2, 30, 5).tanh()
    )
    counted = image.replace(words=torch.tensor([5, 2]))
    found = get_reducer("mmtok")(counted, 6)
    other = image.word_relevance.clone()
    other[1, :, 2:] = float("nan")
    assert torch.equal(get_reducer("mmtok")(counted.replace(word_relevance=other), 6).index, found.index)
    for row, words in enumerate((5, 2)):
        alone = image.select_rows(slice(row, row + 1))
        alone = alone.replace(word_relevance=alone.word_relevance[:, :, :words])
        assert kept(found)[row] == mmtok_oracle(alone, 6)
    assert kept(get_reducer("mmtok")(image.replace(words=torch.tensor([5, 0])), 6))[1] != kept(found)[1]


def test_mmtok_covers_the_question():
    """A word that one token alone is close to makes it stay, be it a near duplicate of many."""
    tokens = drawn(8, 1, 1, 6) + 0.01 * drawn(9, 1, 20, 6)
    relevance = torch.zeros(1, 20, 1)
    relevance[0, 13] = 0.5
    image = VisualContext(tokens, encoder_features=tokens, word_relevance=relevance)
    assert kept(get_reducer("mmtok")(image, 1)) == [[13]]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("holov", {"alpha": -0.1}),
        ("holov", {"runs": 0}),
        ("holov", {"windows": "round"}),
        ("scope", {"alpha": "much"}),
        ("scope", {"alpha": float("inf")}),
        ("mmtok", {"vision_weight": -1}),
        ("mmtok", {"text_temperature": 0}),
        ("mmtok", {"vision_temperature": True}),
    ],
)
def test_bad_options_are_named(name, options):
    ((field, value),) = options.items()
    with pytest.raises(SaccadeError, match=f"'{name}': {field}={value!r}"):
        get_reducer(name, **options)
