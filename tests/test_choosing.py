"""What reducers share: rows a few at a time, products in blocks, choosing by score."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from saccade.reducers import get_reducer
from saccade.reducers.common import best_first, mask_to_index
from saccade.reducers.similarity import FLOAT32_TIE, TIE, cosine_similarity
from saccade.testing.reducers import make_context
from saccade.tokens import VisualContext

BY_ROWS = ["mmtok", "scope", "tome", "vispruner"]
"""Reducers that take a few rows at a time on a CPU."""
COSINES_BY_ROWS = ["prumerge", "redundancy", "visionzip"]
"""Those that do so for cosines alone."""


class TestFewRowsAtATime:
    @pytest.mark.parametrize("ragged", [False, True])
    @pytest.mark.parametrize("keep", [4, 6, torch.tensor([9, 2, 1, 4, 3])])
    @pytest.mark.parametrize("name", [*BY_ROWS, *COSINES_BY_ROWS])
    def test_gives_the_same(self, name, keep, ragged, monkeypatch):
        features = torch.randn(5, 24, 7, generator=torch.Generator().manual_seed(2))
        valid = torch.arange(24) < torch.tensor([24, 3, 24, 17, 1]).unsqueeze(1) if ragged else None
        reducer = get_reducer(name)
        context = make_context(features, reducer.needs, valid=valid)
        whole = reducer(context, keep)
        calls = []
        monkeypatch.setattr("saccade.reducers.common.CPU_CACHED_ELEMENTS", 1)
        if name in BY_ROWS:
            monkeypatch.setattr(VisualContext, "select_rows", counted(VisualContext.select_rows, calls))
        else:
            monkeypatch.setattr(torch, "bmm", counted(torch.bmm, calls))
        parts = reducer(context, keep)
        a_row = 2 if name == "redundancy" else 1  # sums of cosines, then cosines
        assert len(calls) == 5 * a_row
        assert torch.equal(parts.index, whole.index)
        assert parts.dense == whole.dense
        if whole.weight is not None:
            torch.testing.assert_close(parts.weight, whole.weight)

    @pytest.mark.parametrize("tokens", [383, 384, 387, 401])
    @pytest.mark.parametrize("precision", ["float32", "float64"])
    def test_products_in_blocks_are_the_whole_product(self, tokens, precision):
        """From 384 tokens on, half of the blocks are computed and the others copied."""
        features = torch.randn(2, tokens, 5, generator=torch.Generator().manual_seed(tokens))
        features[0, 7] = 0
        valid = torch.arange(tokens) < torch.tensor([tokens, tokens - 30]).unsqueeze(1)
        found = cosine_similarity(features, make_context(features, valid=valid), precision)
        unit = torch.nn.functional.normalize(features.double(), dim=2) * valid.unsqueeze(2)
        torch.testing.assert_close(
            found.double(), unit @ unit.mT, rtol=0, atol=1e-6 if precision == "float32" else 1e-14
        )
        # How a product rounds on either side of the diagonal is the processor's affair, as long as no tie sees it.
        window = FLOAT32_TIE if precision == "float32" else TIE
        assert (found - found.mT).abs().max() < window / 10


class TestBestFirst:
    VALUES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, -1e-45, 3e38, -3e38, math.inf, -math.inf, math.nan])

    @settings(max_examples=200)
    @given(
        st.lists(st.tuples(VALUES | st.floats(width=32), st.booleans()), min_size=1, max_size=30),
        st.integers(0, 31),
        st.sampled_from([torch.float32, torch.float64]),
    )
    @example([(-1.401298464324817e-45, True), (-1e-45, True)], 2, torch.float32)  # one number there
    def test_equals_a_stable_sort(self, tokens, count, dtype):
        values, valid = zip(*tokens, strict=True)
        context = make_context(torch.zeros(1, len(values), 1), valid=torch.tensor([valid]))
        scores = torch.tensor([values], dtype=dtype)
        found = best_first(scores, context, count)
        # What the dtype holds of them: 1e-45 is another number in float32.
        values, lowest = scores[0].tolist(), torch.finfo(dtype).min

        def rank(token: int) -> tuple[bool, float, int]:
            value = values[token]
            return not valid[token], -(lowest if math.isnan(value) else min(max(value, lowest), -lowest)), token

        real = [token for token in sorted(range(len(values)), key=rank) if valid[token]]
        assert found.shape == (1, min(count, len(values)))
        assert found[0].tolist()[: len(real)] == real[:count]

    @given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4))
    def test_mask_to_index(self, rows):
        width = max(sum(row) for row in rows)
        expected = [[column for column in range(5) if row[column]] for row in rows]
        expected = [row + [-1] * (width - len(row)) for row in expected]
        assert mask_to_index(torch.tensor(rows), width).tolist() == expected


def counted(method, calls: list):
    def call(*args, **options):
        calls.append(args)
        return method(*args, **options)

    return call
