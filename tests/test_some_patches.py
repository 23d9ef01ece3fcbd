"""Patches that a predictor reproduces are dropped before the tower; the rest run as if the others were masked."""

import json
from dataclasses import replace
from functools import cached_property

import numpy as np
import pytest
import torch
from datasets import Dataset
from family_models import FAMILIES, RELATIVES, WITH_VIDEO, VideoCase
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from transformers import AttentionInterface

from saccade.cli.main import main
from saccade.dualspeed import DualSpeedTrainer
from saccade.dualspeed.modes import ModeConfig
from saccade.errors import SaccadeError
from saccade.families.encoded import Patches
from saccade.families.some_patches import window_grids, windows_of
from saccade.pruning import Pruner, apply_pruning, prune
from saccade.reducers import Needs, PruningConfig, keep_count, reduce, reproduced
from saccade.reducers.config import trained_options
from saccade.report.view import view_reducers
from saccade.serving.shorten import check_serves
from saccade.testing.families import CLOSE, Case, generation_options, logits, real
from saccade.testing.training import fast_slow_step, make_config

PIXELS = {"pixel_values": "image_grid_thw", "pixel_values_videos": "video_grid_thw"}
QWENS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v")
TOWERS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def flattened(inputs: dict, tower) -> dict:
    """The inputs with four of five windows of each image and frame in one colour."""
    inputs = dict(inputs)
    for pixels, grid in PIXELS.items():
        if inputs.get(pixels) is not None:
            grids = window_grids(inputs[grid], tower.spatial_merge_size)
            number = torch.cat([torch.arange(rows * columns) for rows, columns in grids])
            flat = (number % 5 != 0).repeat_interleave(tower.spatial_merge_size**2)
            inputs[pixels] = inputs[pixels].masked_fill(flat.unsqueeze(1), 0.25)
    return inputs


class Flat(Case):
    @cached_property
    def batch(self):
        return flattened(super().batch, self.model.model.visual)

    def prompts(self, rows=range(4)):
        return flattened(super().prompts(rows), self.model.model.visual)


class FlatVideo(VideoCase):
    @cached_property
    def batch(self):
        return flattened(super().batch, self.model.model.visual)


NOISE = {name: Case(name, (FAMILIES | RELATIVES)[name]) for name in QWENS}
IMAGES = {name: Flat(name, (FAMILIES | RELATIVES)[name]) for name in QWENS}
VIDEOS = {name: FlatVideo(name, FAMILIES[name]) for name in WITH_VIDEO if name in QWENS}
EVERY = [
    pytest.param(case, id=f"{name}-{kind}")
    for kind, cases in (("image", IMAGES), ("video", VIDEOS))
    for name, case in cases.items()
]
EXACT = Needs(patch_tolerance=0.0)


# The predictor


def rebuild(windows: np.ndarray, rows: int, columns: int, tolerance: float) -> tuple[list[bool], np.ndarray]:
    """`reproduced` for one image, window by window, and the image as one who sees only the others rebuilds it."""
    seen = windows.copy()
    found = []
    for number in range(rows * columns):
        row, column = divmod(number, columns)
        guesses = []
        if column:
            guesses.append(seen[number - 1])
        if row:
            guesses.append(seen[number - columns])
        if row and column:
            guesses.append(seen[number - 1] + seen[number - columns] - seen[number - columns - 1])
        if column:
            guesses.append(np.repeat(seen[number - 1][..., -1:], windows.shape[-1], axis=-1))
        if row:
            guesses.append(np.repeat(seen[number - columns][..., -1:, :], windows.shape[-2], axis=-2))
        errors = [np.abs(guess - windows[number]).max() for guess in guesses]
        best = int(np.argmin(errors)) if errors else None
        found.append(best is not None and bool(errors[best] <= tolerance))
        if found[-1]:
            seen[number] = guesses[best]
    return found, seen


