"""Skip-Vision while generating: skipped rows leave the cache, and what is written is as if they were masked in it."""

import copy

import pytest
import torch
from family_models import FAMILIES, WITH_VIDEO, VideoCase
from skip_tester import (
    CLOSE,
    FullCache,
    banned_tokens,
    greedy_options,
    options_for,
    oracle_logits,
    skipping,
    with_cache,
)
from transformers import DynamicCache

from saccade import SaccadeError
from saccade.pruning.cache import cache_of
from saccade.skip_vision.cache import read_length, stored_length
from saccade.testing import families as tester
from saccade.tokens import Role

FREEING = [name for name in FAMILIES if name != "gemma3"]
CASES = {name: tester.Case(name, FAMILIES[name]) for name in FAMILIES}
CASES |= {f"{name} videos": VideoCase(name, FAMILIES[name]) for name in WITH_VIDEO}
COUNT = 32


@pytest.fixture(params=[name for name in CASES if name != "gemma3"])
def case(request):
    return CASES[request.param]


KINDS = ("llava", "internvl", "qwen2_5_vl", "qwen3_vl videos")
"""Positions on one axis and on three, rows of several crops, features that are added at deeper layers, and clips."""


@pytest.fixture(
    params=[pytest.param(name, marks=[] if name in KINDS else pytest.mark.slow) for name in CASES if name != "gemma3"]
)
def kind(request):
    """For what `generate` does with the cache once a family's prompt is in it: one family of each kind."""
    return CASES[request.param]


@pytest.fixture
def llava():
    return CASES["llava"]


def generated(output, inputs):
    return output.sequences[:, inputs["input_ids"].shape[1] :]


@pytest.mark.interfaces
def test_compacted_cache_equals_masked_full_cache(case):
    """Greedy tokens and logits, with different numbers of skipped rows, text-only samples and left padding."""
    check_compacted_cache(case, range(4))


@pytest.mark.parametrize("row", [1, 2], ids=["two images", "text"])
def test_compacted_cache_of_a_prompt_alone(kind, row):
    check_compacted_cache(kind, [row])


def check_compacted_cache(case, rows):
    prompts = case.prompts(rows)
    if case.name == "llava_onevision":
        prompts.pop("mm_token_type_ids", None)  # a text-only sample of the tests has it, the model does not take it
    with skipping(case.model, options_for(case.name)) as skip:
        prepared = skip.prepare(prompts, padding_side="left")
        output = case.model.generate(**prompts, **greedy_options(case.model, COUNT))
    oracle = FullCache(case.model)
    tokens, logits = oracle.greedy(oracle.read(prepared), COUNT, banned_tokens(case.model))
    assert torch.equal(output.sequences[:, : prompts["input_ids"].shape[1]], prompts["input_ids"])
    assert torch.equal(generated(output, prompts), tokens)
    torch.testing.assert_close(torch.stack(output.logits), logits, **CLOSE)


def test_the_masked_rows_do_matter(llava):
    """The oracle of the test above would see it if skipped rows stayed visible."""
    prompts = llava.prompts()
    with skipping(llava.model, options_for("llava")) as skip:
        prepared = skip.prepare(prompts, padding_side="left")
    hidden, seen = FullCache(llava.model), FullCache(llava.model)
    first, second = hidden.read(prepared), seen.read(prepared)
    torch.testing.assert_close(first, second)
    seen.mask = prepared["attention_mask"]
    token = first.argmax(dim=1)
    assert not torch.allclose(hidden.write(token), seen.write(token), atol=1e-2)


