"""Each published method against loops written from its formula, one image and one token at a time."""

import math
from collections.abc import Callable
from fractions import Fraction
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saccade.errors import SaccadeError
from saccade.reducers import get_reducer, list_reducers
from saccade.reducers.similarity import nearest_kept
from saccade.testing.reducers import kept, make_context, special_features, take_tokens
from saccade.tokens import VisualContext


def drawn(rows: int, tokens: int, width: int, seed: int) -> Tensor:
    return torch.randn(rows, tokens, width, generator=torch.Generator().manual_seed(seed))


def full_context(rows: int = 3, tokens: int = 37, seed: int = 0) -> VisualContext:
    """Features, saliency, keys and relevance without ties; the tokens of a row share a direction."""
    return VisualContext(
        features=drawn(rows, tokens, 16, seed) + 0.5 * drawn(rows, 1, 16, seed + 1),
        encoder_features=drawn(rows, tokens, 12, seed + 5) + 0.5 * drawn(rows, 1, 12, seed + 6),
        saliency=drawn(rows, tokens, 1, seed + 2).squeeze(2).softmax(dim=1),
        keys=drawn(rows, tokens, 8, seed + 3),
        relevance=drawn(rows, tokens, 1, seed + 4).squeeze(2),
    )


def cosine(a: Tensor, b: Tensor) -> float:
    norms = float(a.double().norm() * b.double().norm())
    return float(a.double() @ b.double()) / norms if norms else 0.0


def signed_square(a: Tensor, b: Tensor) -> Fraction:
    """The square of the cosine of two whole-numbered vectors, with its sign, exactly."""
    a, b = a.long(), b.long()
    product, lengths = int(a @ b), int(a @ a) * int(b @ b)
    return Fraction(product * abs(product), lengths) if lengths else Fraction(0)


Likeness = Callable[[Tensor, Tensor], float | Fraction]
WHOLE_NUMBERS = st.integers(0, 2**32 - 1).map(
    lambda seed: torch.randint(-2, 3, (2, 1 + seed % 29, 5), generator=torch.Generator().manual_seed(seed)).float()
)
"""Tokens `(2, N, 5)` whose cosines are often equal, and not often equal in floating point."""


def by_saliency(saliency: Tensor, among: list[int]) -> list[int]:
    return sorted(among, key=lambda token: (-float(saliency[token]), token))


def determinant_oracle(features: Tensor, quality: list[float], keep: int) -> list[int]:
    """Greedy maximum of log det, by the determinant itself and not by a recursion."""
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    scale = torch.tensor(quality, dtype=torch.float64)
    kernel = scale.unsqueeze(1) * (unit @ unit.T) * scale
    chosen: list[int] = []
    for _ in range(keep):
        rest = [token for token in range(len(features)) if token not in chosen]
        values = {
            token: round(float(torch.linalg.det(kernel[[*chosen, token]][:, [*chosen, token]])), 14) for token in rest
        }
        chosen.append(max(rest, key=lambda token: (values[token], -token)))
    return sorted(chosen)


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("keep", [1, 4, 12])
def test_dpp_and_cdpruner_maximise_the_determinant(keep, precision):
    context = full_context()
    relevance = context.relevance.double()
    for row in range(3):
        low, high = float(relevance[row].min()), float(relevance[row].max())
        quality = [(float(value) - low) / (high - low) for value in relevance[row]]
        alpha = 0.8 / (2 * 0.2)
        for name, options, scale in (
            ("dpp", {}, [1.0] * 37),
            ("cdpruner", {}, quality),
            ("cdpruner", {"theta": 0.8}, [math.exp(alpha * value) for value in quality]),
            ("cdpruner", {"theta": 0.0}, [1.0] * 37),
        ):
            found = kept(get_reducer(name, precision=precision, **options)(context, keep))[row]
            assert found == determinant_oracle(context.features[row], scale, keep), (name, options)


def test_cdpruner_scales_relevance_within_the_row():
    context = full_context()
    reducer = get_reducer("cdpruner")
    expected = reducer(context, 9).index
    context = context.replace(
        relevance=context.relevance * torch.tensor([[1.0], [100.0], [0.01]]) + torch.tensor([[0.0], [7], [-3]])
    )
    assert torch.equal(reducer(context, 9).index, expected)
    assert not torch.equal(expected, get_reducer("dpp")(context, 9).index)


