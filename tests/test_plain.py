"""`conversation: plain`, LLaVA's stage one: image, caption and line break; no roles, no instruction."""

import json

import pytest
import yaml
from assemble_parts import tokenizer_of
from PIL import Image
from transformers import CLIPImageProcessorPil, LlavaProcessor

from saccade import SaccadeError
from saccade.cli.main import main
from saccade.data.lengths import TokenCounter, row_text
from saccade.dualspeed import DualSpeedCollator
from saccade.errors import RecordError
from saccade.recipes import RECIPES
from saccade.reducers import PruningConfig
from saccade.tokens import IGNORE_INDEX
from saccade.training import ModelOptions, load_rows
from saccade.training.chat_format import make_template

CAPTIONS = ("A cat on a sofa.", "two dogs")
STARTS = {"vicuna": "<s>", "qwen2": "", "llama": ""}


def processor_of(name):
    tokenizer = tokenizer_of(name)
    tokenizer.add_tokens("<image>", special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=make_template(tokenizer, "own", "<image>").text,
    )


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """LLaVA's rows, with the image before and after the instruction."""
    folder = tmp_path_factory.mktemp("plain")
    Image.new("RGB", (20, 30)).save(folder / "a.png")
    asked = ("<image>\nDescribe it briefly.", "What is this?\n<image>")
    turns = [
        [{"from": "human", "value": q}, {"from": "gpt", "value": a}] for q, a in zip(asked, CAPTIONS, strict=True)
    ]
    (folder / "data.json").write_text(json.dumps([{"image": "a.png", "conversations": two} for two in turns]))
    return folder / "data.json"


@pytest.mark.parametrize("name", STARTS)
def test_a_row_is_image_caption_and_line_break(rows, name):
    processor = processor_of(name)
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    collator = DualSpeedCollator(
        processor, placeholder_id=image, assistant_only_loss=True, completion_only_loss=None, conversation="plain"
    )
    loaded = list(load_rows(ModelOptions(dataset=str(rows))))
    batch = collator(loaded)
    counter = TokenCounter(processor, image, PruningConfig(prune_ratio=0.5), conversation="plain")
    for row, caption in enumerate(CAPTIONS):
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist()
        words = processor.tokenizer(f"{STARTS[name]}<image>{caption}\n", add_special_tokens=False)["input_ids"]
        assert [token for token in ids if token != image] == [token for token in words if token != image]
        assert ids.count(image) == 16
        learned = [token for token in batch["labels"][row].tolist() if token != IGNORE_INDEX]
        # All that follows the image.
        assert learned == ids[ids.index(image) + 16 :]
        assert processor.tokenizer.decode(learned).strip(" ") == f"{caption}\n"
        full, shortened = counter.lengths(counter.text_tokens(row_text(loaded[row])), [(20, 30)])
        assert (full, shortened) == (len(ids), len(ids) - 8)


@pytest.mark.parametrize(
    ("said", "images"), [(("a", "b", "c", "d"), 1), (("a", "b"), 0)], ids=["two answers", "no image"]
)
def test_what_is_not_a_caption_is_a_bad_record(said, images):
    spoken = [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(said)]
    collator = DualSpeedCollator(processor_of("qwen2"), conversation="plain")
    with pytest.raises(RecordError, match=f"{images} image\\(s\\), 0 video\\(s\\) and {len(said) // 2} answers"):
        collator([{"messages": spoken, "images": [Image.new("RGB", (16, 16))] * images}])


def test_an_unknown_conversation_is_refused(capsys):
    assert main(["train", "tiny-digits/pretrain", "--conversation", "free"]) == 2
    assert "conversation='free' is unknown: use one of chat, plain" in capsys.readouterr().err
    with pytest.raises(SaccadeError, match="conversation='free'"):
        DualSpeedCollator(processor_of("qwen2"), conversation="free")(
            [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "images": []}]
        )


def test_stage_one_trains_on_it(rows, tmp_path, capsys):
    flags = [
        "--dataset",
        str(rows),
        "--max_steps",
        "2",
        "--per_device_train_batch_size",
        "2",
        "--disable_tqdm",
        "true",
    ]
    flags += ["--conversation", "plain", "--save_strategy", "no", "--output_dir", str(tmp_path / "out")]
    assert main(["train", "tiny-digits/pretrain", *flags]) == 0
    log = json.loads((tmp_path / "out" / "log.json").read_text())
    assert log["recipe"]["conversation"] == "plain"
    assert log["log_history"][-1]["train_loss"] > 0
    assert main(["data", "check", str(rows), "--model", "tiny", "--output", str(tmp_path / "check.json")]) == 0


def test_the_recipes_of_stage_one_are_plain_and_no_other():
    for path in RECIPES.rglob("*.yaml"):
        first = "pretrain" in path.stem and path.parent.name != "tiny-digits"
        assert (yaml.safe_load(path.read_text()).get("conversation") == "plain") == first, path
