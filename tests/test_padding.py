"""`image_aspect_ratio: pad`: a square with the mean colour, made by the processor that is saved with the model."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset
from family_models import FAMILIES
from helpers import make_trainer
from PIL import Image
from transformers import AutoProcessor, CLIPImageProcessorPil, SiglipImageProcessorPil
from transformers.image_utils import IMAGENET_STANDARD_MEAN

from saccade.dualspeed import DualSpeedConfig
from saccade.dualspeed.collator import DualSpeedCollator
from saccade.errors import RecordError, SaccadeError
from saccade.evaluation.digits import collate_prompts, prepare_prompts
from saccade.families import family_class
from saccade.families.padding import check_aspect_ratio, pad_to_square, padded, pads_to_square
from saccade.recipes import RECIPES
from saccade.report.view import seen_part
from saccade.training import load_recipe
from saccade.training.export import export_model

MEAN, STD = (0.4814, 0.4578, 0.4082), (0.2686, 0.2613, 0.2757)
CLIP = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "image_mean": MEAN, "image_std": STD}


def framed(width: int, height: int) -> Image.Image:
    """A picture of 4:3 or 3:4, noise without strong colours, except for one along each of its shorter edges."""
    pixels = np.random.default_rng(1).integers(90, 166, (height, width, 3), dtype=np.uint8)
    strip = min(width, height) // 8
    if width > height:
        pixels[:, :strip], pixels[:, -strip:] = (255, 0, 0), (0, 0, 255)
    else:
        pixels[:strip], pixels[-strip:] = (255, 0, 0), (0, 0, 255)
    return Image.fromarray(pixels)


def naive(image: Image.Image, mean: tuple[float, ...], std: tuple[float, ...], side: int) -> np.ndarray:
    """The oracle, `(3, side, side)`: pad as LLaVA-1.5's released code does, scale, normalize."""
    longer = max(image.size)
    square = np.empty((longer, longer, 3), dtype=np.uint8)
    square[:] = [int(value * 255) for value in mean]
    left, top = (longer - image.width) // 2, (longer - image.height) // 2
    square[top : top + image.height, left : left + image.width] = np.asarray(image)
    small = Image.fromarray(square).resize((side, side), Image.Resampling.BICUBIC)
    return ((np.asarray(small) / 255 - mean) / std).transpose(2, 0, 1)


def colours(pixels: np.ndarray, mean, std) -> np.ndarray:
    """Pixels `(3, H, W)` of a processor as colours `(H, W, 3)` in [0, 255]."""
    return 255 * (pixels.transpose(1, 2, 0) * std + mean)


STOCK = {
    "CLIP": (lambda: CLIPImageProcessorPil(**CLIP), MEAN, STD),
    "SigLIP": (
        lambda: SiglipImageProcessorPil(size={"height": 32, "width": 32}),
        IMAGENET_STANDARD_MEAN,
        IMAGENET_STANDARD_MEAN,
    ),
}


def llava(kind: str = "CLIP"):
    """A tiny LLaVA with a stock image processor."""
    model, processor = FAMILIES["llava"].build()
    processor.image_processor = STOCK[kind][0]()
    return model, processor