def test_memory_is_freed(case):
    """What the cache stores is the kept rows, of every layer."""
    prompts = case.prompts()
    stored = {}
    for drop in (True, False):
        with skipping(case.model, options_for(case.name, drop_kv=drop)) as skip:
            roles = skip.prepare(prompts, padding_side="left")["skip_roles"]
            cache = cache_of(case.model.generate(**prompts, **greedy_options(case.model, 5)))
        assert read_length(cache) == roles.shape[1] + 4
        layers = [(layer.keys, layer.values) for layer in cache.layers]
        assert len({keys.shape for pair in layers for keys in pair}) == 1
        stored[drop] = sum(t.untyped_storage().nbytes() for pair in layers for t in pair), stored_length(cache)
    kept = int(((roles != Role.SKIPPED) & (roles != Role.PADDING)).sum(dim=1).max())
    assert stored[True][1] == kept + 4
    assert stored[False][1] == roles.shape[1] + 4
    assert stored[True][0] * stored[False][1] == stored[False][0] * stored[True][1]
    assert stored[True][0] < stored[False][0]


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"num_return_sequences": 2, "do_sample": True},
        {"do_sample": True, "top_k": 5},
        {"prefill_chunk_size": 7},
        {"use_cache": False},
    ],
    ids=lambda options: " ".join(options),
)
def test_ways_of_generating(kind, options):
    """Each equals the same with all rows in the cache and a mask instead of compaction."""
    if "prefill_chunk_size" in options and "onevision" in kind.name:
        pytest.skip("the stock model's chunks count frames otherwise")
    prompts = kind.prompts()
    outputs = []
    for config in ({}, {"drop_kv": False, "text_visibility": "prompt_only"}):
        changed = options if config == {} else {k: v for k, v in options.items() if k in SAME_WAY}
        with skipping(kind.model, options_for(kind.name, **config)):
            torch.manual_seed(5)
            given = {"max_new_tokens": 8, "suppress_tokens": banned_tokens(kind.model), "do_sample": False, **changed}
            outputs.append(kind.model.generate(**prompts, **given))
    several = options.get("num_return_sequences", 1)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(
        outputs[0][:, : prompts["input_ids"].shape[1]], prompts["input_ids"].repeat_interleave(several, dim=0)
    )


SAME_WAY = ("num_beams", "num_return_sequences", "do_sample", "top_k")


def test_prompt_lookup_equals_greedy(kind):
    prompts = kind.prompts([1])
    with skipping(kind.model, options_for(kind.name)):
        options = greedy_options(kind.model, 24)
        plain = kind.model.generate(**prompts, **options)
        looked = kind.model.generate(**prompts, **options, prompt_lookup_num_tokens=3)
    assert torch.equal(plain.sequences, looked.sequences)


def test_full_cache_stays_where_asked(case):
    """With drop_kv off, answers attend to the skipped rows, as in training as published."""
    prompts = case.prompts()
    with skipping(case.model, options_for(case.name, drop_kv=False)) as skip:
        output = case.model.generate(**prompts, **greedy_options(case.model, 6))
        uncached = case.model.generate(**prompts, **greedy_options(case.model, 6), use_cache=False)
        prepared = skip.prepare(prompts, padding_side="left")
    assert torch.equal(output.sequences, uncached.sequences)
    torch.testing.assert_close(output.logits[0], oracle_logits(case.model, prepared)[:, -1], **CLOSE)
    torch.testing.assert_close(torch.stack(output.logits), torch.stack(uncached.logits), **CLOSE)


def test_gemma_generates_with_its_full_cache():
    case = CASES["gemma3"]
    prompts = case.prompts()
    with skipping(case.model, options_for("gemma3")):
        cached, uncached = (
            case.model.generate(**prompts, **greedy_options(case.model, 6), use_cache=use) for use in (True, False)
        )
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(uncached.logits), **CLOSE)


def second_turn(case, prompts, row):
    """Text of a further question, and another sample whose image comes with it: two dicts of processor outputs."""
    tokenizer = case.processor.tokenizer
    ids = tokenizer("how many digits ?", add_special_tokens=False, return_tensors="pt")["input_ids"]
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return text, case.prompts([row])


