"""Budgets that are counts, that crops or samples share, and that follow the images."""

import json
import math
from dataclasses import asdict, fields

import pytest
import torch
from family_models import FAMILIES, WITH_VIDEO, VideoCase
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saccade import DualSpeedConfig, SaccadeError, prune_inputs
from saccade.cli.main import main
from saccade.evaluation import Inference, plan_inferences
from saccade.pruning import ModeIsolator
from saccade.reducers import (
    Needs,
    PruningConfig,
    adaptive_counts,
    get_reducer,
    keep_counts,
    list_reducers,
    reduce,
    token_need,
)
from saccade.reducers.budget import share_out
from saccade.reducers.shared_budget import Units
from saccade.sweeps.plan import check_runs, plan_grid
from saccade.testing import families as tester
from saccade.testing.training import fast_slow_step
from saccade.tokens import Reduction, VisualContext
from saccade.training import load_recipe

CASES = {name: tester.Case(name, FAMILIES[name]) for name in FAMILIES}
VIDEO_CASES = {f"{name}-video": VideoCase(name, FAMILIES[name]) for name in WITH_VIDEO}
SEVERAL_ROWS = ("internvl", "idefics3", "llava_next", "qwen3_vl-video", "llava_onevision-video")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ragged() -> VisualContext:
    """Five rows of up to nine tokens: two images of two crops, one of one; two samples."""
    valid = torch.arange(9) < torch.tensor([9, 4, 9, 6, 7]).unsqueeze(1)
    return VisualContext(
        features=draw(5, 9, 6).masked_fill(~valid.unsqueeze(2), 0),
        valid=valid,
        grid=torch.tensor([[1, 3, 3], [1, 2, 2], [1, 3, 3], [1, 2, 3], [1, 1, 7]]),
        group=torch.tensor([0, 0, 1, 2, 2]),
        sample=torch.tensor([0, 0, 0, 1, 1]),
        saliency=torch.rand(5, 9, generator=torch.Generator().manual_seed(1)),
    )


def kept(reduction: Reduction) -> list[list[int]]:
    return [[token for token in row if token >= 0] for row in reduction.index.tolist()]


class TestPruningConfig:
    def test_a_number_replaces_the_ratio(self):
        assert PruningConfig(prune_ratio=0.9).count(576) == 58
        assert PruningConfig().prune_ratio == 0.9
        assert PruningConfig(keep_tokens=64).count(576) == 64
        assert PruningConfig(keep_tokens=64).count(60) == 60
        assert PruningConfig(keep_tokens=64).prune_ratio is None
        assert PruningConfig(prune_ratio=0.0).keeps_all
        assert not PruningConfig(keep_tokens=64).keeps_all

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"prune_ratio": 1.0}, "prune_ratio=1.0"),
            ({"keep_tokens": 0}, "keep_tokens=0"),
            ({"keep_tokens": 1.5}, "keep_tokens=1.5"),
            ({"keep_tokens": True}, "keep_tokens=True"),
            ({"keep_tokens": 5, "prune_ratio": 0.0}, "prune_ratio=0.0 and keep_tokens=5"),
            ({"budget": "batch"}, "budget='batch' is unknown: use one of crop, image, sample"),
            ({"adaptive": "yes"}, "adaptive='yes'"),
            ({"reducer": ["a"]}, r"reducer=\['a'\] is a list: give a reducer's name"),
            ({"isolator": ["a"]}, r"isolator=\['a'\] is a list: give its folder or file"),
            ({"patch_tolerance": 10**400}, "patch_tolerance=10+: expected a number"),
        ],
    )
    def test_bad_values(self, options, words):
        with pytest.raises(SaccadeError, match=words):
            PruningConfig(**options)

    @pytest.mark.parametrize("name", [entry.name for entry in fields(PruningConfig)])
    def test_whatever_a_file_gives_a_field_it_is_used_or_refused(self, name, tmp_path):
        numbers = [0, 1, -1, 1.5, 10**400, float("nan"), float("inf")]
        values = [None, True, *numbers, "", "a", "0.5", ".", [], ["a"], [[]], {}, {"a": 1}, {"seed": ["a"]}]
        said = []
        for value in values:
            (tmp_path / "pruning_config.json").write_text(json.dumps({name: value}))
            try:
                config = PruningConfig.from_pretrained(tmp_path)
            except SaccadeError as error:
                said.append(str(error))
            else:
                assert config.count(576) <= 576
                assert PruningConfig(**asdict(config)) == config
        assert said
        assert all("\n" not in line and name.partition("_")[0] in line for line in said)

    def test_a_file_without_an_isolator(self, tmp_path):
        (tmp_path / "pruning_config.json").write_text('{"isolator": null}')
        assert PruningConfig.from_pretrained(tmp_path).isolator is None

    def test_a_file_that_is_nested_without_end(self, tmp_path):
        (tmp_path / "pruning_config.json").write_text("[" * 100_000)
        with pytest.raises(SaccadeError, match="is damaged"):
            PruningConfig.from_pretrained(tmp_path)