@pytest.mark.parametrize("kind", STOCK)
@pytest.mark.parametrize("size", [(64, 48), (48, 64), (65, 40), (21, 64), (48, 48)])
def test_padded_pixels_are_those_of_the_naive_way(kind, size):
    _, mean, std = STOCK[kind]
    processor = llava(kind)[1]
    pad_to_square(processor)
    found = processor.image_processor(framed(*size), return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(found, naive(framed(*size), mean, std, 32), atol=1e-5)


@pytest.mark.parametrize("size", [(64, 48), (48, 64)])
def test_what_clip_cuts_off_stays(size):
    """The coloured edges of a picture of 4:3: a quarter of it is gone without padding, and there with it."""
    processor = llava()[1]

    def share_of(color: tuple[int, int, int]) -> float:
        pixels = processor.image_processor(framed(*size), return_tensors="np")["pixel_values"][0]
        return float((np.abs(colours(pixels, MEAN, STD) - color).max(axis=-1) < 60).mean())

    assert share_of((255, 0, 0)) == share_of((0, 0, 255)) == 0
    pad_to_square(processor)
    # An eighth of the shorter side, along it: 48 / 64 of the square.
    for color in ((255, 0, 0), (0, 0, 255)):
        assert share_of(color) == pytest.approx((48 / 8 / 64) * (48 / 64), rel=0.25)


def test_a_square_image_is_as_it_was_and_twice_is_once():
    processor = llava()[1]
    image = framed(48, 48)
    before = processor.image_processor(image, return_tensors="pt")["pixel_values"]
    pad_to_square(processor)
    once = processor.image_processor
    pad_to_square(processor)
    assert processor.image_processor is once
    assert torch.equal(once(image, return_tensors="pt")["pixel_values"], before)


@pytest.mark.parametrize("kind", STOCK)
def test_counts_of_visual_tokens_stay(kind):
    """vLLM asks the processor for them."""
    processor = llava(kind)[1]
    pad_to_square(processor)
    assert processor._get_num_multimodal_tokens(image_sizes=[(48, 64)])["num_image_tokens"] == [64]


def test_a_processor_that_does_more_is_refused():
    class Mirrors(CLIPImageProcessorPil):
        def _preprocess(self, images, **options):
            return super()._preprocess([image[..., ::-1] for image in images], **options)

    processor = llava()[1]
    processor.image_processor = Mirrors(**CLIP)
    with pytest.raises(SaccadeError, match="image_aspect_ratio='pad': Mirrors does not treat square images as"):
        pad_to_square(processor)


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_pads_or_says_why_not(name):
    model = FAMILIES[name].build()[0]
    family = family_class(model.config)
    check_aspect_ratio(family, None)
    if name == "llava":
        check_aspect_ratio(family, "pad")
        return
    reason = "are resized to a square" if name == "gemma3" else "reach the model whole"
    with pytest.raises(SaccadeError, match=rf"image_aspect_ratio='pad': images of \w+ {reason}.*; leave it out"):
        check_aspect_ratio(family, "pad")


def test_the_option_is_refused_before_anything_is_loaded(tmp_path):
    with pytest.raises(SaccadeError, match="image_aspect_ratio='square' is unknown: use one of pad"):
        DualSpeedConfig(output_dir=str(tmp_path), image_aspect_ratio="square", use_cpu=True, bf16=False)
    model, processor = FAMILIES["qwen2_5_vl"].build()
    with pytest.raises(SaccadeError, match="images of qwen"):
        make_trainer(model, processor, tmp_path, image_aspect_ratio="pad")


STOCK_LOADING = """
import sys
from PIL import Image
from transformers import AutoProcessor

for folder in sys.argv[2:]:
    processor = AutoProcessor.from_pretrained(folder)
    pixels = processor.image_processor(Image.open(sys.argv[1]), return_tensors="np")["pixel_values"][0]
    pixels.tofile(folder + "/pixels")
assert not [name for name in sys.modules if name.partition(".")[0] == "saccade"]
"""


def test_trained_saved_exported_and_loaded_it_pads(tmp_path):
    """Training, evaluation, what was saved and what was exported give one picture the same pixels."""
    picture = framed(64, 48)
    picture.save(tmp_path / "picture.png")
    model, processor = llava()
    words = [{"role": "user", "content": "<image> how many ?"}, {"role": "assistant", "content": "3"}]
    row = {"messages": words, "images": [str(tmp_path / "picture.png")]}
    rows = Dataset.from_list([row] * 4)
    trainer = make_trainer(model, processor, tmp_path / "out", rows=rows, max_steps=1, image_aspect_ratio="pad")
    trainer.train()
    trainer.save_model()
    export_model(tmp_path / "out", tmp_path / "exported")
    expected = torch.tensor(naive(picture, MEAN, STD, 32), dtype=torch.float32)
    loaded = AutoProcessor.from_pretrained(tmp_path / "out")
    found = {
        "training": trainer.data_collator([row])["pixel_values"][0],
        "the processor that was given": processor.image_processor(picture, return_tensors="pt")["pixel_values"][0],
        "evaluation": collate_prompts(loaded, [row])["pixel_values"][0],
        "saved": loaded.image_processor(picture, return_tensors="pt")["pixel_values"][0],
    }
    # A process of its own, in which nothing has imported saccade.
    paths = [str(tmp_path / name) for name in ("picture.png", "out", "exported")]
    subprocess.run([sys.executable, "-c", STOCK_LOADING, *paths], check=True, capture_output=True)
    for folder in ("out", "exported"):
        pixels = np.fromfile(tmp_path / folder / "pixels", dtype=np.float32)
        found[folder] = torch.from_numpy(pixels).view(3, 32, 32)
    for name, pixels in found.items():
        torch.testing.assert_close(pixels, expected, atol=1e-5, rtol=0, msg=name)
    # A next stage that does not ask for it goes on with it.
    again = make_trainer(FAMILIES["llava"].build()[0], loaded, tmp_path / "next", rows=rows)
    assert pads_to_square(again.processing_class)


def test_a_long_image_cannot_take_all_memory_as_a_square():
    """A strip of 180:1 passes as it is; as a square it has 180 times its pixels."""
    model, processor = llava()
    strip = {"messages": [{"role": "user", "content": "<image> ?"}, {"role": "assistant", "content": "3"}]}
    strip["images"] = [Image.new("RGB", (1800, 10))]
    image_id = model.config.image_token_id
    collator = DualSpeedCollator(processor, placeholder_id=image_id, max_image_pixels=100_000)
    assert collator([strip])["pixel_values"].shape == (1, 3, 32, 32)
    pad_to_square(processor)
    message = "1800 x 10 pixels, 1800 x 1800 once it is padded to a square, more than max_image_pixels=100000"
    with pytest.raises(RecordError, match=message):
        collator([strip])
    content = [{"type": "image", "image": Image.new("RGB", (10_000, 60))}]
    with pytest.raises(RecordError, match="10000 x 10000 once it is padded"):
        prepare_prompts(processor, [[{"role": "user", "content": content}]])


def test_the_view_shows_what_the_model_sees():
    processor = llava()[1]
    image = framed(64, 48)
    assert seen_part(processor, image).size == (48, 48)
    pad_to_square(processor)
    seen = seen_part(processor, image)
    assert seen.size == (64, 64)
    assert np.array_equal(seen, padded(image, processor))
    np.testing.assert_allclose(
        processor.image_processor(seen, return_tensors="np")["pixel_values"],
        processor.image_processor(image, return_tensors="np")["pixel_values"],
    )


def test_the_recipes_pad_where_the_published_ones_do():
    pads = set()
    for path in RECIPES.rglob("*.yaml"):
        recipe = load_recipe(path, ["--use_cpu", "true"])
        if recipe.trainer.image_aspect_ratio == "pad":
            pads.add(str(path.relative_to(RECIPES).with_suffix("")))
    assert pads >= {"skip-vision/sft_100_156", "skip-vision/sft_256_320", "skip-vision/vicuna_64_156"}
    second = {
        str(path.relative_to(RECIPES).with_suffix(""))
        for folder in RECIPES.glob("llava-1.5-*")
        for path in folder.glob("sft_*.yaml")
    }
    assert second
    assert pads >= second
    assert not {name for name in pads if name.endswith("pretrain") or "hd" in name}
