"""The words of the embedded task's language, and the tokenizer that splits text into them."""

from collections.abc import Mapping
from types import MappingProxyType

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from saccade.data.questions import COLUMN_WORDS, ROW_WORDS

PAD, START, END, UNKNOWN, IMAGE = "<pad>", "<s>", "</s>", "<unk>", "<image>"
USER, ASSISTANT = "<user>", "<assistant>"
SPECIAL = (PAD, START, END, UNKNOWN, IMAGE, USER, ASSISTANT)

# Digits, every count and every sum of two digits.
NUMBERS = tuple(str(number) for number in range(21))
SENTENCE_WORDS = (
    *("a", "above", "all", "at", "below", "describe", "digit", "digits", "first", "greater", "has", "how", "image"),
    *("is", "leftmost", "many", "maximum", "minimum", "more", "no", "of", "or", "plus", "read", "rightmost", "second"),
    *("sum", "the", "there", "times", "what", "where", "which", "yes", "?", ".", ","),
)
# What one patch shows, as one word: a digit, x for a distractor or _ for background, then the place, chess-like.
CONTENTS = (*"0123456789", "x", "_")
PLACE_CODES = tuple(f"{row}{column}" for row in "abc" for column in "123")
PATCH_WORDS = tuple(content + place for content in CONTENTS for place in PLACE_CODES)

WORDS = (*SPECIAL, *NUMBERS, *ROW_WORDS, *COLUMN_WORDS, *SENTENCE_WORDS, *PATCH_WORDS)

# The generation block marks what `assistant_only_loss` trains on: the answer and its end-of-turn token. It must not
# begin with a space, since transformers only finds the block if its first character belongs to a token.
CHAT_TEMPLATE = (
    "{{ '<s>' }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '<assistant> ' }}"
    "{% generation %}"
    "{% if message['content'] is string %}{{ message['content'] + ' ' }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] + ' ' }}{% endfor %}{% endif %}"
    "{{ '</s>' }}"
    "{% endgeneration %}"
    "{% else %}"
    "{{ '<user>' }}"
    "{% if message['content'] is string %}{{ ' ' + message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ 'image <image>' }}{% else %}{{ ' ' + part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def build_tokenizer(
    specials: Mapping[str, str] = MappingProxyType({"image_token": IMAGE}), image: str = f"image {IMAGE}"
) -> PreTrainedTokenizerFast:
    """A word-level tokenizer over `WORDS`: lower case, split at spaces and punctuation, unknown words to <unk>.

    Args:
        specials: special tokens besides those of a chat, by attribute name; those that are not in `WORDS` are added.
        image: how a chat writes an image.
    """
    if len(set(WORDS)) != len(WORDS):
        raise ValueError("WORDS names a word twice: every word needs one id")
    words = dict.fromkeys([*WORDS, *specials.values()])
    model = WordLevel({word: number for number, word in enumerate(words)}, unk_token=UNKNOWN)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = Lowercase()
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=START,
        eos_token=END,
        unk_token=UNKNOWN,
        extra_special_tokens={"user_token": USER, "assistant_token": ASSISTANT, **specials},
        chat_template=CHAT_TEMPLATE.replace("image <image>", image),
        padding_side="right",
        model_max_length=2048,
    )
