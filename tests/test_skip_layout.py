"""Layout, merge, split and summary against loops written from the formulas."""

import functools
import math

import pytest
import torch
from family_models import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from skip_tester import skipping
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d

from saccade import SaccadeError
from saccade.reducers import Needs
from saccade.reducers.redundancy import RedundancyMerge
from saccade.reducers.shared_budget import Units
from saccade.skip_vision import PRESETS, SkipVisionConfig, SummaryHead
from saccade.skip_vision.config import amount_of
from saccade.skip_vision.split import _pyramid
from saccade.testing.families import Case
from saccade.testing.tiny_models import mixed_rows
from saccade.tokens import IGNORE_INDEX, Places, Role, VisualContext, VisualTokens, splice

IMAGE, PAD = 9, 0


def merge_by_loops(x: torch.Tensor, keep: int) -> torch.Tensor:
    """The published merge of `x` `(N, D)` to `keep` tokens, in its order."""
    x = x.double()
    unit = x / x.norm(dim=1, keepdim=True)
    count = len(x)
    cosine = [[float(unit[i] @ unit[j]) for j in range(count)] for i in range(count)]
    redundancy = [sum(cosine[i][j] for j in range(count) if j != i) for i in range(count)]
    order = sorted(range(count), key=lambda token: -redundancy[token])
    sources, targets = order[: count - keep], order[count - keep :]
    groups = {target: [target] for target in targets}
    for source in sources:
        groups[max(targets, key=lambda target: cosine[source][target])].append(source)
    return torch.stack([sum(x[member] for member in groups[target]) / len(groups[target]) for target in targets])


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.lists(st.integers(1, 14), min_size=1, max_size=4), st.integers(1, 14))
def test_merge_equals_loops(seed, lengths, keep):
    """In the published order, for rows of different length, with gradients through values only."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    x = torch.randn(len(lengths), longest, 6, generator=generator, dtype=torch.float64).requires_grad_()
    valid = torch.arange(longest) < torch.tensor(lengths).unsqueeze(1)
    reduction, order = RedundancyMerge().ranked(VisualContext(features=x, valid=valid), keep)
    merged = reduction.apply(x)
    for row, length in enumerate(lengths):
        count = min(keep, length)
        expected = merge_by_loops(x[row, :length].detach(), count)
        torch.testing.assert_close(merged[row][order[row, :count]].detach(), expected, rtol=1e-6, atol=1e-6)
        assert (order[row, :count] < count).all()
    merged.sum().backward()
    torch.testing.assert_close(x.grad.sum(dim=1)[:, 0], reduction.counts.double(), rtol=1e-6, atol=1e-6)


def test_merge_by_hand():
    """Two alike and one apart, to two: those alike meet, and the distinctive one is last."""
    x = torch.tensor([[[0.0, 1.0], [2.0, 0.0], [4.0, 0.1]]])
    reduction, order = RedundancyMerge().ranked(VisualContext(features=x), 2)
    # The third has cosines 0.9997 and 0.025, so it is the most redundant one, and joins the second.
    merged = reduction.apply(x)[0][order[0]]
    torch.testing.assert_close(merged, torch.tensor([[3.0, 0.05], [0.0, 1.0]]))


def lay_out_by_loops(rows, blocks_out, side):
    """Samples as lists of (id, role, source, label), with each image's rows instead of its placeholders."""
    samples, number = [], 0
    for ids, labels in rows:
        sample, column = [], 0
        while column < len(ids):
            if ids[column] == IMAGE:
                end = column
                while end < len(ids) and ids[end] == IMAGE:
                    end += 1
                sample += [(IMAGE, role, column + offset, IGNORE_INDEX) for role, offset in blocks_out[number]]
                number, column = number + 1, end
                continue
            if ids[column] != PAD:
                role = Role.TEXT if labels[column] == IGNORE_INDEX else Role.ANSWER
                sample.append((ids[column], role, column, labels[column]))
            column += 1
        samples.append(sample)
    longest = max(len(sample) for sample in samples)
    padding = (PAD, Role.PADDING, -1, IGNORE_INDEX)
    return [
        [padding] * (longest - len(s)) + s if side == "left" else s + [padding] * (longest - len(s)) for s in samples
    ]