def test_cdpruner_without_words_is_dpp():
    context = full_context()
    context = context.replace(relevance=torch.full((3, 37), 0.25))
    assert torch.equal(get_reducer("cdpruner")(context, 9).index, get_reducer("dpp")(context, 9).index)


def test_what_adds_no_volume_is_taken_by_relevance():
    # Rank two: two tokens span everything, the other three are the most relevant that are left.
    basis = torch.tensor([[1.0, 0, 0], [0, 1, 0]])
    features = torch.tensor([[1.0, 0], [0, 1], [1, 1], [2, 1], [1, 3], [3, 1], [1, -1]]) @ basis
    relevance = torch.tensor([[1.0, 0.95, 0.1, 0.5, 0.2, 0.7, 0.0]])
    found = get_reducer("cdpruner")(VisualContext(features.unsqueeze(0), relevance=relevance), 5).index
    assert found.tolist() == [[0, 1, 3, 4, 5]]
    zeros = VisualContext(torch.zeros(1, 7, 3), relevance=relevance)
    assert get_reducer("cdpruner")(zeros, 3).index.tolist() == [[0, 1, 5]]


@pytest.mark.parametrize("theta", [None, 0.5, 0.9, 0.95])
def test_cdpruner_compares_small_qualities_too(theta):
    """One token is a hundred times as relevant as all others, whose qualities lie near zero then."""
    context = make_context(drawn(4, 150, 64, 0), get_reducer("cdpruner").needs)
    context = context.replace(relevance=context.relevance.clone())
    context.relevance[:, 17] = 100.0
    single = get_reducer("cdpruner", theta=theta)(context, 32).index
    assert torch.equal(single, get_reducer("cdpruner", theta=theta, precision="float64")(context, 32).index)


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("rank", [1, 2, 20])
def test_more_tokens_than_dimensions(rank, precision):
    features = drawn(2, 80, rank, 3) @ drawn(1, rank, 64, 4).squeeze(0)
    for name in ("dpp", "cdpruner"):
        context = make_context(features, get_reducer(name).needs)
        for row in kept(get_reducer(name, precision=precision)(context, 64)):
            assert len(set(row)) == 64
    # The first tokens are those of the determinant, as long as it is not zero.
    first = kept(get_reducer("dpp", precision=precision)(make_context(features), rank))
    assert first == [determinant_oracle(row, [1.0] * 80, rank) for row in features]


@pytest.mark.parametrize("name", ["dpp", "cdpruner"])
def test_twins_are_settled_by_raster_order_in_any_company(name):
    """Each token three times over, in a space that the kept ones nearly fill, alone, in a batch and padded."""
    features = drawn(4, 40, 24, 6).repeat_interleave(3, dim=1)
    context = make_context(features, get_reducer(name).needs)
    if context.relevance is not None:
        context = context.replace(relevance=context.relevance[:, :40].repeat_interleave(3, dim=1))
    place = torch.full((131,), -1)
    place[torch.randperm(131, generator=torch.Generator().manual_seed(0))[:120].sort().values] = torch.arange(120)
    for keep in (5, 20):
        together = kept(get_reducer(name)(context, keep))
        assert all(token % 3 == 0 for row in together for token in row)
        assert together == kept(get_reducer(name, precision="float64")(context, keep))
        padded = kept(get_reducer(name)(take_tokens(context, place, 3.0), keep))
        assert [[int(place[token]) for token in row] for row in padded] == together
        for row in range(4):
            assert kept(get_reducer(name)(context.select_rows(torch.tensor([row])), keep))[0] == together[row]


def test_fastervlm_takes_the_highest():
    context = full_context()
    for row, found in enumerate(kept(get_reducer("fastervlm")(context, 9))):
        assert found == sorted(by_saliency(context.saliency[row], list(range(37)))[:9])
    tied = VisualContext(torch.zeros(1, 6, 2), saliency=torch.tensor([[0.5, 1.0, 0.5, 1.0, 0.5, 0.5]]))
    assert get_reducer("fastervlm")(tied, 4).index.tolist() == [[0, 1, 2, 3]]


