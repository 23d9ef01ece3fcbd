"""A model that prunes in place: the answers of `prune_inputs`, after the prompt as it was given."""

import copy
import inspect
import io
import json
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from accelerate import Accelerator, cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from accelerate.state import AcceleratorState
from family_models import FAMILIES, RELATIVES, WITH_VIDEO, VideoCase, build_pixtral
from peft import LoraConfig, get_peft_model
from PIL import Image
from skip_tester import options_for, skipping
from transformers import (
    DynamicCache,
    GenerationConfig,
    LlavaForConditionalGeneration,
    LogitsProcessor,
    StoppingCriteria,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer

from saccade import PruningConfig, SaccadeError, apply_pruning, apply_skip_vision, prune_inputs
from saccade.evaluation import plan_inferences
from saccade.pruning import ModeIsolator, pruning_config
from saccade.pruning.cache import cache_of
from saccade.pruning.patching import PER_IMAGE
from saccade.serving.vllm_plugin import folder_pruning
from saccade.skip_vision.cache import cache_name
from saccade.testing.families import CLOSE, Case, generation_options, logits
from saccade.testing.tiny_models import Tiny

CASES = {name: Case(name, FAMILIES[name]) for name in FAMILIES}
CONFIG = PruningConfig("divprune", prune_ratio=0.7)
IN_PLACE = {
    "pruning": lambda model: apply_pruning(model, CONFIG),
    "skip_vision": lambda model: skipping(model, options_for("llava")),
}
"""Context managers of each way in which `generate` runs on another prompt than the given one."""


@pytest.fixture(params=IN_PLACE)
def in_place(request):
    return IN_PLACE[request.param]


def same_answers(case, prompts, config=CONFIG, **options):
    """What a pruning model generates, and what `prune_inputs` before `generate` does, cut at the shorter prompt."""
    options = {**generation_options(case), **options}
    pruned = prune_inputs(case.model, prompts, config)
    torch.manual_seed(0)
    expected = case.model.generate(**dict(pruned), **options)[:, pruned["input_ids"].shape[1] :]
    with apply_pruning(case.model, config):
        torch.manual_seed(0)
        found = case.model.generate(**dict(prompts), **options)
    several = found.shape[0] // prompts["input_ids"].shape[0]
    length = prompts["input_ids"].shape[1]
    assert torch.equal(found[:, :length], prompts["input_ids"].repeat_interleave(several, dim=0))
    assert torch.equal(found[:, length:], expected)


def test_none_unsets_what_the_model_would_generate_with(monkeypatch):
    case = CASES["llava"]
    prompts = case.prompts([1])
    monkeypatch.setattr(case.model.generation_config, "repetition_penalty", 5.0)
    same_answers(case, prompts, repetition_penalty=None)


@pytest.mark.parametrize("name", FAMILIES)
def test_generates_what_prune_inputs_does(name):
    """Batches, several images, text-only rows, beams and samples; after removal the model is the stock one again."""
    case = CASES[name]
    prompts = case.prompts()
    before = case.model.generate(**dict(prompts), **generation_options(case))
    attributes = dict(vars(case.model))
    for positions in case.positions:
        same_answers(case, prompts, CONFIG.replace(positions=positions))
    same_answers(case, prompts, num_beams=2, num_return_sequences=2)
    same_answers(case, prompts, do_sample=True, num_return_sequences=2)
    assert vars(case.model) == attributes
    assert torch.equal(case.model.generate(**dict(prompts), **generation_options(case)), before)


OTHERS = RELATIVES | {
    "pixtral": Tiny(lambda: build_pixtral("Llava"), LlavaForConditionalGeneration),
}


def test_other_families_prune_in_place_too():
    """Those of the shared tester's relatives: what a processor returns is told apart, and the model generates."""
    for name, tiny in OTHERS.items():
        case = Case(name, tiny)
        prompts, family = case.prompts([0, 2]), case.family
        known = {"input_ids", "attention_mask", *family.vision_inputs, *family.token_inputs, *PER_IMAGE}
        assert prompts.keys() <= known, name
        same_answers(case, prompts)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_further_turn_of_text_on_the_same_cache(name):
    """The answers of one prefill on the whole conversation: the prompt pruned, and the turns after it as they are."""
    case = CASES[name]
    options = {**generation_options(case), "return_dict_in_generate": True}
    options |= {"min_new_tokens": options["max_new_tokens"]}  # rows end together
    for positions in case.positions:
        config = CONFIG.replace(positions=positions)
        prompts = case.prompts()
        question = torch.tensor([[7, 11, 9]]).expand(len(prompts["input_ids"]), -1)
        with apply_pruning(case.model, config):
            cache, ids, mask = None, prompts["input_ids"], prompts["attention_mask"]
            for turn in range(3):
                images = dict(prompts) if turn == 0 else {}
                given = {**images, "input_ids": ids, "attention_mask": mask}
                if cache is not None:
                    given[cache_name(case.model.forward)] = cache
                found = case.model.generate(**given, **options)
                cache = cache_of(found)
                assert torch.equal(found.sequences[:, : ids.shape[1]], ids)
                ids = torch.cat((found.sequences, question), dim=1)
                mask = torch.cat((mask, mask.new_ones(len(mask), ids.shape[1] - mask.shape[1])), dim=1)
        whole = case.prompts()
        new = found.sequences[:, whole["input_ids"].shape[1] : -options["max_new_tokens"]]
        shorter = prune_inputs(case.model, {**whole, **longer(case, whole, new)}, config)
        expected = case.model.generate(**shorter, **options).sequences
        assert torch.equal(found.sequences[:, -options["max_new_tokens"] :], expected[:, -options["max_new_tokens"] :])


def with_later_image(case, rows, config):
    """Three turns on one cache: the prompts of `rows[0]`, then of `rows[1]` with their images, then text.

    What is written after the second prompt, the conversation up to that, and the second answer with the third prompt.
    """
    options = {**generation_options(case), "return_dict_in_generate": True}
    first, second = map(case.prompts, rows)
    with apply_pruning(case.model, config):
        found = case.model.generate(**first, **options)
        ids = torch.cat((found.sequences, second["input_ids"]), dim=1)
        answered = torch.ones_like(found.sequences[:, first["input_ids"].shape[1] :])
        per_token = {"attention_mask": torch.cat((first["attention_mask"], answered, second["attention_mask"]), dim=1)}
        for name in {*case.family.token_inputs, "mm_token_type_ids"} & second.keys():
            per_token[name] = torch.cat((first[name], torch.zeros_like(answered), second[name]), dim=1)
        cache = {cache_name(case.model.forward): cache_of(found)}
        whole = {"input_ids": ids, **per_token}
        found = case.model.generate(**{**second, **whole}, **cache, **options).sequences
        assert torch.equal(found[:, : ids.shape[1]], ids)
        new = torch.cat((found[:, ids.shape[1] :], torch.tensor([[7, 11, 9]]).expand(len(ids), -1)), dim=1)
        ids = torch.cat((ids, new), dim=1)
        mask = torch.nn.functional.pad(per_token["attention_mask"], (0, new.shape[1]), value=1)
        last = case.model.generate(input_ids=ids, attention_mask=mask, **cache, **options).sequences
    return last[:, whole["input_ids"].shape[1] :], whole, new


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "gemma3"])
def test_a_further_turn_with_an_image_on_the_same_cache(name):
    """The answers of one prefill on the whole conversation with all images, each of which is reduced by itself."""
    case = CASES[name]
    for positions in case.positions:
        config = CONFIG.replace(positions=positions)
        found, whole, new = with_later_image(case, ([0], [3]), config)
        for key, value in case.prompts([0, 3]).items():
            if key not in whole:
                crops = name in ("idefics3", "smolvlm")
                whole[key] = value.reshape(1, -1, *value.shape[2:]) if crops else value
        answers = []
        for inputs in (whole, {**whole, **longer(case, whole, new)}):
            pruned = prune_inputs(case.model, inputs, config)
            answers.append(case.model.generate(**pruned, **generation_options(case))[:, -6:])
        assert torch.equal(found[:, :6], answers[0])
        assert torch.equal(found[:, -6:], answers[1])


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_further_turn_with_images_in_a_batch(name):
    """Rows with and without an image in either turn, of different lengths: each as by itself."""
    case = CASES[name]
    together, *_ = with_later_image(case, ([0, 1, 0], [3, 2, 1]), CONFIG)
    for number, rows in enumerate((([0], [3]), ([1], [2]), ([0], [1]))):
        alone, *_ = with_later_image(case, rows, CONFIG)
        assert torch.equal(together[number], alone[0])


