"""The user's bare words, out of what the stock chat templates of all families make of a conversation."""

import logging

import pytest
from chat_templates import STOCK, tokenizer_like

from saccade.errors import SaccadeError
from saccade.families import question
from saccade.families.question import Reader, load_reader, models_reader
from saccade.tiny import build_tiny_processor

IMAGES = (
    "<image>",
    "<video>",
    "<IMG_CONTEXT>",
    "<|vision_start|>",
    "<|image_pad|>",
    "<|vision_end|>",
    "<|video_pad|>",
)
SPECIALS = {f"{number}_token": word for number, word in enumerate((*IMAGES, "<start_of_image>", "<|begin_of_text|>"))}
FIRST = "How many cats are there, and what do they do?"
SUFFIX = "\nAnswer the question using a single word or phrase."
SYSTEM = "A chat between a user and an assistant. The assistant gives answers."


def text(role: str, words: str, image: bool = False) -> dict:
    return {"role": role, "content": [*[{"type": "image"}] * image, {"type": "text", "text": words}]}


@pytest.mark.parametrize("kind", ["llama", "bytes"])
@pytest.mark.parametrize("name", STOCK)
class TestStockTemplates:
    @pytest.fixture
    def tokenizer(self, name, kind):
        return tokenizer_like(kind, STOCK[name])(SPECIALS, "<image>")

    @staticmethod
    def read(tokenizer, messages: list[dict], answered: bool = False) -> list[str]:
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=not answered)
        return Reader.of(tokenizer).questions(tokenizer(prompt, add_special_tokens=False)["input_ids"])

    def test_one_turn_and_several(self, tokenizer):
        asked = text("user", FIRST + SUFFIX, image=True)
        assert self.read(tokenizer, [asked]) == [FIRST]
        answered = [asked, text("assistant", "There are 2 cats, both asleep.")]
        assert self.read(tokenizer, [*answered, text("user", "And where?")]) == [FIRST, "And where?"]
        assert self.read(tokenizer, answered, answered=True) == [FIRST]

    def test_with_a_system_prompt(self, tokenizer, name):
        if name == "llava_next_mistral":
            pytest.skip("its template has no system message")
        messages = [text("system", SYSTEM), text("user", FIRST, image=True)]
        if name == "gemma3":  # writes it into the first turn
            assert self.read(tokenizer, messages) == [f"{SYSTEM} {FIRST}"]
        else:
            assert self.read(tokenizer, messages) == [FIRST]

    def test_what_the_template_did_not_write_is_all_the_users(self, tokenizer):
        reader = Reader.of(tokenizer)
        ids = tokenizer(f"<image>\n{FIRST}{SUFFIX}", add_special_tokens=False)["input_ids"]
        assert reader.questions(ids) == [FIRST]
        assert reader.questions(tokenizer("<image>", add_special_tokens=False)["input_ids"]) == []


def test_the_embedded_tasks_template():
    """Lower-cased word by word, with a word of the template's own before an image."""
    processor = build_tiny_processor()
    talk = [text("user", "How many digits?", image=True), text("assistant", "2"), text("user", "what is the sum?")]
    prompt = processor.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    ids = processor.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert Reader.of(processor).questions(ids) == ["how many digits ?", "what is the sum ?"]


def test_readers_are_found_in_folders(tmp_path, caplog):
    processor = build_tiny_processor()
    for kept, folder in ((processor, tmp_path / "processor"), (processor.tokenizer, tmp_path / "tokenizer")):
        kept.save_pretrained(folder)
        assert load_reader(str(folder)).turn is not None
    bare = build_tiny_processor().tokenizer
    bare.chat_template = None
    bare.save_pretrained(tmp_path / "bare")
    assert load_reader(str(tmp_path / "bare")).turn is None
    processor.image_processor.save_pretrained(tmp_path / "images")
    for name in ("nothing", "images"):
        with pytest.raises(SaccadeError, match=rf"tokenizer=.*{name}.*no tokenizer could be read"):
            load_reader(str(tmp_path / name))
    question.models_reader.cache_clear()
    with caplog.at_level(logging.WARNING):
        for folder, why in (
            ("", "not loaded from a folder"),
            (str(tmp_path / "nothing"), "no tokenizer could be read"),
        ):
            caplog.clear()
            for _ in range(2):
                assert models_reader(folder) is None
            (record,) = caplog.records
            assert why in record.getMessage()
            assert "option 'tokenizer'" in record.getMessage()