@st.composite
def pictures(draw):
    """Small images of a few grey levels, in which much repeats, and a tolerance."""
    rows, columns, size, channels = (draw(st.integers(1, most)) for most in (5, 5, 3, 2))
    kind = draw(st.sampled_from(["levels", "slope", "tiles"]))
    if kind == "slope":
        y, x = np.mgrid[: rows * size, : columns * size]
        image = draw(st.integers(-2, 2)) * y + draw(st.integers(-2, 2)) * x
        image = np.stack([image] * channels)
    else:
        values = st.integers(0, 1 if kind == "tiles" else 9)
        count = channels * rows * size * columns * size
        image = np.array(draw(st.lists(values, min_size=count, max_size=count))).reshape(channels, rows * size, -1)
    windows = image.reshape(channels, rows, size, columns, size).transpose(1, 3, 0, 2, 4)
    windows = windows.reshape(rows * columns, channels, size, size).astype(np.float64)
    return windows, rows, columns, draw(st.sampled_from([0, 1, 2, 5]))


@settings(max_examples=60)
@given(pictures())
def test_the_predictor_is_the_naive_one(drawn):
    windows, rows, columns, tolerance = drawn
    found, seen = rebuild(windows, rows, columns, tolerance)
    assert reproduced(torch.tensor(windows), [(rows, columns)], tolerance).tolist() == found
    assert np.abs(seen - windows).max() <= tolerance
    assert not found[0]


def test_errors_do_not_add_up():
    """A slope of one step per window: true neighbours are always within the tolerance, rebuilt ones are not."""
    windows = torch.arange(12.0).reshape(12, 1, 1, 1).expand(12, 1, 2, 2)
    assert reproduced(windows, [(1, 12)], 2.0).tolist() == [False, True, True] * 4


def test_even_slopes_and_repeats_are_reproduced():
    y, x = torch.meshgrid(torch.arange(12), torch.arange(16), indexing="ij")
    slope = (3 * y + 5 * x).reshape(3, 4, 4, 4).transpose(1, 2).reshape(12, 1, 4, 4).float()
    inner = torch.zeros(3, 4, dtype=torch.bool)
    inner[1:, 1:] = True
    assert reproduced(slope, [(3, 4)], 0).reshape(3, 4).equal(inner)
    first = torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert reproduced(first.repeat(3, 1, 1, 1), [(3, 4)], 0).tolist() == [False] * 4 + [True] * 8
    assert reproduced(torch.ones(12, 1, 4, 4), [(3, 4)], 0).tolist() == [False] + [True] * 11


def test_images_do_not_predict_one_another():
    windows = torch.ones(12, 1, 2, 2)
    assert (~reproduced(windows, [(2, 3), (1, 1), (5, 1)], 0)).nonzero().flatten().tolist() == [0, 6, 7]


def test_what_is_not_a_number_is_never_reproduced():
    windows = torch.ones(4, 1, 2, 2)
    windows[1, 0, 0, 1] = torch.nan
    windows[2] = torch.inf
    assert reproduced(windows, [(1, 4)], 1.0).tolist() == [False] * 4


@pytest.mark.parametrize("name", TOWERS)
def test_windows_are_pictures(name):
    """The processor's patches, put together again, are the image."""
    case = NOISE[name]
    noise = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    processor = case.processor.image_processor
    batch = processor(images=[Image.fromarray(noise)], return_tensors="pt")
    vision = case.model.config.vision_config
    windows = windows_of(batch["pixel_values"], vision.patch_size, vision.spatial_merge_size)
    assert windows.shape == (12, 6, 8, 8)
    assert window_grids(batch["image_grid_thw"], 2) == [(3, 4)]
    picture = windows.reshape(3, 4, 3, 2, 8, 8)[:, :, :, 0].permute(0, 3, 1, 4, 2).reshape(24, 32, 3)
    mean, deviation = (torch.tensor(values) for values in (processor.image_mean, processor.image_std))
    torch.testing.assert_close(picture, (torch.from_numpy(noise) / 255 - mean) / deviation)


# The tower


