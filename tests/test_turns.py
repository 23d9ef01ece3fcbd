"""Models learn to stop: of every stock chat template the answers and their ends are learned, and nothing else."""

import json
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import family_models
import pytest
import torch
from chat_templates import STOCK, VICUNA, shipped, tokenizer_like
from datasets import Dataset
from family_models import FAMILIES
from helpers import ORDINARY, losses, make_trainer
from tokenizers.processors import TemplateProcessing
from transformers.utils.chat_template_utils import render_jinja_template

from saccade import SaccadeError
from saccade.cli.main import main
from saccade.data.lengths import TokenCounter
from saccade.data.plain import PlainWriter
from saccade.data.turns import TurnWriter, with_places
from saccade.dualspeed.collator import DualSpeedCollator
from saccade.dualspeed.labels import check_turns, stop_ids
from saccade.errors import RecordError
from saccade.evaluation.digits import collate_prompts
from saccade.families import get_family
from saccade.reducers import PruningConfig
from saccade.serving.requests import vllm_request
from saccade.testing.tiny_models import noise_image

QUESTIONS = ("What is in this picture?", "Where is the cat?", "How many cats are there?")
WRITES_START = ("idefics3", "smolvlm", "gemma3")
"""Whose chat templates write the token that starts a text themselves."""
ANSWERS = ("A cat sits on the mat.", "12", "Two cats,\n\nboth asleep — naïve, of course!")


def talk(*texts: str) -> list[dict]:
    return [{"role": "assistant" if number % 2 else "user", "content": text} for number, text in enumerate(texts)]


def turns(count: int, tags: str = "") -> list[dict]:
    pairs = zip((tags + QUESTIONS[0], *QUESTIONS[1:]), ANSWERS, strict=True)
    return talk(*(text for pair in list(pairs)[:count] for text in pair))


@pytest.fixture
def build(monkeypatch):
    def of(name, kind):
        """Model, processor and collator with a stock template."""
        stock = STOCK[name]
        monkeypatch.setattr(family_models, "build_tokenizer", tokenizer_like(kind, stock))
        model, processor = FAMILIES[stock.family].build()
        tokenizer = processor.tokenizer
        if stock.eos:
            model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids([stock.eos, stock.end])
        collator = DualSpeedCollator(
            processor=processor,
            assistant_only_loss=True,
            completion_only_loss=True,
            placeholder_id=get_family(model).placeholder_id,
            stop_ids=stop_ids(model.generation_config, tokenizer),
        )
        return model, processor, collator

    return of


def learned(collator, labels) -> list[str]:
    """Each stretch of learned tokens as text."""
    stretches = groupby(labels.tolist(), lambda label: label != -100)
    return [collator.processor.tokenizer.decode(list(part)).strip() for is_learned, part in stretches if is_learned]


def stock_prompt(processor, messages: list[dict], shown: list) -> list[int]:
    """The tokens that transformers itself makes of a conversation that asks for an answer."""
    left = iter(shown)
    parts = [
        {
            **message,
            "content": [
                {**part, "image": next(left)} if part["type"] == "image" else part for part in message["content"]
            ],
        }
        for message in messages
    ]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return processor.apply_chat_template(parts, **options)["input_ids"][0].tolist()


def images(*sizes: tuple[int, int]) -> list:
    return [noise_image(*size, seed) for seed, size in enumerate(sizes)]


