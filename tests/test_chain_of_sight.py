"""Chain-of-Sight: the resampler against loops, its scales under Skip-Vision, and from parts to a saved model."""

import subprocess
import sys
from functools import partial

import pytest
import torch
from family_models import build_llava
from PIL import Image
from skip_tester import CLOSE, oracle_logits, skipping
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText, AutoProcessor

from saccade import SaccadeError, SkipVisionConfig
from saccade.cli.main import main
from saccade.families import get_family
from saccade.families.chain_of_sight import (
    ChainOfSightConfig,
    ChainOfSightForConditionalGeneration,
    MultiScaleResampler,
    grown_config,
    place_codes,
)
from saccade.families.encoded import Patches
from saccade.families.fitting import check_processor
from saccade.reducers.shared_budget import Units
from saccade.skip_vision.split import split_tokens
from saccade.testing import families as tester
from saccade.testing.tiny_models import Tiny, noise_image
from saccade.tiny import tiny_checkpoint
from saccade.tokens import Places, Role
from saccade.training.assemble import AssembleOptions, assemble_model
from saccade.training.flops import projector_flops, skip_rows

THREE = [[1, 2], [2, 2], [4, 2]]
"""Of 8 x 8 patches: 4 tokens of the whole, 16 of windows of 4 x 4 patches, 64 of windows of 2 x 2."""


@pytest.fixture(scope="module")
def case():
    return tester.Case(
        "chain_of_sight",
        Tiny(
            lambda: build_llava(config_class=partial(ChainOfSightConfig, scales=THREE)),
            ChainOfSightForConditionalGeneration,
        ),
    )


def attend_by_loops(resampler, image, queries, windows, row, column):
    """The tokens of one window of an image `(side, side, Dv)`, one query and one head at a time."""
    side, width = image.shape[0], image.shape[-1]
    edge, head = side // windows, width // resampler.heads
    patches = image[row * edge : (row + 1) * edge, column * edge : (column + 1) * edge].reshape(edge * edge, width)
    keys = resampler.k_proj(patches + place_codes(edge, width, patches))
    values = resampler.v_proj(patches)
    asked = resampler.q_proj(queries + place_codes(round(len(queries) ** 0.5), width, queries))
    tokens = []
    for number, query in enumerate(asked):
        parts = []
        for start in range(0, width, head):
            score = keys[:, start : start + head] @ query[start : start + head] / head**0.5
            parts.append(score.softmax(dim=0) @ values[:, start : start + head])
        tokens.append(queries[number] + resampler.o_proj(torch.cat(parts)))
    return torch.stack(tokens)


@torch.no_grad()
def test_each_window_is_seen_by_its_own_queries(case):
    """Maps in raster order, coarse to fine: the token at (i, j) is a query of the window that covers its place."""
    resampler = case.family.projector
    features = torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(0))
    got = resampler(features)
    start = 0
    for queries, (windows, count) in zip(resampler.queries, THREE, strict=True):
        side = windows * count
        maps = got[:, start : start + side * side].unflatten(1, (side, side))
        for image, tokens in zip(resampler.norm(features).unflatten(1, (8, 8)), maps, strict=True):
            for row, column in ((0, 0), (windows - 1, 0), (0, windows - 1)):
                window = attend_by_loops(resampler, image, queries, windows, row, column)
                expected = super(MultiScaleResampler, resampler).forward(window).unflatten(0, (count, count))
                rows, columns = (slice(at * count, (at + 1) * count) for at in (row, column))
                torch.testing.assert_close(tokens[rows, columns], expected, **CLOSE)
        start += side * side
    assert got.shape == (2, start, 32)


@torch.no_grad()
def test_scores_of_patches_go_to_the_tokens_at_their_place(case):
    encoded = case.family.encode(case.inputs)
    rows = case.inputs["pixel_values"].shape[0]
    values = torch.arange(1.0, 65).reshape(1, 64, 1).expand(rows, -1, -1)
    with_class = torch.nn.functional.pad(values, (0, 0, 1, 0), value=1e6)
    got = case.family.patches_to_tokens([Patches(with_class, True)], encoded, case.inputs)
    square = values[0].reshape(8, 8)
    for scale, side in enumerate((2, 4, 8)):
        edge = 8 // side
        for row in (scale, 3 + scale):  # of the first and of the second image
            tokens = got[row, : side * side, 0].reshape(side, side)
            assert tokens[1, 0] == square[edge : 2 * edge, :edge].mean()


def test_the_finest_scale_is_skipped_and_the_first_summary_pools_the_one_before(case):
    config = SkipVisionConfig.preset("272/256")
    with torch.no_grad():
        encoded = case.family.encode(case.inputs)
        places = Places.of(case.family.placeholder(case.inputs["input_ids"]), encoded.context)
    blocks = Units.of_tokens(encoded.context, places.block)
    split = split_tokens(case.family, config, encoded, blocks, blocks.context(encoded.context))
    images = len(blocks.place)
    assert split.retained.index.tolist() == [list(range(20))] * images
    assert split.pooled.tolist() == [[False] * 4 + [True] * 16] * images
    assert split.rest.tolist() == [[False] * 20 + [True] * 64] * images
    with skipping(case.model, config) as skip:
        prepared = skip.prepare(case.inputs)
        got = tester.logits(case.model, prepared)
    roles = prepared["skip_roles"]
    assert (roles == Role.SKIPPED).sum(dim=1).tolist() == [16, 32, 0, 16]
    seen = (roles != Role.SKIPPED) & (roles != Role.PADDING)
    torch.testing.assert_close(got[seen], oracle_logits(case.model, prepared)[seen], **CLOSE)