def longer(case, prompts, new):
    """Inputs per token of a batch with the tokens `new` `(B, n)` behind each row."""
    found = {"input_ids": torch.cat((prompts["input_ids"], new), dim=1)}
    found["attention_mask"] = torch.cat((prompts["attention_mask"], torch.ones_like(new)), dim=1)
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in prompts:
            found[name] = torch.cat((prompts[name], torch.zeros_like(new)), dim=1)
    return found


@pytest.mark.parametrize("name", WITH_VIDEO)
def test_videos(name):
    case = VideoCase(name, FAMILIES[name])
    same_answers(case, case.prompts())


def test_text_alone_is_the_stock_model():
    case = CASES["llava"]
    prompts = {name: value for name, value in case.prompts([2]).items() if name != "pixel_values"}
    assert not case.family.placeholder(prompts["input_ids"]).any()
    options = generation_options(case)
    expected = case.model.generate(**prompts, **options)
    with apply_pruning(case.model, CONFIG):
        assert torch.equal(case.model.generate(**prompts, **options), expected)


def test_a_forward_is_of_the_shorter_sequence():
    case = CASES["qwen2_5_vl"]
    expected = logits(case.model, case.prune(case.inputs, "divprune", 0.7, padding_side="right"))
    with apply_pruning(case.model, CONFIG):
        torch.testing.assert_close(logits(case.model, case.inputs), expected)
        with pytest.raises(SaccadeError, match="labels: a model that prunes in place does not train"):
            case.model(**case.batch)