PIECES = st.lists(
    st.one_of(st.integers(1, 5).map(lambda n: ("text", n)), st.integers(1, 6).map(lambda n: ("image", n)))
)


@settings(max_examples=150)
@given(st.lists(PIECES, min_size=1, max_size=4), st.sampled_from(["left", "right"]), st.booleans(), st.data())
def test_layout_equals_loops(samples, side, pad_left, data):
    """Images anywhere, several a sample, none at all, and padding on either side before and after."""
    rows, sizes = [], []
    for pieces in samples:
        ids, labels = [7], [IGNORE_INDEX]
        for kind, count in pieces:
            # A token of text between images: two next to one another are one run, told apart by their group only.
            new = [1 + number % 5 for number in range(count)] if kind == "text" else [IMAGE] * count + [8]
            ids += new
            labels += [token if token < 4 else IGNORE_INDEX for token in new]
            sizes += [count] if kind == "image" else []
        rows.append((ids, labels))
    longest = max(len(ids) for ids, _ in rows)

    def padded(values, fill):
        empty = [fill] * (longest - len(values))
        return [*empty, *values] if pad_left else [*values, *empty]

    rows = [(padded(ids, PAD), padded(labels, IGNORE_INDEX)) for ids, labels in rows]
    ids, labels = (torch.tensor([row[part] for row in rows]) for part in (0, 1))
    blocks_out = []
    for size in sizes:
        offsets = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=8))
        roles = data.draw(st.lists(st.sampled_from([3, 4, 5]), min_size=len(offsets), max_size=len(offsets)))
        blocks_out.append(list(zip(roles, offsets, strict=True)))
    most = max(sizes, default=1)
    valid = torch.arange(most) < torch.tensor(sizes).reshape(-1, 1)
    context = VisualContext(features=torch.zeros(len(sizes), most, 2), valid=valid)
    places = Places.of(ids == IMAGE, context)
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    stand = [(kind, starts[n] + offset) for n, block in enumerate(blocks_out) for kind, offset in block]
    role, place = (torch.tensor([entry[part] for entry in stand], dtype=torch.long) for part in range(2))
    visual = VisualTokens(place, role, torch.zeros(len(place), 2), [len(block) for block in blocks_out])
    layout = splice(ids, (ids != PAD).long(), places, visual, labels=labels, pad_id=PAD, padding_side=side)
    expected = torch.tensor(lay_out_by_loops(rows, blocks_out, side))
    assert torch.equal(layout.input_ids, expected[..., 0])
    assert torch.equal(layout.role, expected[..., 1])
    assert torch.equal(layout.source, expected[..., 2])
    assert torch.equal(layout.labels, expected[..., 3])
    for positions, mask in zip(layout.position_ids.tolist(), layout.attention_mask.bool().tolist(), strict=True):
        real = [position for position, there in zip(positions, mask, strict=True) if there]
        assert real == list(range(len(real)))
    twice = layout.gather(torch.stack((ids, ids)), 0)
    assert torch.equal(twice[1].masked_fill(layout.role == Role.SUMMARY, IMAGE), layout.input_ids)


def test_blocks_join_the_crops_of_an_image():
    context = VisualContext(features=torch.zeros(3, 2, 1), group=torch.tensor([0, 1, 1]))
    blocks = Units.of_tokens(context, Places.of(torch.tensor([[True] * 6]), context).block)
    assert blocks.row.tolist() == [[0, 0, -1, -1], [1, 1, 2, 2]]
    features = torch.arange(6.0).reshape(3, 2, 1)
    assert blocks.join(features).squeeze(2).tolist() == [[0, 1, 0, 0], [2, 3, 4, 5]]


