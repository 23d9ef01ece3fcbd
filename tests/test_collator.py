"""Samples to batches: labels, images, and one clear error for each kind of bad sample."""

from dataclasses import replace
from io import BytesIO

import pytest
import torch
from datasets import Dataset
from family_models import FAMILIES
from helpers import make_trainer
from PIL import Image
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from saccade import SaccadeError
from saccade.data.conversation import place_media
from saccade.data.lengths import TokenCounter, estimate_lengths
from saccade.dualspeed.collator import DualSpeedCollator, prepare_example
from saccade.dualspeed.engines import BLANK_ROW, DummyImageCollator
from saccade.families import get_family
from saccade.images import open_image
from saccade.reducers import PruningConfig


@pytest.mark.interfaces
def test_labels_equal_trl_with_image_labels_masked(collator, scenes):
    rows = [scenes[index] for index in range(12)]
    ours = collator(rows)
    stock = DataCollatorForVisionLanguageModeling(processor=collator.processor, assistant_only_loss=True)
    theirs = stock([dict(row) for row in rows])
    theirs["labels"][theirs["input_ids"] == collator.placeholder_id] = -100
    assert set(ours) == set(theirs)
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name
    assert (ours["labels"] != -100).any(dim=1).all()


def test_labels_are_the_assistants_words_alone(collator, processor, mixed_rows):
    batch = collator(mixed_rows)
    for row, labels in zip(mixed_rows, batch["labels"], strict=True):
        text = processor.decode(labels[labels != -100])
        answers = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
        assert text.split() == " </s> ".join([*answers, ""]).split()


def test_tags_say_where_images_stand(collator, mixed_rows):
    batch = collator(mixed_rows[1:2])
    image = batch["input_ids"][0] == collator.placeholder_id
    starts = (image & ~torch.nn.functional.pad(image, (1, 0))[:-1]).sum()
    assert image.sum() == 288
    assert starts == 2


@pytest.mark.interfaces
def test_prompt_and_completion(collator, mixed_rows):
    rows = [
        {"images": row["images"], "prompt": row["messages"][:-1], "completion": row["messages"][-1:]}
        for row in (mixed_rows[0], mixed_rows[3])
    ]
    batch = replace(collator, assistant_only_loss=False, completion_only_loss=True)(rows)
    assert not (batch["labels"] == collator.placeholder_id).any()
    assert (batch["labels"] != -100).any(dim=1).all()


@pytest.mark.parametrize("name", ["qwen2_5_vl", "internvl", "gemma3"])
def test_prompt_and_completion_as_plain_text(name, tmp_path):
    """As TRL takes them: the text names the model's own placeholders, and is grouped by its length too."""
    model, processor = FAMILIES[name].build()
    place = processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}], tokenize=False)
    image = Image.new("RGB", (32, 16))
    rows = [{"prompt": f"how many {place}", "completion": "2 " * (1 + row), "images": [image]} for row in range(4)]
    trainer = make_trainer(model, processor, tmp_path, rows=Dataset.from_list(rows), max_steps=1, group_by="full")
    batch = trainer.data_collator(rows)
    learned = [processor.tokenizer.decode(ids[ids != -100]) for ids in batch["labels"]]
    assert [text.count("2") for text in learned] == [1, 2, 3, 4]
    assert not any("how" in text for text in learned)
    trainer.train()
    counter = TokenCounter(processor, get_family(model).placeholder_id, PruningConfig(prune_ratio=0.0))
    lengths = estimate_lengths(rows, counter, shortened=False)
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[-1]


@pytest.mark.parametrize("form", ["messages", "prompt", "text"])
def test_a_blank_image_has_the_form_of_the_rows(form):
    """Ranks whose batch is all text need one; nothing is learned from its row."""
    model, processor = FAMILIES["qwen2_5_vl"].build()
    chat = [{"role": "user", "content": "3 plus 4"}, {"role": "assistant", "content": "7"}]
    row = {
        "messages": {"messages": chat, "images": []},
        "prompt": {"prompt": chat[:1], "completion": chat[1:], "images": []},
        "text": {"prompt": "3 plus 4", "completion": "7", "images": []},
    }[form]
    options = {"assistant_only_loss": form == "messages", "completion_only_loss": form != "messages"}
    collator = DualSpeedCollator(processor=processor, placeholder_id=get_family(model).placeholder_id, **options)
    batch = DummyImageCollator(collator, collator.placeholder_id, processor)([row, row])
    blank = (batch["input_ids"] == collator.placeholder_id).any(dim=1)
    assert blank.tolist() == [False, False, True]
    assert batch[BLANK_ROW]
    assert ((batch["labels"] != -100).any(dim=1) == ~blank).all()
    # A row that cannot be used, and is replaced, says nothing of the form.
    lenient = replace(collator, max_bad_records=1)
    words = [column for column in row if column != "images"]
    bad = {**dict.fromkeys(words), "images": []}
    assert (DummyImageCollator(lenient, collator.placeholder_id, processor)([bad, row])["labels"] != -100).any()


def test_max_length_cuts_text_but_never_images(collator, mixed_rows):
    whole = collator(mixed_rows)
    cut = replace(collator, max_length=306)(mixed_rows)
    last_image = int((whole["input_ids"] == collator.placeholder_id).nonzero()[:, 1].max())
    assert last_image < 306 < whole["input_ids"].shape[1]
    assert torch.equal(cut["input_ids"], whole["input_ids"][:, :306])
    with pytest.raises(
        SaccadeError, match=r"sample 0 of the batch: max_length=100 cuts image tokens: .* raise max_length to"
    ):
        replace(collator, max_length=100)(mixed_rows)


def png() -> bytes:
    stream = BytesIO()
    Image.effect_noise((64, 64), 50).save(stream, "PNG")
    return stream.getvalue()


def test_images_as_paths_bytes_and_grey_images(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    for image in (
        str(tmp_path / "a.png"),
        tmp_path / "a.png",
        {"bytes": png(), "path": None},
        {"bytes": None, "path": str(tmp_path / "a.png")},
        Image.new("L", (4, 4)),
    ):
        assert open_image(image).mode == "RGB"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.png", None, "missing.png' does not exist"),
        ("empty.png", b"", "empty.png' is empty, 0 bytes"),
        ("text.png", b"hello", "text.png' is not an image in a supported format"),
        ("cut.png", png()[:900], "cut.png' cannot be decoded"),
    ],
)
def test_bad_images(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SaccadeError, match=message) as error:
        open_image(str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_no_image_at_all():
    with pytest.raises(SaccadeError, match="image is an int"):
        open_image(3)


@pytest.mark.parametrize(
    ("content", "images", "message"),
    [
        ("<image> what ?", 2, r"1 <image> placeholder\(s\) but images has 2"),
        ("<image> <image> what ?", 1, r"2 <image> placeholder\(s\) but images has 1"),
        ([{"type": "text", "text": "what ?"}], 1, r"0 <image> placeholder\(s\) but images has 1"),
    ],
)
def test_tags_that_do_not_match(content, images, message):
    with pytest.raises(SaccadeError, match=message):
        place_media([{"role": "user", "content": content}], images)


def test_images_without_a_user_message():
    with pytest.raises(SaccadeError, match="no user message"):
        place_media([{"role": "assistant", "content": "a"}], 1)


def test_single_image_column():
    example = prepare_example({"image": Image.new("RGB", (8, 8)), "messages": [{"role": "user", "content": "a"}]})
    assert len(example["images"]) == 1
    assert "image" not in example
