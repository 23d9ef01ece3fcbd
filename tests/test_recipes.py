"""Recipes: every shipped one parses, overrides work, and bad ones get one clear line."""

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from saccade import SaccadeError
from saccade.cli.main import main
from saccade.data import digit_scenes
from saccade.data.rows import write_jsonl
from saccade.dualspeed.collator import prepare_example
from saccade.dualspeed.config import LEAST
from saccade.families import get_family
from saccade.pruning import ModeIsolator
from saccade.recipes import RECIPES, earlier_stage, read_recipe
from saccade.training import ModelOptions, load_recipe, load_rows, make_recipe, train_recipe
from saccade.training.run import check_recipe, lora_config
from saccade.training.sources import dataset_name

SHIPPED = sorted(RECIPES.rglob("*.yaml"))
ASKED, ANSWERED = '{"role": "user", "content": "a?"}', '{"role": "assistant", "content": "b"}'
TINY = ["--max_steps", "2", "--per_device_train_batch_size", "2", "--disable_tqdm", "true", "--save_strategy", "no"]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(RECIPES)))
def test_shipped_recipes_parse_and_comment_every_line(path):
    # Without it, bf16 is refused where there is no GPU.
    recipe = load_recipe(path, ["--use_cpu", "true"])
    assert recipe.trainer.output_dir
    for line in path.read_text().splitlines():
        assert not line.strip() or "#" in line, line


def test_recipes_are_there():
    assert {path.stem for path in SHIPPED} >= {
        "pretrain",
        "sft",
        "sft_lora",
        "prune_only",
        "all_tokens",
        "skip_vision",
        "chain_of_sight",
        "llava_hd",
        "dualspeed_skip",
        "multi_speed",
    }


def test_overrides_are_typed():
    recipe = load_recipe(
        "tiny-digits/sft",
        ["--learning_rate", "2e-4", "--prune-ratio=0.8", "--lora", "true", "--resume", "auto", "--seed", "7"],
    )
    assert recipe.trainer.learning_rate == 2e-4
    assert recipe.trainer.prune_ratio == 0.8
    assert recipe.options.lora is True
    assert recipe.options.resume == "auto"
    assert recipe.trainer.seed == 7


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--prune_ration", "0.8"], "unknown field 'prune_ration': did you mean 'prune_ratio'"),
        (["--prune_ratio", "1.5"], r"prune_ratio=1.5 is outside \[0, 1\)"),
        (["--prune_ratio", "much"], "prune_ratio='much' is a str, expected float"),
        (["--learning_rate", "fast"], "learning_rate='fast'"),
        (["--max_steps", "many"], "max_steps='many'"),
        (["--lora", "3"], "lora=3 is an int, expected bool"),
        (["--seed"], "--seed has no value"),
        (["seed", "3"], "'seed' is not a field"),
        (["--lr_scheduler_type", "sawtooth"], "sawtooth"),
        (["--resume", "/nowhere"], "resume='/nowhere' is not a folder"),
        (["--dataset", "/nowhere.jsonl"], "nowhere.jsonl' does not exist"),
        (["--dataset_stage", "tune"], "tune"),
        (["--dtype", "int4"], "dtype='int4'"),
        (["--model", "/nowhere"], "model='/nowhere'"),
        (["--model", "tiny", "--max_length", "64"], "max_length=64 cuts image tokens"),
        (["--packing", "true"], "[Pp]acking"),
        (
            ["--dataset", str(Path(__file__).parents[1] / "src" / "saccade" / "tokens")],
            "not a folder written by save_to_disk",
        ),
        (["--dataset_rows", "0"], "dataset_rows=0"),
        (["--lora", "true", "--freeze_language_model", "true"], "set one to false"),
        *(([f"--{name}", str(least - 1)], f"{name}={least - 1}.*: give {least}") for name, least in LEAST.items()),
        (["--learning_rate", ".nan"], "learning_rate=nan"),
        (["--max_steps", "-1", "--num_train_epochs", "0"], "num_train_epochs=0.*, or set max_steps"),
        (["--save_strategy", "steps", "--save_steps", "0"], "save_steps=0.*save_strategy"),
        (["--lora", "true", "--lora_r", "0"], "lora_r=0: give 1"),
        (["--lora_target_modules", "[q_proj]"], "lora_target_modules=.* has no effect without lora: give both"),
        (["--dataset_shuffle_buffer", "9"], "dataset_shuffle_buffer=9 has no effect without dataset_streaming"),
        (["--image_cache", "x"], "image_cache='x' has no effect without image_urls"),
        (["--lora", "true", "--lora_alpha", "-1"], "lora_alpha=-1: give 1"),
        (["--lora", "true", "--lora_dropout", "1.0"], r"lora_dropout=1.0 is outside \[0, 1\)"),
    ],
)
def test_bad_fields_end_in_one_line_before_training(overrides, message, tmp_path, capsys):
    status = main(["train", "tiny-digits/sft", "--output_dir", str(tmp_path / "out"), "--model", "tiny", *overrides])
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert status == 2
    assert printed.startswith("saccade: error: ")
    assert re.search(message, printed), printed


