"""Training and inference with the stock processors that need torchvision: on videos, clips in, answers out, tokens
pruned per frame; and LFM2-VL's, on images."""

import atexit
import json
import shutil
import tempfile
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("torchvision") is None:
    pytest.skip("torchvision is not installed; `make test-video` has it in a separate venv", allow_module_level=True)

import torch
from family_models import LFM2_SIZES, build_lfm2_vl
from helpers import make_trainer
from transformers import (
    AutoProcessor,
    Lfm2VlForConditionalGeneration,
    Lfm2VlImageProcessor,
    Qwen2_5_VLForConditionalGeneration,
)
from video_files import frame_image, numbers_of, write_clip
from video_models import STOCK, FramesToPatches, build

from saccade.cli.main import main
from saccade.data.clips import with_clips
from saccade.data.mixture import SourceOptions, mix
from saccade.dualspeed.collator import DualSpeedCollator
from saccade.evaluation.digits import collate_prompts
from saccade.evaluation.rows import file_rows
from saccade.families import get_family
from saccade.pruning import prune_inputs
from saccade.reducers import Needs, list_reducers
from saccade.testing import families as tester
from saccade.testing.tiny_models import PATCH, Tiny
from saccade.videos import Sampling, open_video

FRAMES = 6
SHORT = 4
GLM = ("glm4v", "glm46v")
"""Their stock models take no batch that has both images and videos; saccade's passes do."""
SAMPLED = ("divprune", "vispruner")
BY_STOCK = ("ratio zero", "cached generation")
"""Checks that run the stock model on the batch as it is."""


def rows_file(folder, clips_alone: bool = False) -> str:
    """Clips, clips beside images, and text; or without the images."""
    # The first has fewer frames than are taken of the other.
    for number, frames in enumerate((SHORT, 30)):
        write_clip(folder / f"{number}.mp4", frames, rate=10)
    frame_image(3).save(folder / "a.png")
    spoken = [{"from": "human", "value": "<video>\nhow many ?"}, {"from": "gpt", "value": "3"}]
    both = [{"from": "human", "value": "<image> or <video> ?"}, {"from": "gpt", "value": "yes"}]
    rows = [
        {"video": "0.mp4", "conversations": spoken},
        {"video": "1.mp4", "image": "a.png", "conversations": both},
        {"conversations": [{"from": "human", "value": "3 plus 4"}, {"from": "gpt", "value": "7"}]},
        {"video": "1.mp4", "conversations": spoken},
    ]
    if clips_alone:
        rows[1] = {"video": "1.mp4", "conversations": [{"from": "human", "value": "or <video> ?"}, both[1]]}
    path = folder / "rows.json"
    path.write_text(json.dumps(rows * 2))
    return str(path)


@pytest.fixture(params=STOCK)
def name(request) -> str:
    return request.param


@pytest.fixture
def case(name, tmp_path):
    model, processor = build(name, stock=True)
    return model, processor, mix([SourceOptions(rows_file(tmp_path)).open()])


def collate(model, processor, rows, **options):
    placeholder = get_family(model).placeholder_id
    sampling = Sampling(FRAMES)
    collator = DualSpeedCollator(
        processor=processor, placeholder_id=placeholder, assistant_only_loss=True, sampling=sampling, **options
    )
    return collator([rows[index] for index in range(4)])


