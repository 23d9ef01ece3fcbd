"""A lower resolution in place of a reducer: sizes, places, and that the tower sees the smaller image only."""

import math
from dataclasses import replace

import family_tester as tester
import pytest
import torch
import torch.nn.functional as F
from family_models import FAMILIES
from hypothesis import given
from hypothesis import strategies as st

from saccade import SaccadeError, prune_inputs
from saccade.families import LlavaFamily, get_family
from saccade.families.collect import encode_for
from saccade.families.resolution import shrink_images, shrink_patches
from saccade.pruning import reduce
from saccade.reducers import get_reducer
from saccade.reducers.downsample import grid_places, lower_grid
from saccade.tokens import TokenBudget, VisualContext

CASES = {
    name: tester.Case(name, FAMILIES[name]) for name in ("llava", "internvl", "idefics3", "qwen2_5_vl", "qwen3_vl")
}


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 2000))
def test_the_grid_stays_within_the_budget_and_near_the_aspect_ratio(height, width, keep):
    rows, columns = lower_grid(height, width, keep)
    assert 1 <= rows <= height
    assert 1 <= columns <= width
    assert rows * columns <= keep
    if keep >= height * width:
        assert (rows, columns) == (height, width)
    # Neither edge can grow within the budget and the full grid, or the rule would have taken the larger one.
    assert rows == height or (rows + 1) * columns > keep
    assert columns == width or rows * (columns + 1) > keep
    uniform = [
        max(1, math.floor(edge * math.sqrt(min(1, keep / (height * width))) - 1e-9)) for edge in (height, width)
    ]
    if uniform[0] * uniform[1] <= keep:
        assert rows * columns >= uniform[0] * uniform[1]


def test_grids_by_hand():
    assert lower_grid(24, 24, 58) == (7, 8)
    assert lower_grid(24, 24, 58, square=True) == (7, 7)
    assert lower_grid(24, 24, 64) == (8, 8)
    assert lower_grid(12, 12, 14) == (3, 4)
    assert lower_grid(10, 20, 50) == (5, 10)
    assert lower_grid(24, 1, 2) == (2, 1)
    assert lower_grid(5, 5, 0) == (1, 1)