def test_names_that_look_like_numbers_stay_as_they_are_written(tmp_path):
    """For the stock YAML loader they are 202411, 493, 750 and a date."""
    for name in ("2024_11", "0755", "12:30", "2024-11-12", "0x10", "7"):
        recipe = load_recipe("tiny-digits/pretrain", ["--run_name", name, "--learning_rate", "1e-3"])
        assert (recipe.trainer.run_name, recipe.trainer.learning_rate) == (name, 0.001)
    with pytest.raises(SaccadeError, match=r"run_name=1\.1 is read as a number: put it into quotes"):
        load_recipe("tiny-digits/pretrain", ["--run_name", "1.10"])
    assert load_recipe("tiny-digits/pretrain", ["--run_name", "'1.10'"]).trainer.run_name == "1.10"
    with pytest.raises(SaccadeError, match="max_steps='1_000' is a str, expected int"):
        load_recipe("tiny-digits/pretrain", ["--max_steps", "1_000"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dataset": "rows.json", "image_folder": "nope"}, "image_folder='nope' is not a folder"),
        ({"dataset": "rows.json", "image_folder": ["images", "nope"]}, "image_folder='nope' is not a folder"),
        ({"dataset": [{"path": "rows.json", "wieght": 1}]}, "unknown field 'wieght': did you mean 'weight'"),
        ({"dataset": ["rows.json", "rowz.json"]}, "dataset='rowz.json' does not exist: did you mean 'rows.json'"),
        (
            {"dataset": ["rows.json", "rowz.parquet"]},
            "dataset='rowz.parquet' does not exist: did you mean 'rows.json'",
        ),
        ({"eval_dataset": "rowz.parquet", "eval_strategy": "epoch"}, "dataset='rowz.parquet' does not exist"),
        ({"dataset": "table.csv"}, "dataset='table.csv' is a file of a kind that is not read"),
        ({"dataset": ["rows.json", "UPPER.JSON"]}, "dataset='UPPER.JSON' is a file of a kind that is not read"),
        ({"dataset": 7}, "dataset=7 is an int, expected list or str"),
        ({"dataset_stage": "foo"}, "dataset_stage='foo' is unknown"),
        ({"dataset_split": "tets"}, "dataset_split='tets' is unknown: did you mean 'test'"),
        (
            {"dataset": "rows.json", "dataset_split": "train[:9]"},
            "dataset_split='train[:9]': 'rows.json' is a single file",
        ),
        (
            {"dataset": [{"path": "rows.json", "split": "train"}]},
            "dataset split='train' of 'rows.json', a single file",
        ),
        ({"dataset_format": "csv"}, "dataset_format='csv' is unknown"),
        ({"dataset_turns": 0}, "dataset_turns=0: give at least 1"),
        ({"dataset_shuffle_buffer": -1}, "dataset_shuffle_buffer=-1"),
        ({"dataset_streaming": True}, "dataset_streaming=true: digits"),
        ({"eval_dataset": ["rowz.json"], "eval_strategy": "epoch"}, "dataset='rowz.json' does not exist"),
        ({"image_urls": "example.org"}, "image_urls='example.org' is not the beginning"),
        ({"dtype": "bf16"}, "dtype='bf16' is unknown: did you mean 'bfloat16'"),
        ({"skip_mode": "slow"}, "skip_mode='slow' says which mode skips"),
        ({"resume_from_checkpoint": "out"}, "resume_from_checkpoint='out' has no effect in a recipe: use resume"),
        ({"model_init_kwargs": {"dtype": "float16"}}, "model_init_kwargs={'dtype': 'float16'} has no effect"),
        ({"do_train": False}, "do_train=False has no effect in a recipe, which trains: remove it"),
        ({"do_predict": True}, "do_predict=True has no effect in a recipe"),
        (
            {"dataset_num_proc": 4},
            "dataset_num_proc=4 has no effect in a recipe: rows are prepared as batches are made; use",
        ),
        (
            {"dataset_kwargs": {"skip_prepare_dataset": True}},
            "dataset_kwargs={'skip_prepare_dataset': True} has no eff",
        ),
        ({"shuffle_dataset": True}, "shuffle_dataset=True has no effect in a recipe"),
        ({"packing_strategy": "wrapped"}, "packing_strategy='wrapped' has no effect in a recipe"),
        ({"eval_packing": True}, "eval_packing=True has no effect in a recipe"),
        ({"pad_token": "<pad>"}, "pad_token='<pad>' has no effect in a recipe"),
        ({"length_column_name": "n"}, "length_column_name='n' has no effect in a recipe: rows have no column"),
        ({"label_names": ["labels"]}, "label_names=['labels'] has no effect in a recipe"),
        ({"include_for_metrics": ["loss"]}, "include_for_metrics=['loss'] has no effect in a recipe"),
        ({"batch_eval_metrics": True}, "batch_eval_metrics=True has no effect in a recipe"),
        ({"do_eval": True}, "do_eval=True has no effect in a recipe: set eval_strategy, or use"),
    ],
)
def test_the_check_finds_what_needs_no_model(fields, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for name in ("rows.json", "table.csv", "UPPER.JSON"):
        (tmp_path / name).write_text("[]")
    words = [word for name, value in fields.items() for word in (f"--{name}", json.dumps(value))]
    assert main(["train", "tiny-digits/sft", "--model", "tiny", "--check", *words]) == 2
    assert message in capsys.readouterr().err


def test_what_asks_for_nothing_is_taken():
    """As other tools write a recipe, with every field."""
    nothing = {"dataset_kwargs": {}, "model_init_kwargs": {}, "eval_packing": False, "include_for_metrics": []}
    recipe = make_recipe({"model": "tiny", "dataset": "digits", **nothing, "do_eval": False, "shuffle_dataset": False})
    assert recipe.options.model == "tiny"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not valid YAML"),
        ("- a\n- b", "must be a mapping"),
        ("", "must be a mapping"),
        (
            "prune_ratio: 0.5\n\nprune_ratio: 0.9",
            "not valid YAML: 'prune_ratio' is given in lines 1 and 3: remove one",
        ),
        ("skip_vision:\n  merge: none\n  'merge': none", "'merge' is given in lines 2 and 3: remove one"),
    ],
)
def test_bad_files(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(SaccadeError, match=message):
        load_recipe(path)
    with pytest.raises(SaccadeError, match="tiny-digits/sft"):
        load_recipe(tmp_path / "other.yaml")


def test_the_stage_before_is_found_beside_files_that_are_no_recipes(tmp_path):
    for name, text in (
        ("bin.yaml", b"\x00\xff"),
        ("a_list.yaml", b"- 1"),
        ("a_date.yaml", b"model: out/first\na: 2024-13-45"),
        ("first.yaml", b"model: tiny\noutput_dir: out/first"),
        ("second.yaml", b"model: out/first"),
    ):
        (tmp_path / name).write_bytes(text)
    (tmp_path / "folder.yaml").mkdir()
    assert earlier_stage(tmp_path / "second.yaml", "out/first") == tmp_path / "first.yaml"
    assert earlier_stage(tmp_path / "first.yaml", "tiny") is None


def test_a_second_stage_may_be_checked_before_the_first_has_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "tiny-digits/sft", "--check"]) == 0
    note = "saccade: note: model='out/pretrain' does not exist: `saccade train tiny-digits/pretrain` writes it\n"
    assert capsys.readouterr().err == note


