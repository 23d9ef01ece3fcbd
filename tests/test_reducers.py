"""The registry, each built-in reducer against its definition, and the invariants that all of them share."""

import itertools
import math
import os
import subprocess
import sys
import types
import warnings
from importlib.metadata import EntryPoint

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.errors import SaccadeError
from saccade.reducers import get_reducer, list_reducers, register_reducer, registry
from saccade.reducers.random import _content_hash
from saccade.reducers.similarity import FLOAT32_TIE, cosine_similarity, products_are_exact
from saccade.testing.reducers import HostSyncs, ReducerTester, kept, make_context
from saccade.tokens import Reduction, VisualContext


class TestEveryReducer(ReducerTester):
    pass


class TestTheTester:
    """The checks above must be able to fail."""

    @pytest.mark.parametrize(
        "read",
        [
            lambda x: x.sum().item(),
            lambda x: bool(x.any()),
            lambda x: x[x > 0],
            lambda x: x.nonzero(),
            lambda x: x.unique(),
            lambda x: torch.repeat_interleave(x.long().abs()),
        ],
    )
    def test_host_reads_are_found(self, read):
        x = torch.arange(4.0)
        with HostSyncs() as mode:
            read(x)
        assert mode.found


class TestRegistry:
    @pytest.fixture
    def clean(self, monkeypatch):
        monkeypatch.setattr(registry, "_classes", dict(registry._classes))
        return monkeypatch

    def test_built_in_names(self):
        assert {"none", "random", "uniform", "avgpool", "divprune"} <= set(list_reducers())
        assert list_reducers() == sorted(list_reducers())

    def test_unknown_name_lists_the_known(self):
        with pytest.raises(SaccadeError, match=r"reducer='sparse' is unknown: use one of .*divprune.*uniform"):
            get_reducer("sparse")

    def test_unknown_option_lists_the_options(self):
        with pytest.raises(SaccadeError, match=r"'random' does not take the option 'sed': its options are seed"):
            get_reducer("random", sed=1)
        with pytest.raises(SaccadeError, match=r"'uniform' does not take the option 'k': it has no options"):
            get_reducer("uniform", k=1)
        with pytest.raises(SaccadeError, match="seed='x'"):
            get_reducer("random", seed="x")

    @pytest.mark.parametrize(
        "keep",
        [2.0, True, None, "3", torch.tensor([1.0, 2.0]), torch.tensor([1]), torch.tensor(2), torch.ones(4).long()],
    )
    @pytest.mark.parametrize("name", ["divprune", "prumerge", "tome", "visionzip", "vispruner"])
    def test_bad_keep(self, name, keep, monkeypatch):
        monkeypatch.setattr("saccade.reducers.common.CPU_CACHED_ELEMENTS", 1)
        reducer = get_reducer(name)
        with pytest.raises(SaccadeError, match="keep"):
            reducer(make_context(torch.ones(2, 4, 3), reducer.needs), keep)

    def test_register(self, clean):
        @register_reducer("first")
        class First:
            needs = frozenset()

            def __init__(self, **options):
                self.options = options

            def __call__(self, context, keep):
                return Reduction(torch.zeros(context.shape[0], 1, dtype=torch.long), dense=True)

        assert get_reducer("first", anything=3).options == {"anything": 3}
        with pytest.raises(SaccadeError, match="already belongs to"):
            register_reducer("first")(type(get_reducer("none")))
        with pytest.raises(SaccadeError, match="'colour'"):
            register_reducer("other")(type("Other", (First,), {"needs": frozenset({"colour"})}))
        with pytest.raises(SaccadeError, match=r"needs is the string 'saliency': write frozenset\(\{'saliency'\}\)"):
            register_reducer("other")(type("Other", (First,), {"needs": "saliency"}))
        with pytest.raises(TypeError, match="not a class"):
            register_reducer("function")(lambda context, keep: None)
        with pytest.raises(TypeError, match="not a class"):
            register_reducer("no call")(type("NoCall", (), {"needs": frozenset()}))

    def test_plugins(self, clean):
        good = types.ModuleType("saccade_test_plugin")

        class Last:
            needs = frozenset()

            def __call__(self, context, keep):
                return Reduction(torch.full((context.shape[0], 1), context.shape[1] - 1), dense=True)

        good.Last = Last
        clean.setitem(sys.modules, "saccade_test_plugin", good)
        points = [
            EntryPoint("broken", "saccade_no_such_module:Thing", registry.ENTRY_POINT_GROUP),
            EntryPoint("divprune", "saccade_test_plugin:Last", registry.ENTRY_POINT_GROUP),
            EntryPoint("last", "saccade_test_plugin:Last", registry.ENTRY_POINT_GROUP),
        ]
        clean.setattr(registry, "entry_points", lambda group: points if group == "saccade.reducers" else [])
        clean.setattr(registry, "_plugins_loaded", False)
        with pytest.warns(RuntimeWarning) as caught:
            names = list_reducers()
        assert "last" in names
        assert "broken" not in names
        assert [str(warning.message).split("'")[1] for warning in caught] == ["broken", "divprune"]
        assert type(get_reducer("divprune")).__name__ == "DivPrune"
        assert get_reducer("last")(VisualContext(torch.ones(1, 5, 2)), 1).index.tolist() == [[4]]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            list_reducers()


