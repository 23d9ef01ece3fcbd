"""Budgets, contexts, reductions, and the splice against lists built sample by sample."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saccade.errors import SaccadeError
from saccade.pruning.pruner import places_of, with_isolator
from saccade.reducers import keep_count
from saccade.tokens import IGNORE_INDEX, Places, Reduction, Role, VisualContext, VisualTokens, splice

IMAGE_ID = 7
PAD_ID = 3


class TestKeepCount:
    @pytest.mark.parametrize(
        ("tokens", "ratio", "kept"),
        [
            (576, 0.9, 58),
            (2880, 0.9, 288),
            (144, 0.9, 14),
            (10, 0.9, 1),
            (5, 0.9, 1),
            (1, 0.999, 1),
            (15, 0.9, 2),
            (576, 0.5, 288),
            (576, 0.902, 56),
            (576, 0.0, 576),
            (576, 0, 576),
            (0, 0.9, 0),
        ],
    )
    def test_values(self, tokens, ratio, kept):
        assert keep_count(tokens, ratio) == kept

    @pytest.mark.parametrize("ratio", [-0.1, 1.0, 1, 1.5, float("nan"), float("inf"), "0.9", None, True, False])
    def test_bad_ratio(self, ratio):
        with pytest.raises(SaccadeError, match="prune_ratio"):
            keep_count(576, ratio)

    @given(st.integers(1, 5000), st.integers(0, 999))
    def test_rounds_half_up_and_keeps_one(self, tokens, thousandths):
        exact = (1000 - thousandths) * tokens
        assert keep_count(tokens, thousandths / 1000) == max(1, (2 * exact + 1000) // 2000)


class TestContext:
    def test_defaults(self):
        context = VisualContext(torch.zeros(2, 9, 4))
        assert context.dense
        assert context.valid.all()
        assert context.valid.shape == (2, 9)
        assert context.grid.tolist() == [[1, 3, 3]] * 2
        assert context.group.tolist() == [0, 1]
        assert context.shape == (2, 9, 4)
        assert VisualContext(torch.zeros(1, 8, 4)).grid.tolist() == [[1, 1, 8]]

    def test_given_mask_is_not_dense(self):
        assert not VisualContext(torch.zeros(2, 9, 4), valid=torch.ones(2, 9, dtype=torch.bool)).dense

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("encoder_features", torch.zeros(2, 8, 3)),
            ("valid", torch.ones(1, 9, dtype=torch.bool)),
            ("grid", torch.ones(2, 2, dtype=torch.long)),
            ("group", torch.zeros(3, dtype=torch.long)),
            ("seed", torch.zeros(2, 1, 1)[:1]),
            ("saliency", torch.zeros(9, 2)),
            ("keys", torch.zeros(2)),
            ("relevance", torch.zeros(2, 10)),
        ],
    )
    def test_wrong_shape_names_the_field(self, name, value):
        with pytest.raises(ValueError, match=name):
            VisualContext(torch.zeros(2, 9, 4), **{name: value})

    @pytest.mark.parametrize("shape", [(9, 4), (1, 2, 9, 4)])
    def test_features_have_three_axes(self, shape):
        with pytest.raises(ValueError, match="features"):
            VisualContext(torch.zeros(shape))

    def test_mask_must_be_bool(self):
        with pytest.raises(ValueError, match="valid"):
            VisualContext(torch.zeros(2, 9, 4), valid=torch.ones(2, 9, dtype=torch.long))

    @pytest.mark.parametrize("rows", [torch.tensor([2, 0]), torch.tensor([True, False, True])])
    def test_select_rows(self, rows):
        values = {"saliency": torch.rand(3, 4), "keys": torch.rand(3, 4, 2), "seed": torch.arange(3)}
        features = torch.randn(3, 4, 5)
        picked = VisualContext(features, group=torch.tensor([0, 0, 1]), **values).select_rows(rows)
        assert picked.dense
        assert torch.equal(picked.features, features[rows])
        assert picked.group.tolist() == torch.tensor([0, 0, 1])[rows].tolist()
        for name, value in values.items():
            assert torch.equal(getattr(picked, name), value[rows])
        assert picked.relevance is None
        valid = torch.tensor([[True, False], [True, True], [False, False]])
        ragged = VisualContext(torch.zeros(3, 2, 1), valid=valid).select_rows(rows)
        assert not ragged.dense
        assert torch.equal(ragged.valid, valid[rows])


class TestReduction:
    @settings(max_examples=40)
    @given(st.integers(1, 3), st.integers(1, 6), st.data())
    def test_selection_against_a_loop(self, rows, tokens, data):
        chosen = [
            sorted(data.draw(st.sets(st.integers(0, tokens - 1), max_size=tokens), label="row")) for _ in range(rows)
        ]
        index = pad_rows(chosen, -1)
        x = torch.randn(rows, tokens, 3, requires_grad=True)
        reduction = Reduction(index)
        out = reduction.apply(x)
        assert reduction.counts.tolist() == [len(row) for row in chosen]
        assert torch.equal(reduction.valid, index >= 0)
        for row, places in enumerate(chosen):
            for slot in range(index.shape[1]):
                expected = x[row, places[slot]] if slot < len(places) else torch.zeros(3)
                assert torch.equal(out[row, slot], expected)
        out.sum().backward()
        for row, places in enumerate(chosen):
            reached = [token for token in range(tokens) if x.grad[row, token].any()]
            assert reached == places

    def test_dense_selection_is_the_same(self):
        x, index = torch.randn(2, 5, 3), torch.tensor([[0, 3], [1, 4]])
        assert torch.equal(Reduction(index, dense=True).apply(x), Reduction(index).apply(x))

    def test_merge_against_a_loop(self):
        x = torch.randn(2, 5, 3, requires_grad=True)
        weight = torch.rand(2, 2, 5)
        weight[:, :, 4] = 0
        weight[1, 1] = 0
        out = Reduction(torch.tensor([[0, 3], [1, -1]]), weight).apply(x)
        for row in range(2):
            for slot in range(2):
                expected = sum(weight[row, slot, token] * x[row, token] for token in range(5))
                torch.testing.assert_close(out[row, slot], expected)
        out.sum().backward()
        assert (x.grad.abs().sum(dim=2) > 0).tolist() == [[True] * 4 + [False]] * 2

    def test_merge_keeps_the_dtype(self):
        weight = torch.full((1, 1, 9), 1 / 9)
        out = Reduction(torch.tensor([[4]]), weight).apply(torch.ones(1, 9, 2).bfloat16())
        assert out.dtype == torch.bfloat16
        assert out.tolist() == [[[1.0, 1.0]]]


def pad_rows(rows: list[list[int]], fill: int, side: str = "right") -> Tensor:
    longest = max(map(len, rows), default=0)
    filled = [
        [*row, *[fill] * (longest - len(row))] if side == "right" else [fill] * (longest - len(row)) + row
        for row in rows
    ]
    return torch.tensor(filled, dtype=torch.long).reshape(len(rows), longest)


@dataclass
class Token:
    """One token of the full batch; `row` and `place` say which visual token a placeholder represents."""

    id: int
    label: int
    row: int | None = None
    place: int | None = None


@dataclass
class Batch:
    """A drawn batch: samples of tokens, and per feature row the valid places, the kept ones and the image."""

    samples: list[list[Token]]
    valid: list[list[int]]
    kept: list[list[int]]
    group: list[int]
    width: int
    dense: bool


@st.composite
def batches(draw) -> Batch:
    dense = draw(st.booleans())
    width = draw(st.integers(1, 5))
    valid, kept, group, samples = [], [], [], []
    for _ in range(draw(st.integers(1, 4))):
        tokens: list[Token] = []
        for _ in range(draw(st.integers(0, 4))):
            if draw(st.booleans()):
                for _ in range(draw(st.integers(1, 3))):
                    label = draw(st.sampled_from([IGNORE_INDEX, 50, 51]))
                    tokens.append(Token(draw(st.integers(10, 99)), label))
                continue
            image = max(group, default=-1) + 1
            for part in range(draw(st.integers(1, 3))):
                if part and draw(st.booleans()):
                    tokens.append(Token(98, IGNORE_INDEX))
                places = list(range(width))
                if not dense:
                    places = sorted(draw(st.sets(st.sampled_from(places))))
                tokens += [Token(IMAGE_ID, IGNORE_INDEX, len(valid), place) for place in places]
                valid.append(places)
                kept.append(sorted(draw(st.sets(st.sampled_from(places)))) if places else [])
                group.append(image)
        samples.append(tokens)
    return Batch(samples, valid, kept, group, width, dense)


def spliced_oracle(
    batch: Batch, columns: list[list[int]], positions: list[list[int]] | None, isolator_length: int, axes: bool
) -> list[list[dict]]:
    """What each sample becomes, token by token, following the docstrings of `splice` and `with_isolator`."""
    result = []
    for number, tokens in enumerate(batch.samples):
        out: list[dict] = []
        seen: set[int] = set()
        for at, token in enumerate(tokens):
            column = columns[number][at]
            position = positions[number][at] if positions else None
            if token.row is None:
                out.append({"id": token.id, "label": token.label, "source": column, "position": position})
                continue
            image = batch.group[token.row]
            if image not in seen:
                seen.add(image)
                run = 0
                while at + run < len(tokens) and tokens[at + run].row is not None:
                    if batch.group[tokens[at + run].row] != image:
                        break
                    run += 1
                for offset in range(isolator_length):
                    step = 0 if axes or position is None else min(offset, run - 1)
                    start = positions[number][at + step] if positions else None
                    place = columns[number][at + (0 if axes else min(offset, run - 1))]
                    out.append(
                        {"id": IMAGE_ID, "label": IGNORE_INDEX, "source": place, "position": start, "isolator": True}
                    )
            if token.place in batch.kept[token.row]:
                out.append({"id": IMAGE_ID, "label": IGNORE_INDEX, "source": column, "position": position})
        for count, entry in enumerate(out):
            if entry["position"] is None:
                entry["position"] = count
        result.append(out)
    return result


def isolated_counts(batch: Batch, isolator_length: int) -> list[int]:
    """Tokens that each feature row is handed over with: the kept ones, and the isolator with an image's first row."""
    counts, seen = [], set()
    for places, kept, image in zip(batch.valid, batch.kept, batch.group, strict=True):
        starts = image not in seen and bool(places)
        seen |= {image} if places else set()
        counts.append(len(kept) + isolator_length * starts)
    return counts