def test_what_a_recipe_merges_in_may_be_overridden(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("reducer_options: &a {x: 1}\nskip_vision: &b {<<: *a, x: 2}\nmodes: [{<<: *b, x: 3}]")
    assert read_recipe(path) == {"reducer_options": {"x": 1}, "skip_vision": {"x": 2}, "modes": [{"x": 3}]}
    path.write_text("reducer_options: &a {x: 1}\nskip_vision: &b {y: 2}\nmodes: [{<<: *a, <<: *b, 1: 2, '1': 3}]")
    assert read_recipe(path)["modes"] == [{"x": 1, "y": 2, 1: 2, "1": 3}]
    with pytest.raises(SaccadeError, match="cannot be read as a value"):
        load_recipe("tiny-digits/sft", ["--skip_vision", "{merge: none, merge: none}"])


def test_a_model_without_a_dataset_does_not_train_on_the_digits(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: llava-hf/llava-1.5-7b-hf\nuse_cpu: true\n")
    with pytest.raises(SaccadeError, match=r"llava-1.5-7b-hf' without a dataset would train on .* dataset: digits if"):
        check_recipe(load_recipe(path))
    # The folder of images is that of the data which the digits take the place of.
    check_recipe(load_recipe(path, ["--dataset", "digits", "--image_folder", "nope"]))
    check_recipe(load_recipe(path, ["--model", "tiny"]))


def test_a_recipes_data_is_named_in_a_few_words():
    entries = ["a.json", "digits", {"path": "c.jsonl"}, "d", "e"]
    assert dataset_name(ModelOptions(dataset=entries)) == "a.json, digits, the embedded scenes, c.jsonl and 2 more"
    assert dataset_name(ModelOptions(dataset="a.json")) == "a.json"


def test_train_on_a_users_own_json_lines(tmp_path, capsys):
    data = write_jsonl(digit_scenes("sft", "train", 6), tmp_path / "data")
    output = tmp_path / "out"
    status = main(
        ["train", "tiny-digits/sft", "--model", "tiny", "--dataset", str(data), "--output_dir", str(output), *TINY]
    )
    assert status == 0, capsys.readouterr().err
    names = {path.name for path in output.iterdir()}
    assert {"model.safetensors", "mode_isolator.saccade", "dualspeed.json", "log.json"} <= names
    log = json.loads((output / "log.json").read_text())
    assert log["recipe"]["dataset"] == str(data)
    assert log["environment"]["packages"]["torch"]
    assert log["finished"]


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_truncated_image_ends_the_run_in_one_line(tmp_path, capsys, workers):
    data = write_jsonl(digit_scenes("sft", "train", 6, kinds=["read"]), tmp_path / "data")
    for image in sorted((tmp_path / "data" / "images").iterdir())[2:]:
        image.write_bytes(image.read_bytes()[:-3000])
    flags = ["--dataset", str(data), "--output_dir", str(tmp_path / "out"), "--dataloader_num_workers", workers, *TINY]
    assert main(["train", "tiny-digits/sft", "--model", "tiny", *flags]) == 2
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert printed.startswith(f"saccade: error: {data}, line ")
    assert "cannot be decoded" in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not valid JSON"),
        ('{"images": []}', "has no 'messages' list"),
        ('{"messages": ["hi"]}', "each message needs a 'role'"),
        ('{"messages": [{"content": "hi"}]}', "each message needs a 'role'"),
        (
            '{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}',
            "mixes rows",
        ),
        (f'{{"messages": [{ASKED}, {ANSWERED}], "images": ["b.png"]}}', "image 'b.png' does not exist in"),
        (
            f'{{"messages": [{ASKED.replace("a?", "<image> <image>")}, {ANSWERED}], "images": ["a.png"]}}',
            r"messages has 2 <image> placeholder\(s\) but images has 1",
        ),
    ],
)
def test_bad_rows_are_named(tmp_path, line, message):
    Image.new("RGB", (96, 96)).save(tmp_path / "a.png")
    good = {"messages": [json.loads(ASKED), json.loads(ANSWERED)], "images": ["a.png"]}
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(good) + "\n" + line + "\n")
    rows = load_rows(ModelOptions(dataset=str(path)))
    assert rows[0]["fault"] is None
    assert re.search(message, rows[1]["fault"]), rows[1]["fault"]
    assert rows[1]["record"] == f"{path}, line 2"
    with pytest.raises(SaccadeError, match=f"^{path}, line 2: "):
        prepare_example_or_raise(rows[1])