@pytest.mark.parametrize("with_image", [False, True], ids=["text", "image"])
@pytest.mark.parametrize("row", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_second_turn(kind, row, with_image):
    """A conversation continues from the cache, with more text or another image, as if all rows were still there."""
    prompts = kind.prompts([row])
    text, picture = second_turn(kind, prompts, 3)
    new = picture if with_image else text
    with skipping(kind.model, options_for(kind.name)) as skip:
        first_prepared = skip.prepare(prompts, padding_side="left")
        first = kind.model.generate(**prompts, **greedy_options(kind.model, 5))
        # The last token that was written is not in the cache yet.
        last = first.sequences[:, -1:]
        behind = {**new, "input_ids": torch.cat((last, new["input_ids"]), dim=1)}
        behind["attention_mask"] = torch.ones_like(behind["input_ids"])
        if "mm_token_type_ids" in new:
            types = new["mm_token_type_ids"]
            behind["mm_token_type_ids"] = torch.cat((types.new_zeros(1, 1), types), dim=1)
        second_prepared = skip.prepare(behind, padding_side="left")
        whole = {**behind, "input_ids": torch.cat((first.sequences[:, :-1], behind["input_ids"]), dim=1)}
        whole["attention_mask"] = torch.ones_like(whole["input_ids"])
        if "mm_token_type_ids" in new:
            zeros = whole["input_ids"].new_zeros(1, whole["input_ids"].shape[1] - behind["input_ids"].shape[1])
            whole["mm_token_type_ids"] = torch.cat((zeros, behind["mm_token_type_ids"]), dim=1)
        cache = cache_of(first)
        kept = stored_length(cache)
        second = kind.model.generate(**whole, **greedy_options(kind.model, COUNT), **with_cache(kind.model, cache))
        third_kept = stored_length(cache)
    oracle = FullCache(kind.model)
    tokens, _ = oracle.greedy(oracle.read(first_prepared), 5, banned_tokens(kind.model))
    assert torch.equal(generated(first, prompts), tokens)
    tokens, logits = oracle.greedy(oracle.read(second_prepared), COUNT, banned_tokens(kind.model))
    assert torch.equal(generated(second, whole), tokens)
    torch.testing.assert_close(torch.stack(second.logits), logits, **CLOSE)
    roles = second_prepared["skip_roles"]
    assert (roles == Role.SKIPPED).any() == with_image
    assert third_kept == kept + int((roles != Role.SKIPPED).sum()) + COUNT - 1


def test_new_tokens_alone_may_be_given(llava):
    prompts = llava.prompts([0])
    text, _ = second_turn(llava, prompts, 3)
    with skipping(llava.model, options_for("llava")):
        first = llava.model.generate(**prompts, **greedy_options(llava.model, 5))
        twin = copy.deepcopy(cache_of(first))
        ids = torch.cat((first.sequences, text["input_ids"]), dim=1)
        options = greedy_options(llava.model, 6)
        whole = llava.model.generate(input_ids=ids, **with_cache(llava.model, cache_of(first)), **options)
        new = ids[:, first.sequences.shape[1] - 1 :]
        alone = llava.model.generate(
            input_ids=new, attention_mask=torch.ones_like(ids), **with_cache(llava.model, twin), **options
        )
    assert torch.equal(whole.sequences[:, -6:], alone.sequences[:, -6:])


@pytest.mark.parametrize("drop", [True, False], ids=["drop_kv", "full cache"])
@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_a_further_turn_however_the_cache_was_filled(name, drop):
    """By forwards, by `generate` on new tokens only, or by both: what `generate` writes after the whole conversation.

    The penalty depends on every token before, which the cache therefore has to know.
    """
    case = CASES[name]
    model, prompts = case.model, case.prompts([0])
    options = {**greedy_options(model, 3), "repetition_penalty": 1.5}
    text, _ = second_turn(case, prompts, 3)

    def on(output, *ids):
        new = torch.cat(ids, dim=1)
        return {"input_ids": new, "attention_mask": torch.ones_like(new), **with_cache(model, cache_of(output))}

    with skipping(model, options_for(name, drop_kv=drop)), torch.no_grad():
        first = model.generate(**prompts, **options)
        second = model.generate(**on(copy.deepcopy(first), first.sequences, text["input_ids"]), **options)
        whole = torch.cat((second.sequences, text["input_ids"]), dim=1)
        expected = model.generate(**on(copy.deepcopy(second), whole), **options)
        read = first.sequences.shape[1] - 1
        rest = whole[:, read:-4]

        filled = {"generate, forward": model(**on(copy.deepcopy(first), rest))}
        steps = copy.deepcopy(first)
        for token in rest.T:
            steps = model(**on(steps, token.unsqueeze(1)))
        filled["generate, forwards"] = steps
        alone = on(copy.deepcopy(first), whole[:, read : -3 - text["input_ids"].shape[1]])
        alone["attention_mask"] = torch.ones(1, read + alone["input_ids"].shape[1], dtype=torch.long)
        filled["generate, new tokens"] = model.generate(**alone, **options)
        if not drop:  # else the answer would see other tokens
            output = model(**prompts, use_cache=True)
            filled["forward, forward"] = model(**on(output, whole[:, prompts["input_ids"].shape[1] : -4]))
        for way, output in filled.items():
            found = model.generate(**on(output, whole), **options)
            assert torch.equal(found.sequences, expected.sequences), way
            torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), **CLOSE)


