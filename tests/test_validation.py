"""A recipe's validation set, its best checkpoint, its attention and its choice of adapters."""

import json
import math

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from saccade import SaccadeError
from saccade.cli.main import main
from saccade.data import digit_scenes
from saccade.data.rows import write_jsonl
from saccade.training import ModelOptions, load_recipe, make_recipe, train_recipe
from saccade.training.models import load_model
from saccade.training.run import lora_config
from saccade.training.sources import DIGIT_EVAL_ROWS, hold_out, load_eval_rows, load_rows

HERE = {"use_cpu": True, "bf16": False, "disable_tqdm": True, "gradient_checkpointing": False}
ANSWER = {"role": "assistant", "content": "yes"}
SHORT = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 4, "max_steps": 2, "save_strategy": "no"}


@given(
    rows=st.integers(2, 60), share=st.floats(0.01, 0.99), seed=st.integers(0, 5), most=st.none() | st.integers(1, 9)
)
def test_what_is_held_out_is_not_trained_on(rows, share, seed, most):
    dataset = Dataset.from_dict({"n": list(range(rows))})
    number = round(share * rows)
    if number in (0, rows):
        with pytest.raises(SaccadeError, match=f"eval_share={share}: {number} of {rows} rows"):
            hold_out(dataset, share, seed, most)
        return
    trained, evaluated = (list(part["n"]) for part in hold_out(dataset, share, seed, most))
    assert len(trained) == rows - number
    assert len(evaluated) == (number if most is None else min(number, most))
    assert not set(trained) & set(evaluated)
    assert trained == sorted(trained)
    again = hold_out(dataset, share, seed, most)
    assert (trained, evaluated) == tuple(list(part["n"]) for part in again)


@pytest.mark.parametrize("weight", [{"weight": 1}, {}])
@pytest.mark.parametrize("second", ["b", "a", "./a"])
def test_a_record_that_a_mixture_repeats_is_held_out_whole(tmp_path, weight, second):
    """Of a source that is repeated by its weight, or that is listed twice."""
    second = second.replace("./", f"../{tmp_path.name}/")
    for name, count in (("a", 20), ("b", 5)):
        rows = ({"messages": [{"role": "user", "content": f"{name} {n}"}, ANSWER]} for n in range(count))
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [{"path": str(tmp_path / f"{name}.jsonl"), **weight} for name in ("a", second)]
    rows = load_rows(ModelOptions(dataset=[sources[0], {**sources[1], "rows": 5}]))
    distinct = {row["record"] for row in rows}
    assert len(distinct) == (25 if second == "b" else 20)
    assert (len(rows) > len(distinct)) == (bool(weight) or second != "b")
    for seed in range(3):
        trained, held = ([row["record"] for row in part] for part in hold_out(rows, 0.2, seed))
        assert len(held) == len(set(held)) == len(distinct) // 5
        assert set(trained) == distinct - set(held)
        assert len(trained) == sum(row["record"] not in held for row in rows)


def test_a_file_that_is_read_in_two_ways_is_held_out_once(tmp_path):
    """With other image folders, or in another format, its records are the same."""
    path = tmp_path / "a.jsonl"
    rows = ({"messages": [{"role": "user", "content": str(number)}, ANSWER]} for number in range(20))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for other in ({"image_folder": str(tmp_path)}, {"format": "chat"}):
        rows = load_rows(ModelOptions(dataset=[{"path": str(path)}, {"path": str(path), **other}]))
        trained, held = ([row["record"] for row in part] for part in hold_out(rows, 0.25, seed=0))
        assert (len(trained), len(held)) == (30, 5)
        assert not set(trained) & set(held)