@torch.no_grad()
def loop(case, prompts, tokens, with_mask=False):
    """The logits behind a prompt and behind each of the tokens `(B, n)`, one forward after the other on one cache."""
    name, mask = cache_name(case.model.forward), prompts["attention_mask"]
    output = case.model(**prompts, use_cache=True)
    yield output.logits[:, -1]
    for token in tokens.T:
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        masked = {"attention_mask": mask} if with_mask else {}
        output = case.model(input_ids=token.unsqueeze(1), **{name: cache_of(output)}, **masked)
        yield output.logits[:, -1]


def generated_logits(case, prompts):
    """The logits of `generate` after each token, `(n, B, V)`, and the tokens `(B, n - 1)` that they follow."""
    options = {**generation_options(case), "return_dict_in_generate": True, "output_logits": True}
    options |= {"min_new_tokens": options["max_new_tokens"]}
    found = case.model.generate(**dict(prompts), **options)
    return torch.stack(found.logits), found.sequences[:, prompts["input_ids"].shape[1] : -1]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_loop_of_forwards(name):
    """The logits of `generate`, of two conversations in turn: one of rows of different lengths, one of one row."""
    case = CASES[name]
    batches = [case.prompts(), case.prompts([3])]
    for positions in case.positions:
        with apply_pruning(case.model, CONFIG.replace(positions=positions)):
            expected, tokens = zip(*(generated_logits(case, prompts) for prompts in batches), strict=True)
            for with_mask in (False, True):
                loops = [loop(case, prompts, new, with_mask) for prompts, new in zip(batches, tokens, strict=True)]
                steps = list(zip(*loops, strict=True))
        for found, wanted in zip(zip(*steps, strict=True), expected, strict=True):
            torch.testing.assert_close(torch.stack(found), wanted, **CLOSE)


def test_other_families_go_on_in_a_loop_too():
    for name, tiny in OTHERS.items():
        case = Case(name, tiny)
        prompts = case.prompts([0, 2])
        with apply_pruning(case.model, CONFIG.replace(positions="original")):
            expected, tokens = generated_logits(case, prompts)
            found = torch.stack(list(loop(case, prompts, tokens)))
        torch.testing.assert_close(found, expected, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "lfm2_vl"])
def test_the_last_column_of_a_left_padded_batch(name):
    """The logits of each sample by itself."""
    case = Case(name, RELATIVES[name]) if name in RELATIVES else CASES[name]
    for positions in case.positions:
        with apply_pruning(case.model, CONFIG.replace(positions=positions)), torch.no_grad():
            alone = torch.cat([case.model(**case.prompts([row])).logits[:, -1] for row in (0, 1, 3)])
            for options in ({}, {"logits_to_keep": 1}):
                together = case.model(**case.prompts([0, 1, 3]), **options).logits[:, -1]
                torch.testing.assert_close(together, alone, **CLOSE)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_rows_of_a_cache_that_move(name):
    """Repeated, sorted and selected ones, on copies of one cache, also after it was generated with: each as alone."""
    case = CASES[name]
    rows, key, options = [0, 1, 3], cache_name(case.model.forward), generation_options(case)
    moves = {
        "batch_repeat_interleave": (2, [0, 0, 1, 1, 2, 2]),
        "reorder_cache": (torch.tensor([2, 0, 1]), [2, 0, 1]),
        "batch_select_indices": (torch.tensor([2]), [2]),
    }
    token = torch.tensor([[7]])

    def step(cache, count):
        return case.model(input_ids=token.expand(count, -1), **{key: cache}).logits[:, -1]

    def after(prompts):
        return cache_of(case.model(**prompts, use_cache=True))

    config = CONFIG.replace(positions="original")
    with apply_pruning(case.model, config), torch.no_grad():
        alone = torch.cat([step(after(case.prompts([row])), 1) for row in rows])
        cache = after(case.prompts(rows))
        for method, (how, order) in moves.items():
            moved = copy.deepcopy(cache)
            getattr(moved, method)(how)
            torch.testing.assert_close(step(moved, len(order)), alone[order], **CLOSE)
        with pytest.raises(SaccadeError, match="input_ids has 2 rows, of which the key-value cache holds 3"):
            step(cache, 2)
        # One prompt, of any number of rows.
        cache = after(case.prompts([1]))
        cache.batch_repeat_interleave(3)
        torch.testing.assert_close(step(cache, 3), alone[1].expand(3, -1), **CLOSE)
        options |= {"num_beams": 2, "return_dict_in_generate": True}
        for number, row in enumerate(rows):
            single = cache_of(case.model.generate(**case.prompts([row]), **options))
            alone[number] = step(single, 2)[0]
        many = cache_of(case.model.generate(**case.prompts(rows), **options))
        torch.testing.assert_close(step(many, 6)[::2], alone, **CLOSE)


