"""docs/add-a-family.md, followed from scratch: the page's family, held against every invariant."""

import re
from pathlib import Path

import pytest
import transformers

from saccade import families
from saccade.testing.families import CHECKS
from saccade.testing.tiny_models import PATCH, build_tokenizer, finish, siglip_options, special_ids, text_options
from saccade.tiny.vocabulary import IMAGE

PAGE = Path(__file__).resolve().parent.parent / "docs" / "add-a-family.md"


def build_vipllava():
    """VIP-LLaVA: 32 px, 8 x 8 tokens, features of both layers of its tower."""
    tokenizer = build_tokenizer({"image_token": IMAGE}, IMAGE)
    vision = {key: value for key, value in siglip_options(32).items() if key != "vision_use_head"}
    config = transformers.VipLlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision),
        text_config=transformers.LlamaConfig(**text_options(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=[-1, -2],
        image_seq_length=64,
        **special_ids(tokenizer),
    )
    image_processor = transformers.CLIPImageProcessorPil(size={"height": 32, "width": 32}, do_center_crop=False)
    processor = transformers.LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )
    return finish(transformers.VipLlavaForConditionalGeneration(config), processor)


@pytest.fixture(scope="module")
def page():
    """The page's family, registered, and the names of its test."""
    assert "vipllava" not in families.list_families()
    names = {"__name__": "page", "build_vipllava": build_vipllava}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), names)
    yield names
    families._FAMILIES.pop(("vipllava", None))


@pytest.mark.parametrize("reducer", ["divprune", "avgpool", "fastervlm"])
@pytest.mark.parametrize("check", CHECKS)
def test_the_page_s_family(page, check, reducer):
    page["test_invariant"](CHECKS[check], reducer)


def test_generation_at_ratio_zero(page):
    page["test_generation_at_ratio_zero"]()


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_it_trains(page, lora, tmp_path):
    page["test_training"](lora, tmp_path)