@given(st.integers(1, 30), st.integers(1, 30), st.data())
def test_each_token_stands_where_its_centre_falls(height, width, data):
    lower = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    places = grid_places((height, width), lower)
    assert places == sorted(set(places))
    assert len(places) == lower[0] * lower[1]
    for number, place in enumerate(places):
        y, x = (number // lower[1] + 0.5) * height / lower[0], (number % lower[1] + 0.5) * width / lower[1]
        assert place == math.floor(y + 1e-9) * width + math.floor(x + 1e-9)


def test_patches_of_a_smaller_video_by_loops():
    channels, patch, temporal, merge = 3, 2, 2, 2
    frames, lower = 2, (1, 2)
    grid = (frames, 4, 6)
    video = torch.randn(frames * temporal, channels, grid[1] * patch, grid[2] * patch)

    def cut(pixels):
        """Patches in the order of the processor: frame, block of merged patches, patch within it."""
        edge = patch * merge
        found = []
        for frame in range(frames):
            for top in range(0, pixels.shape[2], edge):
                for left in range(0, pixels.shape[3], edge):
                    for y in range(top, top + edge, patch):
                        for x in range(left, left + edge, patch):
                            piece = pixels[frame * temporal : (frame + 1) * temporal, :, y : y + patch, x : x + patch]
                            found.append(piece.transpose(0, 1).reshape(-1))
        return torch.stack(found)

    small = F.interpolate(video, size=(lower[0] * 4, lower[1] * 4), mode="bicubic", antialias=True)
    torch.testing.assert_close(shrink_patches(cut(video), grid, lower, merge, patch, temporal), cut(small))


@pytest.mark.parametrize("name", CASES)
def test_the_tower_sees_the_smaller_images_only(name):
    """Its input is smaller than the full one by the share of tokens that were kept, and features are its output."""
    case = CASES[name]
    family = case.family
    modules = [
        module for module in family.vision_tower.modules() if isinstance(module, (torch.nn.Conv2d, torch.nn.Conv3d))
    ]
    seen = []
    hooks = [module.register_forward_pre_hook(lambda _, args: seen.append(args[0].numel())) for module in modules[:1]]
    try:
        with torch.no_grad():
            family.encode(case.inputs)
            encoded = encode_for(family, get_reducer("downsample"), case.inputs, TokenBudget(0.7))
    finally:
        for hook in hooks:
            hook.remove()
    assert len(seen) == 2
    context = encoded.context
    reduction = reduce(context, get_reducer("downsample"), TokenBudget(0.7))
    counts = reduction.counts
    budget = [TokenBudget(0.7).count(int(valid.sum())) for valid in context.valid]
    assert all(1 <= count <= most for count, most in zip(counts.tolist(), budget, strict=True))
    assert seen[1] / seen[0] == pytest.approx(int(counts.sum()) / int(context.valid.sum()))
    filled = context.features.abs().sum(dim=2) > 0
    assert torch.equal(filled, tester.kept_mask(reduction.index, context.shape[1]))


@pytest.mark.parametrize("at_once", [1, 2**20])
def test_gradients_reach_the_pixels_of_full_images(at_once, monkeypatch):
    monkeypatch.setattr("saccade.reducers.common.CPU_CACHED_ELEMENTS", at_once)
    pixels = torch.rand(3, 2, 28, 28, generator=torch.Generator().manual_seed(0)).requires_grad_()
    small = shrink_images(pixels, 14, 14)
    expected = F.interpolate(pixels, size=(14, 14), mode="bicubic", antialias=True)
    torch.testing.assert_close(small, expected)
    found, wanted = (torch.autograd.grad(images.square().sum(), pixels)[0] for images in (small, expected))
    torch.testing.assert_close(found, wanted)


def test_features_equal_the_stock_model_on_a_resized_image():
    case = CASES["llava"]
    pixels = case.inputs["pixel_values"]
    context = encode_for(case.family, get_reducer("downsample"), case.inputs, TokenBudget(keep_tokens=20)).context
    small = F.interpolate(pixels, size=(4 * 4, 5 * 4), mode="bicubic", antialias=True)
    with torch.no_grad():
        expected = case.model.get_image_features(pixel_values=small, interpolate_pos_encoding=True, return_dict=True)
    reduction = reduce(context, get_reducer("downsample"), TokenBudget(keep_tokens=20))
    torch.testing.assert_close(reduction.apply(context.features), torch.stack(tuple(expected.pooler_output)))


@pytest.mark.parametrize("name", CASES)
def test_a_budget_of_everything_is_the_full_encoding(name):
    """At the full size nothing is resized, and every token is kept at its place."""
    case = CASES[name]
    budget = TokenBudget(keep_tokens=10_000)
    with torch.no_grad():
        context = encode_for(case.family, get_reducer("downsample"), case.inputs, budget).context
        full = case.family.encode(case.inputs).context
    torch.testing.assert_close(context.features, full.features)
    assert torch.equal(context.grid, full.grid)
    assert torch.equal(context.group, full.group)
    reduction = reduce(context, get_reducer("downsample"), budget)
    assert torch.equal(reduction.counts, full.valid.sum(dim=1))


def test_the_teacher_runs_on_smaller_images_and_the_student_on_full_ones():
    case = CASES["llava"]
    family = get_family(case.model)
    sizes = []
    handle = family.vision_tower.register_forward_pre_hook(lambda _, args: sizes.append(tuple(args[0].shape[-2:])))
    step = tester.make_step(family, "downsample", None)
    try:
        for mode in ("fast", "slow"):
            output = step(mode, case.batch, 1.0)
            sizes.append(mode)
    finally:
        handle.remove()
    assert sizes == [(16, 16), "fast", (16, 16), (32, 32), "slow"]
    assert output.kl > 0
    assert output.tokens_in == case.batch["attention_mask"].sum()
    assert output.tokens_teacher < output.tokens_in


@pytest.mark.parametrize(
    ("options", "name"), [({"budget": "image"}, "budget='image'"), ({"adaptive": True}, "adaptive")]
)
def test_images_cannot_share_a_resolution(options, name):
    case = CASES["llava"]
    with pytest.raises(SaccadeError, match=name):
        prune_inputs(case.model, case.inputs, "downsample", **options)


def test_features_of_full_images_are_refused():
    with pytest.raises(SaccadeError, match="chooses no tokens of full images"):
        get_reducer("downsample")(VisualContext(torch.zeros(1, 4, 2)), 2)


def test_a_tower_without_a_grid_is_refused(monkeypatch):
    case = CASES["llava"]
    monkeypatch.setattr(case.model.config, "vision_feature_select_strategy", "full")
    with pytest.raises(SaccadeError, match="vision_feature_select_strategy='full' gives no grid"):
        prune_inputs(case.model, case.inputs, "downsample")


def test_a_tower_whose_first_patch_is_cut_off_is_refused(monkeypatch):
    case = CASES["llava"]
    block = replace(case.family.attention_block(), class_token=False)
    monkeypatch.setattr(LlavaFamily, "attention_block", lambda self: block)
    with pytest.raises(SaccadeError, match="vision_feature_select_strategy='default' gives no grid"):
        prune_inputs(case.model, case.inputs, "downsample")


def test_images_of_many_sizes_are_refused(monkeypatch):
    model = CASES["llava"].model
    monkeypatch.setattr(type(model.config.vision_config), "model_type", "pixtral")
    with pytest.raises(SaccadeError, match=r"vision_config.model_type='pixtral': .*add-a-family"):
        get_family(model)
