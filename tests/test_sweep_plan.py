"""What a sweep plans before anything runs: grids, seeds, shared stages, studies, and what it refuses."""

import json
import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from saccade import SaccadeError
from saccade.cli.main import main
from saccade.recipes import parse_grid
from saccade.sweeps import METHODS, QUICK, Evaluation, RunSpec, digit_run
from saccade.sweeps.plan import Plan, check_runs, choose, make_plan, place, plan_grid
from saccade.tiny import build_tiny_llava, save_tiny

SFT = {"dataset": "digits", "max_steps": 2, "learning_rate": 1e-3}
PRETRAIN = {"dataset": "digits", "dataset_stage": "pretrain", "freeze_language_model": True, "max_steps": 1}


class TestGrid:
    def test_mappings_are_placed_as_they_are_and_their_labels_are_words(self) -> None:
        wanted = {"preset": "576/576", "newlines": "drop"}
        specs = plan_grid(SFT, None, {"skip_vision": [wanted, None]}, seeds=1)
        assert [spec.stages[-1].get("skip_vision") for spec in specs] == [wanted, None]
        assert [spec.labels["skip_vision"] for spec in specs] == ["{preset: 576/576, newlines: drop}", None]
        assert choose(specs, {"skip_vision": [wanted]}) == specs[:1]

    def test_values_are_read_as_yaml(self) -> None:
        grid = parse_grid(["prune_ratio=0.5,0.9", "reducer=divprune,random", "reducer_options={seed: 1},{seed: 2}"])
        assert grid == {
            "prune_ratio": [0.5, 0.9],
            "reducer": ["divprune", "random"],
            "reducer_options": [{"seed": 1}, {"seed": 2}],
        }

    def test_the_runs_are_the_product_seed_by_seed(self) -> None:
        grid = {"prune_ratio": [0.5, 0.9], "learning_rate": [1e-3, 1e-4, 1e-5]}
        specs = plan_grid(SFT, PRETRAIN, grid, seeds=2, scenes=7, split="validation")
        wanted = [
            {"prune_ratio": ratio, "learning_rate": rate, "seed": seed}
            for seed, ratio, rate in product(range(2), grid["prune_ratio"], grid["learning_rate"])
        ]
        assert [spec.labels for spec in specs] == wanted
        assert len({spec.name for spec in specs}) == 12
        for spec, labels in zip(specs, wanted, strict=True):
            pretrain, sft = spec.stages
            assert (pretrain["prune_ratio"], sft["prune_ratio"]) == (labels["prune_ratio"],) * 2
            assert (pretrain["seed"], sft["seed"], sft["dataset_seed"]) == (labels["seed"],) * 3
            assert sft["learning_rate"] == labels["learning_rate"]
            assert "learning_rate" not in pretrain
            assert (spec.evaluation.scenes, spec.evaluation.split) == (7, "validation")
            assert [way["name"] for way in spec.evaluation.inferences] == ["full", "pruned", "pruned_isolator"]

    def test_without_seeds_the_recipe_s_own_stays(self) -> None:
        (spec,) = plan_grid({**SFT, "seed": 7, "dataset_seed": 3}, None, {}, seeds=None)
        assert (spec.labels, spec.stages[0]["seed"], spec.stages[0]["dataset_seed"]) == ({"seed": 7}, 7, 3)

    def test_a_field_goes_to_the_stage_that_it_names(self) -> None:
        stages = {"pretrain": {}, "sft": {}}
        given = {"positions": "original", "max_steps": 5, "pretrain.max_steps": 9}
        assert place(stages, given, {"sft.positions": "compact"}) == {
            "pretrain": {"positions": "original", "max_steps": 9},
            "sft": {"positions": "compact", "max_steps": 5},
        }
        with pytest.raises(SaccadeError, match="there is no stage 'first', the stages are pretrain, sft"):
            place(stages, {"first.seed": 1})

    @pytest.mark.parametrize("named_first", [True, False])
    def test_a_field_for_a_named_stage_holds_whatever_is_given_for_all(self, named_first) -> None:
        fields = {"pretrain.prune_ratio": [0, 0.3], "prune_ratio": [0.5, 0.9], "pretrain.seed": [5], "max_steps": [2]}
        order = list(fields) if named_first else list(reversed(fields))
        for overridden in ((), ("pretrain.seed",), ("pretrain.seed", "max_steps")):
            grid = {name: fields[name] for name in order if name not in overridden}
            overrides = {name: fields[name][0] for name in overridden}
            specs = plan_grid(SFT, PRETRAIN, grid, 2, overrides=overrides)
            assert len({spec.stage_ids for spec in specs}) == 8
            for spec in specs:
                pretrain, sft = spec.stages
                wanted = spec.labels["pretrain.prune_ratio"], spec.labels["prune_ratio"]
                assert (pretrain["prune_ratio"], sft["prune_ratio"]) == wanted
                assert (pretrain["seed"], sft["seed"]) == (5, spec.labels["seed"])

    def test_overrides_for_a_named_stage_survive_the_grid(self) -> None:
        specs = plan_grid(SFT, PRETRAIN, {"prune_ratio": [0.5, 0.9]}, None, overrides={"pretrain.prune_ratio": 0})
        assert [[stage["prune_ratio"] for stage in spec.stages] for spec in specs] == [[0, 0.5], [0, 0.9]]
        (spec,) = plan_grid(SFT, PRETRAIN, {"keep_tokens": [6]}, None, overrides={"pretrain.prune_ratio": 0})
        assert [(stage.get("prune_ratio"), stage.get("keep_tokens")) for stage in spec.stages] == [
            (0, None),
            (None, 6),
        ]

    def test_an_override_that_grid_or_seeds_would_replace_is_refused(self) -> None:
        with pytest.raises(SaccadeError, match="--seed 3 and --seeds both choose the seeds: give one of them"):
            plan_grid(SFT, PRETRAIN, {}, 2, overrides={"seed": 3})
        with pytest.raises(SaccadeError, match=r"--prune_ratio 0\.5 and --grid prune_ratio both set it: give one"):
            plan_grid(SFT, PRETRAIN, {"prune_ratio": [0.8, 0.9]}, None, overrides={"prune_ratio": 0.5})

    def test_scenes_follow_the_seed_unless_they_are_chosen(self) -> None:
        specs = plan_grid(SFT, PRETRAIN, {"dataset_seed": [10, 11]}, 2)
        for spec in specs:
            assert [stage["dataset_seed"] for stage in spec.stages] == [spec.labels["dataset_seed"]] * 2
        assert len({spec.stage_ids for spec in specs}) == 4
        specs = plan_grid(SFT, PRETRAIN, {}, 2, overrides={"pretrain.dataset_seed": 7})
        assert [[stage["dataset_seed"] for stage in spec.stages] for spec in specs] == [[7, 0], [7, 1]]

    def test_no_two_runs_have_one_name(self) -> None:
        grid = {
            "dataset": ["данные.json", "файлы.json", "a/b.json", "a_b.json"],
            "image_folder": ["c d", "c_d", "c/d"],
        }
        specs = plan_grid(SFT, None, grid, 2)
        names = [spec.name for spec in specs]
        assert len(set(names)) == len(names) == 24
        assert all(re.fullmatch(r"[A-Za-z0-9.=_+-]+", name) for name in names)
        # A grid that grows leaves the names of the runs that are there.
        more = plan_grid(SFT, None, {**grid, "image_folder": [*grid["image_folder"], "c:d"]}, 2)
        assert {(spec.name, spec.stage_ids) for spec in specs} <= {(spec.name, spec.stage_ids) for spec in more}

    def test_runs_that_differ_in_their_labels_only_are_refused(self) -> None:
        with pytest.raises(SaccadeError, match="slow_probability has no effect on them; leave it out of --grid"):
            plan_grid(PRETRAIN, None, {"slow_probability": [0.1, 0.5]}, None)
        with pytest.raises(SaccadeError, match="the runs seed=0 and seed=1 would be the same: seed has no effect"):
            plan_grid(SFT, None, {}, 2, overrides={"sft.seed": 3, "dataset_seed": 0})

    def test_rows_of_other_data_are_not_evaluated_on(self) -> None:
        (spec,) = plan_grid({"dataset": "rows.jsonl"}, None, {}, seeds=None)
        assert spec.evaluation is None

    def test_only(self) -> None:
        specs = plan_grid(SFT, PRETRAIN, {"prune_ratio": [0.5, 0.9], "reducer": ["divprune", "random"]}, seeds=2)
        chosen = choose(specs, {"prune_ratio": [0.9], "seed": [1]})
        assert {(spec.labels["prune_ratio"], spec.labels["seed"]) for spec in chosen} == {(0.9, 1)}
        assert len(chosen) == 2
        with pytest.raises(SaccadeError, match="--only color: no run has this label, they have prune_ratio, reducer"):
            choose(specs, {"color": ["red"]})
        with pytest.raises(SaccadeError, match="--only seed=9: no run has it, there are 0, 1"):
            choose(specs, {"seed": [9]})