class TestShareOut:
    @settings(max_examples=300)
    @given(st.lists(st.tuples(st.floats(0, 1e3), st.integers(0, 40)), min_size=1, max_size=8), st.integers(0, 200))
    def test_bounds_and_total(self, holders, total):
        weights, limits = zip(*holders, strict=True)
        shares = share_out(total, weights, limits)
        assert all(min(1, limit) <= share <= limit for share, limit in zip(shares, limits, strict=True))
        assert sum(shares) == min(max(total, sum(min(1, limit) for limit in limits)), sum(limits))

    @settings(max_examples=300)
    @given(st.lists(st.tuples(st.floats(0, 1e3), st.integers(1, 40)), min_size=1, max_size=8), st.integers(0, 200))
    def test_is_proportional_between_the_bounds(self, holders, total):
        """Within one of c * weight, cut to the bounds, with the c that meets the total, found by bisection."""
        weights, limits = zip(*holders, strict=True)
        shares = share_out(total, weights, limits)
        if not any(weights):
            weights = [1.0] * len(weights)
        low, high = 0.0, 1e12
        for _ in range(300):
            middle = math.sqrt(low * high) if low > 0 else (low + high) / 2 if high > 1e-9 else 0.0
            exact = [min(max(middle * weight, 1), limit) for weight, limit in zip(weights, limits, strict=True)]
            low, high = (middle, high) if sum(exact) < sum(shares) else (low, middle)
        exact = [min(max(high * weight, 1), limit) for weight, limit in zip(weights, limits, strict=True)]
        if abs(sum(exact) - sum(shares)) < 1e-6:  # else weights of zero hold back what no other can take
            assert all(abs(share - wanted) < 1 + 1e-6 for share, wanted in zip(shares, exact, strict=True))

    def test_by_hand(self):
        assert share_out(10, [1, 1, 2], [10, 10, 10]) == [3, 2, 5]  # 2.5, 2.5, 5: the first of equals
        assert share_out(10, [1, 1, 8], [10, 10, 4]) == [3, 3, 4]
        assert share_out(10, [0, 0, 5], [10, 10, 10]) == [1, 1, 8]
        assert share_out(9, [0, 0, 0], [10, 10, 10]) == [3, 3, 3]
        assert share_out(12, [0, 0, 5], [10, 10, 4]) == [4, 4, 4]
        assert share_out(5, [3, 1], [0, 10]) == [0, 5]
        assert share_out(0, [3, 1], [9, 9]) == [1, 1]