class Masking:
    """Attention under which the patches `hidden`, in the tower's order, are seen by none; called piece after piece."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.hidden, self.place = hidden, 0

    def __call__(self, module, query, key, value, attention_mask, scaling, **options):
        piece = self.hidden[self.place : self.place + key.shape[2]]
        self.place = (self.place + key.shape[2]) % len(self.hidden)
        score = query @ key.transpose(2, 3) * scaling
        weights = score.masked_fill(piece, torch.finfo(score.dtype).min).softmax(dim=-1)
        return (weights @ value).transpose(1, 2), None


def masked_features(case, absent: torch.Tensor):
    """Encoding by the whole tower, with the patches of absent windows masked in every layer's attention."""
    visual, inputs = case.model.model.visual, case.inputs
    encode, kinds = visual.forward, iter([pixels for pixels in PIXELS if inputs.get(pixels) is not None])
    masks = dict(zip([pixels for pixels in PIXELS if inputs.get(pixels) is not None], absent, strict=True))

    def forward(*args, **kwargs):
        kind = next(kinds)
        hidden = masks[kind].repeat_interleave(visual.spatial_merge_size**2).unsqueeze(1)
        if hasattr(visual, "window_size"):
            config = case.model.config.vision_config
            from transformers.vision_utils import get_vision_window_index

            order, _ = get_vision_window_index(
                inputs[PIXELS[kind]], config.spatial_merge_size, config.window_size, config.patch_size
            )
            hidden = visual.permute_input_for_window_attn(hidden, order, len(hidden))
        AttentionInterface.register("masking", Masking(hidden.flatten()))
        return encode(*args, **kwargs)

    before = visual.config._attn_implementation
    visual.config._attn_implementation = "masking"
    visual.forward = forward
    try:
        with torch.no_grad():
            return case.family.encode(inputs)
    finally:
        del visual.forward
        visual.config._attn_implementation = before


def absent_windows(case) -> list[torch.Tensor]:
    """The windows of each kind of input that are reproduced exactly."""
    visual = case.model.model.visual
    return [
        reproduced(
            windows_of(case.inputs[pixels], visual.config.patch_size, 2), window_grids(case.inputs[grid], 2), 0.0
        )
        for pixels, grid in PIXELS.items()
        if case.inputs.get(pixels) is not None
    ]


@pytest.mark.parametrize("case", EVERY)
def test_the_tower_runs_as_if_dropped_patches_were_masked(case):
    """At their places in the whole image, in windows and in full, and at every layer that the model reads."""
    absent = absent_windows(case)
    with torch.no_grad():
        some = case.family.encode(case.inputs, EXACT)
        whole = case.family.encode(case.inputs)
    context = some.context
    left = context.valid & ~context.absent
    assert 0 < int((context.valid & context.absent).sum()) == sum(int(lacking.sum()) for lacking in absent)
    assert left.any(dim=1).all()
    expected = masked_features(case, absent)
    assert not torch.allclose(expected.context.features[left], whole.context.features[left], **CLOSE)
    torch.testing.assert_close(context.features[left], expected.context.features[left], **CLOSE)
    assert not context.features[~left].any()
    assert len(some.deepstack_features) == len(expected.deepstack_features)
    for found, wanted in zip(some.deepstack_features, expected.deepstack_features, strict=True):
        torch.testing.assert_close(found[left], wanted[left], **CLOSE)


@pytest.mark.parametrize("case", EVERY)
def test_scores_of_patches_stand_with_their_tokens(case):
    visual = case.model.model.visual
    merged = []
    handle = visual.merger.register_forward_hook(lambda module, args, output: merged.append(output.detach()))
    with torch.no_grad():
        encoded = case.family.encode(case.inputs, EXACT)
    handle.remove()
    patches = [Patches(output.repeat_interleave(4, dim=0).unsqueeze(0), False) for output in merged]
    got = case.family.patches_to_tokens(patches, encoded, case.inputs)
    torch.testing.assert_close(got, encoded.context.features)


@pytest.mark.parametrize("name", QWENS)
def test_exact_where_nothing_is_dropped(name):
    """Noise is not reproduced: the inputs of the language model are the same to the bit."""
    case = NOISE[name]
    for reducer in ("divprune", "fastervlm", "avgpool"):
        plain, dropping = (case.prune(case.inputs, reducer, patch_tolerance=value) for value in (None, 0.1))
        assert plain.keys() == dropping.keys()
        for key in plain.keys() - {"mm_encoder_outputs"}:
            assert torch.equal(plain[key], dropping[key])
        outputs = (given["mm_encoder_outputs"]["image"] for given in (plain, dropping))
        for one, two in zip(*(output.to_tuple() for output in outputs), strict=True):
            for left, right in zip(one, two, strict=True):
                assert all(map(torch.equal, left, right)) if isinstance(left, (list, tuple)) else left.equal(right)


