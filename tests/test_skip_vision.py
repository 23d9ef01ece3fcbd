"""Skip-Vision on every family: what a skipping forward must equal, and that removing it leaves nothing behind."""

import copy
import inspect
import io

import pytest
import torch
from family_models import FAMILIES, WITH_VIDEO, VideoCase
from peft import LoraConfig, get_peft_model
from skip_tester import CLOSE, options_for, oracle_logits, skipping, without_roles

from saccade import SaccadeError
from saccade.reducers import get_reducer
from saccade.skip_vision import apply_skip_vision
from saccade.testing import families as tester
from saccade.tokens import Role, VisualContext

CASES = {name: tester.Case(name, tiny) for name, tiny in FAMILIES.items()}
CASES |= {f"{name} videos": VideoCase(name, FAMILIES[name]) for name in WITH_VIDEO}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def logits_and_roles(model, skip, inputs, side="right", **options):
    """Logits of tokens that are neither skipped nor padding `(M, V)`, and the roles `(B, S)`."""
    prepared = skip.prepare(inputs, padding_side=side)
    with torch.no_grad():
        logits = model(**prepared, use_cache=False, **options).logits
    roles = prepared["skip_roles"]
    return logits[(roles != Role.SKIPPED) & (roles != Role.PADDING)], roles


def test_nothing_skipped_and_no_summary_is_the_stock_model(case):
    stock = tester.logits(case.model, case.inputs)
    with skipping(case.model, options_for(case.name, retained=1.0, skipped=0, summary=False)) as skip:
        got, roles = logits_and_roles(case.model, skip, case.inputs)
    assert not (roles == Role.SKIPPED).any()
    assert torch.equal(got, tester.real(stock, case.inputs["attention_mask"]))


def test_nothing_skipped_is_the_stock_model_but_for_the_summary(case):
    """With the summary rows hidden from attention, at the stock model's positions, nothing else changes."""
    if "token_type_ids" in case.inputs:
        pytest.skip("Gemma's bidirectional attention has no such mask from outside")
    stock = tester.real(tester.logits(case.model, case.inputs), case.inputs["attention_mask"])
    with skipping(case.model, options_for(case.name, retained=1.0, skipped=0)) as skip:
        prepared, roles = without_roles(skip.prepare(case.inputs, padding_side="right"))
    summary = roles == Role.SUMMARY
    assert summary.any()
    if not skip.family.uses_mrope:
        prepared["position_ids"] = ((~summary).cumsum(dim=1) - 1).clamp(min=0)
    prepared["attention_mask"] = prepared["attention_mask"].masked_fill(summary, 0)
    got = tester.logits(case.model, prepared)
    torch.testing.assert_close(got[(roles != Role.PADDING) & ~summary], stock, **CLOSE)


@pytest.mark.parametrize("options", [{}, {"layers": (0, 1)}, {"layers": (1, 2)}], ids=["all", "first", "second"])
def test_gathered_rows_equal_masked_ones(case, options):
    """Rows that are not skipped are those of the stock model with masked feed-forward outputs."""
    config = options_for(case.name, **options)
    with skipping(case.model, config) as skip:
        prepared = skip.prepare(case.inputs)
        got, roles = logits_and_roles(case.model, skip, case.inputs, side=None)
    assert (roles == Role.SKIPPED).any()
    inputs, roles = without_roles(prepared)
    layers = skip.family.language_layers
    handles = []
    for number in range(*(config.layers or (0, len(layers)))):
        hook = lambda module, args, output: output.masked_fill((roles == Role.SKIPPED).unsqueeze(-1), 0)  # noqa: E731
        handles.append(layers[number].mlp.register_forward_hook(hook))
    expected = tester.logits(case.model, inputs)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(got, expected[(roles != Role.SKIPPED) & (roles != Role.PADDING)], **CLOSE)
    # What the last layer's feed-forward network does to skipped rows reaches no other.
    if config.layers == (1, 2) and len(layers) == 2:
        return
    plain = tester.logits(case.model, inputs)
    assert not torch.allclose(got, plain[(roles != Role.SKIPPED) & (roles != Role.PADDING)], atol=1e-2)