class TestNone:
    def test_keeps_all(self):
        valid = torch.tensor([[True, False, True], [False, False, True]])
        context = VisualContext(torch.randn(2, 3, 2), valid=valid)
        assert get_reducer("none")(context, 1).index.tolist() == [[0, 2, -1], [2, -1, -1]]


class TestRandom:
    def test_every_token_and_pair_equally_often(self):
        draws, tokens, keep = 6000, 12, 4
        context = VisualContext(torch.zeros(draws, tokens, 1), seed=torch.arange(draws))
        index = get_reducer("random")(context, keep).index
        member = torch.zeros(draws, tokens).scatter(1, index, 1.0)
        pairs = member.T @ member / draws
        single, double = keep / tokens, keep * (keep - 1) / (tokens * (tokens - 1))
        # Five standard deviations of a frequency over this many draws.
        for share, expected in ((pairs.diagonal(), single), (pairs[~torch.eye(tokens, dtype=torch.bool)], double)):
            assert (share - expected).abs().max() < 5 * math.sqrt(expected * (1 - expected) / draws)

    def test_seeds(self):
        features = torch.randn(1, 64, 8, generator=torch.Generator().manual_seed(0)).expand(3, 64, 8)
        by_content = get_reducer("random")(VisualContext(features), 16).index
        assert torch.equal(by_content[0], by_content[1])
        assert not torch.equal(by_content, get_reducer("random", seed=1)(VisualContext(features), 16).index)
        seeded = VisualContext(features, seed=torch.tensor([5, 5 + 2**40, 5]))
        index = get_reducer("random")(seeded, 16).index
        assert torch.equal(index[0], index[2])
        assert not torch.equal(index[0], index[1])
        assert not torch.equal(index, get_reducer("random", seed=-1)(seeded, 16).index)

    def test_content_hash_has_32_bits_on_bfloat16(self):
        features = torch.randn(20000, 1, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
        context = VisualContext(features)
        hashes = _content_hash(context, torch.zeros(20000, 1, dtype=torch.long))
        # 0.05 collisions are expected of 32 bits, thousands of 16.
        assert hashes.unique().numel() >= 19998
        assert 0 <= hashes.min() <= hashes.max() < 2**32

    def test_content_decides(self):
        features = torch.zeros(1, 36, 5).bfloat16()
        base = get_reducer("random")(VisualContext(features), 9).index
        changed = 0
        for token in range(36):
            other = features.clone()
            other[0, token, token % 5] = 1.0
            changed += not torch.equal(get_reducer("random")(VisualContext(other), 9).index, base)
        assert changed == 36
        swapped = torch.randn(1, 36, 5, generator=torch.Generator().manual_seed(1))
        first = get_reducer("random")(VisualContext(swapped), 9).index
        assert not torch.equal(first, get_reducer("random")(VisualContext(swapped.flip(1)), 9).index)


def grid_context(frames: int, height: int, width: int, dtype: torch.dtype = torch.float32) -> VisualContext:
    tokens = frames * height * width
    features = torch.randn(1, tokens, 3, generator=torch.Generator().manual_seed(tokens), dtype=dtype)
    return VisualContext(features, grid=torch.tensor([[frames, height, width]]))


GRIDS = st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9))