def test_a_batch(name, case):
    model, processor, rows = case
    batch = collate(model, processor, rows)
    family = get_family(model)
    with torch.no_grad():
        encoded = family.encode(batch)
    counts = family.placeholder(batch["input_ids"]).sum(dim=1)
    assert counts.tolist()[2] == 0
    assert int(counts.sum()) == int(encoded.context.valid.sum())
    # A row of features for each frame, or pair of frames; those of one clip are a group.
    if name in ("internvl", "smolvlm"):  # take frames as images, with text between them
        assert len(encoded.context.group.unique()) == 3 * FRAMES + 1
    else:
        frames = [FRAMES] * 3 if name.startswith("llava") else [SHORT // 2, FRAMES // 2, FRAMES // 2]
        groups = encoded.context.group[torch.tensor(encoded.videos)]
        assert [count for count in torch.bincount(groups).tolist() if count] == frames
    learned = batch["labels"] != -100
    assert not (learned & family.placeholder(batch["input_ids"])).any()
    assert [processor.decode(row[mask]).split()[0] for row, mask in zip(batch["labels"], learned, strict=True)] == [
        *("3", "yes", "7", "3")
    ]


def test_the_frames_are_those_that_we_took(tmp_path):
    """The processor neither chooses other frames nor reorders them."""
    _, processor = build("qwen2_5_vl", stock=True)
    clip = open_video(write_clip(tmp_path / "a.mp4", 20, rate=10), Sampling(FRAMES))
    mine, stock = FramesToPatches(), processor.video_processor
    options = {"do_sample_frames": False, "input_data_format": "channels_last", "video_metadata": [clip.metadata()]}
    given = stock([clip.frames], do_resize=False, do_normalize=False, return_tensors="pt", **options)
    expected = mine([clip.frames], **options)
    assert torch.equal(given["video_grid_thw"], expected["video_grid_thw"])
    torch.testing.assert_close(2 * given["pixel_values_videos"] - 1, expected["pixel_values_videos"])
    assert numbers_of(clip) == [0, 4, 8, 11, 15, 19]


def test_times_stand_before_the_frames_of_qwen3(tmp_path):
    model, processor = build("qwen3_vl", stock=True)
    rows = mix([SourceOptions(rows_file(tmp_path)).open()])
    batch = collate(model, processor, rows)
    clip = open_video(rows[3]["videos"][0], Sampling(FRAMES))
    pairs = [(clip.times[number] + clip.times[number + 1]) / 2 for number in range(0, FRAMES, 2)]
    written = processor.tokenizer.decode(batch["input_ids"][3])
    # The tiny tokenizer knows neither dots nor the word.
    texts = processor.get_text_with_replacements(
        ["<|video_pad|>"], [], [processor.replace_video_token({**stock_output(processor, clip)}, 0)]
    )[0][0]
    assert [f"<{time:.1f} seconds>" in texts for time in pairs] == [True] * 3
    assert written.count("<|vision_start|>") == 3


def stock_output(processor, clip):
    options = {"do_sample_frames": False, "input_data_format": "channels_last", "video_metadata": [clip.metadata()]}
    return processor.video_processor([clip.frames], return_metadata=True, **options)


@pytest.mark.parametrize("padding_free", [False, True])
def test_training(name, case, tmp_path, padding_free):
    """Fast, slow and teacher passes on rows of clips, images and text; the saved model loads with its processor."""
    model, processor, rows = case
    if padding_free and name == "qwen3_5":
        pytest.skip("its layers of linear attention are not packed")
    options = {"padding_free": padding_free, "slow_probability": 0.5, "prune_ratio": 0.75, "video_frames": FRAMES}
    trainer = make_trainer(model, processor, tmp_path / "out", rows=rows, max_steps=4, **options)
    trainer.train()
    modes = {entry["mode"] for entry in trainer.state.log_history if "mode" in entry}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 4
    assert all(0 < loss < 50 for loss in losses), modes
    trainer.save_model()
    loaded = AutoProcessor.from_pretrained(tmp_path / "out")
    assert type(loaded.video_processor) is type(processor.video_processor)
    before, after = collate(model, processor, rows), collate(model, loaded, rows)
    # Loaded with torchvision at hand, it resizes images in another way; Qwen3.5's tokenizer is loaded as its stock
    # class, which splits words in another way.
    same = {"video_grid_thw", "pixel_values_videos"} if name == "qwen3_5" else before.keys() - {"pixel_values"}
    for key in same:
        assert torch.equal(torch.as_tensor(after[key]), torch.as_tensor(before[key])), key


@pytest.mark.parametrize("budget", ["crop", "image", "sample"])
def test_budgets_over_time(name, case, budget):
    model, processor, rows = case
    batch = {key: value for key, value in collate(model, processor, rows).items() if key != "labels"}
    family = get_family(model)
    with torch.no_grad():
        context = family.encode(batch).context
        pruned = prune_inputs(model, batch, reducer="divprune", keep_tokens=2, budget=budget, newlines="drop")
    kept = int(family.placeholder(pruned["input_ids"]).sum())
    units = {"crop": context.shape[0], "image": len(context.group.unique()), "sample": 3}[budget]
    assert kept == 2 * units
    with torch.no_grad():
        assert model(**pruned).logits.isfinite().all()


def test_pruned_answers_at_a_ratio_of_zero_are_the_stock_models(name, case, tmp_path):
    model, processor, rows = case
    if name in GLM:
        batch = {key: value for key, value in collate(model, processor, rows).items() if key != "labels"}
        with pytest.raises(ValueError, match="Image features and image tokens do not match"):
            model(**batch)
        rows = mix([SourceOptions(rows_file(tmp_path, clips_alone=True)).open()])
    batch = {key: value for key, value in collate(model, processor, rows).items() if key != "labels"}
    with torch.no_grad():
        stock = model(**batch).logits
        pruned = prune_inputs(model, batch, prune_ratio=0.0, padding_side="right")
        ours = model(**pruned).logits
    mask = batch["attention_mask"].bool()
    torch.testing.assert_close(ours[pruned["attention_mask"].bool()], stock[mask], rtol=1e-4, atol=1e-4)


def test_from_a_folder_of_clips_to_an_exported_model_in_three_commands(tmp_path, capsys):
    model, processor = build("qwen2_5_vl", stock=True)
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    (tmp_path / "clips").mkdir()
    rows = rows_file(tmp_path / "clips")
    (tmp_path / "run.yaml").write_text(
        f"model: {tmp_path / 'base'}\ndataset: {rows}\noutput_dir: {tmp_path / 'out'}\nvideo_frames: {FRAMES}\n"
        "reducer: changes\nbudget: image\nprune_ratio: 0.75\nslow_probability: 0.5\nmax_steps: 4\n"
        "per_device_train_batch_size: 4\nlearning_rate: 1.0e-3\nuse_cpu: true\nbf16: false\n"
    )
    assert main(["data", "check", str(tmp_path / "run.yaml"), "--output", str(tmp_path / "check.json")]) == 0
    report = json.loads((tmp_path / "check.json").read_text())
    assert (report["bad"], report["videos"], report["frames"], report["images"]) == (0, 6, 2 * SHORT + 4 * FRAMES, 2)
    batch = collate(model, processor, mix([SourceOptions(rows).open()]))
    assert report["tokens"]["full"]["max"] == int(batch["attention_mask"].sum(dim=1).max())

    assert main(["train", str(tmp_path / "run.yaml")]) == 0
    assert main(["eval", str(tmp_path / "out"), "--dataset", rows, "--batch-size", "4"]) == 0
    assert main(["export", str(tmp_path / "out"), "--output", str(tmp_path / "new")]) == 0

    results = json.loads((tmp_path / "out" / "eval.json").read_text())["results"]
    lengths = {result["inference"]: result["mean_prompt_length"] for result in results}
    assert lengths["pruned"] < lengths["pruned_isolator"] < lengths["full"]
    assert {result["samples"] for result in results} == {8}
    assert "8 rows of" in capsys.readouterr().out
    assert "on rows of `rows.json`, by exact match" in (tmp_path / "new" / "README.md").read_text()
    exported = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "new")
    loaded = AutoProcessor.from_pretrained(tmp_path / "new")
    inputs = collate(exported, loaded, mix([SourceOptions(rows).open()]))
    inputs.pop("labels")
    with torch.no_grad():
        pruned = prune_inputs(exported, inputs, tmp_path / "new")
        assert exported(**pruned).logits.isfinite().all()
    assert pruned["input_ids"].shape[1] < inputs["input_ids"].shape[1]