def test_the_last_layer_gives_skipped_rows_keys_and_values_only(case):
    counts = {}

    def count(name):
        return lambda module, args, output: counts.__setitem__(name, output.shape[0] * output.shape[1])

    with skipping(case.model, options_for(case.name)) as skip:
        prepared = skip.prepare(case.inputs)
        skipped = int((prepared["skip_roles"] == Role.SKIPPED).sum())
        last = skip.family.language_layers[-1]
        handles = []
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            module = getattr(last.self_attn, name)
            handles.append(module.register_forward_hook(count(name)))
        inner = next(child for child in last.mlp.children() if isinstance(child, torch.nn.Linear))
        handles.append(inner.register_forward_hook(count("mlp")))
        seen = {}
        original = torch.nn.functional.linear
        weights = {id(getattr(last.self_attn, name).weight): name for name in ("q_proj", "k_proj", "v_proj", "o_proj")}

        def watch(x, weight, bias=None):
            if id(weight) in weights:
                seen[weights[id(weight)]] = x.numel() // x.shape[-1]
            return original(x, weight, bias)

        torch.nn.functional.linear = watch
        try:
            tester.logits(case.model, prepared)
        finally:
            torch.nn.functional.linear = original
            for handle in handles:
                handle.remove()
    total = prepared["input_ids"].numel()
    assert counts["mlp"] == total - skipped
    assert seen == {
        "q_proj": total - skipped,
        "k_proj": total,
        "v_proj": total,
        "o_proj": total - skipped,
    }


def test_batch_equals_one_by_one(case):
    with skipping(case.model, options_for(case.name)) as skip:
        together = skip.prepare(case.prompts())
        assert len(set((together["skip_roles"] == Role.SKIPPED).sum(dim=1).tolist())) > 1
        with torch.no_grad():
            logits = case.model(**together).logits[:, -1]
            for row, expected in enumerate(logits):
                alone = case.model(**skip.prepare(case.prompts([row]))).logits[0, -1]
                torch.testing.assert_close(alone, expected, **CLOSE)


def test_padding_sides(case):
    with skipping(case.model, options_for(case.name)) as skip:
        left, right = (logits_and_roles(case.model, skip, case.inputs, side)[0] for side in ("left", "right"))
    torch.testing.assert_close(left, right, **CLOSE)


def test_forward_takes_processor_outputs(case):
    with skipping(case.model, options_for(case.name)) as skip, torch.no_grad():
        prepared = skip.prepare(case.batch)
        got = case.model(**case.batch)
        expected = oracle = case.model(**prepared)
        torch.testing.assert_close(got.loss, expected.loss)
        torch.testing.assert_close(got.logits, oracle.logits)
    inputs = {name: value for name, value in prepared.items() if name != "labels"}
    logits = oracle_logits(case.model, inputs)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), prepared["labels"][:, 1:].flatten())
    torch.testing.assert_close(got.loss, loss, **CLOSE)
    assert (prepared["labels"] != -100).sum() == (case.batch["labels"] != -100).sum()


def test_text_only(case):
    prompt = case.prompts([2])
    assert not case.family.has_images(prompt)
    stock = tester.logits(case.model, prompt)
    with skipping(case.model, options_for(case.name)) as skip:
        assert torch.equal(tester.logits(case.model, prompt), stock)
        prepared = skip.prepare(prompt)
        assert set(prepared["skip_roles"].unique().tolist()) <= {Role.PADDING, Role.TEXT}
        torch.testing.assert_close(tester.logits(case.model, prepared)[0, -1], stock[0, -1], **CLOSE)


def test_remove_restores_everything(case):
    def everything():
        return {name: dict(module.__dict__) for name, module in case.model.named_modules()}

    stock = tester.logits(case.model, case.inputs)  # transformers hangs hooks of its own on the tower, once
    before = everything()
    shapes = {name: set(values["_modules"]) for name, values in before.items()}
    state = {name: value.clone() for name, value in case.model.state_dict().items()}
    with skipping(case.model, options_for(case.name)) as skip:
        tester.logits(case.model, case.inputs)
        assert everything().keys() != before.keys()
    skip.remove()
    after = everything()
    assert {name: set(values["_modules"]) for name, values in after.items()} == shapes
    assert {name: set(values) for name, values in after.items()} == {name: set(v) for name, v in before.items()}
    for name, values in before.items():
        assert all(
            after[name][key] is value for key, value in values.items() if key[0] != "_" and key != "rope_deltas"
        )
    assert all(torch.equal(value, state[name]) for name, value in case.model.state_dict().items())
    assert torch.equal(tester.logits(case.model, case.inputs), stock)


def test_a_deep_copy_skips_on_its_own(case):
    with skipping(case.model, options_for(case.name)):
        expected = tester.logits(case.model, case.inputs)
        twin = copy.deepcopy(case.model)
    assert torch.equal(tester.logits(twin, case.inputs), expected)
    with torch.no_grad():
        for parameter in case.family.language_layers.parameters():
            parameter.add_(0.1)
        try:
            assert torch.equal(tester.logits(twin, case.inputs), expected)
        finally:
            for parameter in case.family.language_layers.parameters():
                parameter.sub_(0.1)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_a_model_that_is_pickled_skips(name):
    fresh = tester.Case(name, FAMILIES[name])
    file = io.BytesIO()
    with skipping(fresh.model, options_for(name)):
        # Before its first forward, in which transformers adds hooks that cannot be pickled.
        torch.save(fresh.model, file)
        expected = tester.logits(fresh.model, fresh.inputs)
        stock = inspect.signature(type(fresh.model).forward).parameters
        assert [*stock][1:-1] == [*inspect.signature(fresh.model.forward).parameters][:-2]
    assert not torch.equal(expected, tester.logits(fresh.model, fresh.inputs))
    file.seek(0)
    assert torch.equal(tester.logits(torch.load(file, weights_only=False), fresh.inputs), expected)


