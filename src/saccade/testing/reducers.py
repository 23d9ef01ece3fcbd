"""The tests that every registered reducer has to pass: subclass `ReducerTester` in a test file to run them.

Another package with a reducer can do the same; it only needs to override `names`.
"""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from saccade.reducers import get_reducer, list_reducers
from saccade.tokens import Reduction, VisualContext

KEEPS_EVERYTHING = {"none"}
SYNCS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique", "_unique2"}
DYNAMIC = {"repeat_interleave", "unique_consecutive", "unique_dim", "bincount", "nonzero_numpy", "argwhere"}


class HostSyncs(TorchDispatchMode):
    """Records operations that copy a value to the host, or whose result has a shape that depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in SYNCS | DYNAMIC:
            self.found.append(name)
        # Indexing with a bool tensor searches for true entries inside the kernel, where a dispatch mode sees nothing.
        masks = name.startswith("index") and isinstance(args[1], (list, tuple))
        if masks and any(part is not None and part.dtype in (torch.bool, torch.uint8) for part in args[1]):
            self.found.append(f"{name} with a mask")
        return func(*args, **(kwargs or {}))


def make_context(
    features: Tensor, needs: frozenset[str] = frozenset(), valid: Tensor | None = None, grid: Tensor | None = None
) -> VisualContext:
    """A context whose extra fields, if needed, depend only on a hash of row and position."""
    rows, tokens, _ = features.shape
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> Tensor:
        drawn = torch.rand(64, 4096, *shape[2:], generator=generator)
        return drawn[:rows, :tokens].to(features.device)

    widths = {
        "encoder_features": (rows, tokens, 6),
        "keys": (rows, tokens, 4),
        "word_relevance": (rows, tokens, 3),
    }
    extras = {name: draw(*widths.get(name, (rows, tokens))) for name in sorted(needs)}
    return VisualContext(features, valid=valid, grid=grid, **extras)


def take_tokens(context: VisualContext, place: Tensor, fill: float) -> VisualContext:
    """The context with token `place[i]` (long `(M,)`) at i, or padding with the value `fill` if `place[i]` is -1."""
    rows = context.shape[0]
    real = place >= 0

    def take(value: Tensor | None) -> Tensor | None:
        if value is None:
            return None
        taken = value[:, place.clamp(min=0)].clone()
        taken[:, ~real] = fill
        return taken

    names = ("features", "encoder_features", "saliency", "keys", "relevance", "word_relevance")
    fields = {name: take(getattr(context, name)) for name in names}
    valid = context.valid[:, place.clamp(min=0)] & real
    return VisualContext(**fields, valid=valid.expand(rows, -1), grid=context.grid, group=context.group)


def kept(reduction: Reduction) -> list[list[int]]:
    """The index without its padding."""
    return [[token for token in row if token >= 0] for row in reduction.index.tolist()]


def special_features(tokens: int, width: int) -> dict[str, Tensor]:
    """Features `(1, N, D)` with many ties or a low rank."""
    generator = torch.Generator().manual_seed(3)
    basis = torch.randn(2, width, generator=generator)
    return {
        "constant": torch.full((1, tokens, width), 0.3),
        "zero": torch.zeros(1, tokens, width),
        "rank two": (torch.randn(1, tokens, 2, generator=generator) @ basis),
        "duplicates": torch.randn(1, 3, width, generator=generator).repeat(1, tokens, 1)[:, :tokens],
        "tiny": torch.randn(1, tokens, width, generator=generator) * 1e-20,
        "huge": torch.randn(1, tokens, width, generator=generator) * 1e15,
    }


class ReducerTester:
    """Every invariant of a reducer. `name` and `reducer` are fixtures over all registered reducers."""

    @pytest.fixture(params=list_reducers())
    def name(self, request) -> str:
        return request.param

    @pytest.fixture
    def reducer(self, name):
        return get_reducer(name)

    @staticmethod
    def expected(name: str, keep: int, available: int) -> int:
        return available if name in KEEPS_EVERYTHING else min(max(keep, 1), available)

    @staticmethod
    def features(rows: int, tokens: int, width: int = 12, seed: int = 0) -> Tensor:
        """Random features whose values bfloat16 represents exactly."""
        drawn = torch.randn(rows, tokens, width, generator=torch.Generator().manual_seed(seed))
        return drawn.bfloat16().float()

    @pytest.mark.parametrize("tokens", [1, 2, 7, 16, 24, 144])
    @pytest.mark.parametrize("keep", [0, 1, 2, 5, 16, 23, 1000])
    def test_budget_order_and_shape(self, name, reducer, tokens, keep):
        context = make_context(self.features(3, tokens), reducer.needs)
        reduction = reducer(context, keep)
        count = self.expected(name, keep, tokens)
        assert reduction.index.shape == (3, count)
        assert reduction.index.dtype == torch.long
        assert reduction.dense
        assert (reduction.index >= 0).all()
        assert (reduction.index < tokens).all()
        assert (reduction.index.diff(dim=1) > 0).all()
        assert reduction.apply(context.features).shape == (3, count, 12)

    @pytest.mark.parametrize("shape", [(0, 16, 4), (2, 0, 4)])
    def test_no_rows_or_no_tokens(self, name, reducer, shape):
        context = make_context(torch.zeros(shape), reducer.needs)
        assert reducer(context, 4).apply(context.features).numel() == 0

    def test_a_row_without_valid_tokens_keeps_none(self, name, reducer):
        valid = torch.ones(2, 9, dtype=torch.bool)
        valid[0] = False
        context = make_context(self.features(2, 9), reducer.needs, valid=valid)
        reduction = reducer(context, 4)
        assert kept(reduction)[0] == []
        assert len(kept(reduction)[1]) == self.expected(name, 4, 9)
        assert torch.equal(
            reduction.apply(context.features)[0], torch.zeros_like(reduction.apply(context.features)[0])
        )
        nothing = make_context(self.features(2, 9), reducer.needs, valid=torch.zeros(2, 9, dtype=torch.bool))
        for keep in (4, torch.tensor([4, 2])):
            assert kept(reducer(nothing, keep)) == [[], []]
            assert not reducer(nothing, keep).apply(nothing.features).any()

    def test_distinct_on_degenerate_features(self, name, reducer):
        for kind, features in special_features(25, 12).items():
            for keep in (1, 4, 13, 25):
                row = kept(reducer(make_context(features, reducer.needs), keep))[0]
                assert len(set(row)) == self.expected(name, keep, 25), kind
                assert row == sorted(row), kind

    def test_does_not_depend_on_batch_mates(self, name, reducer):
        rows = torch.cat([self.features(3, 36), *special_features(36, 12).values()])
        context = make_context(rows, reducer.needs)
        together = kept(reducer(context, 9))
        for row in range(len(rows)):
            alone = reducer(context.select_rows(torch.tensor([row])), 9)
            assert kept(alone)[0] == together[row]
        flipped = reducer(context.select_rows(torch.arange(len(rows)).flip(0)), 9)
        assert kept(flipped) == together[::-1]

    @pytest.mark.parametrize("fill", [0.0, 1e4, float("nan")])
    def test_does_not_depend_on_padding(self, name, reducer, fill):
        rows = torch.cat([self.features(3, 30), *special_features(30, 12).values()])
        context = make_context(rows, reducer.needs, grid=torch.tensor([[1, 5, 6]]).expand(len(rows), 3))
        for keep in (1, 7, 12, 30):
            bare = reducer(context, keep)
            scattered = torch.full((50,), -1)
            scattered[torch.randperm(50, generator=torch.Generator().manual_seed(keep))[:30].sort().values] = (
                torch.arange(30)
            )
            right = torch.cat([torch.arange(30), torch.full((11,), -1)])
            left = right.roll(11)
            for place in (right, left, scattered):
                padded = take_tokens(context, place, fill)
                reduction = reducer(padded, keep)
                moved = [[int(place[token]) for token in row] for row in kept(reduction)]
                assert moved == kept(bare)
                if fill == fill:
                    outcome = reduction.apply(padded.features)
                    width = bare.index.shape[1]
                    expected = bare.apply(context.features)
                    # Rounding errors of sums of huge features exceed any absolute tolerance, so it is relative.
                    scale = context.features.abs().amax(dim=(1, 2), keepdim=True).clamp(min=1e-30)
                    torch.testing.assert_close(outcome[:, :width] / scale, expected / scale, rtol=1e-5, atol=1e-6)
                    assert not outcome[:, width:].any()

    def test_rows_of_different_length(self, name, reducer):
        lengths = [1, 4, 9, 16, 20]
        features = self.features(5, 20)
        valid = torch.arange(20) < torch.tensor(lengths).unsqueeze(1)
        grid = torch.tensor([[1, 1, 1], [1, 2, 2], [1, 3, 3], [1, 4, 4], [1, 4, 5]])
        context = make_context(features, reducer.needs, valid=valid, grid=grid)
        reduction = reducer(context, 6)
        for row, length in enumerate(lengths):
            assert len(kept(reduction)[row]) == self.expected(name, 6, length)
            alone = take_tokens(context.select_rows(torch.tensor([row])), torch.arange(length), 0.0)
            assert kept(reducer(alone, 6))[0] == kept(reduction)[row]
        self.check_padding_is_last(reduction)

    def test_a_budget_per_row(self, name, reducer):
        context = make_context(self.features(5, 16), reducer.needs)
        budgets = [0, 1, 5, 16, 40]
        reduction = reducer(context, torch.tensor(budgets))
        for row, keep in enumerate(budgets):
            assert len(kept(reduction)[row]) == self.expected(name, keep, 16)
            one = reducer(context.select_rows(torch.tensor([row])), keep)
            assert kept(one)[0] == kept(reduction)[row]
        self.check_padding_is_last(reduction)
        same = reducer(context, torch.full((5,), 7))
        assert torch.equal(same.index, reducer(context, 7).index)

    @staticmethod
    def check_padding_is_last(reduction: Reduction) -> None:
        assert not reduction.dense or reduction.valid.all()
        counts = reduction.counts.unsqueeze(1)
        assert torch.equal(reduction.valid, torch.arange(reduction.index.shape[1]) < counts)
        assert (reduction.index[~reduction.valid] == -1).all()

    def test_bfloat16_and_autocast_choose_the_same(self, name, reducer):
        features = self.features(3, 64, width=32)
        context = make_context(features, reducer.needs)
        reference = reducer(context, 11).index
        assert torch.equal(reducer(make_context(features.bfloat16(), reducer.needs), 11).index, reference)
        assert torch.equal(reducer(make_context(features.double(), reducer.needs), 11).index, reference)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(reducer(context, 11).index, reference)

    def test_same_twice_and_inputs_untouched(self, name, reducer):
        features = self.features(2, 25)
        context = make_context(features.clone(), reducer.needs)
        state = torch.get_rng_state()
        first, second = reducer(context, 6), reducer(context, 6)
        assert torch.equal(first.index, second.index)
        assert torch.equal(context.features, features)
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_a_value_that_is_not_finite(self, name, reducer, value):
        """An overflow in the tower neither makes a row keep a token twice nor affects another row."""
        features = self.features(2, 25)
        clean = reducer(make_context(features.clone(), reducer.needs), 6)
        features[0, 3, 0], features[0, 7] = value, value
        reduction = reducer(make_context(features, reducer.needs), 6)
        assert reduction.index.shape == clean.index.shape
        assert (reduction.index[0].diff() > 0).all()
        assert torch.equal(reduction.index[1], clean.index[1])
        if reduction.weight is not None:
            assert torch.equal(reduction.weight[1], clean.weight[1])

    def test_merge_weights(self, name, reducer):
        valid = torch.ones(2, 16, dtype=torch.bool)
        valid[1, 9:] = False
        reduction = reducer(make_context(self.features(2, 16), reducer.needs, valid=valid), 5)
        if reduction.weight is None:
            pytest.skip("selects")
        assert reduction.weight.shape == (2, reduction.index.shape[1], 16)
        assert not reduction.weight[1, :, 9:].any()
        assert not reduction.weight.requires_grad
        # Every kept token contributes to its own merge.
        own = reduction.weight.gather(2, reduction.index.clamp(min=0).unsqueeze(2)).squeeze(2)
        assert (own[reduction.valid] > 0).all()

    def test_gradient_reaches_what_is_kept_or_merged(self, name, reducer):
        features = self.features(2, 16).requires_grad_()
        reduction = reducer(make_context(features, reducer.needs), 5)
        assert not reduction.index.requires_grad
        reduction.apply(features).sum().backward()
        reached = features.grad.abs().sum(dim=2) > 0
        if reduction.weight is None:
            wanted = torch.zeros(2, 16, dtype=torch.bool).scatter(1, reduction.index, True)
        else:
            wanted = reduction.weight.abs().sum(dim=1) > 0
        assert torch.equal(reached, wanted)

    def test_hot_path_reads_nothing_back(self, name, reducer):
        context = make_context(self.features(3, 36), reducer.needs)
        with HostSyncs() as mode:
            reducer(context, 9)
        assert mode.found == []

    def test_hot_path_runs_without_values_and_on_one_device(self, name, reducer):
        # Meta tensors have shapes but no values: code that reads a value, or mixes in a host tensor, raises.
        real = make_context(self.features(3, 36), reducer.needs)
        context = make_context(torch.empty(3, 36, 12, device="meta"), reducer.needs)
        reduction = reducer(context, 9)
        assert reduction.index.shape == reducer(real, 9).index.shape
        assert reduction.index.device.type == "meta"
        assert reduction.apply(context.features).shape[:2] == reduction.index.shape