@pytest.mark.parametrize("with_forward", [False, True], ids=["generate", "forward"])
@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_padding_behind_a_shorter_answer_is_hidden_from_later_turns(name, with_forward):
    """The mask of a further turn says where it is, in the cache or not."""
    case = CASES[name]
    text, _ = second_turn(case, None, 3)
    with skipping(case.model, options_for(name)), torch.no_grad():
        found = []
        for rows, count in (([0, 3], 6), ([0], 3)):
            prompts = case.prompts(rows)
            first = case.model.generate(**prompts, **greedy_options(case.model, count))
            new = text["input_ids"].expand(len(rows), -1)
            ids = torch.cat((first.sequences, new), dim=1)
            mask = torch.ones_like(ids)
            mask[:, : prompts["attention_mask"].shape[1]] = prompts["attention_mask"]
            mask[0, -new.shape[1] - count + 3 : -new.shape[1]] = 0
            cache = with_cache(case.model, cache_of(first))
            if with_forward:
                unread = new.shape[1] + 1
                output = case.model(input_ids=ids[:, -unread:], attention_mask=mask, **cache)
                found.append(output.logits[0, -1])
            else:
                output = case.model.generate(
                    input_ids=ids, attention_mask=mask, **cache, **greedy_options(case.model, 3)
                )
                found.append(torch.stack(output.logits)[:, 0])
    torch.testing.assert_close(*found, **CLOSE)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3"])
def test_a_further_turn_of_a_batch(name):
    """Each row as by itself, also if the model makes its masks before its language model."""
    case = CASES[name]
    answers, options = [], greedy_options(case.model, 4)
    with skipping(case.model, options_for(name)):
        for rows in (range(4), *([row] for row in range(4))):
            prompts = case.prompts(rows)
            first = case.model.generate(**prompts, **options)
            whole = {"input_ids": torch.nn.functional.pad(first.sequences, (0, 3), value=21)}
            whole["attention_mask"] = torch.nn.functional.pad(prompts["attention_mask"], (0, 7), value=1)
            second = case.model.generate(**whole, **with_cache(case.model, cache_of(first)), **options)
            answers.append(torch.stack(second.logits))
    torch.testing.assert_close(torch.cat(answers[1:], dim=1), answers[0], **CLOSE)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3"])
def test_a_forward_of_a_further_image_takes_either_mask(name):
    """That of the whole conversation, or of the new tokens: what `generate` does."""
    case, picture = CASES[name], CASES[name].prompts([3])
    with skipping(case.model, options_for(name)), torch.no_grad():
        first = case.model.generate(**case.prompts([0]), **greedy_options(case.model, 3))
        ids, last = picture["input_ids"], first.sequences[:, -1:]
        part = {**picture, "input_ids": torch.cat((last, ids), dim=1)}
        for types in {"token_type_ids", "mm_token_type_ids"} & picture.keys():
            part[types] = torch.nn.functional.pad(picture[types], (1, 0))
        masks = [torch.ones_like(part["input_ids"]), torch.ones(1, first.sequences.shape[1] + ids.shape[1]).long()]
        given = {**part, "attention_mask": masks[1], **with_cache(case.model, cache_of(copy.deepcopy(first)))}
        expected = case.model.generate(**given, **greedy_options(case.model, 1)).logits[0]
        for mask in masks:
            cache = with_cache(case.model, cache_of(copy.deepcopy(first)))
            found = case.model(**{**part, "attention_mask": mask}, **cache).logits[:, -1]
            torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.interfaces
