"""`saccade assemble`: a stock LLaVA of any CLIP or SigLIP tower and any language model, and bad parts refused."""

import json
import shutil

import pytest
import torch
from assemble_parts import make_language_model, make_tower, tokenizer_of
from PIL import Image
from safetensors.torch import load_file, save_file
from skip_tester import skipping
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaNextImageProcessorPil,
    T5Config,
)

from saccade import SaccadeError, SkipVisionConfig
from saccade.cli.main import main
from saccade.data import digit_scenes
from saccade.data.rows import write_jsonl
from saccade.families import family_class, get_family
from saccade.families.padding import pads_to_square
from saccade.testing.tiny_models import noise_image
from saccade.tokens import Role
from saccade.training.assemble import AssembleOptions, assemble_model
from saccade.training.chat_format import V1_SYSTEM, make_template

PAIRS = [
    ("llama", "clip_vision_model", False),
    ("qwen2", "siglip", True),
    ("qwen3", "clip", False),
    ("mistral", "siglip_vision_model", False),
    ("vicuna", "clip_vision_model", False),
]
ENDS = {"llama": "<|eot_id|>", "qwen2": "<|im_end|>", "qwen3": "<|im_end|>", "mistral": "</s>", "vicuna": "</s>"}
IMAGE = {"type": "image"}


def said(text):
    return {"type": "text", "text": text}


def chat(*words, system=None):
    spoken = [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(words)]
    return [{"role": "system", "content": system}, *spoken] if system else spoken


def with_image(messages):
    first, *others = messages
    return [{**first, "content": [IMAGE, said(first["content"])]}, *others]


@pytest.fixture(scope="module", params=PAIRS, ids=lambda pair: "-".join(map(str, pair[:2])))
def assembled(request, tmp_path_factory):
    name, tower, tied = request.param
    parts = tmp_path_factory.mktemp(name)
    make_language_model(parts / "language", name, tied)
    make_tower(parts / "tower", tower)
    flags = ["--vision-tower", str(parts / "tower"), "--language-model", str(parts / "language")]
    assert main(["assemble", *flags, "--output", str(parts / "out")]) == 0
    return name, tower, tied, parts


def test_it_loads_in_stock_transformers(assembled):
    name, _, tied, parts = assembled
    model, info = AutoModelForImageTextToText.from_pretrained(parts / "out", output_loading_info=True)
    assert not any(keys for kind, keys in info.items() if kind.endswith("_keys"))
    assert family_class(model.config).name == "llava"
    processor = AutoProcessor.from_pretrained(parts / "out")
    text = processor.apply_chat_template(with_image(chat("what ?")), add_generation_prompt=True, tokenize=False)
    inputs = processor(images=Image.new("RGB", (40, 30)), text=text, return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 16 == model.config.image_seq_length
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()
        # A grid of patches, with CLIP's class token left out and SigLIP without one.
        assert get_family(model).encode(inputs).context.grid.tolist() == [[1, 4, 4]]
    assert model.config.tie_word_embeddings == tied
    shared = model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()
    assert shared == tied
    rows = model.get_input_embeddings().weight.shape[0]
    assert rows % 64 == 0
    assert rows == model.config.text_config.vocab_size
    assert len(processor.tokenizer) <= rows < len(processor.tokenizer) + 64
    end = processor.tokenizer.convert_tokens_to_ids(ENDS[name])
    assert end in model.generation_config.eos_token_id
    assert model.generation_config.pad_token_id == processor.tokenizer.pad_token_id is not None


def test_the_parts_are_the_ones_that_were_given(assembled):
    """Text alone gives the language model's own logits, and the tower its own hidden states."""
    _, tower, _, parts = assembled

    model = AutoModelForImageTextToText.from_pretrained(parts / "out")
    language = AutoModelForCausalLM.from_pretrained(parts / "language")
    ids = torch.tensor([[5, 9, 30, 4]])
    known = language.config.vocab_size
    with torch.no_grad():
        wanted = language(input_ids=ids).logits
        torch.testing.assert_close(model(input_ids=ids).logits[..., :known], wanted, rtol=1e-4, atol=1e-5)
        pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        whole = AutoModel.from_pretrained(parts / "tower")
        own = getattr(whole, "vision_model", whole)(pixels, output_hidden_states=True).hidden_states[-2]
        kept = own[:, 1:] if tower.startswith("clip") else own
        features = model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output[0]
        torch.testing.assert_close(features, model.model.multi_modal_projector(kept)[0], rtol=1e-4, atol=1e-5)


def test_two_steps_and_an_answer(assembled, tmp_path):
    name, *_, parts = assembled
    data = write_jsonl(digit_scenes("sft", "train", 4), tmp_path / "data")
    flags = ["--model", str(parts / "out"), "--dataset", str(data), "--output_dir", str(tmp_path / "run")]
    flags += ["--max_steps", "2", "--per_device_train_batch_size", "2", "--disable_tqdm", "true"]
    assert main(["train", "tiny-digits/sft", *flags, "--save_strategy", "no"]) == 0
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "run")
    processor = AutoProcessor.from_pretrained(tmp_path / "run")
    start = AutoModelForImageTextToText.from_pretrained(parts / "out").model.multi_modal_projector.linear_1.weight
    assert not torch.equal(start, model.model.multi_modal_projector.linear_1.weight)
    end = processor.tokenizer.convert_tokens_to_ids(ENDS[name])
    assert end in model.generation_config.eos_token_id
    text = processor.apply_chat_template(with_image(chat("what ?")), add_generation_prompt=True, tokenize=False)
    inputs = processor(images=Image.new("RGB", (40, 30)), text=text, return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] > inputs["input_ids"].shape[1]