class TestPooling:
    @pytest.mark.parametrize(("side", "keep"), [(24, 64), (12, 16), (24, 144), (24, 576), (24, 4), (4, 1)])
    def test_exact_square_pooling(self, side, keep):
        context = grid_context(1, side, side)
        image = context.features.mT.reshape(1, 3, side, side)
        pooled = torch.nn.functional.avg_pool2d(image, side // math.isqrt(keep)).flatten(2).mT
        torch.testing.assert_close(get_reducer("avgpool")(context, keep).apply(context.features), pooled)

    def test_rectangles_and_frames(self):
        context = grid_context(3, 4, 6)
        image = context.features.mT.reshape(3, 3, 4, 6)  # (D, t, h, w)
        pooled = torch.nn.functional.avg_pool2d(image, 2).flatten(1).T.unsqueeze(0)
        torch.testing.assert_close(get_reducer("avgpool")(context, 18).apply(context.features), pooled)
        whole_frames = get_reducer("avgpool")(context, 3).apply(context.features)
        torch.testing.assert_close(whole_frames, image.mean(dim=(2, 3)).T.unsqueeze(0))

    @settings(max_examples=60)
    @given(GRIDS, st.data())
    def test_partition(self, shape, data):
        frames, height, width = shape
        tokens = frames * height * width
        keep = data.draw(st.integers(1, tokens))
        context = grid_context(*shape)
        reduction = get_reducer("avgpool")(context, keep)
        weight = reduction.weight[0]
        assert weight.shape == (keep, tokens)
        torch.testing.assert_close(weight.sum(dim=1), torch.ones(keep))
        member = weight > 0
        assert (member.sum(dim=0) == 1).all()
        place = [(n // (height * width), n // width % height, n % width) for n in range(tokens)]
        for region in range(keep):
            inside = member[region].nonzero().flatten().tolist()
            torch.testing.assert_close(weight[region, inside], torch.full((len(inside),), 1 / len(inside)))
            assert self.connected({place[n] for n in inside})
            centroid = [sum(place[n][axis] for n in inside) / len(inside) for axis in range(3)]
            center = int(reduction.index[0, region])
            nearest = min(math.dist(place[n], centroid) for n in inside)
            assert center in inside
            assert math.dist(place[center], centroid) == pytest.approx(nearest)
        assert torch.equal(get_reducer("uniform")(context, keep).index, reduction.index)

    @staticmethod
    def connected(cells: set[tuple[int, int, int]]) -> bool:
        reached, frontier = set(), [next(iter(cells))]
        while frontier:
            cell = frontier.pop()
            if cell in reached:
                continue
            reached.add(cell)
            for axis in range(3):
                for step in (-1, 1):
                    near = tuple(value + step * (axis == number) for number, value in enumerate(cell))
                    if near in cells:
                        frontier.append(near)
        return reached == cells

    @pytest.mark.parametrize("keep", range(1, 577, 5))
    def test_regions_of_an_image_are_balanced_and_compact(self, keep):
        context = grid_context(1, 24, 24)
        member = get_reducer("avgpool")(context, keep).weight[0] > 0
        sizes = member.sum(dim=1)
        assert sizes.min() >= math.floor(576 / keep * 0.75)
        assert sizes.max() <= math.ceil(576 / keep * 1.34)
        place = torch.stack([torch.arange(576) // 24, torch.arange(576) % 24], dim=1).float()
        centers = place[get_reducer("uniform")(context, keep).index[0]]
        # No token is much farther from a kept one than the diagonal of a square region.
        assert torch.cdist(place, centers).amin(dim=1).max() <= 1.45 * math.sqrt(576 / keep) + 1

    def test_a_lattice_is_preferred_to_square_regions(self):
        context = grid_context(1, 4, 6)
        image = context.features.mT.reshape(1, 3, 4, 6)
        pooled = torch.nn.functional.avg_pool2d(image, (2, 1)).flatten(2).mT
        torch.testing.assert_close(get_reducer("avgpool")(context, 12).apply(context.features), pooled)

    def test_uniform_is_a_lattice(self):
        index = get_reducer("uniform")(grid_context(1, 24, 24), 64).index[0]
        expected = [row * 24 + column for row in range(1, 24, 3) for column in range(1, 24, 3)]
        assert index.tolist() == expected

    def test_grid_that_does_not_fit_is_laid_out_afresh(self):
        features = torch.randn(1, 9, 3)
        square = get_reducer("uniform")(VisualContext(features, grid=torch.tensor([[1, 3, 3]])), 3)
        assert torch.equal(
            get_reducer("uniform")(VisualContext(features, grid=torch.tensor([[1, 5, 5]])), 3).index, square.index
        )
        line = VisualContext(torch.randn(1, 10, 3), grid=torch.tensor([[1, 5, 5]]))
        assert get_reducer("uniform")(line, 5).index.tolist() == [[0, 2, 4, 6, 8]]


def divprune_oracle(features: list[list[int]], keep: int, tie: float = 1e-12) -> list[int]:
    """The greedy of the formula in plain Python; of distances within `tie` of the largest the first one counts."""
    count = len(features)

    def distance(i: int, j: int) -> float:
        dot = sum(a * b for a, b in zip(features[i], features[j], strict=True))
        norms = sum(a * a for a in features[i]) * sum(b * b for b in features[j])
        return 1 - dot / math.sqrt(norms) if norms else 1.0

    def nearest(i: int, others: list[int]) -> float:
        return min((distance(i, j) for j in others if j != i), default=math.inf)

    def farthest(candidates: list[int], others: list[int]) -> int:
        distances = [nearest(i, others) for i in candidates]
        largest = max(distances)
        return next(i for i, value in zip(candidates, distances, strict=True) if value >= largest - tie)

    chosen = [farthest(list(range(count)), list(range(count)))]
    while len(chosen) < min(max(keep, 1), count):
        chosen.append(farthest([i for i in range(count) if i not in chosen], chosen))
    return sorted(chosen)


ROWS = st.integers(1, 4).flatmap(
    lambda width: st.lists(
        st.lists(st.lists(st.integers(-3, 3), min_size=width, max_size=width), min_size=1, max_size=10),
        min_size=1,
        max_size=3,
    )
)


class TestDivPrune:
    @settings(max_examples=150)
    @given(ROWS, st.data())
    def test_equals_the_formula(self, rows, data):
        longest = max(map(len, rows))
        width = len(rows[0][0])
        budgets = data.draw(st.lists(st.integers(1, longest + 1), min_size=len(rows), max_size=len(rows)))
        features = torch.full((len(rows), longest + 2, width), 9.0)
        valid = torch.zeros(len(rows), longest + 2, dtype=torch.bool)
        place = []
        for number, row in enumerate(rows):
            slots = data.draw(st.permutations(range(longest + 2)))[: len(row)]
            place.append(sorted(slots))
            features[number, place[-1]] = torch.tensor(row, dtype=torch.float32)
            valid[number, place[-1]] = True
        dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
        context = make_context(features.to(dtype), valid=valid)
        for keep, (precision, tie) in itertools.product(
            (torch.tensor(budgets), budgets[0]), (("float32", FLOAT32_TIE), ("float64", 1e-12))
        ):
            found = kept(get_reducer("divprune", precision=precision)(context, keep))
            for number, row in enumerate(rows):
                count = budgets[number] if isinstance(keep, torch.Tensor) else keep
                assert [place[number].index(token) for token in found[number]] == divprune_oracle(row, count, tie)

    @pytest.mark.parametrize("keep", [1, 2, 6, 12])
    def test_constant_and_zero_take_the_first(self, keep):
        for value in (0, 2):
            rows = [[value, value]] * 12
            found = get_reducer("divprune")(make_context(torch.tensor([rows]).float()), keep)
            assert kept(found)[0] == list(range(keep)) == divprune_oracle(rows, keep)

    def test_a_zero_token_is_orthogonal_to_all(self):
        rows = [[1, 0], [1, 0], [0, 0], [1, 1]]
        found = get_reducer("divprune")(make_context(torch.tensor([rows]).float()), 2)
        assert kept(found)[0] == divprune_oracle(rows, 2) == [0, 2]

    def test_equals_a_float64_loop_on_wide_features(self):
        generator = torch.Generator().manual_seed(5)
        features = torch.randn(3, 144, 256, generator=generator) + 0.5 * torch.randn(3, 1, 256, generator=generator)
        found = get_reducer("divprune")(make_context(features), 14).index
        for row in range(3):
            unit = torch.nn.functional.normalize(features[row].double(), dim=1)
            distance = 1 - unit @ unit.T
            others = distance.masked_fill(torch.eye(144, dtype=torch.bool), torch.inf)
            chosen = [int(others.amin(dim=1).argmax())]
            smallest_margin = torch.inf
            while len(chosen) < 14:
                nearest = distance[:, chosen].amin(dim=1)
                nearest[chosen] = -torch.inf
                best = nearest.topk(2)
                smallest_margin = min(smallest_margin, float(best.values.diff().abs()))
                chosen.append(int(best.indices[0]))
            # Otherwise the comparison would hang on rounding.
            assert smallest_margin > 1e-6
            assert found[row].tolist() == sorted(chosen)

    def test_float64_option(self):
        features = torch.randn(8, 200, 32, generator=torch.Generator().manual_seed(4))
        features = features * torch.tensor([1e25, 1e-25]).repeat(4).view(8, 1, 1)
        index = get_reducer("divprune")(make_context(features), 50).index
        assert torch.equal(get_reducer("divprune", precision="float64")(make_context(features), 50).index, index)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(get_reducer("divprune", precision="float64")(make_context(features), 50).index, index)
        with pytest.raises(SaccadeError, match="precision='half'"):
            get_reducer("divprune", precision="half")

    def test_float32_gives_way_to_coarser_products(self, monkeypatch):
        assert products_are_exact(torch.device("cpu"))
        assert products_are_exact(torch.device("cuda"))
        features = torch.randn(2, 30, 8, generator=torch.Generator().manual_seed(4))
        monkeypatch.setattr("saccade.reducers.similarity.products_are_exact", lambda device: False)
        assert cosine_similarity(features, VisualContext(features), "float32").dtype == torch.float64

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a process for each setting")
    def test_tf32_is_noticed(self):
        code = """
import os, torch
from saccade.reducers.similarity import products_are_exact
device = torch.device("cuda")
assert products_are_exact(device)
for setting in (
    "torch.backends.cuda.matmul.allow_tf32 = True",
    "torch.set_float32_matmul_precision('medium')",
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "torch.backends.fp32_precision = 'tf32'",
):
    child = os.fork()  # torch refuses to be asked in one way after being set in the other
    if not child:
        exec(setting)
        os._exit(products_are_exact(device))
    assert os.waitpid(child, 0)[1] == 0, setting
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def test_parallel_and_mirrored_tokens_tie(self):
        # Directions equal but for the last digit of a float32, and angles equal but for rounding.
        direction = torch.randn(64, generator=torch.Generator().manual_seed(3))
        scales = torch.linspace(0.37, 91.3, 40).unsqueeze(1)
        found = get_reducer("divprune")(make_context((scales * direction).unsqueeze(0)), 7)
        assert kept(found)[0] == list(range(7))
        angles = torch.tensor([0.0, 40.0, -40.0, 20.0, -20.0]).deg2rad()
        fan = torch.stack([angles.cos(), angles.sin()], dim=1).unsqueeze(0)
        assert get_reducer("divprune")(make_context(fan), 2).index.tolist() == [[0, 1]]
        assert get_reducer("divprune")(make_context(fan), 1).index.tolist() == [[0]]

    def test_chunks_of_rows_give_the_same(self, monkeypatch):
        features = torch.randn(5, 20, 7, generator=torch.Generator().manual_seed(2))
        whole = get_reducer("divprune")(make_context(features), 6).index
        monkeypatch.setattr("saccade.reducers.common.CPU_CACHED_ELEMENTS", 2 * 20 * 7)
        assert torch.equal(get_reducer("divprune")(make_context(features), 6).index, whole)

    def test_padding_is_no_neighbour_of_the_first_pick(self):
        # All similarities are negative, so a zero vector would be everyone's nearest.
        angles = torch.tensor([230.0, 0.0, 130.0, 0.0]).deg2rad()
        features = torch.stack([angles.cos(), angles.sin()], dim=1).unsqueeze(0)
        valid = torch.tensor([[True, True, True, False]])
        assert get_reducer("divprune")(make_context(features, valid=valid), 1).index.tolist() == [[1]]

    def test_first_pick_is_the_most_isolated(self):
        features = torch.tensor([[[1.0, 0.0], [0.9, 0.1], [-1.0, 0.2], [1.0, 0.05]]])
        assert get_reducer("divprune")(make_context(features), 1).index.tolist() == [[2]]