@pytest.mark.interfaces
@pytest.mark.parametrize("kind", ["llama", "bytes"])
@pytest.mark.parametrize("name", STOCK)
def test_answers_and_their_ends_are_learned(name, kind, build):
    """In `messages`, in `prompt` and `completion`, and over several turns, in batches with rows of other lengths."""
    _, processor, collator = build(name, kind)
    check_turns(collator)
    end = STOCK[name].end
    several = talk(QUESTIONS[0] + "<image>", ANSWERS[0], QUESTIONS[1] + "<image>", ANSWERS[1])
    split = turns(2)
    rows = [
        {"images": [], "messages": turns(3)},
        {"images": images((32, 16)), "messages": turns(1)},
        {"images": images((24, 24), (16, 32)), "messages": several},
        {"images": images((32, 32)), "messages": [*turns(1), *talk("And now?")]},
        {"images": images((32, 16)), "prompt": split[:3], "completion": split[3:]},
        {"images": [], "prompt": split[:1], "completion": split[1:2]},
    ]
    batch = collator(rows)
    expected = [ANSWERS, ANSWERS[:1], ANSWERS[:2], ANSWERS[:1], ANSWERS[1:2], ANSWERS[:1]]
    assert [learned(collator, labels) for labels in batch["labels"]] == [[a + end for a in row] for row in expected]
    end_id = processor.tokenizer.convert_tokens_to_ids(end)
    assert (batch["labels"] == end_id).sum(dim=1).tolist() == [len(answers) for answers in expected]
    for row, ids, labels in zip(rows, batch["input_ids"], batch["labels"], strict=True):
        alone = collator([row])
        width = alone["labels"].shape[1]
        assert torch.equal(labels[:width], alone["labels"][0])
        assert (labels[width:] == -100).all()
        # What comes before the first answer is what generate sees when it is asked for it. LLaVA-OneVision gives an
        # image fewer tokens where another one comes later.
        if len(row["images"]) < 2:
            asked = with_places(row["prompt"] if "prompt" in row else row["messages"][:1], len(row["images"]))
            seen = stock_prompt(processor, asked, row["images"])
            start = int((labels != -100).nonzero()[0])
            assert ids[:start].tolist() == seen
            assert seen[:2].count(processor.tokenizer.bos_token_id) == (kind == "llama" or name in WRITES_START)


@pytest.mark.parametrize("name", STOCK)
def test_the_page_of_families_says_what_is_learned(name, build):
    _, processor, collator = build(name, "bytes")
    stock = STOCK[name]
    messages = with_places(talk("How many?", "12"), 0)
    (text,), (spans,) = render_jinja_template(
        [messages], chat_template=stock.template, return_assistant_tokens_mask=True
    )
    marked = [text[slice(*span)] for span in spans]
    written = TurnWriter(processor, collator.stop_ids).write({"messages": messages})
    cells = [[written.text[slice(*part)] for part in written.learned], marked]
    learned, marked = (f"`{json.dumps(texts[0])}`".replace("|", r"\|") if texts else "nothing" for texts in cells)
    model = name.removeprefix(stock.family).strip("_").capitalize()
    page = (Path(__file__).parent.parent / "docs" / "families.md").read_text()
    assert f"| `{stock.family}`{model and f' with {model}'} | {marked} | {learned} |" in page.splitlines()


@pytest.mark.parametrize("name", ["llava_next_mistral", "qwen2_5_vl", "qwen3_vl", "idefics3", "smolvlm", "gemma3"])
def test_training_templates_teach_what_the_stock_ones_do(name, build):
    """Those that TRL ships have marks, some of which include the newline after the end; they are not needed."""
    _, _, collator = build(name, "bytes")
    row = {"images": images((32, 16)), "messages": turns(2)}
    expected = collator([row])
    marked = shipped(f"{name.removesuffix('_mistral')}_training")
    assert "generation" in marked
    for batch in (replace(collator, chat_template=marked)([row]), _with_template(collator, marked)([row])):
        for key, value in expected.items():
            assert torch.equal(batch[key], value), key


def _with_template(collator, template):
    collator.processor.chat_template = template
    return collator


@pytest.mark.parametrize("name", STOCK)
def test_a_plain_caption_is_learned_whatever_the_template_writes_for_an_image(name, build):
    """Also beside an image in several tiles, between which processors write line breaks, and one that ends in some."""
    _, processor, collator = build(name, "bytes")
    plain = replace(collator, conversation="plain")
    captions = ("a cat", "a\ncat\n", " two dogs\n\n")
    for caption in captions:
        rows = [{"images": images(size), "messages": talk("say <image>", caption)} for size in ((32, 16), (64, 64))]
        batch = plain(rows)
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            assert (
                processor.tokenizer.decode(labels[labels != -100]).strip(" ") == caption.strip("\n").strip(" ") + "\n"
            )
            assert (ids == collator.placeholder_id).any()