def test_bad_scales_are_refused():
    vision = {"model_type": "clip_vision_model", "image_size": 32, "patch_size": 4}
    for scales, message in (
        ([[1, 4], [3, 2]], "divides the 8 patches"),
        ([[1, 4], [2, 0]], "in a window; .* is not"),
        ([[4, 2], [1, 4]], "from coarse to fine"),
        ([[4, 2]], "two or more"),
    ):
        with pytest.raises(SaccadeError, match=message):
            ChainOfSightConfig(vision_config=vision, scales=scales)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start") / "out"
    assemble_model("tiny", "tiny", folder, AssembleOptions(projector="resampler", dtype="float32"))
    return folder


def test_from_parts_to_a_model_that_loads(start):
    """Tower and language model of the embedded model; the processor writes a placeholder for each token."""
    model, info = AutoModelForImageTextToText.from_pretrained(start, output_loading_info=True)
    assert type(model) is ChainOfSightForConditionalGeneration
    assert not any(keys for kind, keys in info.items() if kind.endswith("_keys"))
    processor = AutoProcessor.from_pretrained(start)
    check_processor(processor, model.config)
    inputs = processor(images=Image.new("RGB", (40, 30)), text="<image> how many ?", return_tensors="pt")
    assert get_family(model).encode(inputs).context.grid.tolist() == [[1, 4, 4], [1, 8, 8]]
    assert model(**inputs).logits.isfinite().all()
    processor.num_additional_image_tokens += 1
    with pytest.raises(SaccadeError, match="num_additional_image_tokens=-62"):
        check_processor(processor, model.config)


def test_the_published_scales():
    vision = {"model_type": "clip_vision_model", "image_size": 224, "patch_size": 14}
    config = ChainOfSightConfig(vision_config=vision)
    assert [side**2 for side in config.sides] == [16, 64]
    grown = grown_config(config, 448)
    assert [side**2 for side in grown.sides] == [16, 256, 1024]
    assert grown.image_seq_length == 1296
    rows = skip_rows(SkipVisionConfig.preset("272/256"), grown.image_seq_length, grown.sides)
    assert (rows.retained, rows.skipped) == (272, 256)
    for size, message in ((300, "give a multiple of the 224 pixels"), (224 // 2, "give a multiple"), (0, "multiple")):
        with pytest.raises(SaccadeError, match=message):
            grown_config(config, size)
    with pytest.raises(SaccadeError, match="leave no scale finer than 16 windows"):
        grown_config(grown, 448)


@pytest.mark.parametrize(("size", "tokens"), [(96, [16, 64, 144]), (192, [16, 256, 576])])
@torch.no_grad()
def test_a_grown_model_goes_on_from_what_it_learned(size, tokens, start, tmp_path):
    """With images of the same size, the old scales give the same tokens; the new one starts as the last."""
    assert main(["grow", str(start), "--image-size", str(size), "--output", str(tmp_path / "out")]) == 0
    before, after = (AutoModelForImageTextToText.from_pretrained(folder) for folder in (start, tmp_path / "out"))
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    check_processor(processor, after.config)
    inputs = processor(images=noise_image(size, size // 2, 0), text="<image> how many ?", return_tensors="pt")
    encoded = get_family(after).encode(inputs)
    assert encoded.context.valid.sum(dim=1).tolist() == tokens
    assert after(**inputs).logits.isfinite().all()
    old, new = (model.model.multi_modal_projector.queries for model in (before, after))
    assert all(torch.equal(new[number], old[min(number, 1)]) for number in range(3))
    positions = [model.model.vision_tower.embeddings.position_embedding.weight for model in (before, after)]
    assert torch.equal(positions[0][0], positions[1][0])  # of the class token
    if size == 96:
        expected = get_family(before).encode({"pixel_values": inputs["pixel_values"]}).context
        got = encoded.context.features[:2][encoded.context.valid[:2]]
        torch.testing.assert_close(got, expected.features[expected.valid], **CLOSE)
    else:  # twice as many patches an edge: a bicubic mean of four neighbours is near what stood between them
        old, new = (each[1:].T.reshape(-1, side, side) for each, side in zip(positions, (12, 24), strict=True))
        torch.testing.assert_close(new.mean(dim=(1, 2)), old.mean(dim=(1, 2)), atol=2e-2, rtol=0)
        corner = torch.nn.functional.avg_pool2d(new[None], 2)[0]
        assert (corner - old).abs().mean() < 0.3 * (old - old.mean(dim=(1, 2), keepdim=True)).abs().mean()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([str(tiny_checkpoint()), "--image-size", "192"], "has no resampler that grows"),
        (["nowhere", "--image-size", "192"], "model='nowhere'"),
        (["{start}", "--image-size", "100"], "image_size=100: give a multiple of the 96 pixels"),
    ],
)
def test_what_cannot_grow_is_refused_in_one_line(flags, message, start, tmp_path, capsys):
    words = [word.format(start=start) for word in flags]
    assert main(["grow", *words, "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_operations_of_the_resampler(case):
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        case.family.projector(torch.zeros(1, 64, 32))
    assert counter.get_total_flops() == projector_flops(case.model.config, 1, (8, 8))


@pytest.mark.slow
def test_an_exported_model_says_that_it_needs_this_package(start, tmp_path, capsys):
    """In a new process, the snippet of its card loads it."""
    assert main(["export", str(start), "--output", str(tmp_path / "out")]) == 0
    assert "loads in transformers, with `import saccade.families`" in " ".join(capsys.readouterr().out.split())
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Saccade has the code of ChainOfSightForConditionalGeneration." in card
    code = card.split("```python\n")[1].split("```")[0] + "print(type(model).__name__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "out", capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "ChainOfSightForConditionalGeneration"