def test_the_best_checkpoint_is_what_is_saved(tmp_path):
    """The evaluation loss is that of the stock model on the rows; the model saved is that of the lowest one."""
    data = write_jsonl(digit_scenes("sft", "validation", 6), tmp_path / "validation")
    # Rates so high that the second step does harm: the best checkpoint is not the last.
    values = {
        **{**HERE, **SHORT, "dataset_rows": 8, "output_dir": str(tmp_path / "out"), "eval_dataset": str(data)},
        **{"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 3},
        **{"load_best_model_at_end": True, "learning_rate": 0.5, "lr_scheduler_type": "constant", "logging_steps": 1},
    }
    trainer = train_recipe(make_recipe(values))
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    assert sorted(losses) == [1, 2, 3]
    best = min(losses, key=losses.get)
    saved, _ = load_model(ModelOptions(model=str(tmp_path / "out")))
    kept, _ = load_model(ModelOptions(model=str(tmp_path / "out" / f"checkpoint-{best}")))
    for name, weight in saved.state_dict().items():
        torch.testing.assert_close(weight, kept.state_dict()[name], msg=name)
    assert math.isclose(trainer.evaluate()["eval_loss"], losses[best], rel_tol=1e-5)


def test_digits_are_evaluated_on_their_validation_split():
    rows = load_eval_rows(ModelOptions(eval_dataset="digits", eval_rows=3))
    expected = digit_scenes("sft", "validation", 3)
    assert [row["messages"] for row in rows] == [row["messages"] for row in expected]
    assert len(load_eval_rows(ModelOptions(eval_dataset="digits"))) == DIGIT_EVAL_ROWS
    assert load_eval_rows(ModelOptions()) is None


def test_a_share_of_a_file_is_held_out(tmp_path):
    data = write_jsonl(digit_scenes("sft", "train", 10), tmp_path / "rows")
    values = {
        **{**HERE, **SHORT, "output_dir": str(tmp_path / "out"), "dataset": str(data), "eval_share": 0.3},
        **{"eval_strategy": "steps", "eval_steps": 2},
    }
    trainer = train_recipe(make_recipe(values))
    trained, held = ([row["record"] for row in rows] for rows in (trainer.train_dataset, trainer.eval_dataset))
    assert (len(trained), len(held)) == (7, 3)
    assert len({*trained, *held}) == 10
    assert any("eval_loss" in entry for entry in trainer.state.log_history)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--eval_strategy", "steps"], "eval_strategy='steps' has no rows: give eval_dataset or eval_share"),
        (["--eval_dataset", "digits"], "eval_dataset='digits' is never used with eval_strategy='no'"),
        (["--eval_share", "0.1"], "eval_share=0.1 is never used with eval_strategy='no'"),
        (["--eval_share", "1", "--eval_strategy", "epoch"], "eval_share=1.0 is outside (0, 1)"),
        (["--eval_share", ".1", "--eval_dataset", "digits"], "both say what to evaluate on"),
        (["--eval_rows", "5"], "eval_rows=5 of nothing"),
        (["--eval_dataset", "digits", "--eval_rows", "0", "--eval_strategy", "epoch"], "eval_rows=0: give at least 1"),
        (
            ["--eval_share", "0.1", "--eval_strategy", "steps", "--dataset_streaming", "true", "--dataset", "a.jsonl"],
            "eval_share=0.1 of a stream",
        ),
    ],
)
def test_evaluation_that_cannot_be_is_refused_before_anything_is_loaded(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").touch()
    assert main(["train", "tiny-digits/sft", "--check", "--use_cpu", "true", *flags]) == 2
    assert message in capsys.readouterr().err


def test_the_named_attention_is_the_one_that_runs(tmp_path):
    for name in ("eager", "sdpa"):
        model, _ = load_model(ModelOptions(attn_implementation=name))
        parts = [model.config, model.config.text_config, model.config.vision_config]
        assert [part._attn_implementation for part in parts] == [name] * 3
    with pytest.raises(SaccadeError, match="attn_implementation='fast': "):
        load_model(ModelOptions(attn_implementation="fast"))


def recipe_with(**options):
    return load_recipe(
        "tiny-digits/sft_lora",
        ["--use_cpu", "true", *(word for name, value in options.items() for word in (f"--{name}", json.dumps(value)))],
    )


def test_adapters_go_where_the_recipe_says():
    model, _ = load_model(ModelOptions())
    config = lora_config(
        model, recipe_with(lora_target_modules=["q_proj", "v_proj"], lora_modules_to_save=["lm_head"])
    )
    assert config.target_modules == {"q_proj", "v_proj"}
    assert config.modules_to_save == ["lm_head"]
    default = lora_config(model, recipe_with())
    assert isinstance(default.target_modules, str)
    assert default.modules_to_save == ["multi_modal_projector"]
    assert lora_config(model, recipe_with(lora_target_modules="all-linear")).target_modules == "all-linear"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"lora_target_modules": ["q_proj", "v_prj"]},
            "lora_target_modules: the model has no module 'v_prj': did",
        ),
        ({"lora_target_modules": r".*\.qq_proj"}, "lora_target_modules: the model has no module"),
        ({"lora_target_modules": "("}, r"lora_target_modules='\(' is not a regular expression"),
        (
            {"lora_modules_to_save": ["projector_of_mine"]},
            "lora_modules_to_save: the model has no module 'proj",
        ),
    ],
)
def test_a_name_of_no_module_is_refused(options, message):
    model, _ = load_model(ModelOptions())
    with pytest.raises(SaccadeError, match=message):
        lora_config(model, recipe_with(**options))
