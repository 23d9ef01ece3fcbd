"""The stock chat templates of all families, and tokenizers like those that they were written for.

Those that TRL ships are read from it. The others are written out as the models' public repositories have them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import trl
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

IMAGES_FIRST = (
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
)
TEXT_NEXT = "{# Render all text next #}{% if message['role'] != 'assistant' %}"
EACH_TEXT = "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"

# llava-hf/llava-1.5-7b-hf, and llava-hf/llava-v1.6-vicuna-7b-hf: answers are marked, and nothing ends them.
VICUNA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    + IMAGES_FIRST
    + "{{ '<image>\n' }}{% endfor %}"
    + TEXT_NEXT
    + EACH_TEXT
    + "{{ content['text'] + ' '}}{% endfor %}{% else %}"
    + EACH_TEXT
    + "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

# llava-hf/llava-onevision-qwen2-7b-ov-hf: the end stands outside the marks, and the generation prompt lacks a space
# that a written answer has before its newline.
ONEVISION = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
    + IMAGES_FIRST
    + "{{ '<image>' }}{% endfor %}"
    "{# Render all video then #}{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}"
    "{{ '<video>' }}{% endfor %}"
    + TEXT_NEXT
    + EACH_TEXT
    + "{{ '\n' + content['text'] }}{% endfor %}{% else %}"
    + EACH_TEXT
    + "{% generation %}{{ '\n' + content['text'] }}{% endgeneration %}{% endfor %}{% endif %}{{'<|im_end|>'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# OpenGVLab/InternVL3-1B-hf: no marks.
INTERNVL = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
    "{% elif content['type'] == 'video' %}{{ '<video>\n' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{'<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)


def shipped(name: str) -> str:
    """A template that TRL ships."""
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()


@dataclass(frozen=True)
class Stock:
    """The chat format of a family's released models.

    Args:
        family: its `model_type`.
        template: the stock chat template.
        end: the token that ends a turn.
        start: the token that starts a text.
        eos: the tokenizer's own end token, where it is another one.
    """

    family: str
    template: str
    end: str
    start: str = "<s>"
    eos: str | None = None


STOCK = {
    "llava": Stock("llava", VICUNA, "</s>"),
    "llava_next_vicuna": Stock("llava_next", VICUNA, "</s>"),
    "llava_next_mistral": Stock("llava_next", shipped("llava_next"), "</s>"),
    "llava_onevision": Stock("llava_onevision", ONEVISION, "<|im_end|>"),
    "qwen2_vl": Stock("qwen2_vl", shipped("qwen2_5_vl"), "<|im_end|>"),
    "qwen2_5_vl": Stock("qwen2_5_vl", shipped("qwen2_5_vl"), "<|im_end|>"),
    "qwen3_vl": Stock("qwen3_vl", shipped("qwen3_vl"), "<|im_end|>"),
    "internvl": Stock("internvl", INTERNVL, "<|im_end|>"),
    "idefics3": Stock("idefics3", shipped("idefics3"), "<end_of_utterance>", "<|begin_of_text|>"),
    "smolvlm": Stock("smolvlm", shipped("smolvlm"), "<end_of_utterance>", "<|im_start|>"),
    "gemma3": Stock("gemma3", shipped("gemma3"), "<end_of_turn>", "<bos>", "<eos>"),
}

CORPUS = (
    "system user assistant USER: ASSISTANT: User: Assistant: model [INST] [/INST] You are a helpful assistant.",
    "What is in this picture? Where is the cat? How many cats are there, and what do they do? Is it 3 or 12?",
    "A cat sits on the mat. Two cats, both asleep. There are 12 of them; on the left a dog is looking at them!",
)
MARKERS = ("<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<end_of_utterance>")


@cache
def _core(kind: str) -> str:
    """A small tokenizer without special tokens, as JSON."""
    if kind == "llama":
        core = Tokenizer(BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        core.pre_tokenizer = pre_tokenizers.Metaspace()
        alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=["<unk>", *alphabet], show_progress=False)
        core.train_from_iterator(CORPUS, trainer)
        # As in Llama's own file: a space is put before each stretch of text between special tokens.
        core.pre_tokenizer = None
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        core.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(content=" ", left=1),
            ]
        )
        return core.to_str()
    core = Tokenizer(BPE())
    pattern = r"'s|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.post_processor = processors.ByteLevel(trim_offsets=True)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator([*CORPUS, "\n\n".join(CORPUS)] * 2, trainer)
    return core.to_str()


def tokenizer_like(kind: str, stock: Stock) -> Callable[[Mapping[str, str], str], PreTrainedTokenizerFast]:
    """A replacement for `family_models.build_tokenizer`.

    Args:
        kind: "llama", a SentencePiece model with byte fallback, or "bytes", byte-level pairs as GPT-2 and Qwen have.
        stock: whose special tokens it has.
    """

    def build(specials: Mapping[str, str], image: str) -> PreTrainedTokenizerFast:
        core = Tokenizer.from_str(_core(kind))
        eos = stock.eos or stock.end
        words = dict.fromkeys(["<pad>", "<unk>", stock.start, eos, *MARKERS, *specials.values()])
        core.add_special_tokens([AddedToken(word, normalized=False, special=True) for word in words])
        if kind == "llama":
            start = (stock.start, core.token_to_id(stock.start))
            core.post_processor = processors.TemplateProcessing(
                single=f"{start[0]} $A", pair=f"{start[0]} $A {start[0]} $B", special_tokens=[start]
            )
        return PreTrainedTokenizerFast(
            tokenizer_object=core,
            pad_token="<pad>",
            bos_token=stock.start,
            eos_token=eos,
            unk_token="<unk>",
            extra_special_tokens=dict(specials),
            chat_template=stock.template,
            padding_side="right",
            model_max_length=2048,
        )

    return build
