"""A user's mistakes: each ends in one line that names the option, its value and the fix."""

import math
import re
import tomllib
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from family_models import FAMILIES
from helpers import make_trainer
from peft import LoraConfig

from saccade import DualSpeedConfig, SaccadeError
from saccade.cli.main import main
from saccade.data import digit_scenes
from saccade.dualspeed import checks
from saccade.errors import EXTRAS, needs_package
from saccade.testing.training import make_config
from saccade.training import load_recipe
from saccade.training.models import ModelOptions, load_model, load_processor
from saccade.training.recipe import make_recipe
from saccade.training.run import check_recipe
from saccade.values import BOUNDS

ROOT = Path(__file__).parent.parent
HERE = ("--use_cpu", "true", "--bf16", "false")


def refused(*words: str) -> str:
    """What `saccade train` says to a recipe with these flags, in one line, without training anything."""
    with pytest.raises(SaccadeError) as found:
        check_recipe(load_recipe("tiny-digits/sft", [*HERE, *words]))
    assert "\n" not in str(found.value)
    return str(found.value)


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "nan"])
@pytest.mark.parametrize("name", [
    *sorted(entry.name for entry in fields(DualSpeedConfig) if entry.init and "float" in str(entry.type)),
    *sorted(entry.name for entry in fields(ModelOptions) if entry.type is float),
])  # fmt: skip
def test_no_option_is_nan_or_infinite(name, value):
    if name in BOUNDS and value == ".inf":  # no bound
        return
    assert re.match(rf"{name}='?-?(nan|inf)", refused(f"--{name}", value))


def test_numbers_inside_of_lists_and_mappings_are_finite_too(tmp_path):
    for options in (
        {"lr_scheduler_kwargs": {"min_lr": math.nan}},
        {"modes": [{"name": "a", "probability": math.inf}]},
    ):
        with pytest.raises(SaccadeError, match="is not a finite number"):
            make_config(tmp_path, **options)


@pytest.mark.parametrize(
    ("name", "value"), [("adam_beta1", 1.0), ("adam_beta2", 1.5), ("max_steps", 0), ("max_steps", -2)]
)
def test_numbers_out_of_range(name, value):
    assert f"{name}={value}" in refused(f"--{name}", str(value))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model", None, "model=None, expected str"),
        ("reducer", None, "reducer=None, expected str"),
        ("image_folder", 5, "image_folder=5 is an int, expected list or str"),
        ("image_folder", [1, 2], "image_folder=[1, 2]: 1 is an int, expected str"),
        ("image_urls", 5, "image_urls=5 is an int, expected list or str"),
        ("lora_target_modules", 5, "lora_target_modules=5 is an int, expected list or str"),
        ("lora_modules_to_save", 5, "lora_modules_to_save=5 is an int, expected list"),
        ("lora_modules_to_save", ["a", None], "None is a NoneType, expected str"),
        ("dataset", 7, "dataset=7 is an int, expected list or str"),
        ("lr_scheduler_kwargs", [1], "lr_scheduler_kwargs=[1] is a list, expected dict or str"),
        ("label_names", {"a": 1}, "label_names={'a': 1} is a dict, expected list"),
    ],
)
def test_every_field_has_the_type_of_its_annotation(name, value, message):
    with pytest.raises(SaccadeError) as found:
        make_recipe({name: value, "use_cpu": True})
    assert message in str(found.value)


def test_a_name_may_be_a_number():
    assert make_recipe({"model": 5, "image_folder": ["a", "b"], "use_cpu": True}).options.model == "5"


def test_rows_are_not_grouped_by_a_length_that_they_do_not_have():
    line = refused("--train_sampling_strategy", "group_by_length")
    assert "use group_by='shortened' or 'full'" in line


def test_a_batch_size_is_not_searched_on_weights_that_are_trained_already():
    line = refused("--auto_find_batch_size", "true")
    assert "auto_find_batch_size=True" in line
    assert "slow_micro_batch_size or max_tokens_per_batch" in line