@pytest.mark.parametrize("way", IN_PLACE)
def test_a_compiled_forward_has_the_same_logits(way):
    """Which tokens stay is decided outside of what is compiled."""
    case = Case("llava", FAMILIES["llava"])
    prompts = case.prompts([0, 1])
    with IN_PLACE[way](case.model), torch.no_grad():
        expected = case.model(**prompts).logits
        torch.compiler.reset()
        compiled = torch.compile(case.model.forward, backend="eager")
        torch.testing.assert_close(compiled(**prompts).logits, expected, **CLOSE)
        torch.compiler.reset()


@pytest.mark.parametrize("way", IN_PLACE)
def test_wrappers_around_a_patched_model_stay(way):
    """accelerate wraps `forward` in place, of the model for autocast and of all its modules for offloading."""
    case, seen = Case("llava", FAMILIES["llava"]), []
    model, prompts = case.model, case.prompts([0])
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    expected = model(**prompts).logits
    with IN_PLACE[way](model):
        shorter = model(**prompts).logits
    seen.clear()
    AcceleratorState._reset_state(reset_partial_state=True)  # another test's has another precision
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    with IN_PLACE[way](model):
        assert accelerator.prepare_model(model, evaluation_mode=True) is model
        assert model(**prompts).logits.shape == shorter.shape
    whole = model(**prompts).logits
    torch.testing.assert_close(whole, expected, atol=0.2, rtol=0.0)  # in bfloat16
    assert seen == [torch.bfloat16, torch.bfloat16]
    with IN_PLACE[way](model):
        again = model(**prompts).logits
    assert again.shape == shorter.shape
    assert not torch.equal(again, whole)
    # A wrapper that stayed is bound to the model that it is called on: a copy's runs the copy.
    blank = copy.deepcopy(model)
    for weight in blank.parameters():
        weight.data.zero_()
    assert not blank(**prompts).logits.any()
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    assert torch.equal(model(**prompts).logits, expected)
    assert next(iter(inspect.signature(model.forward).parameters)) == "input_ids"
    assert torch.equal(copy.deepcopy(model)(**prompts).logits, expected)

    with IN_PLACE[way](model):
        cpu_offload(model, execution_device="cpu")
        model(**prompts)
    assert torch.equal(model(**prompts).logits, expected)
    remove_hook_from_submodules(model)
    assert torch.equal(model(**prompts).logits, expected)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_the_isolator_of_an_offloaded_model(tmp_path):
    """The model's device is then "meta", which is where no tensor can be computed with."""
    case = Case("llava", FAMILIES["llava"])
    prompts, options = case.prompts([0, 1]), generation_options(case)
    ModeIsolator(2, 32).save_pretrained(tmp_path)
    config = CONFIG.replace(isolator=str(tmp_path))
    with apply_pruning(case.model, config):
        expected = case.model.generate(**prompts, **options)
    cpu_offload(case.model, execution_device="cpu")
    with apply_pruning(case.model, config):
        assert torch.equal(case.model.generate(**prompts, **options), expected)


class Gone(BaseStreamer):
    """A reader who is gone after the prompt and two tokens."""

    def __init__(self):
        self.left = 3

    def put(self, value):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt

    def end(self):
        pass