class TestJoint:
    @pytest.mark.parametrize("per", ["image", "sample"])
    @pytest.mark.parametrize("name", ["divprune", "dpp", "fastervlm", "tome", "avgpool", "uniform", "random", "none"])
    @pytest.mark.parametrize("options", [{"prune_ratio": 0.6}, {"keep_tokens": 5}])
    def test_equals_one_row_put_together_by_hand(self, per, name, options):
        context, reducer = ragged(), get_reducer(name)
        budget = PruningConfig(budget=per, **options)
        reduction = reduce(context, budget, reducer)
        owner = (context.group if per == "image" else context.sample).tolist()
        outcome = reduction.apply(context.features)
        for unit in sorted(set(owner)):
            rows = [row for row, name in enumerate(owner) if name == unit]
            tokens = [(row, token) for row in rows for token in range(9) if context.valid[row, token]]
            shapes = {tuple(context.grid[row, 1:].tolist()) for row in rows}
            grid = (len(rows), *next(iter(shapes))) if len(shapes) == 1 else (1, 1, len(tokens))
            alone = VisualContext(
                features=torch.stack([context.features[place] for place in tokens]).unsqueeze(0),
                saliency=torch.stack([context.saliency[place] for place in tokens]).unsqueeze(0),
                grid=torch.tensor([grid]),
            )
            expected = reducer(alone, budget.count(len(tokens)))
            places = [tokens[token] for token in expected.index[0].tolist()]
            assert [(row, token) for row in rows for token in kept(reduction)[row]] == places
            got = torch.cat([outcome[row][reduction.valid[row]] for row in rows])
            torch.testing.assert_close(got, expected.apply(alone.features)[0])
        assert not outcome[~reduction.valid].any()

    def test_join_and_split_are_each_others_inverse(self):
        context = ragged()
        units = Units.of(context, "image")
        joined = units.context(context)
        everything = units.split(get_reducer("none")(joined, 0))
        assert kept(everything) == [list(range(count)) for count in context.valid.sum(dim=1).tolist()]
        assert torch.equal(everything.apply(context.features), context.features)
        assert joined.grid.tolist() == [[1, 1, 13], [1, 3, 3], [1, 1, 13]]

    def test_crops_of_one_shape_are_frames(self):
        context = VisualContext(draw(4, 9, 5), group=torch.tensor([0, 0, 0, 1]))
        assert Units.of(context, "image").context(context).grid.tolist() == [[3, 3, 3], [1, 3, 3]]
        spread = reduce(context, PruningConfig("uniform", keep_tokens=3, budget="image"))
        assert kept(spread)[:3] == [[4], [4], [4]]

    def test_a_crop_may_keep_none_and_merges_pass_gradients_across_rows(self):
        features = torch.zeros(2, 4, 3)
        features[0] = torch.eye(4, 3) + 0.1
        features[1] = features[0, 0] * 0.5
        features.requires_grad_()
        context = VisualContext(features, group=torch.tensor([0, 0]))
        selected = reduce(context, PruningConfig("divprune", keep_tokens=3, budget="image"))
        assert selected.counts.tolist() == [3, 0]
        merged = reduce(context, PruningConfig("tome", keep_tokens=4, budget="image"))
        merged.apply(features).sum().backward()
        assert (features.grad != 0).any(dim=2).all()

    def test_a_sample_must_be_known(self):
        with pytest.raises(SaccadeError, match="budget='sample'"):
            reduce(VisualContext(draw(2, 4, 3)), PruningConfig("divprune", budget="sample"))

    def test_newlines_of_a_unit_are_kept_within_its_budget(self):
        protected = torch.zeros(5, 9, dtype=torch.bool)
        protected[0, 8] = protected[1, 3] = True
        context = ragged().replace(protected=protected)
        for newlines, count in (("keep", 7), ("drop", 7)):
            reduction = reduce(context, PruningConfig("divprune", prune_ratio=0.5, budget="image", newlines=newlines))
            assert int(reduction.counts[:2].sum()) == count
            assert (8 in kept(reduction)[0]) == (3 in kept(reduction)[1]) == (newlines == "keep")