def prepare_example_or_raise(row):
    """As the collator does outside of training: the fault with the record's place before it."""
    from saccade.dualspeed import DualSpeedCollator

    return DualSpeedCollator(processor=None)([row])


@pytest.mark.parametrize("steps", [{"num_train_epochs": 1}, {"max_steps": 2}])
def test_rows_that_make_no_full_batch_are_refused(steps, tmp_path, monkeypatch):
    """Without any batch it was a traceback, or a model that was saved as trained after no step."""
    monkeypatch.setattr("saccade.training.run.load_model", lambda *given: pytest.fail("a model was loaded"))
    values = {"dataset_rows": 3, "per_device_train_batch_size": 4, "dataloader_drop_last": True, **steps}
    recipe = make_recipe({**values, "use_cpu": True, "bf16": False, "output_dir": str(tmp_path / "out")})
    with pytest.raises(SaccadeError, match="dataloader_drop_last=True drops all 3 rows, which make no batch of 4"):
        train_recipe(recipe)
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_lora_covers_the_decoder_and_nothing_else(model):
    config = lora_config(model, make_recipe({"lora": True, "use_cpu": True, "bf16": False}))
    names = [name for name, _ in get_family(model).model.named_modules() if re.fullmatch(config.target_modules, name)]
    assert len(names) == 7 * len(get_family(model).language_layers)
    assert all("language_model" in name for name in names)