@pytest.mark.parametrize(
    ("words", "package"),
    [
        (["--report_to", "tensorboard"], "saccade[track]"),
        (["--report_to", "wandb"], "saccade[track]"),
        (["--report_to", "trackio"], "saccade[track]"),
        (["--report_to", "mlflow"], "mlflow"),
        (["--optim", "adamw_8bit"], "saccade[quant]"),
        (["--optim", "paged_adamw_8bit"], "saccade[quant]"),
        (["--optim", "adamw_bnb_8bit"], "saccade[quant]"),
        (["--optim", "galore_adamw", "--optim_target_modules", "all-linear"], "galore-torch"),
        (["--use_liger_kernel", "true"], "liger-kernel"),
    ],
)
def test_a_package_that_is_missing_is_named_before_a_model_is_loaded(words, package, monkeypatch):
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    monkeypatch.setattr(checks, "get_available_reporting_integrations", lambda: [])
    line = refused(*words)
    assert line.startswith(f"{words[0][2:]}=")
    assert line.endswith(f'is not installed: pip install "{package}"')


def test_every_optimizer_of_bitsandbytes_is_known_to_need_it():
    from transformers import trainer_optimizer

    needing = {name.value for name in trainer_optimizer._BITSANDBYTES_OPTIMIZERS}
    assert {name for name in needing if not name.startswith(checks.BITSANDBYTES)} == set()
    assert not any(name.startswith(checks.BITSANDBYTES) for name in ("adamw_torch", "adamw_torch_8bit", "adafactor"))


def test_deepspeed_is_named_too(monkeypatch):
    monkeypatch.setattr("saccade.dualspeed.config.find_spec", lambda name: None)
    assert refused("--deepspeed", "zero.json").endswith('pip install "saccade[deepspeed]"')


def test_every_extra_installs_the_packages_that_errors_name_it_for():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for package, extra in EXTRAS.items():
        names = {re.match(r"[A-Za-z0-9_-]+", requirement)[0] for requirement in extras[extra]}
        assert package in names, f"saccade[{extra}] does not install {package}"
        assert f"saccade[{extra}]" in str(needs_package("x", package))


def test_an_unknown_tracker_or_template_is_named():
    assert "report_to='tensorbord' is unknown: did you mean 'tensorboard'?" in refused("--report_to", "tensorbord")
    assert "chat_template_path='none.jinja' does not exist" in refused("--chat_template_path", "none.jinja")


def test_a_template_that_is_no_text_is_named(tmp_path, capfd):
    """Also where the data are checked, or the cost is estimated, which load no model."""
    path, rows = tmp_path / "latin.jinja", tmp_path / "rows.json"
    path.write_bytes("caf\xe9".encode("latin-1"))
    message = f"chat_template_path={str(path)!r} is not a Jinja file in UTF-8: 'utf-8' codec"
    assert message in refused("--chat_template_path", str(path))
    rows.write_text('[{"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "a"}]}]')
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: tiny\ndataset: {rows}\nchat_template_path: {path}\noutput_dir: {tmp_path / 'out'}\n")
    for words in (
        ["data", "check", str(recipe), "--output", str(tmp_path / "check.json")],
        ["train", str(recipe), "--dry-run"],
    ):
        assert main(words) == 2
        assert message in capfd.readouterr().err


def test_what_trl_and_the_hub_refuse_is_one_line(model, processor, tmp_path):
    with pytest.raises(SaccadeError, match=r"offline|hub|reach"):
        make_trainer(model, processor, tmp_path, push_to_hub=True)


