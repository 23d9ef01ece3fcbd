"""A micro-batch a few samples at a time: the same losses and gradients as all at once, on every family."""

import pytest
import torch
from family_models import FAMILIES, WITH_VIDEO, VideoCase
from helpers import losses, make_trainer
from peft import LoraConfig

from benchmarks.counting import count_saved_bytes
from saccade import SaccadeError
from saccade.dualspeed.parts import InParts
from saccade.pruning import ModeIsolator
from saccade.testing import families as tester
from saccade.testing.training import fast_slow_step, make_config
from saccade.tiny import build_tiny_llava

CASES = {name: tester.Case(name, FAMILIES[name]) for name in FAMILIES}
VIDEO_CASES = {name: VideoCase(name, FAMILIES[name]) for name in WITH_VIDEO}


def merging(name):
    """Merged tokens are split like kept ones; the one difference is features that are added at deeper layers."""
    return pytest.param(name, "avgpool", marks=[] if name in ("llava", "qwen3_vl") else pytest.mark.slow)


@pytest.mark.parametrize(("name", "reducer"), [*((name, "divprune") for name in FAMILIES), *map(merging, FAMILIES)])
def test_parts_train_as_the_whole(name, reducer):
    tester.check_in_parts(CASES[name], reducer)


@pytest.mark.parametrize("name", WITH_VIDEO)
def test_parts_with_videos_train_as_the_whole(name):
    tester.check_in_parts(VIDEO_CASES[name], "divprune")


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 2},
        pytest.param(
            {"average_tokens_across_devices": False, "gradient_accumulation_steps": 2}, marks=pytest.mark.slow
        ),
        pytest.param({"gradient_checkpointing": True, "bf16": True}, marks=pytest.mark.slow),
        pytest.param({"lora": True}, marks=pytest.mark.slow),
    ],
    ids=["accumulation", "means", "checkpointing in bf16", "lora"],
)
def test_a_run_in_parts_is_the_run_at_once(processor, tmp_path, options):
    """Four samples at once, or three and one."""
    # Packed samples could not be counted.
    options = {"padding_free": False, **options}
    lora = LoraConfig(r=4, target_modules=r".*language_model.*_proj", modules_to_save=["multi_modal_projector"])
    peft_config = lora if options.pop("lora", False) else None
    runs = []
    for size in (None, 3):
        model = build_tiny_llava(processor, seed=0)
        folder = tmp_path / str(size)
        torch.manual_seed(0)
        trainer = make_trainer(
            model, processor, folder, None, peft_config, slow_probability=0.5, slow_micro_batch_size=size, **options
        )
        seen = watch_rows(trainer)
        trainer.train()
        assert {trainer.mode_of(step) for step in range(4)} == {"fast", "slow"}
        runs.append((trainer, seen))
    (whole, all_rows), (parts, few_rows) = runs
    assert set(all_rows) == {4}
    assert set(few_rows) == {4, 3, 1}
    close = 2e-2 if options.get("bf16") else 1e-4
    assert losses(parts) == pytest.approx(losses(whole), abs=close)
    norms = [[entry["grad_norm"] for entry in run.state.log_history if "grad_norm" in entry] for run in (whole, parts)]
    assert norms[1] == pytest.approx(norms[0], rel=close)
    if not options.get("bf16"):
        for name, value in whole.model.state_dict().items():
            torch.testing.assert_close(parts.model.state_dict()[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("texts", [[3], [1, 3], [0, 1, 2, 3]], ids=["one", "two", "all"])
def test_text_beside_images_and_alone_under_dropout(model, collator, mixed_rows, texts):
    """A teacher takes dropout away from text too, so that its divergence is not zero; the parts do the same."""
    rows = [row for number, row in enumerate(mixed_rows) if number not in texts]
    rows += [text_row() for _ in texts]
    batch = dict(collator(rows))
    for layer in model.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    isolator = ModeIsolator(4, model.config.text_config.hidden_size)
    step = fast_slow_step(model, isolator=isolator)
    seen = []
    hook = lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"].shape[0])  # noqa: E731
    model.model.language_model.register_forward_pre_hook(hook, with_kwargs=True)
    whole = step("slow", batch, 1.0)
    seen.clear()
    parts = step("slow", batch, 1.0, in_parts=InParts(1, torch.Tensor.backward))
    assert set(seen) == {1}
    assert (whole.kl is None) == (parts.kl is None) == (len(texts) == 4)
    if whole.kl is not None:
        assert parts.kl > 0
        assert whole.kl > 0


def text_row():
    return {"messages": [{"role": "user", "content": "what"}, {"role": "assistant", "content": "red"}], "images": []}


def watch_rows(trainer):
    """Batch sizes that the language model runs on in training."""
    seen = []

    def note(module, args, kwargs):
        if torch.is_grad_enabled():
            seen.append(kwargs["inputs_embeds"].shape[0])

    trainer.family.language_model.register_forward_pre_hook(note, with_kwargs=True)
    return seen


def test_less_is_kept_for_the_backward_pass(scenes, collator, model):
    """What autograd stores at a time in a slow step on eight samples."""
    batch = dict(collator(scenes.select(range(8))))
    step = fast_slow_step(model, isolator=ModeIsolator(4, model.config.text_config.hidden_size))
    peaks = []
    for in_parts in (None, InParts(2, torch.Tensor.backward)):
        with count_saved_bytes(model.parameters()) as saved:
            step("slow", batch, 1.0, in_parts=in_parts).loss.backward()
        assert saved.now == 0
        peaks.append(saved.peak)
    assert peaks[1] < 0.5 * peaks[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slow_micro_batch_size": 0}, "slow_micro_batch_size=0: give 1 or more"),
        ({"slow_micro_batch_size": 2.5}, "slow_micro_batch_size=2.5 is a float, expected int"),
        ({"slow_micro_batch_size": True}, "slow_micro_batch_size=True is a bool, expected int"),
        ({"slow_micro_batch_size": 2, "skip_vision": {"summary": True}, "skip_mode": "slow"}, "is for modes on all"),
        ({"slow_micro_batch_size": 2, "adaptive": True}, "slow_micro_batch_size=2 with adaptive=True"),
    ],
)
def test_what_cannot_be_cut_is_refused(tmp_path, options, message):
    with pytest.raises(SaccadeError, match=message):
        make_config(tmp_path, **options)
