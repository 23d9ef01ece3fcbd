"""Named settings: in Python, in a recipe, on the command line and in a sweep."""

import json

import pytest

from saccade import DualSpeedConfig
from saccade.cli.main import main
from saccade.errors import SaccadeError
from saccade.presets import PRESETS
from saccade.pruning.isolator import ISOLATOR_FILE
from saccade.sweeps.plan import Plan
from saccade.training import load_recipe

FIELDS = PRESETS["fast_then_slow"]


def written(tmp_path, text: str):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    return file


class TestWhichFieldWins:
    def test_a_recipe_s_own_fields_win_over_its_preset(self, tmp_path) -> None:
        file = written(tmp_path, "model: tiny\ndataset: digits\npreset: fast_then_slow\nisolator_length: 2\n")
        args = load_recipe(file).trainer
        assert (args.schedule, args.distill_weight, args.isolator_length) == ("sequential", 0.0, 2)

    @pytest.mark.parametrize("preset", PRESETS)
    def test_a_preset_on_the_command_line_wins_over_the_recipe(self, preset: str) -> None:
        plain, args = (load_recipe("tiny-digits/sft", flags).trainer for flags in ([], [f"--preset={preset}"]))
        assert (plain.schedule, plain.isolator_length, plain.distill_weight) == ("bernoulli", 4, 1.0)
        assert (plain.positions, plain.slow_probability) == ("compact", 0.1)
        assert {name: getattr(args, name) for name in PRESETS[preset]} == PRESETS[preset]
        assert args.learning_rate == plain.learning_rate

    def test_other_flags_win_over_it(self) -> None:
        args = load_recipe("tiny-digits/sft", ["--distill_weight", "0.5", "--preset", "fast_then_slow"]).trainer
        assert (args.schedule, args.distill_weight) == ("sequential", 0.5)

    def test_options_in_python_win_over_it(self, tmp_path) -> None:
        args = DualSpeedConfig.preset("fast_then_slow", output_dir=str(tmp_path), use_cpu=True, distill_weight=0.5)
        assert (args.schedule, args.isolator_length, args.distill_weight) == ("sequential", 0, 0.5)

    def test_another_schedule_of_the_rate_does_not_get_the_preset_s_arguments(self, tmp_path) -> None:
        recipe = "model: tiny\ndataset: digits\npreset: fast_then_slow\nlr_scheduler_type: cosine\n"
        with pytest.raises(SaccadeError, match=r"lr_scheduler_type='cosine'.*leave lr_scheduler_type out"):
            load_recipe(written(tmp_path, recipe))
        args = load_recipe(written(tmp_path, recipe + "lr_scheduler_kwargs: null\n")).trainer
        assert (args.lr_scheduler_type, args.schedule) == ("cosine", "sequential")

    def test_a_sweep_compares_it_with_the_recipe(self, tmp_path, monkeypatch) -> None:
        monkeypatch.setattr("saccade.sweeps.runner.run_sweep", lambda plan, output, *_: plan.write(output) or _Done)
        command = ["sweep", "tiny-digits/sft", "--grid", "preset=null,fast_then_slow", "--output", str(tmp_path)]
        assert main([*command, "--model", "tiny"]) == 0
        plain, preset = (run.stages[-1] for run in Plan.read(tmp_path).runs)
        assert plain["schedule"] != "sequential"
        assert {name: preset[name] for name in FIELDS} == FIELDS


class _Done:
    @staticmethod
    def tell_failures() -> int:
        return 0


@pytest.mark.parametrize("command", ["train tiny-digits/sft --preset", "sweep tiny-digits/sft --model tiny --preset"])
def test_a_mistyped_name_ends_in_one_line(command: str, capsys) -> None:
    assert main([*command.split(), "fast_then_slw"]) == 2
    assert "preset='fast_then_slw' is unknown: did you mean 'fast_then_slow'?" in capsys.readouterr().err


def test_a_mistyped_name_in_a_recipe_and_in_python(tmp_path) -> None:
    with pytest.raises(SaccadeError, match="preset='fast' is unknown"):
        load_recipe(written(tmp_path, "preset: fast\n"))
    with pytest.raises(SaccadeError, match="preset='fast' is unknown"):
        DualSpeedConfig.preset("fast", output_dir=str(tmp_path))
    with pytest.raises(SaccadeError, match=r"preset=\['fast_then_slow'\] is unknown: did you mean"):
        load_recipe(written(tmp_path, "preset: [fast_then_slow]\n"))


def test_slow_steps_come_last(tmp_path) -> None:
    flags = ["--model", "tiny", "--max_steps", "10", "--logging_steps", "1", "--slow_probability", "0.2"]
    flags += ["--per_device_train_batch_size", "2", "--warmup_steps", "1", "--dataloader_num_workers", "0"]
    output = tmp_path / "run"
    command = ["train", "tiny-digits/sft", "--preset", "fast_then_slow", *flags, "--save_steps", "10"]
    assert main([*command, "--output_dir", str(output)]) == 0
    state = json.loads((output / "checkpoint-10" / "trainer_state.json").read_text())
    logged = [entry for entry in state["log_history"] if "loss" in entry]
    assert ["loss_slow" in entry for entry in logged] == [False] * 8 + [True] * 2
    assert logged[-1]["learning_rate"] >= 0.3 * max(entry["learning_rate"] for entry in logged)
    assert (output / "config.json").exists()
    assert not (output / ISOLATOR_FILE).exists()


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("cosine", {"min_lr_rate": 0.3}, "unexpected keyword argument 'min_lr_rate'"),
        ("cosine_with_min_lr", None, "min_lr"),
        ("polynomial", {"lr_end": 2.0}, "lr_end"),
    ],
)
def test_options_of_another_schedule_of_rates_end_in_one_line(kind: str, options, message: str, tmp_path) -> None:
    with pytest.raises(
        SaccadeError, match=f"lr_scheduler_kwargs=.* does not fit lr_scheduler_type='{kind}': .*{message}"
    ):
        DualSpeedConfig(str(tmp_path), use_cpu=True, lr_scheduler_type=kind, lr_scheduler_kwargs=options)