@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "qwen3_vl"])
def test_a_loop_of_forwards(name):
    """`forward` with a cache continues at the right positions, whether or not they are given."""
    case = CASES[name]
    prompts = case.prompts([1])
    with skipping(case.model, options_for(name)), torch.no_grad():
        expected = case.model.generate(**prompts, **greedy_options(case.model, 6))
        output = case.model(
            **prompts, **with_cache(case.model, DynamicCache(config=case.model.config.get_text_config()))
        )
        got = [output.logits[:, -1]]
        for token in generated(expected, prompts).T[:-1]:
            output = case.model(input_ids=token.unsqueeze(1), **with_cache(case.model, cache_of(output)))
            got.append(output.logits[:, -1])
    torch.testing.assert_close(torch.stack(got), torch.stack(expected.logits), **CLOSE)


def test_a_row_answers_as_alone_beside_a_longer_one_that_skips_nothing(llava):
    """The batch then has as many columns as before, but those of the row that skips are in other places."""
    prompts, options = llava.prompts([0]), greedy_options(llava.model, 16)
    ids, longer = prompts["input_ids"], prompts["input_ids"].shape[1] + 10
    text = torch.randint(20, 60, (1, longer), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, longer, dtype=torch.long)
    mask[0, :10] = 0
    both = {**prompts, "input_ids": torch.cat((torch.nn.functional.pad(ids, (10, 0)), text)), "attention_mask": mask}
    with skipping(llava.model, options_for("llava")):
        alone = torch.stack(llava.model.generate(**prompts, **options).logits)
        together = torch.stack(llava.model.generate(**both, **options).logits)
    torch.testing.assert_close(together[:, 0], alone[:, 0], **CLOSE)


@pytest.mark.parametrize(
    ("name", "drop"), [("llava", True), ("llava", False), ("qwen2_vl", True), ("qwen2_vl", False), ("gemma3", False)]
)
def test_a_loop_of_forwards_whatever_its_mask(name, drop):
    """With the mask of the conversation as given, or as laid out, or none: each row of a batch as by itself."""
    case, tokens = CASES[name], torch.tensor([[20], [21], [22], [23]])

    def steps(prompts, tokens, *masks):
        output = case.model(**prompts, use_cache=True)
        for mask in masks:
            output = case.model(input_ids=tokens, attention_mask=mask, **with_cache(case.model, cache_of(output)))
        return output.logits[:, -1]

    with skipping(case.model, options_for(name, drop_kv=drop)) as skip, torch.no_grad():
        prompts = case.prompts()
        alone = [steps(case.prompts([row]), tokens[row : row + 1], None, None) for row in range(4)]
        for mask in (prompts["attention_mask"], skip.prepare(prompts, padding_side="left")["attention_mask"]):
            masks = [torch.nn.functional.pad(mask, (0, count), value=1) for count in (1, 2)]
            for given in (masks, (masks[0], None), (None, None)):
                torch.testing.assert_close(steps(prompts, tokens, *given), torch.cat(alone), **CLOSE)


@pytest.mark.parametrize("drop", [True, False], ids=["drop_kv", "full cache"])
@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "qwen3_vl"])
@torch.no_grad()
def test_a_loop_of_forwards_after_padding_on_the_right(name, drop):
    """Positions continue from the last token of each row, and tokens of a later call may be padding too."""
    case = CASES[name]
    tokens = torch.tensor([[20, 21], [0, 22], [23, 24], [0, 25]])
    mask = (tokens != 0).long()
    assert not case.inputs["attention_mask"][:, -1].all()
    with skipping(case.model, options_for(name, drop_kv=drop)) as skip:
        found = []
        for prompts in (case.inputs, skip.prepare(case.inputs, padding_side="left")):
            output = case.model(**prompts, use_cache=True)
            longer = torch.cat((prompts["attention_mask"], mask), dim=1)
            for ids, given in ((tokens, longer), (tokens[:, 1:], None)):
                output = case.model(input_ids=ids, attention_mask=given, **with_cache(case.model, cache_of(output)))
            found.append(output.logits[:, -1])
    torch.testing.assert_close(*found, **CLOSE)