@pytest.mark.parametrize("name", ENDS)
def test_what_is_learned_is_the_answers_and_their_ends(name):
    tokenizer = tokenizer_of(name)
    tokenizer.add_tokens("<image>", special_tokens=True)
    made = make_template(tokenizer, "own", "<image>")
    assert tokenizer.convert_ids_to_tokens(made.end_id) == ENDS[name]
    for system in (None, "Be brief."):
        messages = with_image(chat("How many <?", " It's {7} cats. ", "Sure?", "Yes"))
        messages = messages if system is None else [{"role": "system", "content": system}, *messages]
        encoded = tokenizer.apply_chat_template(
            messages, chat_template=made.text, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        pairs = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
        learned = tokenizer.decode([token for token, marked in pairs if marked])
        assert [part.strip() for part in learned.split(ENDS[name])] == ["It's {7} cats.", "Yes", ""]


@pytest.mark.parametrize("name", [name for name in ENDS if name != "vicuna"])
def test_a_language_model_keeps_its_own_format(name):
    """Text alone renders as before, except for Qwen3's empty thought, which every answer gets here."""
    tokenizer = tokenizer_of(name)
    template = make_template(tokenizer, "own", "<image>").text
    thought = "<think>\n\n</think>\n\n"
    whole = [chat("a", "b", "c", "d"), chat("a", "b"), chat("a {{ x }} 'q'", "b \\ %}", system="s")]
    for messages in whole:
        new = tokenizer.apply_chat_template(messages, tokenize=False, chat_template=template)
        own = tokenizer.apply_chat_template(messages, tokenize=False)
        # Mistral's own leaves the system message out once the last question is answered.
        if name != "mistral" or messages[0]["role"] != "system":
            assert new.replace(thought, "") == own.replace(thought, "")
        for number in [number for number, message in enumerate(messages) if message["role"] == "user"]:
            prompt = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
            asked = tokenizer.apply_chat_template(messages[: number + 1], chat_template=template, **prompt)
            own = tokenizer.apply_chat_template(messages[: number + 1], **prompt)
            assert asked.replace(thought, "") == own.replace(thought, "")
            # What is learned goes on from what `generate` is given.
            assert new.startswith(asked)


def test_v1_is_the_published_format():
    tokenizer = tokenizer_of("vicuna")
    template = make_template(tokenizer, "own", "<image>").text
    late = [{"role": "user", "content": [said("How many?"), IMAGE]}, *chat("?", "Two.", "Sure?", "Yes")[1:]]
    rendered = tokenizer.apply_chat_template(late, tokenize=False, chat_template=template)
    assert rendered == (f"<s>{V1_SYSTEM} USER: <image>\nHow many? ASSISTANT: Two.</s>USER: Sure? ASSISTANT: Yes</s>")
    two = [{"role": "user", "content": [said("First"), IMAGE, said("then"), IMAGE]}]
    prompt = tokenizer.apply_chat_template(two, tokenize=False, chat_template=template, add_generation_prompt=True)
    assert prompt.endswith("USER: First<image>\nthen<image>\n ASSISTANT:")
    told = tokenizer.apply_chat_template(chat("a", system="Be brief."), tokenize=False, chat_template=template)
    assert told == "<s>Be brief. USER: a"
    own = make_template(tokenizer, "v1", "<image>", system_prompt="Be kind.").text
    assert tokenizer.apply_chat_template(chat("a"), tokenize=False, chat_template=own) == "<s>Be kind. USER: a"


@pytest.mark.parametrize(
    "messages", [chat("a")[:1] * 2, [{"role": "assistant", "content": "a"}], [{"role": "tool", "content": "a"}]]
)
def test_a_conversation_out_of_turn_is_refused(messages):
    tokenizer = tokenizer_of("qwen2")
    template = make_template(tokenizer, "own", "<image>").text
    with pytest.raises(Exception, match="questions and answers in turn"):
        tokenizer.apply_chat_template(messages, tokenize=False, chat_template=template)


def test_a_template_that_cannot_be_adapted_and_a_file_of_ones_own(tmp_path):
    tokenizer = tokenizer_of("qwen2")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] | upper }}{% endfor %}"
    with pytest.raises(SaccadeError, match=r"cannot be adapted to images: .*chat_template='v1', or a file"):
        make_template(tokenizer, "own", "<image>")
    path = tmp_path / "chat.jinja"
    marked = "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    text = "{% for message in messages %}{% if message['role'] == 'user' %}{{ message['content'] }}{% else %}ANSWER"
    path.write_text(text + marked + "{% endif %}{% endfor %}")
    assert make_template(tokenizer, str(path), "<image>").end_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    path.write_text(text + marked.replace(" + '<|im_end|>'", "") + "{% endif %}{% endfor %}")
    with pytest.raises(SaccadeError, match="the special token that ends it between"):
        make_template(tokenizer, str(path), "<image>")