def test_both_stages_with_lora_then_eval(tmp_path, capsys):
    common = ["--dataset_rows", "16", *TINY]
    assert main(["train", "tiny-digits/pretrain", "--output_dir", str(tmp_path / "one"), *common]) == 0
    lora = ["train", "tiny-digits/sft_lora", "--model", str(tmp_path / "one"), "--output_dir", str(tmp_path / "two")]
    assert main([*lora, *common]) == 0, capsys.readouterr().err
    assert main(["eval", str(tmp_path / "two"), "--num-samples", "20", "--batch-size", "10"]) == 0
    results = json.loads((tmp_path / "two" / "eval.json").read_text())["results"]
    assert [result["inference"] for result in results] == ["full", "pruned", "pruned_isolator"]
    assert results[1]["mean_prompt_length"] < results[2]["mean_prompt_length"] < results[0]["mean_prompt_length"]
    assert all(result["samples"] == 20 for result in results)


def test_resume_auto_starts_anew_without_a_checkpoint_and_goes_on_with_one(tmp_path):
    values = {
        "dataset_rows": 16,
        "output_dir": str(tmp_path),
        "lr_scheduler_type": "constant",
        "max_steps": 2,
        "save_steps": 1,
        "per_device_train_batch_size": 2,
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "resume": "auto",
        "logging_steps": 1,
        "gradient_checkpointing": False,
    }
    train_recipe(make_recipe(values))
    trainer = train_recipe(make_recipe({**values, "max_steps": 3}))
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2, 3]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prune-ratio", "1"], r"prune_ratio=1.0 is outside"),
        (["--inference", "half"], "inference='half' is unknown"),
        (["--inference", "pruned_isolator"], "needs an isolator"),
        (["--reducer", "best"], "divprune"),
        (["--num-samples", "0"], "num_samples=0"),
        (["--split", "exam"], "exam"),
    ],
)
def test_bad_eval_flags(flags, message, capsys):
    assert main(["eval", "tiny", *flags]) == 2
    assert re.search(message, capsys.readouterr().err.strip().splitlines()[-1])