@pytest.mark.parametrize(("height", "width", "windows"), [(12, 12, (8, 2)), (24, 24, (8, 2)), (5, 7, (4, 3, 1))])
def test_scales_are_average_pooling(height, width, windows):
    weight, center, finest = _pyramid(height, width, windows)
    grid = torch.randn(1, 3, height, width)
    expected = []
    for window in windows:
        shape = (math.ceil(height / window), math.ceil(width / window))
        if height % window == 0 and width % window == 0:
            expected.append(avg_pool2d(grid, window).flatten(2)[0].T)
        else:
            expected.append(weight_by_loops(grid[0], shape))
    torch.testing.assert_close(weight @ grid.flatten(2)[0].T, torch.cat(expected))
    assert (weight.gather(1, center.unsqueeze(1)) > 0).all()
    assert finest.sum() == math.ceil(height / windows[-1]) * math.ceil(width / windows[-1])


def weight_by_loops(grid, shape):
    """Pieces of lines as equal as floor division makes them."""
    (rows, columns), (_, height, width) = shape, grid.shape
    cells = []
    for row in range(rows):
        for column in range(columns):
            lines = slice(row * height // rows, (row + 1) * height // rows)
            cells.append(grid[:, lines, column * width // columns : (column + 1) * width // columns].mean(dim=(1, 2)))
    return torch.stack(cells)


def test_whole_windows_are_those_of_adaptive_pooling():
    weight, _, _ = _pyramid(32, 32, (8, 2))
    grid = torch.randn(1, 2, 32, 32)
    expected = [adaptive_avg_pool2d(grid, side).flatten(2)[0].T for side in (4, 16)]
    torch.testing.assert_close(weight @ grid.flatten(2)[0].T, torch.cat(expected))


def test_summary_head():
    head = SummaryHead(5)
    torch.nn.init.normal_(head.norm.weight)
    torch.nn.init.normal_(head.norm.bias)
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    valid = torch.tensor([[True] * 4, [True, True, False, False], [False] * 4])
    weight = head(x.float(), valid)
    for row, count in enumerate((4, 2)):
        scores = []
        for token in x[row, :count]:
            normal = (token - token.mean()) / (token.var(unbiased=False) + 1e-5).sqrt()
            scores.append(((normal * head.norm.weight + head.norm.bias) * head.score.weight[0]).sum())
        expected = torch.stack(scores).softmax(dim=0).float()
        torch.testing.assert_close(weight[row, :count], expected)
    assert weight[2].tolist() == [0, 0, 0, 0]
    assert head.score.bias is None
    assert 0.01 < SummaryHead(4096).score.weight.std() < 0.03
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(head(x.float(), valid), weight)


# What stands for an image, on models


@functools.cache
def case_of(name):
    """A family's tiny model, the same for every call: a part of its weights is drawn anew in each build."""
    return Case(name, FAMILIES[name])


def composed(name, rows=(1,), **options):
    """Roles, sources and rows of the images of some of the mixed samples, and the features they are computed from."""
    case = case_of(name)
    prompts = case.prompts(rows)
    with skipping(case.model, SkipVisionConfig(**{"drop_kv": False, **options})) as skip, torch.no_grad():
        encoded = skip.family.encode(prompts, Needs(frozenset({"saliency"})) if name == "llava" else None)
        prepared = skip.prepare(prompts, padding_side="right")
        head = skip.summary
    pooled = prepared["mm_encoder_outputs"]["image"].pooler_output
    if isinstance(pooled, torch.Tensor):
        pooled = [pooled.flatten(0, 1)]
    return encoded.context, prepared["skip_roles"], [row for row in pooled if len(row)], head


def summary_of(head, tokens):
    return head(tokens.unsqueeze(0), torch.ones(1, len(tokens), dtype=torch.bool))[0] @ tokens


@pytest.mark.parametrize("merge_order", ["published", "raster"])
def test_llava_as_published(merge_order):
    """Retained by class attention in raster order, the rest merged, with a summary after each."""
    context, roles, rows, head = composed("llava", retained=11, skipped=17, merge_order=merge_order)
    assert len(rows) == 2
    for image, row in enumerate(rows):
        features = context.features[image]
        best = sorted(range(64), key=lambda token: -context.saliency[image, token].item())[:11]
        retained = features[sorted(best)]
        rest = features[[token for token in range(64) if token not in best]]
        merged = merge_by_loops(rest, 17).float()
        torch.testing.assert_close(row[:11], retained)
        torch.testing.assert_close(row[11], summary_of(head, retained))
        if merge_order == "published":
            torch.testing.assert_close(row[12:29], merged)
        else:
            assert not torch.allclose(row[12:29], merged)
            torch.testing.assert_close(row[12:29].sort(dim=0).values, merged.sort(dim=0).values)
        torch.testing.assert_close(row[29], summary_of(head, merged))
        assert len(row) == 30
    visual = roles[0][roles[0] >= Role.RETAINED].tolist()
    assert visual == [3] * 11 + [4] + [5] * 17 + [4] + [3] * 11 + [4] + [5] * 17 + [4]


def test_nothing_to_merge_keeps_raster_order():
    context, _, rows, _ = composed("llava", rows=[0], retained=40, skipped=None, merge="none", split="uniform")
    kept = [number for number in range(64) if (rows[0][:40] == context.features[0][number]).all(dim=1).any()]
    left = [number for number in range(64) if number not in kept]
    assert torch.equal(rows[0][41:65], context.features[0][left])
    _, _, same, _ = composed("llava", rows=[0], retained=40, skipped=24, merge="redundancy", split="uniform")
    assert torch.equal(rows[0][:-1], same[0][:-1])


def test_thumbnail_of_anyres_images():
    """The small picture is retained, all crops are merged jointly; newlines are tokens of the crops."""
    context, roles, rows, head = composed("llava_next", split="thumbnail", skipped=10)
    for image, row in enumerate(rows):
        small = context.features[2 * image][context.valid[2 * image]]
        large = context.features[2 * image + 1][context.valid[2 * image + 1]]
        assert len(small) == 16
        merged = merge_by_loops(large, 10).float()
        torch.testing.assert_close(row[:16], small)
        torch.testing.assert_close(row[17:27], merged, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(row[27], summary_of(head, merged), rtol=1e-4, atol=1e-4)
        assert len(row) == 28
    assert (roles == Role.RETAINED).sum() == 32


def test_newlines_can_be_left_out():
    """As LLaVA-HD has none: what is merged, or skipped unmerged, is the crops' own tokens."""
    context, _, rows, _ = composed("llava_next", split="thumbnail", skipped=10, newlines="drop")
    _, roles, whole, _ = composed("llava_next", split="thumbnail", skipped=10_000, newlines="drop")
    skipped = 0
    for image, (row, unmerged) in enumerate(zip(rows, whole, strict=True)):
        own = context.valid[2 * image + 1] & ~context.protected[2 * image + 1]
        assert own.sum() < context.valid[2 * image + 1].sum()
        large = context.features[2 * image + 1][own]
        torch.testing.assert_close(row[17:27], merge_by_loops(large, 10).float(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(unmerged[17:-1], large)
        skipped += len(large)
    assert (roles == Role.SKIPPED).sum() == skipped


def test_thumbnail_of_internvl_is_its_last_crop():
    context, _, rows, _ = composed("internvl", rows=[0], split="thumbnail", skipped=1.0)
    crops = context.features.shape[0]
    assert crops > 1
    torch.testing.assert_close(rows[0][:16], context.features[-1])
    assert len(rows[0]) == 16 + 1 + 16 + 1


def test_scales():
    """Coarse to fine, then the feature map itself, merged; the first summary leaves the coarsest out."""
    context, _, rows, head = composed("llava", rows=[0], split="scale", skipped=0.25)
    grid = context.features[0].T.reshape(1, -1, 8, 8)
    coarse, fine = (avg_pool2d(grid, window).flatten(2)[0].T for window in (8, 2))
    merged = merge_by_loops(context.features[0], 16).float()
    torch.testing.assert_close(rows[0][:17], torch.cat((coarse, fine)))
    torch.testing.assert_close(rows[0][17], summary_of(head, fine))
    torch.testing.assert_close(rows[0][18:34], merged)
    assert len(rows[0]) == 35


def test_shares_and_newlines():
    """A share counts newlines; they are never among the retained tokens unless all are."""
    context, roles, rows, _ = composed("llava_next", rows=[0], retained=0.5, skipped=0.25, split="uniform")
    total = int(context.valid.sum())
    newline = context.features[1][context.protected[1]][0]
    retained = int((roles == Role.RETAINED).sum())
    assert retained == math.floor(0.5 * total + 0.5)
    assert (roles == Role.SKIPPED).sum() == math.floor(0.25 * total + 0.5)
    assert not (rows[0][:retained] == newline).all(dim=1).any()


def test_positions_of_several_axes_come_from_the_grid():
    """A summary has the position of its group's last token, a merged token that of its most distinctive member."""
    case = Case("qwen2_vl", FAMILIES["qwen2_vl"])
    prompts = case.prompts([1])
    full = case.family.full_positions(prompts)
    with skipping(case.model, SkipVisionConfig(split="uniform", retained=2, skipped=2)) as skip:
        prepared = skip.prepare(prompts)
    roles, positions = prepared["skip_roles"][0], prepared["position_ids"][:, 0]
    text = ~case.family.placeholder(prompts["input_ids"])[0]
    assert torch.equal(positions[:, roles == Role.TEXT], full[:, 0][:, text])
    at = (roles == Role.SUMMARY).nonzero().flatten()
    assert torch.equal(positions[:, at], positions[:, at - 1])


# Options


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    """At the published sizes the counts are the published ones, and at others they scale."""
    config = SkipVisionConfig.preset(name)
    retained, skipped = map(int, name.split("/"))
    if config.split == "scale":
        weight, _, _ = _pyramid(32, 32, config.scales)
        assert (len(weight), amount_of(config.skipped, 1024)) == (retained, skipped)
    else:
        assert config.split == "thumbnail" or amount_of(config.retained, 576) == retained
        assert amount_of(config.skipped, 576 - (retained if config.merge == "none" else 0)) == skipped
    assert SkipVisionConfig.preset(name, drop_kv=False) == SkipVisionConfig(**{**PRESETS[name], "drop_kv": False})
    assert amount_of(156 / 576, 144) == 39


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retained": 0}, "retained=0: use 1 or more"),
        ({"retained": 1.5}, "retained=1.5: a float is a share"),
        ({"retained": True}, "retained=True: use a number"),
        ({"retained": None}, "retained=None.*needs a number"),
        ({"skipped": -1}, "skipped=-1: use 0 or more"),
        ({"skipped": float("nan")}, "skipped=nan"),
        ({"split": "cls"}, "split='cls'.*fastervlm.*thumbnail"),
        ({"split": "random", "split_options": {"sed": 1}}, "sed"),
        ({"split": "thumbnail", "retained": 10}, "retained=10.*leave retained out"),
        ({"merge": "average"}, "merge='average'.*redundancy.*none"),
        ({"merge_order": "sorted"}, "merge_order='sorted'.*published, raster"),
        ({"scales": (2, 8)}, "coarse to fine"),
        ({"scales": (0,)}, "scales=\\(0,\\)"),
        ({"summary": "yes"}, "summary='yes'"),
        ({"layers": (3, 1)}, "layers=\\(3, 1\\)"),
        ({"text_visibility": "some"}, "text_visibility='some'.*prompt_only"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(SaccadeError, match=message):
        SkipVisionConfig(**options)


def test_unknown_preset():
    with pytest.raises(SaccadeError, match=r"preset='100/100'.*100/156"):
        SkipVisionConfig.preset("100/100")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("llava", {"retained": 5, "skipped": 3, "merge": "none"}, "skipped=3: merge='none' leaves 59"),
        ("llava_next", {"split": "scale"}, "split='scale' needs one picture"),
        ("idefics3", {"split": "thumbnail"}, "model_type='idefics3' have no thumbnail"),
        ("smolvlm", {"split": "thumbnail"}, "model_type='smolvlm' have no thumbnail"),
        ("llava", {"layers": (0, 3)}, "layers=\\(0, 3\\).*2 layers"),
    ],
)
def test_what_does_not_fit_the_model(name, options, message):
    assert len(mixed_rows()) == 4
    with pytest.raises(SaccadeError, match=message):
        composed(name, **options)