def test_a_template_without_a_place_for_images_is_refused(build):
    _, processor, collator = build("qwen2_5_vl", "bytes")
    processor.chat_template = "{% for m in messages %}{{ m['content'] | map(attribute='text') | join }}{% endfor %}"
    with pytest.raises(RecordError, match=r"prints .* for images, which is no token"):
        replace(collator, conversation="plain")(
            [{"images": images((32, 16)), "messages": talk("say <image>", "a cat")}]
        )


def test_plain_texts_get_their_end(build):
    _, _, collator = build("llava", "llama")
    row = {"prompt": "USER: <image>\nWhere? ASSISTANT:", "completion": " on the mat.", "images": images((32, 32))}
    batch = collator([row, row | {"completion": " 12"}])
    assert [learned(collator, labels) for labels in batch["labels"]] == [["on the mat.</s>"], ["12</s>"]]
    with pytest.raises(RecordError, match=r"'</s>' is in an answer.*remove it"):
        collator([row | {"completion": " on the mat.</s>"}])
    with pytest.raises(RecordError, match="differ in kind"):
        collator([row | {"completion": talk("a", "b")[1:]}])


def test_a_text_starts_once_whoever_writes_the_start(build):
    """A plain text may have its own start, beside rows of a chat template that leaves it to the tokenizer."""
    _, processor, collator = build("llava", "llama")
    begins, chat = {"text": "<s>USER: a cat"}, {"messages": turns(1), "images": []}
    alone = [collator([row])["input_ids"][0] for row in (begins, chat, {"text": "USER: a cat"})]
    start = processor.tokenizer.bos_token_id
    assert [(ids == start).nonzero().flatten().tolist() for ids in alone] == 3 * [[0]]
    both = collator([begins, chat])
    assert both["input_ids"][0][both["attention_mask"][0] == 1].tolist() == alone[0].tolist()
    assert both["input_ids"][1][both["attention_mask"][1] == 1].tolist() == alone[1].tolist()
    assert learned(collator, both["labels"][1]) == [ANSWERS[0] + "</s>"]


def test_a_tokenizer_that_ends_texts_too_ends_no_prompt(build):
    """As Llama's with `add_eos_token`. Captions without a chat template begin with the start token all the same."""
    _, processor, _ = build("llava", "llama")
    tokenizer = processor.tokenizer
    ends = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    row = {"messages": turns(1), "images": images((32, 32))}
    assert collate_prompts(processor, [row])["input_ids"][0, -1] != tokenizer.eos_token_id
    assert PlainWriter(processor).write(row).text.startswith("<s><image>")


@pytest.mark.parametrize("template", [VICUNA, "{{ bos_token }}" + VICUNA], ids=["tokenizer", "template"])
def test_what_asks_a_model_starts_as_its_training_does(template, build):
    """Evaluation, requests to an engine and counted lengths, whether tokenizer or template writes the start."""
    model, processor, collator = build("llava", "llama")
    processor.chat_template = processor.tokenizer.chat_template = template
    shown = images((32, 32))
    asked = with_places(turns(1)[:1], 1)
    expected = stock_prompt(processor, asked, shown)
    row = {"messages": turns(1), "images": shown}
    assert collator([row])["input_ids"][0][: len(expected)].tolist() == expected
    assert collate_prompts(processor, [row])["input_ids"][0].tolist() == expected
    prompt = processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    request = vllm_request(model, processor, shown, prompt, prune_ratio=0.5)
    placeholder = get_family(model).placeholder_id
    assert request.prompt_token_ids == [token for token, _ in groupby(expected)]
    assert request.prompt_token_ids.count(placeholder) == 1
    counter = TokenCounter(processor, placeholder, PruningConfig(), stop_ids=collator.stop_ids)
    words = {"messages": turns(2), "images": []}
    assert counter.text_tokens(words) == collator([words])["input_ids"].shape[1]


def test_turns_that_are_not_learned_stay_as_the_template_writes_them(build):
    """Inference sees earlier answers of LLaVA-1.5 without an end."""
    _, processor, collator = build("llava", "llama")
    writer = TurnWriter(processor, collator.stop_ids)
    split = talk("Where?", "on the mat", "How many?", "12 ")
    text = writer.write({"prompt": split[:3], "completion": split[3:]})
    assert text.text == "USER: Where? ASSISTANT: on the mat USER: How many? ASSISTANT: 12</s>"
    text = writer.write({"messages": split})
    assert text.text == "USER: Where? ASSISTANT: on the mat</s>USER: How many? ASSISTANT: 12</s>"
    assert [text.text[slice(*part)] for part in text.learned] == [" on the mat</s>", " 12</s>"]