def test_embeddings_with_room_stay_as_they_are(tmp_path):
    make_language_model(tmp_path / "language", "qwen2", rows=300)
    make_tower(tmp_path / "tower")
    summary = assemble_model(tmp_path / "tower", tmp_path / "language", tmp_path / "out")
    assert summary["vocabulary"] == 300
    assert summary["image_token_id"] < 300


def test_the_projector_is_drawn_by_its_seed_and_leaves_the_random_state(tmp_path):
    make_language_model(tmp_path / "language", "qwen2")
    make_tower(tmp_path / "tower")
    state = torch.get_rng_state()
    weights = []
    for number, seed in enumerate((0, 0, 1)):
        out = tmp_path / str(number)
        assemble_model(tmp_path / "tower", tmp_path / "language", out, AssembleOptions(seed=seed))
        stored = load_file(out / "model.safetensors")
        weights.append(next(value for key, value in stored.items() if key.endswith("projector.linear_2.weight")))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("crops", ["anyres", "hd", "hd_pad"])
def test_crops(crops, tmp_path):
    """Of a square image: a thumbnail of 4 x 4, and 8 lines of 8 with a newline each."""
    make_language_model(tmp_path / "language", "llama")
    make_tower(tmp_path / "tower")
    assemble_model(tmp_path / "tower", tmp_path / "language", tmp_path / "out", AssembleOptions(crops=crops))
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    inputs = processor(images=Image.new("RGB", (64, 64)), text="<image>", return_tensors="pt")
    count = 16 + 8 * 8 + 8
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == count
    encoded = get_family(model).encode(inputs)
    assert int(encoded.context.valid.sum()) == count
    assert len(model.config.image_grid_pinpoints) == {"anyres": 5, "hd": 1, "hd_pad": 1}[crops]


def test_hd_pad_is_hd_of_a_square(tmp_path):
    """Any image has all crops, and their pixels are those of the square that a user would have padded it to."""
    make_language_model(tmp_path / "language", "llama")
    make_tower(tmp_path / "tower")
    processors = []
    for crops in ("hd", "hd_pad"):
        assemble_model(tmp_path / "tower", tmp_path / "language", tmp_path / crops, AssembleOptions(crops=crops))
        processors.append(AutoProcessor.from_pretrained(tmp_path / crops))
    plain, pads = processors
    assert pads_to_square(pads)
    assert not pads_to_square(plain)
    for size in ((64, 30), (21, 64)):
        image = noise_image(*size, 3)
        square = Image.new("RGB", (64, 64), tuple(int(255 * mean) for mean in pads.image_processor.image_mean))
        square.paste(image, ((64 - size[0]) // 2, (64 - size[1]) // 2))
        wanted, got = (
            processor(images=picture, text="<image>", return_tensors="pt")
            for processor, picture in ((plain, square), (pads, image))
        )
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[name], wanted[name]) for name in got)
        assert (got["input_ids"] == plain.image_token_id).sum() == 16 + 8 * 8 + 8
        assert plain(images=image, text="<image>", return_tensors="pt")["input_ids"].shape < got["input_ids"].shape
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "hd_pad")
    with skipping(model, SkipVisionConfig.preset("576/576", newlines="drop")) as skip:
        roles = skip.prepare(got)["skip_roles"]
    assert (roles == Role.RETAINED).sum() == (roles == Role.SKIPPED).sum() == 16
    # LLaVA-NeXT's own folders are read as before.
    stock = LlavaNextImageProcessorPil(image_grid_pinpoints=[[64, 64]])
    stock.save_pretrained(tmp_path / "stock")
    assert type(AutoImageProcessor.from_pretrained(tmp_path / "stock")) is LlavaNextImageProcessorPil