def test_a_model_that_cannot_be_fetched_is_one_line(capfd):
    assert main(["train", "tiny-digits/sft", "--model", "someone/nothing", *HERE]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "model='someone/nothing' is not a local folder, and cannot be loaded from the hub" in line


def test_a_processor_that_does_not_load_is_told_before_the_weights_are_read(model, tmp_path, monkeypatch):
    model.config.save_pretrained(tmp_path)
    monkeypatch.setattr("saccade.training.models.load_whole", lambda *_, **__: pytest.fail("the weights were loaded"))
    with pytest.raises(SaccadeError, match="has no processor that loads"):
        load_model(ModelOptions(model=str(tmp_path)))


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is installed")
def test_a_processor_that_needs_torchvision_says_so(tmp_path):
    """As stock folders of Qwen-VL have it, whose processors load their video processor beside that of images."""
    model, processor = FAMILIES["qwen2_5_vl"].build()
    for part in (model.config, processor.tokenizer, processor.image_processor):
        part.save_pretrained(tmp_path)
    with pytest.raises(SaccadeError, match="has a processor that needs torchvision, which is not installed") as found:
        load_processor(ModelOptions(model=str(tmp_path)))
    assert "\n" not in str(found.value)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)


@pytest.mark.parametrize("name", ["bf16", "fp16", "bf16_full_eval"])
def test_half_precision_without_a_gpu_says_what_to_give(name, no_gpu):
    with pytest.raises(SaccadeError, match=f"{name}=True needs a GPU.* give {name}: false, use_cpu: true"):
        make_recipe({name: True})


def test_a_recipe_for_a_gpu_is_checked_without_one(no_gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["train", "tiny-digits/pretrain", "--bf16", "true", "--use_cpu", "false"]
    assert main([*command, "--check"]) == 0
    assert capsys.readouterr().err.startswith("saccade: note: bf16=True needs a GPU, and none was found")
    assert main([*command, "--check", "--eval_strategy", "steps"]) == 2
    assert "eval_strategy='steps' has no rows" in capsys.readouterr().err
    # What a launcher asks before it starts processes.
    assert main([*command, "--check-here"]) == 2
    assert capsys.readouterr().err.startswith("saccade: error: bf16=True needs a GPU")


@pytest.mark.parametrize(("flags", "asked"), [([], "--check-here"), (["--check"], "--check")])
def test_a_launch_checks_the_recipe_first_and_stops_there_if_asked_to(flags, asked, monkeypatch):
    calls = []
    monkeypatch.setattr("saccade.launch.run_processes", lambda plan, command: calls.append(command) or 0)
    monkeypatch.setattr("subprocess.run", lambda command: calls.append(command) or SimpleNamespace(returncode=0))
    processes = [] if flags else ["--processes", "2"]  # here is no GPU to count
    assert main(["train", "tiny-digits/pretrain", "--launch", "ddp", *processes, *flags]) == 0
    assert calls[0][-1] == asked
    assert len(calls) == (1 if flags else 2)


def test_without_a_gpu_a_run_is_in_float32_unless_it_is_told_otherwise(no_gpu, tmp_path, caplog):
    assert DualSpeedConfig(output_dir=str(tmp_path)).bf16 is False
    assert "no GPU was found: training on the CPU" in caplog.text
    caplog.clear()
    assert DualSpeedConfig(output_dir=str(tmp_path), use_cpu=True).bf16 is False
    assert not caplog.text
    assert DualSpeedConfig(output_dir=str(tmp_path), use_cpu=True, bf16=True).bf16 is True


def test_without_a_gpu_no_memory_is_pinned_of_which_torch_would_warn(no_gpu, tmp_path):
    assert DualSpeedConfig(output_dir=str(tmp_path)).dataloader_pin_memory is False


def test_the_two_lines_of_the_readme_run_on_a_cpu_as_they_are(model, processor, tmp_path, monkeypatch, no_gpu):
    code = re.search(
        r"```python\n(from saccade import DualSpeedConfig.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )
    monkeypatch.chdir(tmp_path)
    names = {
        "model": model,
        "processor": processor,
        "dataset": digit_scenes("sft", "train", 3, seed=5, kinds=["read"]),
        "lora": LoraConfig(target_modules=["q_proj", "v_proj"], r=4),
    }
    exec(code[1], names)
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-3"]