@pytest.mark.parametrize("second", [False, True])
def test_a_cache_of_a_call_that_raised_is_refused(second):
    """What it begins with was not noted, so that a further turn would stand at wrong positions."""
    case = CASES["llava"]
    prompts, options = case.prompts([0]), generation_options(case)
    key = cache_name(case.model.forward)
    cache = DynamicCache(config=case.model.config.get_text_config())
    words = torch.tensor([[7, 11, 9]])
    with apply_pruning(case.model, CONFIG):
        given = dict(prompts)
        if second:
            first = case.model.generate(**prompts, **options, **{key: cache})
            before = cache.get_seq_length()
            kept = copy.deepcopy(cache)
            given["input_ids"] = torch.cat((first, prompts["input_ids"]), dim=1)
            given["attention_mask"] = torch.ones_like(given["input_ids"])
        with pytest.raises(KeyboardInterrupt):
            case.model.generate(**given, **options, streamer=Gone(), **{key: cache})
        ids = torch.cat((given["input_ids"], words), dim=1)
        for later in ({"input_ids": ids}, {**prompts, "input_ids": torch.cat((ids, prompts["input_ids"]), dim=1)}):
            later["attention_mask"] = torch.ones_like(later["input_ids"])
            with pytest.raises(SaccadeError, match="with pruned images that raised: pass the whole conversation"):
                case.model.generate(**later, **options, **{key: copy.deepcopy(cache)})
        if second:  # without what that call left, it goes on as if there had been none
            cut = copy.deepcopy(cache)
            cut.crop(before - cut.get_seq_length())
            text = torch.cat((first, words), dim=1)
            later = {"input_ids": text, "attention_mask": torch.ones_like(text)}
            answers = [case.model.generate(**later, **options, **{key: one}) for one in (cut, kept)]
            assert torch.equal(*answers)
        cache.reset()
        again = case.model.generate(**prompts, **options, **{key: cache})
        assert torch.equal(again, case.model.generate(**prompts, **options))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_cache_is_handed_from_forward_to_generate_and_back(name):
    """Also when the model is patched anew; the note on a cache ends with it, and when it is reset."""
    case = CASES[name]
    prompts, key = case.prompts([0, 1]), cache_name(case.model.forward)
    options = {**generation_options(case), "return_dict_in_generate": True}
    config = CONFIG.replace(positions="original")
    with apply_pruning(case.model, config), torch.no_grad():
        expected, tokens = generated_logits(case, prompts)
        cache = cache_of(case.model(**prompts, use_cache=True))
    with apply_pruning(case.model, config), torch.no_grad():
        whole = {
            name: value for name, value in longer(case, prompts, tokens[:, :1]).items() if name != "token_type_ids"
        }
        found = case.model.generate(**whole, **{key: cache}, **{**options, "max_new_tokens": 2, "min_new_tokens": 2})
        assert torch.equal(found.sequences[:, -2:], tokens[:, 1:3])
        output = case.model(input_ids=tokens[:, 2:3], **{key: cache})
        torch.testing.assert_close(output.logits[:, -1], expected[3], **CLOSE)
        # Several tokens at once, in a batch in which one row has fewer.
        cache = cache_of(case.model(**prompts, use_cache=True))
        mask = torch.nn.functional.pad(prompts["attention_mask"], (0, 3), value=1)
        mask[1, -1] = 0
        output = case.model(input_ids=tokens[:, :3], attention_mask=mask, **{key: cache})
        torch.testing.assert_close(output.logits[0], expected[1:4, 0], **CLOSE)
        torch.testing.assert_close(output.logits[1, :2], expected[1:3, 1], **CLOSE)
        cache.reset()
        words = {name: prompts[name] for name in ("input_ids", "attention_mask")}
        words["input_ids"] = words["input_ids"].masked_fill(case.family.placeholder(words["input_ids"]), 7)
        torch.testing.assert_close(
            case.model(**words, **{key: cache}).logits, case.model(**words, use_cache=False).logits
        )
        gone = weakref.ref(cache)
        del cache, output, found
    assert gone() is None


def test_limits_of_the_length_count_the_prompt_that_was_given(in_place):
    case = CASES["llava"]
    prompts = case.prompts([0])
    length = prompts["input_ids"].shape[1]
    options = {**generation_options(case), "max_length": length + 3}
    del options["max_new_tokens"], options["min_new_tokens"]
    with in_place(case.model):
        assert case.model.generate(**prompts, **options).shape[1] == length + 3
        config = GenerationConfig(max_length=length + 2, do_sample=False, pad_token_id=0)
        assert case.model.generate(**prompts, generation_config=config).shape[1] <= length + 2
        assert config.max_length == length + 2
        structured = case.model.generate(**prompts, **options, return_dict_in_generate=True)
        assert structured.sequences.shape[1] == length + 3


LIMITS = [{"min_length": 3, "max_length": 9}, {"min_length": 3, "max_new_tokens": 9}, {"max_length": 3}]