@pytest.mark.parametrize("drop", [True, False], ids=["drop_kv", "full cache"])
@torch.no_grad()
def test_rows_of_a_cache_may_be_moved(llava, drop):
    """Selected, sorted or repeated, by the methods of the cache."""
    tokens, model = torch.tensor([[20], [21], [22], [23]]), llava.model
    with skipping(model, options_for("llava", drop_kv=drop)):
        cache = cache_of(model(**llava.prompts(), use_cache=True))
        moved = {
            "batch_select_indices": torch.tensor([3, 1]),
            "reorder_cache": torch.tensor([2, 0, 3, 1]),
            "batch_repeat_interleave": torch.arange(4).repeat_interleave(2),
        }
        twins = [copy.deepcopy(cache) for _ in moved]
        expected = model(input_ids=tokens, **with_cache(model, cache)).logits
        for twin, (method, rows) in zip(twins, moved.items(), strict=True):
            getattr(twin, method)(2 if "repeat" in method else rows)
            found = model(input_ids=tokens[rows], **with_cache(model, twin)).logits
            torch.testing.assert_close(found, expected[rows], **CLOSE)


def test_prepared_inputs_generate_too(llava):
    """Their output begins with the laid-out prompt."""
    prompts = llava.prompts()
    with skipping(llava.model, options_for("llava")) as skip:
        expected = llava.model.generate(**prompts, **greedy_options(llava.model, 6))
        prepared = skip.prepare(prompts, padding_side="left")
        laid_out = prepared["input_ids"]
        got = llava.model.generate(**prepared, **greedy_options(llava.model, 6))
    assert torch.equal(got.sequences[:, : laid_out.shape[1]], laid_out)
    assert torch.equal(got.sequences[:, laid_out.shape[1] :], generated(expected, prompts))


def test_inputs_by_position(llava):
    prompts = llava.prompts([0])
    with skipping(llava.model, options_for("llava")):
        expected = llava.model.generate(**prompts, max_new_tokens=3, do_sample=False)
        ids = prompts.pop("input_ids")
        assert torch.equal(llava.model.generate(ids, **prompts, max_new_tokens=3, do_sample=False), expected)


def test_what_cannot_work_says_so(llava):
    prompts = llava.prompts([0])
    model = llava.model
    with pytest.raises(SaccadeError, match=r"drop_kv=True.*DynamicSlidingWindowLayer.*drop_kv=False"):
        skipping(CASES["gemma3"].model, options_for("gemma3", drop_kv=True)).__enter__()
    with skipping(model, options_for("llava")):
        with pytest.raises(SaccadeError, match="assistant_model"):
            model.generate(**prompts, assistant_model=model)
        with pytest.raises(SaccadeError, match="StaticLayer"):
            model.generate(**prompts, cache_implementation="static", max_new_tokens=2)
        with pytest.raises(SaccadeError, match="position_ids"):
            model(**prompts, position_ids=torch.zeros_like(prompts["input_ids"]))
        first = model.generate(**prompts, max_new_tokens=3, return_dict_in_generate=True)
        cache = cache_of(first)
        with pytest.raises(SaccadeError, match=r"input_ids has \d+ tokens, of which the key-value cache has read"):
            model.generate(input_ids=first.sequences[:, :5], **with_cache(model, cache))
        ids = torch.cat((first.sequences, first.sequences[:, -3:]), dim=1)
        with pytest.raises(SaccadeError, match="placeholders stand for"):
            model.generate(input_ids=ids, pixel_values=prompts["pixel_values"], **with_cache(model, cache))
        with pytest.raises(SaccadeError, match="cache has 1 rows"):
            model.generate(input_ids=ids.repeat(2, 1), **with_cache(model, cache))
        cache.crop(-4)
        for call in (model, model.generate):
            with pytest.raises(SaccadeError, match="cache was cropped to 10 tokens, within a prompt that is laid out"):
                call(input_ids=ids, **with_cache(model, cache))
    with skipping(model, options_for("llava", drop_kv=False)), torch.no_grad():
        cache = cache_of(model(**prompts, use_cache=True))
        cache.crop(-1)
        with pytest.raises(SaccadeError, match="cache was cropped to 37 tokens, within a prompt that is laid out"):
            model(input_ids=ids, **with_cache(model, cache))