def test_what_follows_the_end_may_depend_on_what_comes(build):
    """As with templates of `saccade assemble`, which close the last turn as the language model's own does."""
    _, _, collator = build("internvl", "bytes")
    row = {"messages": turns(2), "images": images((32, 32))}
    stock = STOCK["internvl"].template
    after = "{{ ' ' if message['role'] == 'assistant' and not loop.last else '\n' }}"
    template = stock.replace("{{'<|im_end|>\n'}}", "{{'<|im_end|>'}}" + after)
    assert template != stock
    batch = replace(collator, chat_template=template)([row])
    check_turns(replace(collator, chat_template=template))
    assert [learned(collator, labels) for labels in batch["labels"]] == [[a + "<|im_end|>" for a in ANSWERS[:2]]]


def test_max_length_cuts_what_is_learned(build):
    _, _, collator = build("qwen2_5_vl", "bytes")
    row = {"images": images((32, 16)), "messages": turns(2)}
    whole = collator([row])
    ends = (whole["labels"][0] == collator.stop_ids[0]).nonzero().flatten().tolist()
    for limit in (ends[0], ends[0] + 1, ends[1]):
        cut = replace(collator, max_length=limit)([row])
        assert torch.equal(cut["labels"], whole["labels"][:, :limit])
        assert torch.equal(cut["input_ids"], whole["input_ids"][:, :limit])


def test_what_is_learned_whole(build):
    _, _, collator = build("llava", "bytes")
    row = {"images": images((32, 32)), "messages": turns(2)}
    other = {"images": [], "messages": turns(1)}
    batch = replace(collator, assistant_only_loss=False)([row, other])
    words = batch["attention_mask"].bool() & (batch["input_ids"] != collator.placeholder_id)
    assert torch.equal(batch["labels"] != -100, words)
    assert (batch["labels"] == collator.stop_ids[0]).sum(dim=1).tolist() == [2, 1]
    # A text in one piece has no answers, whatever stands beside it in the batch.
    batch = collator([{"text": "USER: Where is the cat?", "images": []}, other])
    assert torch.equal((batch["labels"] != -100)[0], batch["attention_mask"][0].bool())
    assert learned(collator, batch["labels"][1]) == [f"{ANSWERS[0]}</s>"]


NO_PROMPT = "{% for m in messages %}{{ m['role'] + ': ' + m['content'][-1]['text'] + '</s>' }}{% endfor %}"
HASHES = VICUNA.replace("content['text'] + ' '", "content['text'] + ' ###'")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (shipped("qwen3_5_think"), "writes '</think>.* where the answer 'a 5 .' should begin: use a chat template"),
        (shipped("qwen3_5_think_training"), "writes '</think>.* where the answer 'a 5 .' should begin"),
        (shipped("qwen3_training"), "where the answer 'a 5 .' should begin"),
        (NO_PROMPT, "writes 'assistant: a 5 .*' where the answer 'a 5 .' should begin"),
        (HASHES, "after an answer the chat template writes '###.*', but generate stops only at '</s>': add the token"),
        (STOCK["internvl"].template, r"'<\|im_end\|>.*', but generate stops only at '</s>': add the token"),
        (VICUNA.replace("content['text'] + ' '", "content['text'].upper() + ' '"), "where the answer 'a 5 .' should"),
        (None, "the processor has no chat template"),
    ],
)
def test_templates_that_would_teach_something_else(template, message, build, tmp_path):
    """One line before the first step: in the trainer, the dry run and the check of data."""
    model, processor, collator = build("llava", "bytes")
    processor.chat_template = template
    with pytest.raises(SaccadeError, match=f"^a conversation of two turns cannot be learned: .*{message}") as error:
        check_turns(collator)
    assert "\n" not in str(error.value)
    rows = Dataset.from_list([{"images": images((32, 32)), "messages": turns(1)}])
    with pytest.raises(SaccadeError, match=message):
        make_trainer(model, processor, tmp_path, rows=rows)


