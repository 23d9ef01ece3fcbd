"""Real processes (gloo, CPU) under each engine against one process at the same global batch."""

import importlib.util
import json
import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch
from data_files import good_records, write_json
from forked import forking
from helpers import ORDINARY
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from saccade.dualspeed.masters import MASTERS_FILE
from saccade.launch import make_plan, run_processes
from saccade.pruning import ModeIsolator
from saccade.tiny import build_tiny_llava, build_tiny_processor

SCRIPT = Path(__file__).parent / "training_process.py"
OPTIONS = {"max_steps": 6, "slow_probability": 0.5}
CHECKPOINTS = {"save_strategy": "steps", "save_steps": 3}
SHARDED = "pytorch_model_fsdp.bin"
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
zero = [
    pytest.param(
        name, marks=[pytest.mark.slow, pytest.mark.skipif(not HAS_DEEPSPEED, reason="DeepSpeed is not installed")]
    )
    for name in ("zero2", "zero3")
]
slow_fsdp2 = pytest.param("fsdp2", marks=pytest.mark.slow)


def launch(output, processes, engine="ddp", expect=0, **options):
    """Train in separate processes, and return the last record of each step."""
    values = {
        "output_dir": str(output),
        **OPTIONS,
        "per_device_train_batch_size": 4 // processes // options.get("gradient_accumulation_steps", 1),
        **options,
    }
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    # The plan refuses to shard where there is no GPU; the script makes accelerate do it.
    with mock.patch("saccade.launch.plan._gpus", return_value=2), mock.patch.dict(os.environ, environment):
        plan = make_plan(engine, processes)
        # DeepSpeed is imported in an environment that names the device.
        quick = nullcontext() if engine.startswith("zero") else forking("saccade.launch.processes")
        with quick:
            assert run_processes(plan, [sys.executable, str(SCRIPT), json.dumps(values)]) == expect
    record = output / "steps.jsonl"
    lines = record.read_text().splitlines() if record.exists() else []
    return {entry["step"]: entry for entry in map(json.loads, lines)}


def check_equal(got, expected, loose=1.0, tokens=True):
    """Same modes, same losses, same gradient norms, step by step; and the same counts of tokens."""
    names = {"loss_fast", "loss_slow", "kl"} | ({"num_tokens", "length_in", "length_full"} if tokens else set())
    assert got.keys() == expected.keys()
    assert [entry["mode"] for entry in got.values()] == [entry["mode"] for entry in expected.values()]
    assert {entry["mode"] for entry in expected.values()} == {"fast", "slow"}
    for step, entry in expected.items():
        assert got[step].keys() == entry.keys()
        for name in entry.keys() & names:
            assert got[step][name] == pytest.approx(entry[name], rel=loose * 1e-3, abs=loose * 1e-5), (step, name)
        assert got[step]["loss"] == pytest.approx(entry["loss"], rel=loose * 1e-4)
        assert got[step]["grad_norm"] == pytest.approx(entry["grad_norm"], rel=loose * 1e-3)


def load_stock(folder):
    """The weights as stock transformers reads them, with no key too many or too few."""
    model, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.state_dict()


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    output = tmp_path_factory.mktemp("one")
    return output, launch(output, 1)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", *zero])