@pytest.mark.parametrize("name", QWENS)
@pytest.mark.parametrize("reducer", ["divprune", "avgpool", "fastervlm"])
def test_the_budget_is_counted_on_all_tokens(name, reducer):
    case = IMAGES[name]
    for ratio in (0.0, 0.3, 0.7):
        config = PruningConfig(reducer, prune_ratio=ratio, patch_tolerance=0.0)
        with torch.no_grad():
            context = case.family.encode(case.inputs, config.needs).context
        reduction = reduce(context, config)
        left = (context.valid & ~context.absent).sum(dim=1)
        wanted = torch.tensor([keep_count(count, ratio) for count in context.valid.sum(dim=1).tolist()])
        assert reduction.counts.equal(torch.minimum(left, wanted))
        for index, absent in zip(reduction.index, context.absent, strict=True):
            assert not absent[index[index >= 0]].any()


@pytest.mark.parametrize(
    "options", [{"budget": "image"}, {"budget": "sample"}, {"adaptive": True}, {"fit_length": 30}]
)
@pytest.mark.parametrize("cases", [IMAGES, VIDEOS], ids=["images", "videos"])
def test_every_budget(cases, options):
    """None keeps an absent token, or more than it would without them."""
    case = cases["qwen2_5_vl"]
    config = PruningConfig(prune_ratio=0.1, patch_tolerance=0.0, **options)
    full = prune(case.family, case.inputs, Pruner(config.replace(patch_tolerance=None)), lambda laid: laid)
    some = prune(case.family, case.inputs, Pruner(config), lambda laid: laid)
    whole, short = (laid.inputs["attention_mask"].sum(dim=1) for laid in (full, some))
    assert (short <= whole).all()
    assert (short < whole).any()
    if "fit_length" in options:
        assert (short <= 30).all()


@pytest.mark.parametrize("case", [case for case in EVERY if "3_5" not in case.id])
def test_kept_tokens_equal_the_full_sequence_with_the_others_masked(case):
    family, inputs = case.family, case.inputs
    config = PruningConfig(prune_ratio=0.0, patch_tolerance=0.0)
    with torch.no_grad():
        encoded = family.encode(inputs, config.needs)
    short = prune(family, inputs, Pruner(config), lambda laid: laid, encoded=encoded)
    context, placeholder = encoded.context, family.placeholder(inputs["input_ids"])
    hidden = torch.zeros_like(placeholder)
    hidden[placeholder] = context.absent[context.valid]
    mask = inputs["attention_mask"].masked_fill(hidden, 0)
    layers = [
        [row[valid] for row, valid in zip(layer, context.valid, strict=True)]
        for layer in (context.features, *encoded.deepstack_features)
    ]
    full = {
        **family.without_vision(inputs),
        "mm_encoder_outputs": family.wrap_features(layers[0], encoded, layers[1:]),
        "position_ids": family.full_positions(inputs),
        "attention_mask": mask,
    }
    got = real(logits(case.model, short.inputs), short.inputs["attention_mask"])
    torch.testing.assert_close(got, real(logits(case.model, full), mask), **CLOSE)


@pytest.mark.parametrize("name", QWENS)
def test_generation(name):
    """A batch answers as its samples do one by one, in place and with inputs that were pruned before."""
    case = IMAGES[name]
    options = {**generation_options(case), "output_logits": True, "return_dict_in_generate": True}
    prompts = case.prompts()
    pruned = case.prune(prompts, "divprune", 0.5, patch_tolerance=0.0)
    assert pruned["input_ids"].shape[1] < case.prune(prompts, "divprune", 0.0)["input_ids"].shape[1]
    together = torch.stack(case.model.generate(**pruned, **options).logits, dim=1)
    for row in range(4):
        alone = case.prune(case.prompts([row]), "divprune", 0.5, patch_tolerance=0.0)
        answer = torch.stack(case.model.generate(**alone, **options).logits, dim=1)
        torch.testing.assert_close(answer[0], together[row], **CLOSE)
    with apply_pruning(case.model, prune_ratio=0.5, patch_tolerance=0.0):
        in_place = torch.stack(case.model.generate(**prompts, **options).logits, dim=1)
    torch.testing.assert_close(in_place, together, **CLOSE)