class TestAdaptive:
    @staticmethod
    def varied(rows: int = 6, tokens: int = 25) -> VisualContext:
        """Rows from all alike to all different."""
        share = torch.linspace(0, 1, rows).view(-1, 1, 1)
        return VisualContext((1 - share) * draw(rows, 1, 16, seed=1) + share * draw(rows, tokens, 16, seed=2))

    def test_need_is_the_mean_distance_of_pairs(self):
        context = ragged()
        for need, row, valid in zip(token_need(context), context.features.double(), context.valid, strict=True):
            row = row[valid]
            pairs = [
                1 - torch.cosine_similarity(one, other, dim=0)
                for number, one in enumerate(row)
                for other in row[number + 1 :]
            ]
            torch.testing.assert_close(need, torch.stack(pairs).mean(), rtol=0, atol=1e-5)
        alike = VisualContext(torch.ones(1, 5, 3))
        assert token_need(alike).tolist() == [0]
        assert token_need(VisualContext(torch.ones(1, 1, 3))).tolist() == [0]

    @pytest.mark.parametrize("options", [{"prune_ratio": 0.8}, {"keep_tokens": 7}])
    def test_the_total_is_the_same_and_varied_rows_get_more(self, options):
        context = self.varied()
        plain = reduce(context, PruningConfig("divprune", **options))
        reduction = reduce(context, PruningConfig("divprune", **options, adaptive=True))
        assert reduction.counts.sum() == plain.counts.sum()
        assert reduction.counts.tolist() == sorted(reduction.counts.tolist())
        assert reduction.counts[0] == 1
        assert reduction.counts[-1] > plain.counts[-1]

    @settings(max_examples=30)
    @given(st.integers(0, 10_000), st.floats(0.1, 0.95), st.permutations(range(6)))
    def test_order_padding_and_repetition_do_not_matter(self, seed, ratio, order):
        share = torch.rand(6, generator=torch.Generator().manual_seed(seed)).view(-1, 1, 1)
        context = VisualContext(share * draw(6, 1, 8, seed=seed) + (1 - share) * draw(6, 20, 8, seed=seed + 1))
        budget = PruningConfig(prune_ratio=ratio, adaptive=True)
        counts = keep_counts(context, budget).tolist()
        assert counts == keep_counts(context, budget).tolist()
        assert sum(counts) == 6 * PruningConfig(prune_ratio=ratio).count(20)
        assert min(counts) >= 1
        assert keep_counts(context.select_rows(torch.tensor(order)), budget).tolist() == [counts[row] for row in order]
        padded = VisualContext(
            torch.cat((torch.full((6, 3, 8), 9.0), context.features, torch.zeros(6, 4, 8)), dim=1),
            valid=torch.cat((torch.zeros(6, 3), torch.ones(6, 20), torch.zeros(6, 4)), dim=1).bool(),
        )
        assert keep_counts(padded, budget).tolist() == counts
        narrow = VisualContext(context.features.bfloat16())
        assert (
            keep_counts(narrow, budget).tolist()
            == keep_counts(VisualContext(narrow.features.float()), budget).tolist()
        )

    def test_equal_needs_keep_their_counts(self):
        context = VisualContext(draw(1, 9, 4).expand(3, -1, -1))
        assert adaptive_counts(context, [2, 5, 3], [9, 9, 9]) == [2, 5, 3]

    def test_newlines_do_not_count(self):
        context = ragged()
        context = context.replace(protected=(torch.arange(9) == 0).expand(5, 9))
        plain, adaptive = (
            keep_counts(context, PruningConfig(prune_ratio=0.5, adaptive=choice)) for choice in (False, True)
        )
        assert plain.tolist() == [4, 1, 4, 2, 3]
        assert adaptive.sum() == plain.sum()
        reduction = reduce(context, PruningConfig("divprune", prune_ratio=0.5, adaptive=True))
        assert reduction.counts.tolist() == (adaptive + 1).tolist()
        assert all(0 in row for row in kept(reduction))


@pytest.mark.parametrize("per", ["image", "sample"])
@pytest.mark.parametrize("reducer", ["divprune", "tome"])
@pytest.mark.parametrize("name", SEVERAL_ROWS)
def test_shared_budgets_on_real_models(name, reducer, per):
    """Counts a unit, a batch equals its samples one by one, and cached generation equals uncached."""
    case = (CASES | VIDEO_CASES)[name]
    budget = PruningConfig(reducer, prune_ratio=tester.RATIO, budget=per, newlines="drop")
    with torch.no_grad():
        context = case.family.encode(case.inputs, budget.needs).context
    reduction = reduce(context, budget)
    owner = context.group if per == "image" else context.sample
    plain = context.valid if context.protected is None else context.valid & ~context.protected
    for unit in owner.unique():
        rows = owner == unit
        wanted = min(budget.count(int(context.valid[rows].sum())), int(plain[rows].sum()))
        assert int(reduction.counts[rows].sum()) == wanted
    isolator = ModeIsolator(2, case.model.config.get_text_config().hidden_size)
    together = tester.logits(case.model, case.prune(case.prompts(), reducer, budget=per, isolator=isolator))[:, -1]
    for row, expected in enumerate(together):
        alone = case.prune(case.prompts([row]), reducer, budget=per, isolator=isolator)
        torch.testing.assert_close(tester.logits(case.model, alone)[0, -1], expected, **tester.CLOSE)
    pruned = case.prune(case.prompts(), reducer, budget=per)
    options = tester.generation_options(case)
    cached, uncached = (case.model.generate(**dict(pruned), **options, use_cache=use) for use in (True, False))
    assert torch.equal(cached, uncached)