class TestStages:
    def test_equal_first_stages_are_one(self) -> None:
        specs = plan_grid(SFT, PRETRAIN, {"slow_probability": [0.1, 0.5], "max_steps": [2, 3]}, seeds=2)
        assert len({spec.stage_ids[0] for spec in specs}) == 2  # one a seed: an always fast stage has no slow steps
        assert len({spec.stage_ids[1] for spec in specs}) == 8

    def test_what_a_stage_comes_after_makes_it_another(self) -> None:
        one, other = plan_grid(SFT, PRETRAIN, {"pretrain.max_steps": [1, 2]}, seeds=None)
        assert one.stages[1] == other.stages[1]
        assert one.stage_ids[1] != other.stage_ids[1]

    def test_all_tokens_in_a_first_stage_are_not_pruning(self) -> None:
        runs = [digit_run("x", {}, QUICK, "prune_only", 0, pretrain_method=name) for name in METHODS]
        shared = {name: run.stage_ids[0] for name, run in zip(METHODS, runs, strict=True)}
        assert shared["all_tokens"] != shared["prune_only"] == shared["slow_steps"]
        assert shared["slow_steps_isolator"] == shared["dualspeed"] != shared["slow_steps"]

    def test_a_second_stage_starts_from_the_first(self, tmp_path: Path) -> None:
        (spec,) = plan_grid({**SFT, "save_strategy": "no"}, PRETRAIN, {}, seeds=None)
        first, second = spec.recipes(tmp_path)
        assert second["model"] == first["output_dir"] == str(tmp_path / spec.stage_ids[0])
        assert first["resume"] == "auto"  # the trainer's default writes checkpoints
        assert "resume" not in second
        assert first["dataset"] == second["dataset"] == "digits"  # which a recipe with a model has to name

    def test_a_spec_survives_json(self) -> None:
        run = RunSpec("a", {"seed": 0}, (SFT,), Evaluation(({"name": "full"},)))
        for spec in (run, replace(run, extra={"checkpoints": 3}), digit_run("x", {}, QUICK, "dualspeed", 0)):
            again = RunSpec.from_json(json.loads(json.dumps(spec.as_json())))
            assert again.as_json() == spec.as_json()
            assert again.stage_ids == spec.stage_ids


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    plan = make_plan("a", plan_grid(SFT, PRETRAIN, {"prune_ratio": [0.5, 0.9]}, seeds=2), about={"study": "x"})
    plan.write(tmp_path)
    assert Plan.read(tmp_path) == plan


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to run"),
        (["tiny-digits/sft", "--grid", "prune_ratio"], "write --grid field=a,b,c"),
        (["tiny-digits/sft", "--grid", "prune_ratio=0.5,0.5"], "the value 0.5 is given twice"),
        (["tiny-digits/sft", "--grid", "prune_rat=0.5"], "unknown field 'prune_rat': did you mean 'prune_ratio'?"),
        (["tiny-digits/sft", "--model", "tiny", "--grid", "prune_ratio=0.5,1.5"], "prune_ratio=1.5 is outside"),
        (
            ["tiny-digits/sft", "--model", "tiny", "--grid", "slow_probability=0.5,1.5"],
            "run slow_probability=1.5-seed=0: slow_probability=1.5",
        ),
        (["tiny-digits/sft", "--model", "tiny", "--grid", "reducer=divprune,nope"], "reducer='nope' is unknown"),
        (["tiny-digits/sft", "--model", "tiny", "--grid", "skip_vision={preset: a},null"], "preset='a' is unknown"),
        (["tiny-digits/sft", "--grid", "model=tiny,nowhere"], "model='nowhere' is not a local folder"),
        (["tiny-digits/sft", "--grid", "seed=1,2", "--seeds", "2"], "--grid seed and --seeds both"),
        (["tiny-digits/sft", "--model", "tiny", "--dataset", "no.jsonl"], "'no.jsonl' does not exist"),
        (["tiny-digits/sft", "--model", "tiny", "--split", "nope"], "split='nope' is unknown"),
        # A number of tokens and, for a named stage, a ratio are no fault.
        (
            ["tiny-digits/sft", "--keep_tokens", "6", "--sft.prune_ratio", "0", "--grid", "slow_probability=7"],
            "slow_probability=7",
        ),
        (["tiny-digits/sft", "--pretrain", "nope"], "recipe 'nope' does not exist"),
        (["tiny-digits/sft", "--seeds", "0"], "seeds=0"),
        (["tiny-digits/sft", "--jobs", "0"], "jobs=0"),
        (["tiny-digits/sft", "--grid", "seed=0,1", "--only", "seed=9"], "--only seed=9: no run has it"),
        (["--table"], "does not exist: give the folder of a sweep"),
    ],
)
def test_bad_input_is_one_line_before_anything_starts(words, message, tmp_path, capsys) -> None:
    output = tmp_path / "out"
    assert main(["sweep", *words, "--output", str(output)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not output.exists()


def test_train_says_who_runs_two_stages(tmp_path, capsys) -> None:
    recipe = tmp_path / "both.yaml"
    recipe.write_text("model: tiny\npretrain: tiny-digits/pretrain\n")
    assert main(["train", str(recipe)]) == 2
    assert "`saccade sweep` trains both stages" in capsys.readouterr().err


def test_no_stage_of_a_model_trains_on_the_digits_unasked(processor, tmp_path) -> None:
    save_tiny(build_tiny_llava(processor), processor, tmp_path / "mine")
    first = {"model": str(tmp_path / "mine"), "dataset": "digits", "dataset_rows": 2, "use_cpu": True}
    second = {"dataset": "digits", "dataset_rows": 2, "use_cpu": True}
    check_runs([RunSpec("run", {"seed": 0}, (first, second))])
    del second["dataset"]
    with pytest.raises(SaccadeError, match=r"run run: model='.*mine' without a dataset would train on"):
        check_runs([RunSpec("run", {"seed": 0}, (first, second))])
    check_runs([RunSpec("run", {"seed": 0}, ({**first, "model": "tiny"}, second))])