def test_two_processes_equal_one(one_process, tmp_path, engine):
    """Modes, losses, gradient norms and weights, isolator included."""
    reference, one = one_process
    check_equal(launch(tmp_path, 2, engine), one)
    models = [load_stock(folder / "final") for folder in (reference, tmp_path)]
    for name, value in models[0].items():
        torch.testing.assert_close(models[1][name], value, rtol=1e-3, atol=1e-4)
    isolators = [ModeIsolator.from_pretrained(folder / "final").weight for folder in (reference, tmp_path)]
    torch.testing.assert_close(isolators[1], isolators[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "modes",
    [{"slow_probability": 0.5}, pytest.param(ORDINARY, marks=pytest.mark.slow)],
    ids=["both modes", "stock steps"],
)
def test_rows_that_fill_up_the_last_batch_do_not_count(tmp_path, modes):
    """Of 9 rows one is left for the second batch of 8: the second rank has nothing but rows that it has seen."""
    # Rows with images only: a stock step on text leaves the projector without a gradient, and not with a zero one.
    scenes = {"num_rows": 9, "kinds": ["count", "read"]}
    options = {"scenes": scenes, "max_steps": 4, "schedule": "stratified", **modes}
    one = launch(tmp_path / "one", 1, per_device_train_batch_size=8, **options)
    two = launch(tmp_path / "two", 2, per_device_train_batch_size=4, **options)
    assert len(one) == 4
    for step, entry in one.items():
        assert two[step]["loss"] == pytest.approx(entry["loss"], rel=1e-4), step
        assert two[step]["grad_norm"] == pytest.approx(entry["grad_norm"], rel=1e-3), step


def test_rows_that_fill_up_the_last_batch_do_not_count_after_a_resume(tmp_path):
    """Accelerate counts no remainder in an epoch whose first batches are skipped."""
    scenes = {"num_rows": 5, "kinds": ["count", "read"]}
    options = {"scenes": scenes, "slow_probability": 0.0, "per_device_train_batch_size": 2, "max_steps": 2}
    options |= {"save_strategy": "steps", "save_steps": 1}
    unbroken = launch(tmp_path, 2, **options)
    resumed = launch(tmp_path, 2, resume=str(tmp_path / "checkpoint-1"), **options)
    assert resumed[2]["loss"] == pytest.approx(unbroken[2]["loss"], rel=1e-5)
    assert resumed[2]["grad_norm"] == pytest.approx(unbroken[2]["grad_norm"], rel=1e-4)


def test_split_batches_lose_no_row(tmp_path):
    """Of 7 rows the last batch has three, of which the second rank's part has one and one that was repeated."""
    scenes = {"num_rows": 7, "kinds": ["count", "read"]}
    options = {"scenes": scenes, "slow_probability": 0.0, "per_device_train_batch_size": 4, "max_steps": 2}
    one = launch(tmp_path / "one", 1, **options)
    two = launch(tmp_path / "two", 2, accelerator_config={"split_batches": True}, **options)
    for step, entry in one.items():
        assert two[step]["loss"] == pytest.approx(entry["loss"], rel=1e-4), step
        assert two[step]["grad_norm"] == pytest.approx(entry["grad_norm"], rel=1e-3), step


@pytest.mark.slow
def test_two_processes_in_parts_and_without_padding_equal_one(one_process, tmp_path):
    """The parts before the last one run backwards inside the forward pass of DDP, which averages the last one's."""
    check_equal(launch(tmp_path, 2, slow_micro_batch_size=1, padding_free=True), one_process[1])


@pytest.mark.slow
def test_two_compiled_processes_equal_one(one_process, tmp_path):
    options = {"slow_micro_batch_size": 1, "padding_free": True, "torch_compile_backend": "aot_eager"}
    check_equal(launch(tmp_path, 2, **options), one_process[1])


@pytest.mark.slow
def test_engines_that_shard_take_no_parts(tmp_path, capfd):
    launch(tmp_path, 2, "fsdp2", expect=1, slow_micro_batch_size=1)
    assert "slow_micro_batch_size=1: FSDP and DeepSpeed count backward passes" in capfd.readouterr().err


@pytest.mark.slow
def test_ranks_share_a_feature_cache(one_process, tmp_path):
    """They fill one folder at once, and a second run reads all of it: the losses stay those of one process without."""
    _, one = one_process
    folder = str(tmp_path / "features")
    for name in ("first", "second"):
        entries = launch(tmp_path / name, 2, "ddp", feature_cache=folder)
        hits = [entry.pop("feature_cache_hits") for entry in entries.values() if "feature_cache_hits" in entry]
        assert (sum(hits) < len(hits)) if name == "first" else (hits == [1.0] * len(hits) != [])
        check_equal(entries, one)


@pytest.mark.parametrize(
    ("accumulation", "parts"),
    [pytest.param(1, 2, marks=pytest.mark.slow), pytest.param(1, 1, marks=pytest.mark.slow), (2, 2)],
)
def test_a_stream_that_ends_unevenly_is_the_stream_of_one_process(tmp_path, accumulation, parts):
    """Of five rows one rank reads three and the other two; then both begin the next epoch, over and over. The same
    where they share a stream in one part."""
    data = write_json(tmp_path / "rows.jsonl", good_records(tmp_path, 5))
    options = {"stream": str(data), "gradient_accumulation_steps": accumulation, "max_steps": 6}
    one = launch(tmp_path / "one", 1, **options, per_device_train_batch_size=2)
    two = launch(tmp_path / "two", 2, **options, stream_parts=parts, per_device_train_batch_size=1)
    assert len(one) == 6
    # The row that stands in is counted among the tokens that were computed, and nowhere else.
    check_equal(two, one, tokens=False)


def test_a_rank_without_rows_of_a_stream_ends_all(tmp_path, capfd):
    data = write_json(tmp_path / "rows.jsonl", good_records(tmp_path, 1))
    launch(tmp_path / "out", 2, expect=1, stream=str(data), per_device_train_batch_size=1)
    said = "the training stream has no rows for rank 1: it has fewer rows than the 2 processes"
    assert capfd.readouterr().err.count(said) >= 2


@pytest.mark.parametrize(
    ("engine", "find_unused"),
    [
        pytest.param("ddp", True, marks=pytest.mark.slow),
        pytest.param("ddp", False, marks=pytest.mark.slow),
        ("fsdp2", None),
        *(pytest.param(*entry.values, None, marks=entry.marks) for entry in zero),
    ],
)
def test_a_rank_without_images_works(tmp_path, engine, find_unused):
    """In fast and in slow steps; where ranks shard the model it goes through the same modules as the others."""
    entries = launch(tmp_path, 2, engine, text_only_rank=1, ddp_find_unused_parameters=find_unused, max_steps=4)
    assert {entry["mode"] for entry in entries.values()} == {"fast", "slow"}
    assert len(entries) == 4


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", *zero])
@pytest.mark.slow
def test_the_isolator_stays_where_it_is_in_slow_steps(tmp_path, engine):
    """Engines may apply an old gradient, or a zero one with momentum, to a parameter that got none."""
    launch(tmp_path, 2, engine, slow_probability=1.0, max_steps=2)
    one = tmp_path / "start"
    launch(one, 1, slow_probability=1.0, max_steps=1, learning_rate=0.0)
    weights = [ModeIsolator.from_pretrained(folder / "final").weight for folder in (tmp_path, one)]
    assert torch.equal(*weights)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", *zero])
@pytest.mark.parametrize(
    ("options", "loose"),
    [
        ({"gradient_accumulation_steps": 2}, 1.0),
        ({"gradient_checkpointing": True}, 1.0),
        ({"bf16": True}, 300.0),
        ({"lora": True, "gradient_checkpointing": True}, 1.0),
        ({"padding_free": True, "gradient_checkpointing": True}, 1.0),
    ],
    ids=["accumulation", "checkpointing", "bf16", "lora", "padding_free"],
)
def test_options_that_engines_treat_differently(tmp_path, engine, options, loose):
    one = launch(tmp_path / "one", 1, **{**options, "max_steps": 4})
    two = launch(tmp_path / "two", 2, engine, **{**options, "max_steps": 4})
    # Where ranks shard the model, a micro-batch of one text gets a blank image beside it, which is counted.
    check_equal(two, one, loose, tokens=engine == "ddp")


@pytest.mark.parametrize(
    ("engine", "before", "after"),
    [
        ("ddp", 2, 1),
        ("ddp", 1, 2),
        ("fsdp2", 2, 2),
        *(pytest.param(*entry.values, 2, 2, marks=entry.marks) for entry in zero),
    ],
)
@pytest.mark.slow
def test_a_killed_run_goes_on_with_as_many_processes_or_others(one_process, tmp_path, engine, before, after):
    """Kill -9 of one rank: the launcher ends the others, and the same global batch gives the same curve."""
    _, one = one_process
    launch(tmp_path, before, engine, expect=1, kill_at_step=5, kill_rank=before - 1, **CHECKPOINTS)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    check_equal(launch(tmp_path, after, engine, resume=True, **CHECKPOINTS), one)


@pytest.mark.parametrize(("engine", "file"), [("ddp", MASTERS_FILE), ("fsdp2", SHARDED)])
@pytest.mark.slow
def test_weights_in_bf16_have_float32_masters(tmp_path, engine, file):
    """The trainer's own, or those that FSDP shards; on the way out they are rounded."""
    rate, steps = 2e-5, 2
    options = {"lr_scheduler_type": "constant", "warmup_steps": 0, "freeze_language_model": True}
    options |= {"max_steps": steps, "save_strategy": "steps", "save_steps": steps}
    launch(tmp_path, 2, engine, bf16=True, half=True, learning_rate=rate, **options)
    start = build_tiny_llava(build_tiny_processor(), seed=0).bfloat16().state_dict()
    path = tmp_path / f"checkpoint-{steps}" / file
    held = load_file(path) if file == MASTERS_FILE else torch.load(path)
    final = LlavaForConditionalGeneration.from_pretrained(tmp_path / "final", dtype="auto").state_dict()
    assert {value.dtype for value in final.values()} == {torch.bfloat16}
    trained = [name for name in start if "multi_modal_projector" in name]
    assert trained
    for name in trained:
        assert held[name].dtype == torch.float32
        moved = held[name] - start[name].float()
        assert (moved != 0).all()
        # A step of Adam is at most the learning rate, at its start.
        assert moved.abs().max() < 1.1 * steps * rate
        assert torch.equal(final[name], held[name].bfloat16())


@pytest.mark.slow
def test_another_engine_does_not_go_on(tmp_path, capfd):
    launch(tmp_path, 2, "fsdp2", max_steps=3, **CHECKPOINTS)
    launch(tmp_path, 2, "ddp", expect=1, resume=True, **CHECKPOINTS)
    assert "engine='ddp' (checkpoint: 'fsdp')" in capfd.readouterr().err


@pytest.mark.slow
def test_sigterm_to_one_rank_stops_and_saves_all(tmp_path):
    launch(tmp_path, 2, signal_at_step=2, kill_rank=1, max_steps=50)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    state = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["global_step"] == 3
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