def visionzip_oracle(context: VisualContext, row: int, keep: int, share: float) -> tuple[list[int], Tensor]:
    tokens = context.shape[1]
    contextual = min(math.floor(keep * share + 0.5), keep - 1)
    dominant = by_saliency(context.saliency[row], list(range(tokens)))[: keep - contextual]
    rest = [token for token in range(tokens) if token not in dominant]
    targets = rest[:: len(rest) // contextual][:contextual] if contextual else []
    weight = torch.zeros(tokens, tokens)
    for token in (*dominant, *targets):
        weight[token, token] = 1
    assigned: dict[int, list[int]] = {target: [] for target in targets}
    for token in rest if targets else []:
        if token not in targets:
            keys = context.keys[row]
            assigned[max(targets, key=lambda target: cosine(keys[token], keys[target]))].append(token)
    for target, members in assigned.items():
        for member in members:
            weight[target, member] = 1 / len(members)
    index = sorted((*dominant, *targets))
    return index, weight[index]


@pytest.mark.parametrize("share", [10 / 64, 0.0, 0.5])
@pytest.mark.parametrize("keep", [1, 2, 9, 20, 37])
def test_visionzip_equals_the_loop(keep, share):
    context = full_context()
    reduction = get_reducer("visionzip", contextual=share)(context, keep)
    for row in range(3):
        index, weight = visionzip_oracle(context, row, keep, share)
        assert reduction.index[row].tolist() == index
        torch.testing.assert_close(reduction.weight[row], weight)


def vispruner_oracle(
    context: VisualContext, row: int, keep: int, likeness: Likeness = cosine, share: Fraction = Fraction(1, 2)
) -> list[int]:
    """A list of the tokens in the order that the rounds leave them in, the first of equals first."""
    order = by_saliency(context.saliency[row], list(range(context.shape[1])))
    important = order[: math.floor(keep * share)]
    order = order[len(important) :]
    features = context.encoder_features[row]

    @cache
    def like(one: int, other: int) -> float | Fraction:
        return likeness(features[one], features[other])

    while len(order) > keep - len(important):
        offered, others = order[0::2], order[1::2]
        score = {token: max((like(token, other) for other in others), default=-2) for token in offered}
        drop = min(8, len(order) - (keep - len(important)), len(offered))
        order = sorted(offered, key=lambda token: -score[token])[drop:] + others
    return sorted(important + order)


@pytest.mark.parametrize("keep", [1, 9, 37])
def test_vispruner_equals_the_loop(keep):
    context = full_context(tokens=61)
    alike = get_reducer("vispruner")(context, keep)
    ragged = get_reducer("vispruner")(context, torch.tensor([keep, 1, 50]))
    for row in range(3):
        assert kept(alike)[row] == vispruner_oracle(context, row, keep)
    assert kept(ragged) == [vispruner_oracle(context, row, count) for row, count in enumerate((keep, 1, 50))]


@pytest.mark.parametrize("share", [0.0, 0.29, 1.0])
def test_vispruner_rounds_the_important_share_down(share):
    context = full_context(rows=1, tokens=103)
    for keep in (1, 7, 100):
        found = get_reducer("vispruner", important=share)(context, keep)
        expected = vispruner_oracle(context, 0, keep, share=Fraction(str(share)))
        assert kept(found)[0] == expected
        assert kept(get_reducer("vispruner", important=share)(context, torch.tensor([keep])))[0] == expected


def test_vispruner_pairs_follow_saliency():
    """Of 0, 2 and 1, in this order, 0 and 1 are offered and 1 is like 2; in raster order 2 would be dropped."""
    context = VisualContext(
        torch.zeros(1, 5, 2),
        encoder_features=torch.tensor([[[1.0, 0], [0, 1], [0, 1], [1, 1], [1, 1]]]),
        saliency=torch.tensor([[0.3, 0.1, 0.2, 0.5, 0.4]]),
    )
    assert kept(get_reducer("vispruner")(context, 4)) == [[0, 2, 3, 4]]
    assert kept(get_reducer("vispruner")(context, 5)) == [[0, 1, 2, 3, 4]]


@settings(max_examples=60)
@given(WHOLE_NUMBERS, st.integers(1, 29))
def test_vispruner_and_prumerge_settle_ties_by_raster_order(tokens, keep):
    keep = min(keep, tokens.shape[1])
    context = VisualContext(
        tokens, encoder_features=tokens, keys=tokens, saliency=drawn(2, tokens.shape[1], 1, 4).squeeze(2).sigmoid()
    )
    pruned, merged = get_reducer("vispruner")(context, keep), get_reducer("prumerge", neighbours=3)(context, keep)
    for row in range(2):
        assert kept(pruned)[row] == vispruner_oracle(context, row, keep, signed_square)
        index, weight = prumerge_oracle(context, row, keep, False, 3, signed_square)
        assert merged.index[row].tolist() == index
        torch.testing.assert_close(merged.weight[row], weight)


def prumerge_oracle(
    context: VisualContext, row: int, keep: int, plus: bool, neighbours: int, likeness: Likeness = cosine
) -> tuple[list[int], Tensor]:
    tokens = context.shape[1]
    saliency, keys = context.saliency[row], context.keys[row]
    extra = 1 < keep < tokens
    centres = keep - extra
    top = centres - centres // 2 if plus else centres
    kept_tokens = by_saliency(saliency, list(range(tokens)))[:top]
    rest = [token for token in range(tokens) if token not in kept_tokens]
    if centres > top:
        kept_tokens += rest[:: len(rest) // (centres - top)][: centres - top]
    pruned = [token for token in range(tokens) if token not in kept_tokens]
    weight = torch.zeros(tokens, tokens)
    for centre in kept_tokens:
        weight[centre, centre] = 1
        others = sorted(set(range(tokens)) - {centre}, key=lambda token: -likeness(keys[centre], keys[token]))
        for token in others[:neighbours]:
            weight[centre, token] = saliency[token]
    index = list(kept_tokens)
    if extra:
        index.append(by_saliency(saliency, pruned)[0])
        for token in pruned:
            weight[index[-1], token] = saliency[token]
    return sorted(index), weight[sorted(index)]


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("keep", [1, 9, 36, 37])
def test_prumerge_equals_the_loop(keep, plus):
    context = full_context()
    for neighbours in (32, 5, 0):
        reduction = get_reducer("prumerge", plus=plus, neighbours=neighbours)(context, keep)
        for row in range(3):
            index, weight = prumerge_oracle(context, row, keep, plus, neighbours)
            assert reduction.index[row].tolist() == index
            torch.testing.assert_close(reduction.weight[row], weight)


@settings(max_examples=100)
@given(WHOLE_NUMBERS, st.data())
def test_the_first_of_equally_near_tokens_is_joined(tokens, data):
    count = tokens.shape[1]
    index = torch.tensor([sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=1)))] * 2)
    found = nearest_kept(tokens, index, make_context(tokens))
    for row in range(2):
        for token in range(count):
            near = [signed_square(tokens[row, token], tokens[row, kept_one]) for kept_one in index[row]]
            assert found[row, token] == near.index(max(near))