@pytest.mark.parametrize("name", WITH_VIDEO)
def test_what_a_budget_is_of_in_a_video(name):
    """A crop is a frame, or on Qwen's models a pair of frames; an image is the whole video."""
    case = VIDEO_CASES[f"{name}-video"]
    with torch.no_grad():
        context = case.family.encode(
            case.inputs, Needs.of(get_reducer("divprune"), PruningConfig(budget="sample"))
        ).context
    rows = {"llava_onevision": 2, "qwen2_vl": 3, "qwen2_5_vl": 3, "qwen3_vl": 3}[name]  # of the first video
    video, video_and_image = context.sample == 0, context.sample == 3
    assert int(video.sum()) == rows

    def count(which: Tensor, per: str) -> int:
        budget = PruningConfig(keep_tokens=3, budget=per, newlines="drop")
        return int(reduce(context, budget).counts[which].sum())

    assert [count(video, per) for per in ("crop", "image", "sample")] == [3 * rows, 3, 3]
    assert [count(video_and_image, per) for per in ("image", "sample")] == [6, 3]


def test_prune_inputs_takes_every_option():
    case = CASES["llava"]
    images = case.inputs["pixel_values"].shape[0]

    def count(**options):
        pruned = prune_inputs(case.model, case.inputs, **options)
        return case.family.placeholder(pruned["input_ids"]).sum(dim=1).tolist()

    assert count(keep_tokens=5) == [5, 10, 0, 5]
    assert count(keep_tokens=5, budget="sample") == [5, 5, 0, 5]
    assert sum(count(keep_tokens=5, adaptive=True)) == 5 * images
    with pytest.raises(SaccadeError, match="keep_tokens=0"):
        count(keep_tokens=0)
    with pytest.raises(SaccadeError, match="newlines='some'"):
        count(newlines="some")


@pytest.mark.parametrize("options", [{"keep_tokens": 6, "adaptive": True}, {"budget": "sample", "newlines": "drop"}])
def test_training_with_a_budget(options, tmp_path):
    """Both modes run, and the fast sequence has the budget's length."""
    case = CASES["llava"]
    config = DualSpeedConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **options)
    step = fast_slow_step(case.family, "divprune", config.pruning)
    text = int(case.batch["attention_mask"].sum() - case.family.placeholder(case.batch["input_ids"]).sum())
    wanted = 4 * 6 if "keep_tokens" in options else sum(config.pruning.count(count) for count in (64, 128, 64))
    assert int(step("fast", case.batch, 1.0).tokens_in) == text + wanted
    slow = step("slow", case.batch, 1.0)
    assert int(slow.tokens_teacher) == text + wanted
    assert {name: config.resume_state()[name] for name in options} == options
    assert config.prune_ratio == (None if "keep_tokens" in options else 0.9)
    # What a configuration says of itself makes the same one again.
    same = {name: getattr(config, name) for name in ("prune_ratio", "keep_tokens")}
    again = DualSpeedConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **same)
    assert again.prune_ratio == config.prune_ratio


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep_tokens": 0}, "keep_tokens=0"),
        ({"budget": "batch"}, "budget='batch'"),
        ({"newlines": "none"}, "newlines='none'"),
    ],
)
def test_a_bad_budget_stops_the_config(options, words, tmp_path):
    with pytest.raises(SaccadeError, match=words):
        DualSpeedConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **options)


BOTH = {"prune_ratio": 0.8, "keep_tokens": 6}
ON_A_CPU = {"model": "tiny", "use_cpu": True, "bf16": False}