@settings(max_examples=150)
@given(
    batches(),
    st.integers(0, 4),
    st.sampled_from(["right", "left"]),
    st.sampled_from(["right", "left"]),
    st.sampled_from([None, "one axis", "three axes"]),
    st.booleans(),
    st.integers(0, 2),
)
def test_splice_equals_lists(batch, isolator_length, side_in, side_out, position_kind, with_labels, extra_padding):
    ids = pad_rows([[token.id for token in tokens] for tokens in batch.samples], PAD_ID, side_in)
    length = ids.shape[1] + extra_padding
    pad = (0, extra_padding) if side_in == "right" else (extra_padding, 0)
    ids = torch.nn.functional.pad(ids, pad, value=PAD_ID)
    columns = [
        [at + (length - len(tokens) if side_in == "left" else 0) for at in range(len(tokens))]
        for tokens in batch.samples
    ]
    mask, placeholder = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    labels = torch.full_like(ids, IGNORE_INDEX)
    position_ids = torch.zeros_like(ids)
    positions = [[5 + number + at for at in range(len(tokens))] for number, tokens in enumerate(batch.samples)]
    for number, tokens in enumerate(batch.samples):
        for at, token in enumerate(tokens):
            column = columns[number][at]
            mask[number, column] = 1
            placeholder[number, column] = token.row is not None
            labels[number, column] = token.label
            position_ids[number, column] = positions[number][at]
    axes = position_kind == "three axes"
    given_positions = None
    if position_kind is not None:
        given_positions = torch.stack([position_ids, position_ids * 2, position_ids + 100]) if axes else position_ids

    rows = len(batch.valid)
    valid = torch.zeros(rows, batch.width, dtype=torch.bool)
    for row, places in enumerate(batch.valid):
        valid[row, places] = True
    context = VisualContext(
        torch.zeros(rows, batch.width, 2),
        valid=None if batch.dense else valid,
        group=torch.tensor(batch.group, dtype=torch.long),
    )
    index = pad_rows(batch.kept, -1)
    weight = torch.ones(rows, index.shape[1], batch.width) if isolator_length % 2 else None
    places = Places.of(placeholder, context)
    place = places_of(context, Reduction(index, weight))
    features = torch.zeros(len(place), 2)
    kept = VisualTokens(place, torch.full_like(place, Role.RETAINED), features, [len(row) for row in batch.kept])
    visual = with_isolator(kept, torch.ones(isolator_length, 2), places, context, spread=not axes)
    assert [len(row) for row in visual.by_row()[0]] == isolated_counts(batch, isolator_length)
    assert torch.equal(visual.features[:, 0] == 1, visual.role == Role.ISOLATOR)
    out = splice(
        ids,
        mask,
        places,
        visual,
        position_ids=given_positions,
        labels=labels if with_labels else None,
        pad_id=PAD_ID,
        padding_side=side_out,
    )

    known = positions if position_kind is not None else None
    expected = spliced_oracle(batch, columns, known, isolator_length, axes)
    size = max(map(len, expected))
    assert out.input_ids.shape == out.source.shape == out.role.shape == (len(expected), size)
    assert out.attention_mask.dtype == mask.dtype
    assert (out.labels is None) == (not with_labels)
    carried = out.gather(ids * 3, fill=-5)
    for number, entries in enumerate(expected):
        start = size - len(entries) if side_out == "left" else 0
        inside = list(range(start, start + len(entries)))
        assert out.attention_mask[number].tolist() == [int(column in inside) for column in range(size)]
        assert out.input_ids[number, inside].tolist() == [entry["id"] for entry in entries]
        assert out.source[number, inside].tolist() == [entry["source"] for entry in entries]
        is_isolator = ["isolator" in entry for entry in entries]
        assert (out.role[number, inside] == Role.ISOLATOR).tolist() == is_isolator
        assert carried[number, inside].tolist() == [
            -5 if "isolator" in entry else entry["id"] * 3 for entry in entries
        ]
        wanted = [entry["position"] for entry in entries]
        if axes:
            assert out.position_ids[0][number, inside].tolist() == wanted
            assert out.position_ids[1][number, inside].tolist() == [position * 2 for position in wanted]
            assert out.position_ids[2][number, inside].tolist() == [position + 100 for position in wanted]
        else:
            assert out.position_ids[number, inside].tolist() == wanted
        if with_labels:
            assert out.labels[number, inside].tolist() == [entry["label"] for entry in entries]
        outside = [column for column in range(size) if column not in inside]
        assert (out.input_ids[number, outside] == PAD_ID).all()
        assert (out.source[number, outside] == -1).all()
        assert not out.role[number, outside].any()
        assert (out.position_ids[..., number, outside] >= 0).all()
        if with_labels:
            assert (out.labels[number, outside] == IGNORE_INDEX).all()


