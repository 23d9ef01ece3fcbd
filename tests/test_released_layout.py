"""Saved weights have the names that released checkpoints have, and stock transformers reads them back as they were."""

import re

import pytest
import torch
from family_models import FAMILIES
from helpers import ORDINARY, make_trainer
from safetensors.torch import load_file

from saccade.families import use_released_names
from saccade.tiny import build_tiny_llava
from saccade.training.export import export_model

LLAMA = r"(embed_tokens|norm|layers\.\d+\.(self_attn|mlp|\w+_layernorm)(\.\w+_(proj|norm))?)\.(weight|bias)"
TRANSFORMER = r"encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12]|layer_norm[12])\.(weight|bias)"
SIGLIP = (
    rf"({TRANSFORMER}|embeddings\.(patch_embedding\.(weight|bias)|position_embedding\.weight)|post_layernorm\.\w+)"
)
CLIP = (
    rf"({TRANSFORMER}|embeddings\.(class_embedding|patch_embedding\.weight|position_embedding\.weight)"
    r"|(pre_layrnorm|post_layernorm)\.(weight|bias))"
)
PROJECTOR = r"multi_modal_projector\.linear_[12]\.(weight|bias)"
QWEN_TOWER = (
    r"(patch_embed\.proj\.(weight|bias)|blocks\.\d+\.(norm[12]|attn\.(qkv|proj)|mlp\.\w+)\.(weight|bias)"
    r"|merger\.(ln_q|mlp\.[02])\.(weight|bias))"
)
QWEN3_TOWER = (
    r"(patch_embed\.proj\.(weight|bias)|pos_embed\.weight|blocks\.\d+\.(norm[12]|attn\.(qkv|proj)|mlp\.\w+)\.(weight|bias)"
    r"|(merger|deepstack_merger_list\.\d+)\.(norm|linear_fc[12])\.(weight|bias))"
)
INTERNVL_TOWER = (
    r"(embeddings\.(cls_token|position_embeddings|patch_embeddings\.projection\.(weight|bias))"
    r"|encoder\.layer\.\d+\.(lambda_[12]|attention\.(q_proj|k_proj|v_proj|projection_layer)\.(weight|bias)"
    r"|(mlp\.fc[12]|layernorm_(before|after))\.(weight|bias)))"
)
RELEASED = {
    # llava-hf/llava-1.5-7b-hf
    "llava": [rf"language_model\.model\.{LLAMA}", rf"vision_tower\.vision_model\.{CLIP}", PROJECTOR],
    # llava-hf/llava-v1.6-vicuna-7b-hf
    "llava_next": [
        rf"language_model\.model\.{LLAMA}",
        rf"vision_tower\.vision_model\.{CLIP}",
        PROJECTOR,
        "image_newline",
    ],
    # llava-hf/llava-onevision-qwen2-7b-ov-hf
    "llava_onevision": [
        rf"language_model\.model\.{LLAMA}",
        rf"vision_tower\.vision_model\.{SIGLIP}",
        PROJECTOR,
        "image_newline",
    ],
    # Qwen/Qwen2-VL-7B-Instruct
    "qwen2_vl": [rf"model\.{LLAMA}", rf"visual\.{QWEN_TOWER}"],
    # Qwen/Qwen2.5-VL-7B-Instruct
    "qwen2_5_vl": [rf"model\.{LLAMA}", rf"visual\.{QWEN_TOWER}"],
    # Qwen/Qwen3-VL-4B-Instruct
    "qwen3_vl": [rf"model\.language_model\.{LLAMA}", rf"model\.visual\.{QWEN3_TOWER}"],
    # OpenGVLab/InternVL3-1B-hf
    "internvl": [
        rf"language_model\.model\.{LLAMA}",
        rf"vision_tower\.{INTERNVL_TOWER}",
        r"multi_modal_projector\.(layer_norm|linear_[12])\.(weight|bias)",
    ],
    # HuggingFaceM4/Idefics3-8B-Llama3
    "idefics3": [
        rf"model\.text_model\.{LLAMA}",
        rf"model\.vision_model\.{SIGLIP}",
        r"model\.connector\.modality_projection\.proj\.weight",
    ],
    # HuggingFaceTB/SmolVLM2-2.2B-Instruct
    "smolvlm": [
        rf"model\.text_model\.{LLAMA}",
        rf"model\.vision_model\.{SIGLIP}",
        r"model\.connector\.modality_projection\.proj\.weight",
    ],
    # google/gemma-3-4b-it
    "gemma3": [
        rf"language_model\.model\.{LLAMA}",
        rf"vision_tower\.vision_model\.{SIGLIP}",
        r"multi_modal_projector\.(mm_input_projection_weight|mm_soft_emb_norm\.weight)",
    ],
}
"""The names of the weights in these checkpoints of the hub, but for the head."""
HEAD = {
    "qwen2_vl": "lm_head",
    "qwen2_5_vl": "lm_head",
    "qwen3_vl": "lm_head",
    "idefics3": "lm_head",
    "smolvlm": "lm_head",
}


def expected_head(name: str) -> str:
    return f"{HEAD.get(name, 'language_model.lm_head')}.weight"


def check_names(name: str, keys: set[str], tied: bool) -> None:
    """Each key is of the released layout, each part of that layout is there, and the head is if it is not tied."""
    assert (expected_head(name) in keys) == (not tied)
    rest = keys - {expected_head(name)}
    patterns = [re.compile(pattern) for pattern in RELEASED[name]]
    assert sorted(key for key in rest if not any(pattern.fullmatch(key) for pattern in patterns)) == []
    assert [pattern.pattern for pattern in patterns if not any(map(pattern.fullmatch, rest))] == []


@pytest.mark.interfaces
@pytest.mark.parametrize("name", FAMILIES)
def test_released_names(name, tmp_path):
    """Once from a configuration, then from the folder that this wrote: what loading met changes nothing."""
    built, _ = FAMILIES[name].build()
    for tied in (True, False):
        built.config.tie_word_embeddings = built.config.get_text_config().tie_word_embeddings = tied
        model = type(built)(built.config)
        for turn in ("first", "again"):
            folder = tmp_path / f"{tied}-{turn}"
            use_released_names(model)
            model.save_pretrained(folder)
            check_names(name, set(load_file(folder / "model.safetensors")), tied)
            loaded, info = type(built).from_pretrained(folder, output_loading_info=True)
            assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
            values = loaded.state_dict()
            assert values.keys() == model.state_dict().keys()
            assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())
            output, embeddings = loaded.get_output_embeddings().weight, loaded.get_input_embeddings().weight
            assert (output is embeddings) == tied
            model = loaded


def test_a_folder_that_stock_transformers_wrote_is_exported_and_trained_on_with_released_names(processor, tmp_path):
    """Its tower's names lack a part; neither the export nor a run that starts there hands that on."""
    build_tiny_llava(processor).save_pretrained(tmp_path / "stock")
    processor.save_pretrained(tmp_path / "stock")
    assert not any("vision_model" in key for key in load_file(tmp_path / "stock" / "model.safetensors"))
    export_model(tmp_path / "stock", tmp_path / "export")
    stock = type(build_tiny_llava(processor)).from_pretrained(tmp_path / "stock")
    options = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, **ORDINARY}
    trainer = make_trainer(stock, processor, tmp_path / "run", **options)
    trainer.train()
    trainer.save_model()
    for folder in ("export", "run", "run/checkpoint-1"):
        check_names("llava", set(load_file(tmp_path / folder / "model.safetensors")), tied=False)