def test_contents_as_text_and_as_parts_in_one_file(tmp_path):
    Image.new("RGB", (96, 96)).save(tmp_path / "a.png")
    answer = {"role": "assistant", "content": "3"}
    parts = [{"type": "image"}, {"type": "text", "text": "how many ?"}]
    rows = [
        {"messages": [{"role": "user", "content": parts}, answer], "images": ["a.png"]},
        {"messages": [{"role": "user", "content": "<image>\nhow many ?"}, answer], "images": "a.png"},
    ]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    loaded = load_rows(ModelOptions(dataset=str(tmp_path / "data.json")))
    batch = prepare_example(loaded[0]), prepare_example(loaded[1])
    assert batch[0]["messages"] == batch[1]["messages"]


def test_prompt_and_completion_rows(tmp_path):
    row = {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}
    (tmp_path / "data.jsonl").write_text(json.dumps(row))
    loaded = load_rows(ModelOptions(dataset=str(tmp_path / "data.jsonl")))[0]
    assert {name: loaded[name] for name in ("prompt", "completion", "images")} == {**row, "images": []}


def test_a_model_without_a_family_is_refused_before_its_weights_are_read(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for command in (["train", "tiny-digits/sft", "--model", str(tmp_path)], ["eval", str(tmp_path)]):
        assert main(command) == 2
        assert "model_type='llama' has no family" in capsys.readouterr().err.strip().splitlines()[-1]


def test_the_isolator_of_a_lora_run_comes_along_and_new_adapters_on_adapters_are_refused(tmp_path):
    values = {
        **{"dataset_rows": 8, "max_steps": 2, "per_device_train_batch_size": 2, "use_cpu": True, "bf16": False},
        **{"disable_tqdm": True, "gradient_checkpointing": False, "save_strategy": "no", "lora_r": 2},
    }
    first = train_recipe(make_recipe({**values, "output_dir": str(tmp_path / "one"), "lora": True}))
    assert ModeIsolator.from_pretrained(tmp_path / "one").weight.equal(first.isolator.weight)
    again = {**values, "model": str(tmp_path / "one"), "dataset": "digits", "output_dir": str(tmp_path / "two")}
    again |= {"learning_rate": 1e-12, "lora": False}
    second = train_recipe(make_recipe(again))
    torch.testing.assert_close(second.isolator.weight, first.isolator.weight)
    assert all(weight.requires_grad for weight in second.family.language_model.parameters())
    with pytest.raises(SaccadeError, match="contains LoRA adapters"):
        train_recipe(make_recipe({**again, "output_dir": str(tmp_path / "three"), "lora": True}))


def test_the_summary_head_of_a_lora_run_comes_along(tmp_path):
    values = {
        **{"dataset": "digits", "dataset_rows": 8, "max_steps": 2, "per_device_train_batch_size": 2},
        **{"use_cpu": True, "bf16": False, "disable_tqdm": True, "gradient_checkpointing": False},
        **{"save_strategy": "no", "lora_r": 2, "prune_ratio": 0.0, "slow_probability": 1.0, "distill_weight": 0.0},
        "skip_vision": "100/156",
    }
    first = train_recipe(make_recipe({**values, "output_dir": str(tmp_path / "one"), "lora": True}))
    again = {**values, "model": str(tmp_path / "one"), "output_dir": str(tmp_path / "two"), "learning_rate": 1e-12}
    again["lora"] = False
    second = train_recipe(make_recipe(again))
    for name, value in first.skip.summary.named_parameters():
        torch.testing.assert_close(dict(second.skip.summary.named_parameters())[name], value)
