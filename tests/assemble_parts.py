"""Tiny random vision towers and language models, as folders that `saccade assemble` takes."""

from pathlib import Path

import torch
import transformers
import trl
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
MISTRAL = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] %}"
    "{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}"
    "{{- bos_token }}{%- for message in loop_messages %}"
    "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('no') }}{%- endif %}"
    "{%- if message['role'] == 'user' %}"
    "{%- if loop.last and system_message is defined %}"
    "{{- '[INST] ' + system_message + '\\n\\n' + message['content'] + '[/INST]' }}"
    "{%- else %}{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}"
    "{%- elif message['role'] == 'assistant' %}{{- ' ' + message['content'] + eos_token }}{%- endif %}{%- endfor %}"
)
"""Mistral's format: no system message of its own, white space at the start of an answer."""

LANGUAGE_MODELS = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}
FORMATS = {
    "llama": (["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"], "llama3"),
    "qwen2": (["<|endoftext|>", "<|im_end|>", "<|im_start|>"], "qwen2_5"),
    "qwen3": (["<|endoftext|>", "<|im_end|>", "<|im_start|>"], "qwen3"),
    "mistral": (["<s>", "</s>"], None),
    "vicuna": (["<s>", "</s>"], None),
}
"""Special tokens, the first of which starts a text and the second ends a turn, and TRL's copy of the template."""


def byte_tokenizer(specials: list[str], template: str | None) -> PreTrainedTokenizerFast:
    """A token for each byte, as Llama 3's and Qwen's tokenizers begin, with the special tokens first."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(BPE({word: number for number, word in enumerate([*specials, *alphabet])}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=specials[1], extra_special_tokens=specials, chat_template=template
    )


def sentence_tokenizer(specials: list[str], template: str | None) -> PreTrainedTokenizerFast:
    """A token for each character, with a mark for spaces and bytes for the rest, as Llama 2's tokenizer begins."""
    characters = ["▁", *(chr(code) for code in range(33, 127))]
    words = ["<unk>", *specials, *(f"<0x{byte:02X}>" for byte in range(256)), *characters]
    core = Tokenizer(
        BPE({word: number for number, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    )
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.post_processor = processors.TemplateProcessing(
        single=f"{specials[0]} $A", pair=f"{specials[0]} $A $B", special_tokens=[(specials[0], 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=specials[0],
        eos_token=specials[1],
        unk_token="<unk>",
        extra_special_tokens=specials,
        chat_template=template,
    )


def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a chat format."""
    specials, copy = FORMATS[name]
    if copy is None:
        return sentence_tokenizer(specials, MISTRAL if name == "mistral" else None)
    tokenizer = byte_tokenizer(specials, (TEMPLATES / f"{copy}.jinja").read_text())
    if name == "llama":
        tokenizer.bos_token = specials[0]
    return tokenizer


def make_language_model(folder: Path, name: str, tied: bool = False, rows: int | None = None) -> Path:
    """A language model of two layers; `rows` of embeddings, or one for each token."""
    tokenizer = tokenizer_of(name)
    config_class, model_class = LANGUAGE_MODELS["llama" if name == "vicuna" else name]
    config = config_class(
        vocab_size=rows or len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=2048,
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = model_class(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_tower(folder: Path, kind: str = "clip_vision_model", size: int = 32, patch: int = 8, **options) -> Path:
    """A tower of three layers; the kinds "clip" and "siglip" also have a text model."""
    shared = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    vision = {**shared, "num_hidden_layers": 3, "image_size": size, "patch_size": patch, **options}
    text = {**shared, "num_hidden_layers": 1, "vocab_size": 50}
    clip = kind.startswith("clip")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        if kind == "clip":
            model = transformers.CLIPModel(transformers.CLIPConfig(vision_config=vision, text_config=text))
        elif kind == "siglip":
            model = transformers.SiglipModel(transformers.SiglipConfig(vision_config=vision, text_config=text))
        elif clip:
            model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**vision))
        else:
            model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**vision))
    model.save_pretrained(folder)
    images = (
        transformers.CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
        if clip
        else transformers.SiglipImageProcessorPil(size={"height": size, "width": size})
    )
    images.save_pretrained(folder)
    return folder
