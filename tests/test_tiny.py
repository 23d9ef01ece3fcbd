import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from experiments.tiny_checkpoint.__main__ import main, pretrain
from experiments.tiny_checkpoint.text import IGNORED, conversation, score_text, text_batch
from experiments.tiny_checkpoint.tower import probe_tower
from saccade.data import digit_scenes
from saccade.tiny import build_tiny_llava, build_tiny_processor, load_tiny, save_tiny, tiny_checkpoint

ROOT = Path(__file__).resolve().parent.parent
# What the weights must reach on validation digits and held-out text; docs/digit-scenes.md has what they do reach.
TOWER_THRESHOLDS = {"digit_accuracy": 0.95, "distractor_accuracy": 0.95, "position_r2": 0.85, "cls_presence": 0.95}
TEXT_THRESHOLD = 0.9


@pytest.fixture(scope="module")
def processor():
    return build_tiny_processor()


def _collate(processor, rows):
    return DataCollatorForVisionLanguageModeling(processor, assistant_only_loss=True)(rows)


def test_stock_classes_take_a_batch_of_every_kind(processor):
    model = build_tiny_llava(processor)
    assert type(model) is LlavaForConditionalGeneration
    dataset = digit_scenes("sft", "train", 6, kinds=["two_images", "text_only", "read", "multi_turn"])
    batch = _collate(processor, [dataset[i] for i in range(6)])
    visual = (batch["input_ids"] == model.config.image_token_id).sum()
    assert visual == 144 * len(batch["pixel_values"])
    assert model(**batch).loss.isfinite()
    features = model.get_image_features(batch["pixel_values"]).pooler_output
    assert [tuple(image.shape) for image in features] == [(144, 96)] * len(batch["pixel_values"])


def test_labels_are_the_answers_and_nothing_else(processor):
    for row in digit_scenes("sft", "train", 150):
        batch = _collate(processor, [row])
        assert processor.tokenizer.unk_token_id not in batch["input_ids"]
        labels = batch["labels"][0]
        told = processor.tokenizer.decode(labels[labels != -100])
        answers = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
        assert told.split() == " </s> ".join([*answers, ""]).split()


def test_chat_text_is_short(processor):
    rows = digit_scenes("sft", "train", 100, kinds=["count", "relation", "read", "multi_turn"])
    lengths = [(_collate(processor, [row])["input_ids"] != processor.image_token_id).sum().item() for row in rows]
    assert max(lengths) <= 45
    assert sum(lengths) / len(lengths) < 25


def test_generation_prompt_continues_as_training_does(processor):
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "how many digits ?"}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True)
    assert text == "<s><user>image <image> how many digits ?<assistant>"


def test_any_image_is_taken(processor):
    for size, mode in (((300, 200), "RGB"), ((40, 70), "L"), ((96, 96), "RGBA")):
        inputs = processor(images=Image.new(mode, size).convert("RGB"), text="image <image>", return_tensors="pt")
        assert inputs["pixel_values"].shape == (1, 3, 96, 96)


def test_same_seed_same_weights_and_global_state_untouched(processor):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, again, other = (build_tiny_llava(processor, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_saved_folder_loads_with_stock_classes(processor, tmp_path):
    model = build_tiny_llava(processor, seed=5)
    folder = save_tiny(model, processor, save_tiny(model, processor, tmp_path / "m"))
    loaded, report = LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    again = AutoProcessor.from_pretrained(folder)
    assert [name.name for name in tmp_path.iterdir()] == ["m"]
    row = digit_scenes("sft", "train", 1, kinds=["where"])[0]
    batch, same = _collate(processor, [row]), _collate(again, [row])
    assert all(torch.equal(batch[name], same[name]) for name in batch)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, loaded(**same).logits, atol=1e-2, rtol=0)


def test_text_worlds_follow_the_chat_template(processor):
    for seed in range(40):
        world, turns = conversation(random.Random(seed))
        messages = []
        for number, (_, (question, answer)) in enumerate(turns):
            asked = f"{world} {question}".strip() if number == 0 else question
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        encoded = processor.tokenizer.apply_chat_template(
            messages, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
        )
        ids, labels = text_batch([(world, turns)], processor.tokenizer)
        assert torch.equal(ids, encoded["input_ids"])
        assert torch.equal(labels != IGNORED, torch.as_tensor(encoded["assistant_masks"]).bool().view_as(labels))


@pytest.mark.slow
def test_shipped_weights_are_small_and_good():
    model, processor = load_tiny()
    assert sum(file.stat().st_size for file in tiny_checkpoint().iterdir()) < 4_000_000
    assert model.dtype == torch.float32
    tower = probe_tower(model.model.vision_tower, processor)
    assert all(tower[name] >= least for name, least in TOWER_THRESHOLDS.items()), tower
    text = score_text(model, processor.tokenizer)
    assert text["all"] >= TEXT_THRESHOLD, text


@pytest.mark.slow
def test_script_writes_a_model_and_a_report(tmp_path, capsys):
    assert main(["--output", str(tmp_path / "tiny"), "--steps", "2", "--threads", "1"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "tiny.json").read_text())
    assert set(TOWER_THRESHOLDS) == set(report["tower"])
    LlavaForConditionalGeneration.from_pretrained(tmp_path / "tiny")


def test_script_names_bad_input(tmp_path):
    with pytest.raises(ValueError, match="tower_steps is -1"):
        pretrain(tmp_path / "tiny", tower_steps=-1, text_steps=1)
    with pytest.raises(SystemExit) as stop:
        main(["--output", str(tmp_path / "tiny"), "--tower-steps", "-1"])
    assert stop.value.code == 2


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_script_reproduces_the_shipped_quality(tmp_path):
    command = [
        sys.executable,
        "-m",
        "experiments.tiny_checkpoint",
        "--output",
        str(tmp_path / "tiny"),
        "--threads",
        "1",
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    report = json.loads((tmp_path / "tiny.json").read_text())
    assert all(report["tower"][name] >= least for name, least in TOWER_THRESHOLDS.items()), report
    assert report["text"]["all"] >= TEXT_THRESHOLD, report