class TestSpliceByHand:
    @staticmethod
    def kept_all(ids: Tensor, context: VisualContext) -> tuple[Places, VisualTokens]:
        places = Places.of(ids == IMAGE_ID, context)
        place = torch.arange(len(places))
        role = torch.full_like(place, Role.RETAINED)
        return places, VisualTokens(place, role, torch.zeros(len(place), 1), context.valid.sum(dim=1).tolist())

    def test_keeping_all_without_isolator_changes_nothing(self):
        ids = torch.tensor([[1, 7, 7, 2], [7, 7, 5, 6]])
        places, visual = self.kept_all(ids, VisualContext(torch.zeros(2, 2, 1)))
        out = splice(ids, torch.ones_like(ids), places, visual, labels=ids)
        assert torch.equal(out.input_ids, ids)
        assert torch.equal(out.position_ids, torch.arange(4).expand(2, 4))
        assert out.labels.tolist() == [[1, -100, -100, 2], [-100, -100, 5, 6]]

    def test_isolator_stays_inside_its_own_image(self):
        ids = torch.tensor([[7, 7, 7, 4]])
        context = VisualContext(torch.zeros(3, 1, 1))
        places, kept = self.kept_all(ids, context)
        visual = with_isolator(kept, torch.zeros(2, 1), places, context, spread=True)
        out = splice(ids, torch.ones_like(ids), places, visual, position_ids=torch.tensor([[10, 11, 12, 13]]))
        assert (out.role == Role.ISOLATOR).tolist() == [[True, True, False] * 3 + [False]]
        assert out.position_ids.tolist() == [[10, 10, 10, 11, 11, 11, 12, 12, 12, 13]]

    def test_two_images_next_to_each_other_are_two_blocks(self):
        context = VisualContext(features=torch.zeros(3, 2, 1), group=torch.tensor([0, 1, 1]))
        places = Places.of(torch.tensor([[True] * 6]), context)
        assert places.block.tolist() == [0, 0, 1, 1, 1, 1]
        assert places.start.tolist() == [0, 0, 2, 2, 2, 2]
        assert places.feature_row.tolist() == [0, 0, 1, 1, 2, 2]

    @pytest.mark.parametrize("rows", [1, 3])
    def test_placeholders_and_tokens_differ_in_number(self, rows):
        ids = torch.tensor([[1, 7, 7, 7, 7, 2]])
        with pytest.raises(ValueError, match=f"4 image placeholders stand for {rows * 2} visual tokens"):
            Places.of(ids == 7, VisualContext(torch.zeros(rows, 2, 1)))

    def test_bad_padding_side(self):
        ids = torch.tensor([[1]])
        with pytest.raises(ValueError, match="padding_side='both'"):
            splice(ids, ids, Places.of(ids == 7, None), None, padding_side="both")