@settings(max_examples=60)
@given(WHOLE_NUMBERS, st.integers(1, 29))
def test_tome_settles_ties_by_raster_order(tokens, keep):
    reduction = get_reducer("tome")(make_context(tokens), keep)
    for row in range(2):
        index, weight = tome_oracle(tokens[row], keep, exact_cosine_of_means(tokens[row]))
        assert reduction.index[row].tolist() == index
        torch.testing.assert_close(reduction.weight[row], weight)


def exact_cosine_of_means(features: Tensor) -> Callable[[list[int], list[int]], Fraction]:
    return lambda a, b: signed_square(features[a].sum(dim=0), features[b].sum(dim=0))


def cosine_of_means(features: Tensor) -> Callable[[list[int], list[int]], float]:
    return lambda a, b: cosine(features[a].double().mean(dim=0), features[b].double().mean(dim=0))


def tome_oracle(
    features: Tensor, keep: int, similarity: Callable[[list[int], list[int]], float | Fraction]
) -> tuple[list[int], Tensor]:
    """Lists of members, whose likeness is computed anew from the features in every round."""
    groups = [[token] for token in range(len(features))]  # the first member says where a group stands
    while len(groups) > keep:
        even, odd = range(0, len(groups), 2), range(1, len(groups), 2)
        pairs = []
        for one in even:
            near = [similarity(groups[one], groups[other]) for other in odd]
            pairs.append((max(near), one, odd[near.index(max(near))]))
        pairs.sort(key=lambda pair: (-pair[0], pair[1]))
        gone = pairs[: min(len(groups) // 2, len(groups) - keep)]
        for _, one, partner in gone:
            groups[partner] = groups[partner] + groups[one]
        groups = [group for number, group in enumerate(groups) if number not in {one for _, one, _ in gone}]
    weight = torch.zeros(len(groups), len(features))
    for number, group in enumerate(groups):
        weight[number, group] = 1 / len(group)
    return [group[0] for group in groups], weight


@pytest.mark.parametrize("tokens", [37, 40])
@pytest.mark.parametrize("keep", [1, 9, 36])
def test_tome_equals_the_loop(tokens, keep):
    context = full_context(tokens=tokens)
    budgets = torch.tensor([keep, 3, 30])
    for budget in (keep, budgets):
        reduction = get_reducer("tome")(context, budget)
        for row in range(3):
            count = keep if isinstance(budget, int) else int(budget[row])
            index, weight = tome_oracle(context.features[row], count, cosine_of_means(context.features[row]))
            assert kept(reduction)[row] == index
            torch.testing.assert_close(reduction.weight[row, :count], weight)
            assert not reduction.weight[row, count:].any()


@pytest.mark.parametrize("name", [name for name in list_reducers() if get_reducer(name).needs])
class TestDegenerateNeeds:
    """What the tester draws at random is constant, zero or half equal here."""

    @staticmethod
    def contexts(needs: frozenset[str]) -> dict[str, VisualContext]:
        features = drawn(1, 30, 6, 8)
        fields = {"saliency": (30,), "keys": (30, 4), "relevance": (30,), "encoder_features": (30, 6)}
        fields["word_relevance"] = (30, 3)
        made = {}
        for value in (0.0, 1.0, 1e-30):
            extras = {name: torch.full((1, *fields[name]), value) for name in needs}
            made[str(value)] = VisualContext(features, **extras)
        extras = {
            name: (drawn(1, *fields[name], 9) if len(fields[name]) > 1 else drawn(1, 30, 1, 9)[..., 0]).sign()
            for name in needs
        }
        made["signs"] = VisualContext(features, **extras)
        for kind, special in special_features(30, 6).items():
            made[kind] = VisualContext(special, **{name: torch.ones(1, *fields[name]) for name in needs})
        return made

    def test_distinct_and_unmoved_by_padding_and_mates(self, name):
        reducer = get_reducer(name)
        made = self.contexts(reducer.needs)
        for kind, context in made.items():
            for keep in (1, 2, 7, 29, 30):
                bare = reducer(context, keep)
                assert len(set(kept(bare)[0])) == keep, kind
                place = torch.full((41,), -1)
                place[torch.randperm(41, generator=torch.Generator().manual_seed(keep))[:30].sort().values] = (
                    torch.arange(30)
                )
                padded = reducer(take_tokens(context, place, 5.0), keep)
                assert [int(place[token]) for token in kept(padded)[0]] == kept(bare)[0], kind
                if bare.weight is not None:
                    torch.testing.assert_close(padded.weight[:, :keep, place >= 0], bare.weight, msg=kind)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("visionzip", {"contextual": 1.0}),
        ("visionzip", {"contextual": "half"}),
        ("vispruner", {"important": -0.1}),
        ("prumerge", {"neighbours": 2.5}),
        ("prumerge", {"plus": "yes"}),
        ("cdpruner", {"theta": 1.0}),
        ("cdpruner", {"precision": "half"}),
        ("dpp", {"precision": 32}),
    ],
)
def test_bad_options_are_named(name, options):
    (field, value), *_ = options.items()
    with pytest.raises(SaccadeError, match=f"'{name}': {field}={value!r}"):
        get_reducer(name, **options)