@pytest.mark.parametrize("visibility", ["prompt_only", "none"])
@pytest.mark.parametrize(
    ("name", "attention"),
    [("llava", "sdpa"), ("qwen2_vl", "sdpa"), ("qwen3_vl", "sdpa"), ("idefics3", "sdpa"), ("llava", "eager")],
)
def test_text_visibility(name, attention, visibility):
    """Logits are those of the stock model under a mask written down token by token."""
    model, processor = FAMILIES[name].build()
    model.set_attn_implementation(attention)
    case = tester.Case(name, FAMILIES[name])
    case.__dict__["built"] = (model, processor)
    with skipping(model, options_for(name, text_visibility=visibility)) as skip:
        prepared = skip.prepare(case.batch)
        with torch.no_grad():
            got = model(**prepared, use_cache=False).logits
    prepared.pop("labels")
    roles = prepared["skip_roles"]
    blind = {"prompt_only": {Role.ANSWER}, "none": {Role.ANSWER, Role.TEXT}}[visibility]
    batch, length = roles.shape
    mask = torch.full((batch, 1, length, length), torch.finfo(torch.float32).min)
    for row in range(batch):
        for query in range(length):
            for key in range(query + 1):
                hidden = roles[row, query].item() in blind and roles[row, key] == Role.SKIPPED
                if query == key or (roles[row, key] != Role.PADDING and not hidden):
                    mask[row, 0, query, key] = 0
    assert (roles == Role.ANSWER).any()
    real = (roles != Role.SKIPPED) & (roles != Role.PADDING)
    plain = oracle_logits(model, prepared)
    expected = oracle_logits(model, {**prepared, "attention_mask": mask})
    torch.testing.assert_close(got[real], expected[real], **CLOSE)
    assert not torch.allclose(got[real], plain[real], atol=1e-2)


def test_merging_by_another_reducer_is_what_that_reducer_does():
    """`merge="tome"`: the skipped rows are its merged tokens of those that are left."""
    case = CASES["llava"]
    config = options_for("llava", retained=8, skipped=12, merge="tome", summary=False)
    prompts = case.prompts([0])
    with skipping(case.model, config) as skip, torch.no_grad():
        encoded = skip.family.encode(prompts)
        prepared = skip.prepare(prompts, padding_side="right")
    rows = prepared["mm_encoder_outputs"]["image"].pooler_output[0]
    features = encoded.context.features[:1]
    kept = get_reducer("divprune")(VisualContext(features), 8).index[0].tolist()
    left = [number for number in range(features.shape[1]) if number not in kept]
    rest = features[:, left]
    merged = get_reducer("tome")(VisualContext(rest), 12)
    torch.testing.assert_close(rows[8:], (merged.weight[0] @ rest[0].float()).to(rows.dtype))


def test_autocast(case):
    """In bfloat16 by autocast the logits are those of float32 as far as it goes."""
    # A split by features would choose other tokens where two are nearly alike.
    options = {"split": "uniform", "merge": "none", "skipped": None}
    with skipping(case.model, options_for(case.name, **options)), torch.no_grad():
        exact = case.model(**case.inputs).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            near = case.model(**case.inputs).logits
    assert near.shape == exact.shape
    scale = exact.float().std()
    assert (near.float() - exact.float()).abs().mean() < 0.15 * scale