def test_an_answer_is_asked_for_as_it_was_trained(tmp_path):
    """The prompt of an evaluation is the start of the row in training, whether padded left or right."""
    model, processor = build("qwen3_vl", stock=True)
    path = rows_file(tmp_path)
    batch = collate(model, processor, mix([SourceOptions(path).open()]))
    rows = file_rows(path, count=4, sampling=Sampling(FRAMES))
    prompts = collate_prompts(processor, [rows[number] for number in range(4)])
    for number in range(4):
        asked = prompts["input_ids"][number][prompts["attention_mask"][number].bool()].tolist()
        learned = batch["input_ids"][number][batch["attention_mask"][number].bool()].tolist()
        assert learned[: len(asked)] == asked
    assert torch.equal(prompts["pixel_values_videos"], batch["pixel_values_videos"])
    assert rows.select_columns("answer")["answer"][:4] == ["3", "yes", "7", "3"]


class StockCase(tester.Case):
    """Batches of clips, images and text, as the stock processors make them."""

    clips_alone = False

    @cached_property
    def built(self):
        return build(self.name, stock=True)

    @cached_property
    def path(self) -> str:
        folder = Path(tempfile.mkdtemp())
        atexit.register(shutil.rmtree, folder)
        return rows_file(folder, self.clips_alone)

    @cached_property
    def batch(self):
        return dict(collate(self.model, self.processor, mix([SourceOptions(self.path).open()])))

    def prompts(self, rows=range(4)):
        every = file_rows(self.path, sampling=Sampling(FRAMES))
        return dict(collate_prompts(self.processor, [every[row] for row in rows]))