@pytest.mark.parametrize("places", ["keywords", "config", "model", "config and model", "keywords and model"])
@pytest.mark.parametrize("limits", LIMITS, ids=" ".join)
def test_limits_count_it_wherever_they_are_set(in_place, places, limits, monkeypatch):
    """The stock model's number of new tokens on as long a prompt, which ends once it may."""
    case = CASES["llava"]
    prompts = case.prompts([0])
    length = prompts["input_ids"].shape[1]
    limits = {name: value + (0 if "new" in name else length) for name, value in limits.items()}
    lower = {name: limits[name] for name in limits if name.startswith("min")}
    # Every token but one ends an answer that may end, and none one that may not be longer.
    rest = {"do_sample": False, "pad_token_id": 0}
    if lower:
        rest["eos_token_id"] = list(range(1, case.model.config.text_config.vocab_size))
    else:
        rest["suppress_tokens"] = generation_options(case)["suppress_tokens"]
    config = GenerationConfig(**rest)
    given: dict = rest if "keywords" in places else {"generation_config": config}
    if places == "keywords":
        given = {**rest, **limits}
    elif places == "config":
        given = {"generation_config": GenerationConfig(**rest, **limits)}
    elif places == "model":
        given = rest
    in_model = lower if places == "keywords and model" else limits
    if "model" in places:
        for name, value in in_model.items():
            monkeypatch.setattr(case.model.generation_config, name, value)
    if places == "keywords and model":
        given = {**rest, **{name: value for name, value in limits.items() if name not in lower}}
    expected = case.model.generate(**prompts, **given).shape[1] - length
    with in_place(case.model):
        assert case.model.generate(**prompts, **given).shape[1] - length == expected
    assert expected == (4 if lower else 3)