@pytest.mark.interfaces
def test_a_model_wrapped_by_peft_skips_generates_and_is_restored():
    case = tester.Case("llava", FAMILIES["llava"])
    inputs = case.prompts()
    with torch.no_grad():
        wrapped = get_peft_model(case.model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        wrapped.eval()
        stock = wrapped.generate(**inputs, max_new_tokens=4, do_sample=False)
        with skipping(case.model, options_for("llava")):
            expected = case.model.generate(**inputs, max_new_tokens=4, do_sample=False)
        skip = apply_skip_vision(wrapped, options_for("llava", summary=False))
        without_summary = wrapped.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert without_summary.shape == expected.shape
        direct = skip.model.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert torch.equal(without_summary, direct)
        skip.remove()
        assert torch.equal(wrapped.generate(**inputs, max_new_tokens=4, do_sample=False), stock)


@pytest.mark.interfaces
@pytest.mark.parametrize(
    "adapters",
    [{"target_modules": "all-linear"}, {"target_modules": ["q_proj"], "modules_to_save": ["skip_summary"]}],
    ids=["all linear", "head saved"],
)
def test_adapters_on_a_skipping_model_are_part_of_its_summary_head(adapters, tmp_path):
    """They get gradients, change what the head does, and once they are merged it is saved like any other."""
    case = tester.Case("llava", FAMILIES["llava"])
    stock = copy.deepcopy(case.model)
    with skipping(case.model, options_for("llava")) as skip:
        wrapped = get_peft_model(case.model, LoraConfig(**adapters, init_lora_weights=False))
        wrapped(**case.batch).loss.backward()
        trained = {name: p for name, p in wrapped.named_parameters() if "skip_summary" in name and p.requires_grad}
        assert trained
        assert all(parameter.grad is not None for parameter in trained.values())
        before = logits_and_roles(wrapped, skip, case.inputs)[0]
        with torch.no_grad():
            for parameter in trained.values():
                parameter.mul_(2)
        expected = logits_and_roles(wrapped, skip, case.inputs)[0]
        assert not torch.allclose(before, expected, atol=1e-3)
        saved(stock, tmp_path)
        for call in (skip.save_pretrained, skip.load_summary):
            with pytest.raises(SaccadeError, match=r"the summary head has a '.*PEFT wrapped it after"):
                call(tmp_path)
        merged = wrapped.merge_and_unload()
        torch.testing.assert_close(logits_and_roles(merged, skip, case.inputs)[0], expected, **CLOSE)
        skip.save_pretrained(tmp_path)
        head = {name: value.clone() for name, value in skip.summary.state_dict().items()}
    with_head = apply_skip_vision(stock, tmp_path)
    assert all(torch.equal(value, head[name]) for name, value in with_head.summary.state_dict().items())


def saved(model, folder):
    """The head of a model, saved to `folder`, and its tensors."""
    with skipping(model, options_for("llava")) as skip:
        skip.save_pretrained(folder)
        return {name: value.clone() for name, value in skip.summary.state_dict().items()}


def test_a_module_that_was_replaced_while_it_skipped_is_said_to_be():
    case = tester.Case("llava", FAMILIES["llava"])
    wrapped = get_peft_model(case.model, LoraConfig(r=2, target_modules=["q_proj"]))
    with skipping(case.model, options_for("llava")):
        merged = wrapped.merge_and_unload()
        with pytest.raises(
            SaccadeError, match=r"was replaced after `apply_skip_vision`, as by `merge_and_unload\(\)`"
        ):
            merged(**case.inputs)


def test_a_head_can_be_saved_after_removal_and_is_not_made_up_for_a_folder_without_one(tmp_path):
    case = CASES["llava"]
    head = saved(case.model, tmp_path)
    skip = apply_skip_vision(case.model, tmp_path)
    skip.remove()
    skip.save_pretrained(tmp_path)
    skip = apply_skip_vision(case.model, tmp_path)
    try:
        assert all(torch.equal(value, head[name]) for name, value in skip.summary.state_dict().items())
    finally:
        skip.remove()
    with skipping(case.model, options_for("llava", summary=False)) as skip:
        skip.save_pretrained(tmp_path)
    with pytest.raises(SaccadeError, match=r"folder=.*: its model was trained without summary tokens, so it"):
        apply_skip_vision(case.model, tmp_path, summary=True)


def test_what_is_replaced_of_a_folder_need_not_be_known_here(tmp_path):
    """Such as a reducer of the trainer's own, with its options."""
    case = CASES["llava"]
    with skipping(case.model, options_for("llava")) as skip:
        skip.config.split, skip.config.split_options, skip.config.merge = "mine", {"sharpness": 3}, "mine too"
        skip.save_pretrained(tmp_path)
    for options, name in (({}, "split='mine'"), ({"split": "divprune"}, "merge='mine too'")):
        with pytest.raises(SaccadeError, match=name):
            apply_skip_vision(case.model, tmp_path, **options)
    skip = apply_skip_vision(case.model, tmp_path, split="divprune", merge="tome")
    skip.remove()
    assert skip.config == options_for("llava", merge="tome")


def test_text_visibility_and_sliding_windows():
    """A mask that hides skipped tokens would replace those of every layer."""
    case = CASES["gemma3"]
    for visibility in ("prompt_only", "none"):
        with pytest.raises(SaccadeError, match=rf"text_visibility='{visibility}': .*DynamicSlidingWindowLayer"):
            apply_skip_vision(case.model, options_for("gemma3", text_visibility=visibility))
    assert not hasattr(case.model, "skip_summary")