@pytest.mark.parametrize("kind", ["clip", "clip_vision_model", "siglip_vision_model", "llava"])
def test_smaller_pictures_have_the_positions_of_the_middle(kind, tmp_path):
    make_language_model(tmp_path / "language", "llama")
    place = tmp_path / "tower"
    make_tower(place, kind.replace("llava", "clip_vision_model"))
    if kind == "llava":
        place = tmp_path / "whole"
        assemble_model(tmp_path / "tower", tmp_path / "language", place)
    assemble_model(place, tmp_path / "language", tmp_path / "large")
    crops = "none" if kind.startswith("siglip") else "hd_pad"
    options = AssembleOptions(image_size=16, crops=crops)
    assert assemble_model(place, tmp_path / "language", tmp_path / "small", options)["visual_tokens"] == 4
    large, small = (
        AutoModelForImageTextToText.from_pretrained(tmp_path / name).model.vision_tower for name in ("large", "small")
    )
    before, after = large.state_dict(), small.state_dict()
    (name,) = (name for name in before if name.endswith("position_embedding.weight"))
    extra = 0 if kind.startswith("siglip") else 1
    middle = [extra + number for number in (5, 6, 9, 10)]
    assert torch.equal(after[name], before[name][[*range(extra), *middle]])
    assert all(torch.equal(after[other], before[other]) for other in before.keys() - {name})
    processor = AutoProcessor.from_pretrained(tmp_path / "small")
    inputs = processor(images=noise_image(32, 32, 0), text="<image>", return_tensors="pt")
    assert inputs["pixel_values"].shape[-2:] == (16, 16)
    count = (inputs["input_ids"] == processor.image_token_id).sum()
    assert count == (4 if crops == "none" else 5 * 4 + 4)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    parts = tmp_path_factory.mktemp("good")
    make_language_model(parts / "language", "qwen2")
    make_tower(parts / "tower")
    make_tower(parts / "siglip", "siglip_vision_model")
    make_tower(parts / "odd", size=24)
    make_tower(parts / "other_size")
    config = json.loads((parts / "other_size" / "config.json").read_text())
    (parts / "other_size" / "config.json").write_text(json.dumps({**config, "image_size": 64}))
    make_tower(parts / "no_patch", size=32, patch=32)
    (parts / "no_patch" / "config.json").write_text(json.dumps({**config, "patch_size": 40}))
    T5Config().save_pretrained(parts / "t5")
    (parts / "empty").mkdir()
    (parts / "taken").mkdir()
    (parts / "taken" / "file").write_text("mine")
    return parts


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"vision-tower": "{p}/language"}, "is not a CLIP or SigLIP vision tower"),
        ({"vision-tower": "{p}/nowhere"}, "vision_tower='{p}/nowhere' is not a folder"),
        ({"vision-tower": "{p}/empty"}, "vision_tower='{p}/empty' cannot be loaded"),
        ({"vision-tower": "{p}/other_size"}, "gives pictures of 32 x 32 pixels, but the tower takes 64 x 64"),
        ({"vision-tower": "{p}/no_patch"}, "image_size=32 does not fit a patch of patch_size=40"),
        ({"language-model": "{p}/t5"}, "is an encoder-decoder and has model_type='t5'"),
        ({"language-model": "{p}/tower"}, "has model_type='clip_vision_model': name a causal language model"),
        ({"language-model": "{p}/nowhere"}, "language_model='{p}/nowhere' is not a folder"),
        ({"output": "{p}/taken"}, "output='{p}/taken' exists: name a folder"),
        ({"gguf-file": "model.gguf"}, "gguf_file='model.gguf' is not in"),
        ({"crops": "many"}, "crops='many' is unknown: did you mean 'anyres'?"),
        ({"vision-tower": "{p}/siglip", "crops": "anyres"}, "LLaVA-NeXT is only known with CLIP towers here"),
        ({"projector": "pool"}, "projector='pool' is unknown: use one of mlp, resampler"),
        ({"projector": "resampler", "crops": "hd"}, "takes whole pictures, not crops='hd'"),
        ({"projector": "resampler", "vision-tower": "{p}/odd"}, "do not divide the 3 x 3 patches of vision_tower="),
        ({"image-size": "20"}, "image_size=20: the tower takes 32 x 32 pixels in patches of 8; give a multiple of 8"),
        ({"image-size": "40"}, "image_size=40: the tower takes 32 x 32"),
        ({"projector": "resampler", "image-size": "24"}, "do not divide the 3 x 3 patches of vision_tower="),
        ({"dtype": "int4"}, "dtype='int4' is unknown"),
        ({"feature-layer": "-9"}, "feature_layer=-9: the tower has 3 layers"),
        ({"chat-template": "{p}/nowhere.jinja"}, "cannot be read: use 'own', 'v1', or a text file"),
        ({"max-shard-size": "big"}, "max_shard_size='big'"),
    ],
)
def test_bad_input_is_one_line(good, flags, message, capsys):
    given = {"vision-tower": "{p}/tower", "language-model": "{p}/language", "output": "{p}/out", **flags}
    words = [word.format(p=good) for name, value in given.items() for word in (f"--{name}", value)]
    assert main(["assemble", *words]) == 2
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert printed.startswith("saccade: error: ")
    assert message.format(p=good) in printed
    assert not (good / "out").exists()
    assert (good / "taken" / "file").read_text() == "mine"