# Training


def page(seed: int) -> Image.Image:
    """32 x 32 px of white with a few lines."""
    image = Image.new("RGB", (32, 32), "white")
    draw = ImageDraw.Draw(image)
    for number in range(3):
        draw.line((2, 4 + 8 * number, 6 + 3 * ((seed + number) % 4), 5 + 8 * number), fill="black")
    return image


def train(case, folder, **options) -> tuple[DualSpeedTrainer, list[int]]:
    """A short run on pages, and how many patches the tower saw in each of its passes."""
    rows = [
        {
            "images": [page(number)],
            "messages": [
                {"role": "user", "content": "<image>\nhow many digits ?"},
                {"role": "assistant", "content": "2"},
            ],
        }
        for number in range(4)
    ]
    model, processor = case.tiny.build()
    values = {"max_steps": 2, "per_device_train_batch_size": 2, "prune_ratio": 0.5, "freeze_vision_tower": False}
    trainer = DualSpeedTrainer(
        model,
        args=make_config(folder, **{**values, **options}),
        train_dataset=Dataset.from_list(rows),
        processing_class=processor,
    )
    seen = []
    hook = model.model.visual.patch_embed.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    trainer.train()
    hook.remove()
    return trainer, seen


def test_fast_steps_run_the_tower_on_fewer_patches(tmp_path):
    """Slow steps on all, although their teacher does not see the tokens of what is dropped."""
    case = NOISE["qwen2_5_vl"]
    for slow in (0.0, 1.0):
        folder = tmp_path / str(slow)
        trainer, seen = train(case, folder, slow_probability=slow, patch_tolerance=0.1)
        assert len(seen) == 2
        assert all(count == 2 * 64 if slow else 0 < count < 64 for count in seen)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert np.isfinite(losses).all()
        fresh = case.tiny.build()[0].model.visual.patch_embed.proj.weight
        assert not torch.equal(trainer.family.model.model.visual.patch_embed.proj.weight, fresh)
        trainer.save_model()
        saved = PruningConfig.from_pretrained(folder)
        assert saved.patch_tolerance == 0.1


def test_a_teacher_runs_without_the_dropped_tokens():
    """They are those of a fast step, although one encoding of all patches serves it and the pass that learns."""
    case = IMAGES["qwen2_5_vl"]
    step = fast_slow_step(case.model, budget=PruningConfig(prune_ratio=0.1, patch_tolerance=0.0))
    fast, slow = (step(mode, case.batch, 1.0) for mode in ("fast", "slow"))
    assert int(slow.tokens_teacher) == int(fast.tokens_in) < int(slow.tokens_in) == int(fast.tokens_full)


def test_parts_of_a_slow_batch_give_the_same_loss(tmp_path):
    case = NOISE["qwen3_vl"]
    losses = []
    for size in (None, 1):
        options = {"slow_probability": 1.0, "patch_tolerance": 0.1, "slow_micro_batch_size": size}
        trainer, _ = train(case, tmp_path / str(size), **options)
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# The option


def test_the_option_is_saved_and_read_back(tmp_path):
    config = PruningConfig(patch_tolerance=0)
    assert isinstance(config.patch_tolerance, float)
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "pruning_config.json").read_text())["patch_tolerance"] == 0.0
    assert PruningConfig.from_pretrained(tmp_path) == config
    assert PruningConfig.from_pretrained(tmp_path, patch_tolerance=None).patch_tolerance is None
    assert trained_options({"patch_tolerance": 0.0, "prune_ratio": 0.5}) == {
        "patch_tolerance": 0.0,
        "prune_ratio": 0.5,
    }
    assert not PruningConfig(prune_ratio=0, patch_tolerance=0).keeps_all


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_tolerance": -0.1}, "patch_tolerance=-0.1: expected a number of at least 0"),
        ({"patch_tolerance": True}, "patch_tolerance=True"),
        ({"patch_tolerance": float("nan")}, "patch_tolerance=nan"),
        ({"patch_tolerance": float("inf")}, "patch_tolerance=inf"),
        ({"patch_tolerance": "0.1"}, "patch_tolerance='0.1'"),
        ({"patch_tolerance": 0.1, "reducer": "changes"}, "reducer='changes', which compares the tokens at each place"),
        ({"patch_tolerance": 0.1, "reducer": "frames"}, "reducer='frames'"),
    ],
)
def test_bad_values_are_one_line(options, message):
    with pytest.raises(SaccadeError, match=message.replace("(", r"\(")):
        PruningConfig(**options)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in QWENS])
