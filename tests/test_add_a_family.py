"""docs/add-a-family.md, followed from scratch: the page's family, held against every invariant."""

import re
from pathlib import Path

import family_tester as tester
import pytest
import transformers
from family_models import PATCH, Tiny, finish, siglip_options, special_ids, text_options, tokenizer_with

from saccade import families
from saccade.tiny.vocabulary import IMAGE

PAGE = Path(__file__).resolve().parent.parent / "docs" / "add-a-family.md"


def build_vipllava():
    """VIP-LLaVA: 32 px, 8 x 8 tokens, features of both layers of its tower."""
    tokenizer = tokenizer_with({"image_token": IMAGE}, IMAGE)
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
def case():
    assert "vipllava" not in families.list_families()
    (code,) = [
        block for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "Family(" in block
    ]
    exec(compile(code, str(PAGE), "exec"), {"__name__": "page"})
    yield tester.Case("vipllava", Tiny(build_vipllava, transformers.VipLlavaForConditionalGeneration))
    families._FAMILIES.pop("vipllava")


@pytest.mark.parametrize("reducer", ["divprune", "avgpool", "fastervlm"])
@pytest.mark.parametrize(
    "check",
    [
        tester.check_ratio_zero,
        tester.check_original_equals_masked,
        tester.check_cached_generation,
        tester.check_batch_equals_one_by_one,
        tester.check_several_sequences,
        tester.check_padding_sides,
        tester.check_gradients,
    ],
    ids=lambda check: check.__name__.removeprefix("check_"),
)
def test_the_page_s_family(case, check, reducer):
    check(case, reducer)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_it_trains(case, lora, tmp_path):
    tester.check_training(case, "divprune", tmp_path, lora)