@pytest.mark.parametrize(
    "give",
    [
        lambda folder: DualSpeedConfig(output_dir=str(folder), use_cpu=True, bf16=False, **BOTH),
        lambda folder: DualSpeedConfig(
            output_dir=str(folder), use_cpu=True, bf16=False, modes=[{"name": "fast", "probability": 1.0, **BOTH}]
        ),
        lambda folder: prune_inputs(CASES["llava"].model, CASES["llava"].inputs, **BOTH),
        lambda folder: Inference.of_run("pruned", None, **BOTH),
        lambda folder: plan_inferences("tiny", **BOTH),
        lambda folder: load_recipe("tiny-digits/sft", ["--prune_ratio=0.8", "--keep_tokens=6"]),
        lambda folder: check_runs(plan_grid({**ON_A_CPU, **BOTH}, None, {}, None)),
        lambda folder: check_runs(plan_grid(ON_A_CPU, None, {"prune_ratio": [0.8], "keep_tokens": [6]}, None)),
    ],
)
def test_a_ratio_beside_a_number_is_refused_wherever_both_can_be_given(give, tmp_path):
    with pytest.raises(SaccadeError, match=r"prune_ratio=0\.8 and keep_tokens=6 .*: leave one of them out"):
        give(tmp_path)


@pytest.mark.parametrize(
    "words",
    [
        ["train", "tiny-digits/sft", "--check", "--prune_ratio", "0.8", "--keep_tokens", "6"],
        ["eval", "tiny", "--prune-ratio", "0.8", "--keep-tokens", "6"],
        ["view", "none.png", "--prune-ratio", "0.8", "--keep-tokens", "6"],
        ["sweep", "tiny-digits/sft", "--model", "tiny", "--prune_ratio", "0.8", "--keep_tokens", "6"],
    ],
)
def test_a_ratio_beside_a_number_is_one_line_of_every_verb(words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "none.png").touch()
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "prune_ratio=0.8 and keep_tokens=6" in line


def test_a_budget_of_the_command_line_replaces_that_of_the_recipe(tmp_path):
    assert load_recipe("tiny-digits/sft").trainer.prune_ratio == 0.9
    args = load_recipe("tiny-digits/sft", ["--keep_tokens", "6"]).trainer
    assert (args.prune_ratio, args.keep_tokens) == (None, 6)
    counted = tmp_path / "counted.yaml"
    counted.write_text("keep_tokens: 6\nbf16: false\nuse_cpu: true\n")
    args = load_recipe(counted, ["--prune_ratio", "0.5"]).trainer
    assert (args.prune_ratio, args.keep_tokens) == (0.5, None)
    (spec,) = plan_grid({"prune_ratio": 0.9}, {"prune_ratio": 0.9}, {"keep_tokens": [6]}, None)
    assert [(stage.get("prune_ratio"), stage["keep_tokens"]) for stage in spec.stages] == [(None, 6)] * 2
    assert {way["keep_tokens"] for way in spec.evaluation.inferences if way["name"] != "full"} == {6}
    assert all("prune_ratio" not in way for way in spec.evaluation.inferences)


def test_a_mode_has_a_budget_of_its_own_or_that_of_the_run(tmp_path):
    modes = [
        {"name": "few", "probability": 0.5, "keep_tokens": 6},
        {"name": "same", "probability": 0.5, "keep_tokens": None},
    ]
    config = DualSpeedConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, prune_ratio=0.5, modes=modes)
    budgets = [(mode.pruning.prune_ratio, mode.pruning.keep_tokens) for mode in config.all_modes()]
    assert budgets == [(None, 6), (0.5, None)]


def test_every_reducer_takes_a_shared_budget():
    known = {"keys": draw(5, 9, 4, seed=3), "relevance": draw(5, 9, seed=4), "encoder_features": draw(5, 9, 6, seed=5)}
    known |= {"word_relevance": draw(5, 9, 3, seed=6), "words": torch.tensor([3, 3, 3, 1, 1])}
    context = ragged().replace(**known)
    for name in list_reducers():
        reduction = reduce(context, PruningConfig(name, keep_tokens=4, budget="image"))
        assert name == "none" or int(reduction.counts.sum()) == 12