class ClipsAlone(StockCase):
    """The same without images."""

    clips_alone = True


STOCK_CASES = {name: StockCase(name, None) for name in STOCK}
CLIPS_ALONE = {name: ClipsAlone(name, None) for name in GLM}


@pytest.mark.parametrize(
    ("name", "reducer", "check"),
    [
        pytest.param(name, reducer, check, marks=[] if reducer in SAMPLED else pytest.mark.slow)
        for name in STOCK
        for reducer in list_reducers()
        if reducer != "none"
        for check in tester.CHECKS
    ],
)
def test_invariant_with_stock_processors(name, reducer, check):
    """Every invariant that families are held to on images."""
    cases = CLIPS_ALONE if name in GLM and check in BY_STOCK else STOCK_CASES
    tester.CHECKS[check](cases[name], reducer)


@pytest.mark.parametrize("name", GLM)
def test_clips_before_the_tower(name):
    """Patches that repeat are dropped of clips too: what is left are the rows of an encoding of all patches."""
    case = STOCK_CASES[name]
    with torch.no_grad():
        every = case.family.encode(case.inputs).context
        some = case.family.encode(case.inputs, Needs(patch_tolerance=0.05)).context
        whole = case.family.encode(case.inputs, Needs(patch_tolerance=0.05, whole_images=True)).context
    assert some.absent.any()
    assert torch.equal(some.absent, whole.absent)
    assert some.shape == every.shape
    torch.testing.assert_close(whole.features, every.features)
    assert not some.features[some.absent].any()


LFM2 = tester.Case(
    "lfm2_vl",
    Tiny(
        lambda: build_lfm2_vl(Lfm2VlImageProcessor(encoder_patch_size=PATCH, max_tiles=4, **LFM2_SIZES)),
        Lfm2VlForConditionalGeneration,
    ),
)


@pytest.mark.parametrize("check", tester.CHECKS)
def test_invariant_of_lfm2(check):
    """With its own image processor, in whose place other tests have one that needs no torchvision."""
    tester.CHECKS[check](LFM2, "divprune")


def test_images_of_lfm2_are_cut_as_the_other_tests_cut_them():
    plain = tester.Case("lfm2_vl", Tiny(build_lfm2_vl, Lfm2VlForConditionalGeneration))
    for name in ("input_ids", "spatial_shapes", "pixel_attention_mask"):
        assert torch.equal(LFM2.inputs[name], plain.inputs[name]), name


def test_training_of_lfm2(tmp_path):
    tester.check_training(LFM2, "divprune", tmp_path, lora=False)


def test_smolvlms_frames_stand_among_images_in_the_order_of_the_text(tmp_path):
    """Its processor gives frames in place of images; here each text has both, as the model reads them."""
    _, processor = build("smolvlm", stock=True)
    clips = [open_video(write_clip(tmp_path / f"{n}.mp4", 4, rate=10, size=(64, 64)), Sampling(4)) for n in range(2)]
    pair = [frame_image(3, (20, 20)), frame_image(5, (48, 48))]
    texts = ["<video> then <image> <image>", "none", "<image> <video>"]
    frames = processor.video_processor([clip.frames for clip in clips], do_sample_frames=False, return_tensors="pt")
    frames = frames["pixel_values"]
    for splitting, crops in ((True, 5), (False, 1)):
        processor.image_processor.do_image_splitting = splitting
        images = processor.image_processor([[image] for image in pair], return_tensors="pt")["pixel_values"]
        assert images.shape[:2] == (2, crops)
        given = with_clips(processor, clips)(
            images=[pair, [], pair[:1]], text=texts, return_tensors="pt", padding=True
        )
        counts = [4 + 2 * crops, 0, crops + 4]
        tokens = (given["input_ids"] == processor.image_token_id).sum(dim=1)
        assert tokens.tolist() == [processor.image_seq_len * count for count in counts]
        expected = [torch.cat([frames[0], *images]), frames[0, :0], torch.cat([images[0], frames[1]])]
        for pixels, mask, count, rows in zip(
            given["pixel_values"], given["pixel_attention_mask"], counts, expected, strict=True
        ):
            assert torch.equal(pixels[:count], rows)
            assert mask[:count].all()
            assert not pixels[count:].any()
            assert not mask[count:].any()
    processor.video_processor.max_image_size = {"longest_edge": 32}
    with pytest.raises(ValueError, match=r"images are scaled to \(24, 24\) pixels, and its frames to \(32, 32\)"):
        with_clips(processor, clips[:1])(images=[pair[:1]], text=["<image> <video>"], return_tensors="pt")