def test_commands_refuse_a_template_before_anything_long(build, tmp_path, capsys):
    model, processor, collator = build("llava", "bytes")
    processor.chat_template = NO_PROMPT
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"messages": turns(1)}))
    options = (
        f"model: {tmp_path / 'model'}\ndataset: {data}\noutput_dir: {tmp_path / 'out'}\nuse_cpu: true\nbf16: false\n"
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(options)
    commands = (
        ["data", "check", str(data), "--model", str(tmp_path / "model")],
        ["data", "check", str(recipe)],
        ["train", str(recipe), "--dry-run"],
        ["train", str(recipe)],
    )
    for command in commands:
        assert main(command) == 2, command
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "saccade: error" in line]
        assert "where the answer 'a 5 .' should begin: use a chat template that" in line
    # With a template of its own the recipe can be checked.
    (tmp_path / "own.jinja").write_text(VICUNA)
    recipe.write_text(f"{options}chat_template_path: {tmp_path / 'own.jinja'}\n")
    assert main(["data", "check", str(recipe), "--output", str(tmp_path / "report.json")]) == 0
    assert main(["train", str(recipe), "--dry-run"]) == 0
    assert "the answer and its end, checked" in capsys.readouterr().out
    tokens = json.loads((tmp_path / "report.json").read_text())["tokens"]
    processor.chat_template = VICUNA
    assert tokens["full"]["max"] == collator([{"messages": turns(1), "images": []}])["input_ids"].shape[1]


def test_stock_steps_and_ours_learn_the_same(build, tmp_path):
    """InternVL's template has no marks, which TRL asks for where it makes the labels."""
    model, processor, collator = build("internvl", "bytes")
    rows = Dataset.from_list([{"images": images((32, 32)), "messages": turns(1 + row % 3)} for row in range(4)])
    options = ORDINARY | {"max_steps": 1, "learning_rate": 0.0, "logging_steps": 1}
    stock = make_trainer(model, processor, tmp_path / "stock", rows=rows, **options)
    assert stock.args.takes_stock_steps
    ours = make_trainer(model, processor, tmp_path / "ours", rows=rows, padding_free=True, **options)
    assert not ours.args.takes_stock_steps
    batch = collator(list(rows))
    assert (batch["labels"] == collator.stop_ids[0]).sum() == 1 + 2 + 3 + 1
    for trainer in (stock, ours):
        assert torch.equal(trainer.data_collator(list(rows))["labels"], batch["labels"])
        trainer.train()
    with torch.no_grad():
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert losses(stock) == pytest.approx([expected.item()], rel=1e-4)
    assert losses(ours) == pytest.approx([expected.item()], rel=1e-4)


def test_a_model_stops_by_itself(build, tmp_path):
    """Twenty rows with LLaVA-1.5's stock template, which writes no end and is saved unchanged beside the weights."""
    model, processor, _ = build("llava", "llama")
    answers = [f"{words} {number}" for words in ("on the mat", "A cat", "Two dogs", "12") for number in range(5)]
    rows = [
        {"images": images((32, 32)) if number % 2 else [], "messages": talk(f"Where is the cat? {number}", answer)}
        for number, answer in enumerate(answers)
    ]
    trainer = make_trainer(
        model,
        processor,
        tmp_path,
        rows=Dataset.from_list(rows),
        max_steps=40,
        per_device_train_batch_size=10,
        learning_rate=1e-2,
        prune_ratio=0.5,
        slow_probability=0.5,
    )
    trainer.train()
    trainer.save_model(str(tmp_path))
    assert (tmp_path / "chat_template.jinja").read_text() == VICUNA
    model.eval()
    stopped = []
    for row in rows:
        asked = with_places(row["messages"][:1], len(row["images"]))
        prompt = processor.apply_chat_template(asked, add_generation_prompt=True)
        inputs = processor(images=row["images"] or None, text=prompt, add_special_tokens=False, return_tensors="pt")
        written = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert "USER" not in processor.decode(written)
        stopped.append(written[-1].item() == processor.tokenizer.eos_token_id)
    assert all(stopped)