def test_weights_that_miss_a_key_are_refused(tmp_path):
    make_tower(tmp_path / "tower")
    make_language_model(tmp_path / "language", "llama")
    weights = load_file(tmp_path / "language" / "model.safetensors")
    weights.pop(next(name for name in weights if "q_proj" in name))
    save_file(weights, tmp_path / "language" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SaccadeError, match=r"its weights are incomplete.*q_proj"):
        assemble_model(tmp_path / "tower", tmp_path / "language", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["language", "tower"]


def test_weights_that_a_llava_misses_count_where_they_are_taken_from(tmp_path):
    make_language_model(tmp_path / "language", "qwen2")
    assemble_model("tiny", tmp_path / "language", tmp_path / "whole")
    weights = load_file(tmp_path / "whole" / "model.safetensors")
    for part, key in (("eyes", "fc1.weight"), ("words", "q_proj")):
        damaged = tmp_path / part
        shutil.copytree(tmp_path / "whole", damaged)
        missing = next(name for name in weights if key in name and ("tower" in name) == (part == "eyes"))
        left = {name: weight for name, weight in weights.items() if name != missing}
        save_file(left, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SaccadeError, match=r"vision_tower='.*eyes': its weights are incomplete.*fc1"):
        assemble_model(tmp_path / "eyes", tmp_path / "language", tmp_path / "out")
    with pytest.raises(SaccadeError, match=r"language_model='.*words': its weights are incomplete.*q_proj"):
        assemble_model("tiny", tmp_path / "words", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assemble_model(tmp_path / "words", tmp_path / "language", tmp_path / "out")


@pytest.mark.parametrize("part", ["vision_tower", "language_model"])
def test_a_part_s_index_reads_no_file_of_another_folder(part, tmp_path):
    make_tower(tmp_path / "tower")
    make_language_model(tmp_path / "language", "llama")
    folder = tmp_path / ("tower" if part == "vision_tower" else "language")
    (tmp_path / "private").mkdir()
    (folder / "model.safetensors").rename(tmp_path / "private" / "private.safetensors")
    names = load_file(tmp_path / "private" / "private.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../private/private.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        SaccadeError, match=rf"{part}='.*': model.safetensors.index.json is damaged .*not a file beside it"
    ):
        assemble_model(tmp_path / "tower", tmp_path / "language", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_tower_of_a_llava_and_the_embedded_one(tmp_path):
    make_language_model(tmp_path / "language", "qwen2")
    first = assemble_model("tiny", tmp_path / "language", tmp_path / "one")
    assert first["visual_tokens"] == 144
    second = assemble_model(tmp_path / "one", tmp_path / "language", tmp_path / "two")
    assert {**second, "output": first["output"]} == first
    towers = [
        AutoModelForImageTextToText.from_pretrained(tmp_path / name).model.vision_tower for name in ("one", "two")
    ]
    for one, two in zip(*(tower.state_dict().values() for tower in towers), strict=True):
        assert torch.equal(one, two)