def test_towers_that_take_whole_images_refuse(name):
    case = Case(name, FAMILIES[name])
    for refused in (
        lambda: case.prune(case.prompts(), "divprune", patch_tolerance=0.1),
        lambda: apply_pruning(case.model, patch_tolerance=0.1),
    ):
        with pytest.raises(SaccadeError, match=r"patch_tolerance=0.1: the vision tower of .* takes whole images only"):
            refused()


def test_servers_refuse():
    with pytest.raises(SaccadeError, match=r"patch_tolerance=0.1 cannot be served"):
        check_serves(NOISE["qwen2_vl"].family, PruningConfig(patch_tolerance=0.1), isolator=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slow_probability": 1.0, "distill_weight": 0.0}, "patch_tolerance=0.1 holds for passes that drop tokens"),
        ({"skip_vision": "100/156"}, "a mode that skips runs on all visual tokens"),
        (
            {
                "modes": [
                    {"name": "fast", "probability": 0.5},
                    {"name": "mid", "probability": 0.5, "patch_tolerance": 0.2, "teacher": "fast"},
                ]
            },
            "two passes on one encoding drop the same patches",
        ),
    ],
)
def test_runs_that_cannot_drop_patches_refuse(options, message, tmp_path):
    with pytest.raises(SaccadeError, match=message):
        make_config(tmp_path, patch_tolerance=0.1, **options)


def test_a_mode_has_its_own_tolerance(tmp_path):
    modes = [
        {"name": "fast", "probability": 0.5, "patch_tolerance": 0.2},
        {"name": "slow", "probability": 0.5, "action": "keep", "teacher": "fast"},
    ]
    fast, slow = make_config(tmp_path, modes=modes).all_modes()
    assert (fast.patch_tolerance, slow.patch_tolerance) == (0.2, None)
    assert ModeConfig.from_dict(fast.to_dict(), PruningConfig()).patch_tolerance == 0.2
    both = slow.needs | fast.needs
    assert both == fast.needs | slow.needs == replace(fast.needs, whole_images=True)
    assert not (fast.needs | fast.needs).whole_images


def test_the_whole_tower_serves_a_pass_on_all_tokens():
    case = IMAGES["qwen2_vl"]
    with torch.no_grad():
        some = case.family.encode(case.inputs, EXACT)
        both = case.family.encode(case.inputs, replace(EXACT, whole_images=True))
        whole = case.family.encode(case.inputs)
    with pytest.raises(SaccadeError, match="patches were dropped before the tower, and this pass needs them all"):
        prune(case.family, case.inputs, None, lambda laid: laid, encoded=some)
    laid = prune(case.family, case.inputs, None, lambda laid: laid, encoded=both)
    assert laid.inputs["mm_encoder_outputs"] is both.outputs
    assert torch.equal(both.context.features, whole.context.features)
    assert both.context.absent.equal(some.context.absent)
    kept_all = prune(case.family, case.inputs, Pruner(PruningConfig(prune_ratio=0)), lambda laid: laid, encoded=both)
    assert kept_all.inputs["input_ids"].equal(case.inputs["input_ids"])


def test_view_tells_what_was_dropped(tmp_path, capsys):
    case, picture = NOISE["qwen2_5_vl"], tmp_path / "view.png"
    pruning = PruningConfig(prune_ratio=0, patch_tolerance=0.1)
    report = view_reducers(case.model, case.processor, page(0), ["divprune"], "how many ?", picture, pruning)
    (panel,) = json.loads(picture.with_suffix(".json").read_text())["panels"]
    assert report["panels"] == [panel]
    assert panel["absent"]
    assert sorted(panel["kept"] + panel["absent"]) == list(range(16))
    page(0).save(tmp_path / "page.png")
    assert main(["view", str(tmp_path / "page.png"), "--patch-tolerance", "0.1"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "patch_tolerance=0.1: the vision tower of model_type='llava' takes whole images only" in line
