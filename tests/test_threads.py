"""Two calls on one model at once, as a server's threads make them, give what each gives alone."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from skip_tester import options_for

from saccade import apply_pruning, apply_skip_vision, prune_inputs
from saccade.data import digit_scenes
from saccade.evaluation.digits import collate_prompts
from saccade.families import get_family
from saccade.families.encoded import AttentionBlock, Call
from saccade.families.vision_attention import first_arguments, watching
from saccade.pruning.cache import cache_of
from saccade.skip_vision.cache import cache_name

ROUNDS = 12


@pytest.fixture
def eager_switching():
    """Threads take turns after a microsecond."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def batches(processor):
    """Batches of different sizes."""
    rows = digit_scenes("sft", "test", 6, kinds=["read"])
    return [collate_prompts(processor, [rows[index] for index in numbers]) for numbers in ((0,), (1, 2, 3), (4, 5))]


def same_at_once(call, batches):
    """Run `call` on each batch in a separate thread, repeatedly, and compare with the results one by one."""
    expected = [call(batch) for batch in batches]
    start, problems = threading.Barrier(len(batches)), []

    def work(number):
        try:
            start.wait()
            for _ in range(ROUNDS):
                found = call(batches[number])
                for name, value in expected[number].items():
                    torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
        except BaseException as error:
            problems.append(error)
            raise

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []


def outputs(inputs):
    return {name: inputs[name] for name in ("input_ids", "attention_mask")} | {
        f"features {number}": rows for number, rows in enumerate(inputs["mm_encoder_outputs"]["image"].pooler_output)
    }


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("reducer", ["divprune", "fastervlm", "visionzip", "cdpruner"])
def test_pruning_at_once(model, batches, eager_switching, reducer):
    modules = list(get_family(model.eval()).vision_tower.modules())
    with torch.no_grad():
        prune_inputs(
            model, batches[0], reducer=reducer, prune_ratio=0.8
        )  # transformers hangs hooks of its own on the tower, once
        before = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules]
        same_at_once(lambda batch: outputs(prune_inputs(model, batch, reducer=reducer, prune_ratio=0.8)), batches)
    # Nothing of it is left in the model.
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules] == before
    assert not any("forward" in module.__dict__ for module in modules)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_generating_at_once_on_a_model_that_prunes(model, batches, eager_switching):
    """A first turn, and a second one on its cache."""
    words, image = torch.tensor([[7, 11]]), get_family(model).placeholder_id
    options = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False, "suppress_tokens": [image]}
    options["return_dict_in_generate"] = True

    def call(batch):
        first = model.generate(**batch, **options)
        ids = torch.cat((first.sequences, words.expand(len(first.sequences), -1)), dim=1)
        mask = torch.nn.functional.pad(batch["attention_mask"], (0, 4), value=1)
        cache = {cache_name(type(model).forward): cache_of(first)}
        second = model.generate(input_ids=ids, attention_mask=mask, **cache, **options)
        return {"answers": second.sequences}

    with apply_pruning(model.eval(), reducer="fastervlm", prune_ratio=0.8):
        same_at_once(call, batches)


def test_hook_of_another_thread_that_is_half_hung_up(model, batches):
    """Torch notes in a second step that a hook takes keywords: a call in between hands over none."""
    family = get_family(model.eval())
    attention = family.vision_tower.encoder.layers[0].self_attn
    block = AttentionBlock(attention, attention.q_proj, attention.k_proj, attention.num_heads, True, frozenset())
    with torch.no_grad(), watching(block) as calls, first_arguments(attention) as taken:
        attention._forward_pre_hooks_with_kwargs.clear()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(family.vision_tower, batches[0]["pixel_values"]).result()
        assert calls == taken == []
        calls.append(Call(torch.ones(1), torch.ones(1), {}))  # or the exit would miss this thread's own


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_skip_vision_at_once(model, batches, eager_switching):
    apply_skip_vision(model.eval(), options_for("llava"))

    def call(batch):
        with torch.no_grad():
            return {"answer": model.generate(**batch, max_new_tokens=3, do_sample=False)}

    same_at_once(call, batches)