class Until(StoppingCriteria):
    """Ends each row at a token after the prompt that it was made for."""

    def __init__(self, token: int, prompt: torch.Tensor) -> None:
        self.token, self.start = token, prompt.shape[1]

    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids[:, self.start :] == self.token).any(dim=1)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_functions_of_the_caller_see_the_prompt_that_was_given(in_place, options):
    case = CASES["llava"]
    prompts = case.prompts([0, 1])
    length = prompts["input_ids"].shape[1]
    rows, given = [], {**generation_options(case), **options}

    def allowed(number: int, ids: torch.Tensor) -> list[int]:
        rows.append((number, ids[:length]))
        return list(range(40, 60))

    class Seen(LogitsProcessor):
        def __call__(self, input_ids, scores):
            assert (input_ids[:, :length].repeat_interleave(1, 0) == self.expected(len(input_ids))).all()
            return scores

        def expected(self, batch: int) -> torch.Tensor:
            return prompts["input_ids"].repeat_interleave(batch // 2, dim=0)

    with in_place(case.model):
        output = case.model.generate(**prompts, **given, logits_processor=[Seen()], prefix_allowed_tokens_fn=allowed)
        until = Until(int(output[0, length]), prompts["input_ids"])
        ended = case.model.generate(**prompts, **given, prefix_allowed_tokens_fn=allowed, stopping_criteria=[until])
        if not options:
            assert torch.equal(ended[1], output[1, : ended.shape[1]])
            assert not ended[0, length + 1 :].any()
    several = 1 if "num_beams" in options else options.get("num_return_sequences", 1)
    assert rows
    for number, ids in rows:
        assert torch.equal(ids, prompts["input_ids"][number // several])


def test_a_streamer_begins_with_the_prompt_that_was_given(in_place):
    case = CASES["llava"]
    prompts, put = case.prompts([0]), []

    class Streamer(BaseStreamer):
        def put(self, value):
            put.append(value)

        def end(self):
            put.append(None)

    with in_place(case.model):
        output = case.model.generate(**prompts, **generation_options(case), streamer=Streamer())
    assert put.pop() is None
    assert torch.equal(torch.cat([one.flatten() for one in put]), output[0])


def test_a_mask_that_is_missing_is_inferred_as_by_the_stock_model(in_place):
    """From padding, unless that ends answers too; in a further turn likewise."""
    case = CASES["llava"]
    prompts, options = case.prompts(), generation_options(case)
    unmasked = {name: value for name, value in prompts.items() if name != "attention_mask"}
    options |= {"min_new_tokens": options["max_new_tokens"], "return_dict_in_generate": True, "output_logits": True}
    masks = {2: prompts["attention_mask"], 0: torch.ones_like(prompts["input_ids"])}
    assert not masks[2].all()
    for end, mask in masks.items():
        answers = []
        with in_place(case.model):
            for given in (unmasked, {**prompts, "attention_mask": mask}):
                output = case.model.generate(**given, **options, pad_token_id=0, eos_token_id=end)
                answers += [torch.stack(output.logits)]
                ids = torch.nn.functional.pad(output.sequences, (0, 2), value=7)
                added = ids.shape[1] - mask.shape[1]
                on = {cache_name(case.model.forward): cache_of(output), "input_ids": ids}
                if "attention_mask" in given:
                    on["attention_mask"] = torch.nn.functional.pad(mask, (0, added), value=1)
                output = case.model.generate(**on, **options, pad_token_id=0, eos_token_id=end)
                answers += [torch.stack(output.logits)]
        torch.testing.assert_close(answers[:2], answers[2:])


def test_a_further_turn_goes_on_with_several_answers():
    case = CASES["llava"]
    prompts, options = case.prompts([0]), generation_options(case)
    sampled = {**options, "do_sample": True, "num_return_sequences": 2, "return_dict_in_generate": True}
    with apply_pruning(case.model, CONFIG):
        output = case.model.generate(**prompts, **sampled)
        ids = torch.cat((output.sequences, torch.tensor([[7, 8], [7, 8]])), dim=1)
        found = case.model.generate(input_ids=ids, **{cache_name(case.model.forward): cache_of(output)}, **options)
    pruned = prune_inputs(case.model, prompts, CONFIG)
    answers = ids[:, prompts["input_ids"].shape[1] :]
    both = {name: pruned[name].repeat_interleave(2, dim=-2) for name in ("input_ids", "attention_mask")}
    features = {name: pruned[name] for name in pruned if name not in (*both, "position_ids")}
    assert torch.equal(found[:, : ids.shape[1]], ids)
    for row, answer in enumerate(answers):
        whole = {name: torch.cat((both[name][:1], torch.ones_like(answer)[None]), dim=1) for name in both}
        whole["input_ids"][0, -len(answer) :] = answer
        expected = case.model.generate(**whole, **features, **options)
        assert torch.equal(found[row, ids.shape[1] :], expected[0, whole["input_ids"].shape[1] :])


@pytest.mark.parametrize("given", [("pixel_values",), ("cache",), ("pixel_values", "inputs_embeds")])
def test_ids_that_are_missing_are_one_line(given):
    case = CASES["llava"]
    prompts = case.prompts([0])
    with apply_pruning(case.model, CONFIG):
        output = case.model.generate(**prompts, **generation_options(case), return_dict_in_generate=True)
        values = {**prompts, "cache": cache_of(output), "inputs_embeds": torch.zeros(1, 4, 8)}
        names = {"cache": cache_name(case.model.forward)}
        with pytest.raises(SaccadeError, match=r"input_ids"):
            case.model.generate(**{names.get(name, name): values[name] for name in given}, max_new_tokens=2)


def test_a_trained_folder_says_how(tmp_path):
    """Its reducer, its ratio and its isolator."""
    case = CASES["llava"]
    torch.manual_seed(0)
    ModeIsolator(3, case.model.config.get_text_config().hidden_size).save_pretrained(tmp_path)
    CONFIG.replace(reducer="uniform", isolator=str(tmp_path)).save_pretrained(tmp_path)
    config = PruningConfig.from_pretrained(tmp_path)
    assert (config.reducer, config.isolator) == ("uniform", str(tmp_path))
    pruned = prune_inputs(case.model, case.prompts(), config)
    plain = prune_inputs(case.model, case.prompts(), config.replace(isolator=None))
    assert pruned["attention_mask"].sum() > plain["attention_mask"].sum()
    with apply_pruning(case.model, tmp_path) as pruning:
        assert pruning.config == config
        found = case.model.generate(**case.prompts(), **generation_options(case))
    expected = case.model.generate(**pruned, **generation_options(case))
    assert torch.equal(found[:, -6:], expected[:, -6:])


@pytest.mark.parametrize(
    "open_with",
    [
        lambda folder, **options: PruningConfig.from_pretrained(folder, **options),
        lambda folder, **options: pruning_config(folder, **options),
        lambda folder, **options: folder_pruning(folder, options or None),
        lambda folder, **options: plan_inferences(str(folder), ["pruned"], **options)[0].pruning,
    ],
)
def test_what_is_replaced_of_a_trained_folder_need_not_be_known_here(open_with, tmp_path):
    """Such as a reducer of the trainer's own, with its options; what is not replaced is checked."""
    values = {"reducer": "mine", "reducer_options": {"sharpness": 3}, "keep_tokens": 7, "positions": "original"}
    (tmp_path / "pruning_config.json").write_text(json.dumps(values))
    with pytest.raises(SaccadeError, match=r"pruning_config.json': reducer='mine' is unknown"):
        open_with(tmp_path)
    with pytest.raises(
        SaccadeError, match=r"pruning_config.json' with other values of prune_ratio: reducer='mine' is"
    ):
        open_with(tmp_path, prune_ratio=0.5)
    config = open_with(tmp_path, reducer="random", reducer_options={"seed": 1})
    assert config == PruningConfig("random", {"seed": 1}, keep_tokens=7, positions="original")
    config = open_with(tmp_path, reducer="uniform", prune_ratio=0.5)
    assert config == PruningConfig("uniform", prune_ratio=0.5, positions="original")


def test_adapters_threads_and_copies():
    case = CASES["llava"]
    wrapped = get_peft_model(copy.deepcopy(case.model), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    batches = [case.prompts([row]) for row in (0, 1, 3, 0)]
    options = generation_options(case)
    expected = [wrapped.generate(**prune_inputs(wrapped, batch, CONFIG), **options)[:, -6:] for batch in batches]
    pruning = apply_pruning(wrapped, CONFIG)
    twin = copy.deepcopy(wrapped)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda batch: wrapped.generate(**batch, **options)[:, -6:], batches))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    pruning.remove()
    pruning.remove()
    assert torch.equal(twin.generate(**batches[0], **options)[:, -6:], expected[0])


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_a_model_that_is_pickled_prunes(name):
    case = Case(name, FAMILIES[name])
    batch, options, file = case.prompts([0]), generation_options(case), io.BytesIO()
    pruning = apply_pruning(case.model, CONFIG)
    # Before its first forward, in which transformers adds hooks that cannot be pickled.
    torch.save(case.model, file)
    expected, answer = case.model(**batch).logits, case.model.generate(**batch, **options)
    pruning.remove()
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(**batch).logits, expected)
    assert expected.shape != case.model(**batch).logits.shape
    assert torch.equal(loaded.generate(**batch, **options), answer)


def test_a_pipeline_prunes():
    case = CASES["llava"]
    pipe = pipeline("image-text-to-text", model=case.model, processor=case.processor, device="cpu")
    seen = []
    handle = case.family.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    messages = [{"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (64, 64))}]}]
    lengths = []
    for _ in range(2):
        with apply_pruning(case.model, CONFIG) if lengths else torch.no_grad():
            text = pipe(text=messages, max_new_tokens=2, return_full_text=False)[0]["generated_text"]
        assert isinstance(text, str)
        lengths.append(seen[0])
        seen.clear()
    handle.remove()
    assert lengths[0] - lengths[1] == 64 - CONFIG.count(64)


def test_what_cannot_be_is_said_in_one_line():
    case = CASES["llava"]
    prompts = case.prompts([0])
    with apply_pruning(case.model, CONFIG):
        with pytest.raises(SaccadeError, match="prunes or skips already"):
            apply_pruning(case.model, CONFIG)
        with pytest.raises(SaccadeError, match="skips or prunes already"):
            apply_skip_vision(case.model)
        cached = case.model.generate(**prompts, **generation_options(case), return_dict_in_generate=True)
        on = {cache_name(case.model.forward): cache_of(cached)}
        with pytest.raises(SaccadeError, match="input_ids: a further turn on the cache of a pruned"):
            case.model.generate(input_ids=cached.sequences[:, 1:], **on)
        step = {"input_ids": torch.tensor([[7]]), **on}
        with pytest.raises(SaccadeError, match="images after tokens that the key-value cache holds: pass"):
            case.model(**prompts, **on)
        with pytest.raises(SaccadeError, match=r"attention_mask has 1 columns: after a pruned prompt, give that of"):
            case.model(**step, attention_mask=torch.ones(1, 1))
        cropped = copy.deepcopy(on)
        cache_of(cropped).crop(-30)
        for call in (case.model, case.model.generate):
            with pytest.raises(
                SaccadeError, match=r"the key-value cache was cropped to \d+ tokens, within a pruned prompt of"
            ):
                call(**{**step, **cropped})
        with pytest.raises(SaccadeError, match="logits_to_keep: the places of a tensor are those of the prompt"):
            case.model(**prompts, logits_to_keep=torch.tensor([3, 5]))
        with pytest.raises(SaccadeError, match="position_ids: visual tokens are dropped"):
            case.model.generate(**prompts, position_ids=torch.zeros_like(prompts["input_ids"]))
        for batching in (
            partial(case.model.generate_batch, [[1]]),
            case.model.init_continuous_batching,
            case.model.continuous_batching_context_manager().__enter__,
        ):
            with pytest.raises(SaccadeError, match="continuous batching reads text only"):
                batching()
        words = case.model.generate(**case.prompts([2]), **generation_options(case), return_dict_in_generate=True)
        with pytest.raises(SaccadeError, match="holds a conversation that did not begin with pruned images"):
            case.model.generate(**prompts, **{next(iter(on)): cache_of(words)})
    for config, reason in (
        (CONFIG.replace(adaptive=True), "adaptive=True"),
        (CONFIG.replace(fit_length=100), "fit_length=100"),
        (CONFIG.replace(budget="sample"), "budget='sample'"),
        (PruningConfig("cdpruner"), "reducer='cdpruner'"),
    ):
        with pytest.raises(SaccadeError, match=f"images of a further turn: with {reason}, which tokens"):
            with_later_image(case, ([0], [3]), config)
    with pytest.raises(SaccadeError, match=r"with attention in both directions \(gemma3\)"):
        with_later_image(CASES["gemma3"], ([0], [3]), CONFIG)
    skip = apply_skip_vision(case.model)
    with pytest.raises(SaccadeError, match="prunes or skips already"):
        apply_pruning(case.model, CONFIG)
    skip.remove()
    with pytest.raises(SaccadeError, match="'ratio' is not an option of pruning"):
        apply_pruning(case.model, ratio=0.5)
    with pytest.raises(SaccadeError, match=r"has no pruning_config\.json"):
        apply_pruning(case.model, "nowhere")
