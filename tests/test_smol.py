"""The testbed smol: rows, the tower's pretraining, the plan of its runs, and from nothing to a table at no size."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from assemble_parts import make_language_model
from smol_parts import parts_of_the_tests
from transformers import AutoTokenizer, CLIPVisionModel, LlavaForConditionalGeneration

from experiments.smol import projector, study, tower, worker
from experiments.smol.__main__ import main
from experiments.smol.rows import REQUEST, make_rows, read_rows, rows_file
from experiments.smol.study import (
    CANDIDATES,
    Settings,
    plan_ranking,
    plan_runs,
    plan_variations,
    ranking_table,
    task_table,
)
from experiments.smol.tasks import TASKS, Region, Sample
from experiments.smol.tasks.base import PATCH
from experiments.smol.worker import merge_tasks
from experiments.tiny_checkpoint.tower import READ_LAYER, place_positions
from saccade.errors import SaccadeError
from saccade.files import write_json_atomically
from saccade.images import open_image
from saccade.sweeps.table import baselines_of
from saccade.training import make_recipe
from saccade.training.assemble import AssembleOptions, assemble_model


@pytest.fixture(scope="module", autouse=True)
def parts(tmp_path_factory) -> Iterator[None]:
    with parts_of_the_tests(tmp_path_factory.mktemp("easy_vqa")):
        yield


class TestRows:
    def test_a_question_with_its_answer_comes_last(self) -> None:
        for task in TASKS:
            rows = make_rows(task, "train", "sft", 6, seed=1, turns=3)
            for number, row in enumerate(rows):
                sample = TASKS[task].sample("train", number, seed=1)
                asked = [message["content"] for message in row["messages"]]
                answers = {(question.text, question.answer) for question in sample.questions}
                assert set(zip(asked[::2], asked[1::2], strict=True)) <= answers
                assert len(set(asked[::2])) == len(asked) // 2 == min(3, len({text for text, _ in answers}))
                assert row["answer"] == asked[-1]
                assert row["kind"].split("/")[0] == task
                kinds = {question.kind for question in sample.questions if question.text == asked[-2]}
                assert row["kind"].split("/")[1] in kinds
                assert open_image(row["images"][0]).tobytes() == sample.image.tobytes()

    def test_captions_tell_everything(self) -> None:
        (row,) = make_rows("documents", "train", "pretrain", 1)
        request, caption = (message["content"] for message in row["messages"])
        assert request == REQUEST
        assert caption == TASKS["documents"].sample("train", 0).caption == row["answer"]

    def test_a_file_is_made_once(self, tmp_path: Path) -> None:
        arguments = ("charts", "validation", "sft", 3, 0, 12, 1)
        path = rows_file(tmp_path, *arguments)
        made = path.stat().st_mtime_ns
        assert rows_file(tmp_path, *arguments) == path
        assert path.stat().st_mtime_ns == made
        assert list(tmp_path.iterdir()) == [path]
        assert read_rows([path, path]).to_list() == 2 * make_rows("charts", "validation", "sft", 3).to_list()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("maps", "train", "sft", 1), "task='maps' is unknown: use one of digits, easy_vqa, documents, charts"),
            (("charts", "train", "dpo", 1), "stage='dpo' is unknown"),
            (("charts", "train", "sft", 0), "number=0: give at least 1"),
        ],
    )
    def test_bad_input_is_told(self, arguments, message: str) -> None:
        with pytest.raises(SaccadeError, match=message):
            make_rows(*arguments)


def test_the_tower_of_the_repository_reads_digits(monkeypatch) -> None:
    monkeypatch.setattr(tower, "train_tower", None)
    folder, report = study._make_tower(Path("nowhere"), study.Settings(), print)
    model = CLIPVisionModel.from_pretrained(folder, dtype=torch.float32)
    assert model.config.image_size == 12 * PATCH
    samples = [TASKS["digits"].sample("train", number) for number in range(100)]
    shown = torch.from_numpy(np.concatenate([tower.patch_targets(sample, 12) for sample in samples]))
    with torch.no_grad():
        states = model(tower._pixels(samples, 12), output_hidden_states=True).hidden_states[READ_LAYER][:, 1:]
    states = states.flatten(0, 1)
    told = torch.linalg.solve(states.T @ states + torch.eye(states.shape[1]), states.T @ shown)
    reader = SimpleNamespace(patches=lambda found: found @ told)
    assert report["validation"]["digits"] > 0.9
    assert tower.score_tower(model, reader, 0, 12, number=20)["digits"] > 0.8


class TestTower:
    @pytest.fixture(autouse=True)
    def small(self, monkeypatch) -> None:
        for name, value in {"WIDTH": 32, "LAYERS": 2, "HEADS": 2, "SAVE_EVERY": 2}.items():
            monkeypatch.setattr(tower, name, value)
        monkeypatch.setattr(tower, "BATCH", dict.fromkeys(TASKS, 1))
        real = tower.score_tower
        monkeypatch.setattr(tower, "score_tower", lambda *args: real(*args, number=2))

    def test_patches_learn_what_they_show(self) -> None:
        image = TASKS["charts"].sample("train", 0).image
        regions = (Region((16, 0, 58, 16), "Rome 7"), Region((40, 0, 48, 8), "red"), Region((0, 176, 192, 192), ""))
        targets = tower.patch_targets(Sample(image, regions, ()), 12)
        assert targets.shape == (144, len(tower.VOCABULARY))
        np.testing.assert_allclose(targets.sum(-1), 1, rtol=1e-6)
        shown = [{tower.VOCABULARY[word] for word in row.nonzero()[0]} for row in targets]
        # The region reaches over 10 of the 16 pixels of patch 3; the second one covers a quarter of patch 2.
        assert [number for number, words in enumerate(shown) if words == {"Rome", "7"}] == [1, 2, 3]
        assert sum(words == {""} for words in shown) == 141

    def test_most_steps_see_the_patches_that_show_something(self) -> None:
        pixels, targets = tower.tower_batch("train", 0, 0, 12)
        chosen = tower.choose_patches(targets, seed=3)
        assert chosen.shape == (len(pixels), 64)
        assert (chosen.diff() > 0).all()
        shows = targets[..., tower.NOTHING] == 0
        for row, patches in zip(shows, chosen.tolist(), strict=True):
            assert row.sum() > 64 or set(row.nonzero()[:, 0].tolist()) <= set(patches)
        assert torch.equal(chosen, tower.choose_patches(targets, seed=3))
        assert not torch.equal(chosen, tower.choose_patches(targets, seed=4))

    def test_a_tower_sees_the_chosen_patches_where_they_are(self) -> None:
        model = tower._new_tower(12, None)
        pixels, targets = tower.tower_batch("train", 0, 0, 12)
        everything = tower.choose_patches(targets, seed=None)
        with torch.no_grad():
            plain = model(pixels).last_hidden_state
            with tower.only_patches(model, everything):
                torch.testing.assert_close(model(pixels).last_hidden_state, plain)
            with tower.only_patches(model, everything[:, 5:9]):
                some = model(pixels).last_hidden_state
                # What the others show does not matter.
                others = pixels.clone()
                others[:, :, :PATCH, : 5 * PATCH] = 0
                others[:, :, PATCH:] = 0
                torch.testing.assert_close(model(others).last_hidden_state, some)
            assert some.shape[1] == 1 + 4
            torch.testing.assert_close(model(pixels).last_hidden_state, plain)

    def test_a_tower_that_was_broken_off_goes_on(self, tmp_path: Path, monkeypatch) -> None:
        whole = tower.train_tower(tmp_path / "whole", 4, log=lambda line: None)
        real = tower.tower_batch

        def breaks_off(split, step, seed, grid):
            if step == 3:
                raise KeyboardInterrupt
            return real(split, step, seed, grid)

        with monkeypatch.context() as patch:
            patch.setattr(tower, "tower_batch", breaks_off)
            with pytest.raises(KeyboardInterrupt):
                tower.train_tower(tmp_path / "parts", 4, log=lambda line: None)
        with pytest.raises(SaccadeError, match=r"holds a tower of other settings: steps=5 \(there: 4\)"):
            tower.train_tower(tmp_path / "parts", 5, log=lambda line: None)
        lines: list[str] = []
        parts = tower.train_tower(tmp_path / "parts", 4, log=lines.append)
        assert lines[0] == "tower: going on after step 2 of 4"
        first, second = (CLIPVisionModel.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "parts"))
        for name, weights in first.items():
            torch.testing.assert_close(second[name], weights, rtol=1e-3, atol=1e-4)
        assert parts["validation"].keys() == whole["validation"].keys() == TASKS.keys()
        assert not (tmp_path / "parts" / tower.STATE_FILE).exists()
        # What is there is taken as it is, unless it is another.
        assert tower.train_tower(tmp_path / "parts", 4)["cpu_seconds"] == parts["cpu_seconds"]
        with pytest.raises(SaccadeError, match="seed=1"):
            tower.train_tower(tmp_path / "parts", 4, seed=1)

    def test_a_larger_grid_starts_from_a_smaller_one(self, tmp_path: Path) -> None:
        tower.train_tower(tmp_path / "small", 1, log=lambda line: None)
        small = CLIPVisionModel.from_pretrained(tmp_path / "small", dtype=torch.float32).state_dict()
        large = tower._new_tower(24, tmp_path / "small")
        fresh = tower._new_tower(24, None)
        (name,) = (name for name in small if name.endswith("position_embedding.weight"))
        for other, weights in large.state_dict().items():
            if other != name:
                assert torch.equal(weights, small[other])
        # Where nothing was learned beside the sines and cosines, none of it is stretched.
        expected = tower._new_tower(12, None)
        place_positions(expected)
        expected.save_pretrained(tmp_path / "untrained")
        table = tower._new_tower(24, tmp_path / "untrained").state_dict()[name]
        torch.testing.assert_close(table[1:], fresh.state_dict()[name][1:])
        assert large.state_dict()[name].shape == (1 + 24 * 24, 32)

    def test_scores_count_the_words_that_patches_name(self) -> None:
        """A read-out that names the same two words everywhere is right where a region has them."""
        model, heads = tower._new_tower(12, None), tower.Heads(32)
        linear = heads.patches[1]
        with torch.no_grad():
            linear.weight.zero_()
            linear.bias.zero_()
            linear.bias[[tower.VOCABULARY.index(word) for word in ("rectangle", "green")]] = torch.tensor([6.0, 5.0])
        words = [TASKS["easy_vqa"].sample("validation", number).regions[0].text.split() for number in range(2)]
        right = sum(len({"rectangle", "green"} & set(both)) for both in words)
        assert all(len(both) == 2 for both in words)
        assert tower.score_tower(model, heads, 0, 12)["easy_vqa"] == right / 4
        assert 0 < right < 4

    def test_a_projector_tells_the_words_of_patches(self, tmp_path: Path, monkeypatch) -> None:
        """Its second layer is the weighted least-squares solution, in the language model's embeddings."""
        monkeypatch.setattr(projector, "score_tower", tower.score_tower)
        tower.train_tower(tmp_path / "tower", 1, log=lambda line: None)
        language_model = make_language_model(tmp_path / "language", "qwen2")
        folder = tmp_path / "model"
        assemble_model(tmp_path / "tower", language_model, folder, AssembleOptions(dtype="float32"))
        report = projector.align_projector(folder, 3, 12, log=lambda line: None)
        assert report["validation"].keys() == TASKS.keys()
        model = LlavaForConditionalGeneration.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        layers, table = model.model.multi_modal_projector, model.get_input_embeddings().weight.detach()
        texts = ["\n", *(word if word.isdigit() else f" {word}" for word in tower.VOCABULARY[1:])]
        words = torch.stack([table[tokenizer(text)["input_ids"]].mean(0) for text in texts])
        units, shown = [], []
        with torch.no_grad():
            for step in range(3):
                pixels, targets = tower.tower_batch("train", step, projector.SEED, 12)
                states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
                units.append(layers.act(layers.linear_1(states)).flatten(0, 1).double())
                shown.append(targets.flatten(0, 1).double())
        units, shown = torch.cat(units), torch.cat(shown)
        assert 0.3 < units.std(0).median() < units.std(0).max() < 2
        with_one = torch.cat([units, torch.ones(len(units), 1)], 1)
        weight = torch.where(shown[:, :1] == 1, 0.2, 1.0).sqrt()
        ridge = (projector.RIDGE * (weight * with_one).square().sum(0).mean()).sqrt() * torch.eye(with_one.shape[1])
        # Ridge regression is least squares with a row for each unit that asks for 0.
        asked = torch.cat([weight * shown, torch.zeros(len(ridge), shown.shape[1])])
        told = torch.linalg.lstsq(torch.cat([weight * with_one, ridge]), asked).solution
        expected = (with_one @ told @ words.double()).float()
        torch.testing.assert_close(layers.linear_2(units.float()), expected, rtol=1e-2, atol=1e-3)


PREPARED = {"data": {"pretrain": ["a"], "sft": ["b"]}, "model": "m"}


class TestPlan:
    def test_methods_that_train_alike_share_stage_one(self) -> None:
        methods = ("all_tokens", "prune_only", "slow_steps", "dualspeed")
        runs = plan_runs(PREPARED, Settings(), methods, range(2))
        assert [run.name for run in runs[:2]] == ["all_tokens-seed0", "prune_only-seed0"]
        firsts = {run.name: run.stage_ids[0] for run in runs}
        assert firsts["prune_only-seed0"] == firsts["slow_steps-seed0"] != firsts["dualspeed-seed0"]
        assert len(set(firsts.values())) == 6
        assert len({run.stage_ids[1] for run in runs}) == 8
        first, second = runs[0].stages
        assert (first["dataset"], second["dataset"]) == (["a"], ["b"])
        assert (first["model"], "model" in second) == ("m", False)
        assert first["prune_ratio"] == second["prune_ratio"] == 0

    def test_shorter_training_on_all_tokens_is_compared_with_the_whole(self) -> None:
        runs = plan_runs(PREPARED, Settings(steps=40), ("all_tokens_shorter", "all_tokens", "dualspeed"), range(2))
        assert [run.stages[-1]["max_steps"] for run in runs[:2]] == [20, 40]
        assert baselines_of(runs) == {run.name: f"all_tokens-seed{run.labels['seed']}" for run in runs}
        by_epochs = [replace(run, stages=({**run.stages[-1], "max_steps": -1},)) for run in runs[1:2]]
        assert set(baselines_of([*runs[:1], *by_epochs]).values()) == {"all_tokens-seed0"}

    def test_pruning_in_one_stage_only(self) -> None:
        methods = ("prune_pretraining", "prune_fine_tuning", "prune_only", "all_tokens")
        runs = plan_runs(PREPARED, Settings(), methods, [0])
        firsts, seconds = ([run.stages[number] for run in runs] for number in (0, 1))
        assert [stage["prune_ratio"] for stage in firsts] == [0.9, 0, 0.9, 0]
        assert [stage["prune_ratio"] for stage in seconds] == [0, 0.9, 0.9, 0]
        assert [run.stage_ids[0] for run in runs[:2]] == [runs[2].stage_ids[0], runs[3].stage_ids[0]]
        assert len({run.stage_ids[1] for run in runs}) == 4
        assert set(baselines_of(runs).values()) == {"all_tokens-seed0"}

    def test_layers_are_compiled_where_asked(self) -> None:
        plain, compiled = (plan_runs(PREPARED, Settings(compiled=asked), ["dualspeed"], [0])[0] for asked in (0, 1))
        assert all("torch_compile" not in stage for stage in plain.stages)
        assert all(make_recipe(stage, "compiled").trainer.torch_compile for stage in compiled.stages)

    def test_every_candidate_is_a_recipe(self) -> None:
        published, *others = plan_runs(PREPARED, Settings(), ["dualspeed", *CANDIDATES], [0])
        for run in others:
            assert all(make_recipe(stage, run.name) for stage in run.stages)
            assert run.stage_ids != published.stage_ids
            skips, isolated = "skip_vision" in run.stages[-1], run.stages[-1]["isolator_length"] > 0
            ways = ["full", "pruned", *(["pruned_isolator"] if isolated and not skips else []), *["skip"] * skips]
            assert [entry["name"] for entry in run.evaluation.inferences] == ways

    def test_more_questions_are_no_other_model(self) -> None:
        one, other = (plan_runs(PREPARED, Settings(questions=number), ["dualspeed"], [0])[0] for number in (1, 2))
        assert one.stage_ids == other.stage_ids

    def test_reducers_are_ranked_on_the_models_of_the_runs(self) -> None:
        settings = Settings(positions="original")
        runs = plan_runs(PREPARED, settings, ["all_tokens"], range(2))
        ranked = plan_ranking(PREPARED, settings, ["all_tokens"], range(2), ["tome", "random"], [0.75, 0.9])
        names = ["tome-original-all_tokens-seed0", "random-original-all_tokens-seed0"]
        assert [run.name for run in ranked[::2]] == names
        assert [run.stage_ids for run in ranked] == 2 * [run.stage_ids for run in runs]
        first, second = ranked[0].evaluation.inferences
        common = {"name": "pruned", "reducer": "tome", "positions": "original"}
        assert (first, second) == ({**common, "prune_ratio": 0.75}, {**common, "prune_ratio": 0.9})
        both = plan_ranking(PREPARED, settings, ["all_tokens"], [0], ["tome"], [0.9], ["compact", "original"])
        assert [run.labels["positions"] for run in both] == ["compact", "original"]
        assert [run.evaluation.inferences[0]["positions"] for run in both] == ["compact", "original"]
        assert {run.stage_ids for run in both} == {runs[0].stage_ids}

    def test_what_varies_is_trained_and_asked_alike(self) -> None:
        grid = {"reducer": ["tome", "random"], "prune_ratio": [0.75, 0.9]}
        runs = plan_variations(PREPARED, Settings(), ["dualspeed"], range(2), grid)
        assert len(runs) == len({run.name for run in runs}) == len({run.stage_ids[1] for run in runs}) == 8
        assert runs[0].name == "reducer=tome-prune_ratio=0.75-dualspeed-seed0"
        for run in runs:
            given = {name: run.labels[name] for name in grid}
            assert all({**stage, **given} == stage for stage in run.stages)
            full, *pruned = run.evaluation.inferences
            assert all({**way, **given} == way for way in pruned)
            assert full == {"name": "full"}
        (same,) = plan_variations(PREPARED, Settings(), ["dualspeed"], [0], {"reducer": ["divprune"]})
        assert same.stage_ids == plan_runs(PREPARED, Settings(), ["dualspeed"], [0])[0].stage_ids

    def test_precision_is_the_recipe_s(self) -> None:
        run = plan_runs(PREPARED, Settings(precision="bfloat16"), ["dualspeed"], [0])[0]
        assert [stage["bf16"] for stage in run.stages] == [True, True]

    def test_bad_input_is_told(self) -> None:
        with pytest.raises(SaccadeError, match="precision='half' is unknown: use one of float32, bfloat16"):
            Settings(precision="half")
        with pytest.raises(SaccadeError, match="method='dual' is unknown"):
            plan_runs(PREPARED, Settings(), ["dual"], [0])
        with pytest.raises(SaccadeError, match="grid=13"):
            Settings(grid=13)
        with pytest.raises(SaccadeError, match="steps=0: give at least 1"):
            Settings(steps=0)


def test_tasks_count_alike() -> None:
    def entry(kind: str, accuracy: float, samples: int) -> dict:
        return {
            "inference": "full",
            "accuracy": accuracy,
            "accuracy_by_kind": {kind: accuracy},
            "samples": samples,
            "mean_prompt_length": 100 * samples,
            "prefill_flops": 3.0,
        }

    (merged,) = merge_tasks({"digits": [entry("digits/count", 0.5, 1)], "charts": [entry("charts/value", 1.0, 3)]})
    assert merged["accuracy"] == 0.75
    assert merged["accuracy_by_task"] == {"digits": 0.5, "charts": 1.0}
    assert merged["accuracy_by_kind"] == {"digits/count": 0.5, "charts/value": 1.0}
    assert (merged["samples"], merged["mean_prompt_length"], merged["prefill_flops"]) == (4, 200, 3)


def test_shares_are_of_all_token_training_with_the_same_seed() -> None:
    def result(method: str, seed: int, charts: float, documents: float, cpu: float) -> dict:
        by_task = {"charts": charts, "documents": documents}
        entry = {"inference": "full", "accuracy_by_task": by_task, "accuracy": sum(by_task.values()) / 2, "samples": 8}
        return {
            "spec": {"labels": {"method": method, "seed": seed}},
            "stages": {"sft": {"cpu_seconds": cpu}},
            "evaluations": [entry],
        }

    every = [result("all_tokens", 0, 0.8, 0.5, 30.0), result("all_tokens", 1, 0.4, 0.5, 10.0)]
    other = [result("dualspeed", 0, 0.4, 0.5, 8.0), result("dualspeed", 1, 0.4, 0.25, 4.0)]
    alone = [result("prune_only", 2, 0.5, 0.5, 1.0)]
    standing = SimpleNamespace(
        results=dict(enumerate(every + other + alone)),
        baselines=dict(enumerate(every * 2)),
        word=lambda method: method,
    )
    columns, (first, second, third) = task_table(standing)
    at = {name: place for place, name in enumerate(columns)}
    assert [first[at[name]] for name in ("share", "lowest task's share")] == ["100.0 %", "100.0 %"]
    assert first[at["CPU time of training"]] == "20 s"
    # Of the tasks' means over the seeds, 75 and 75 %; of the means over the tasks, 45 of 65 and 32.5 of 45.
    assert second[at["lowest task's share"]].startswith("75.0 %")
    assert second[at["share"]] == "70.7 % (69.2-72.2)"
    assert second[at["charts"]] == "40.0 %"
    assert second[at["mean (n = 8)"]] == "38.8 % (32.5-45.0)"
    assert [third[at[name]] for name in ("share", "lowest task's share")] == ["", ""]
    # A seed without all-token training is in neither figure of a row that has shares, and is not counted.
    standing.results[5] = result("dualspeed", 2, 0.9, 0.9, 8.0)
    assert task_table(standing)[1][1] == second
    assert (second[at["seeds"]], third[at["seeds"]]) == ("2", "1")
    del standing.results[5]
    # A seed with which all tokens reach nothing on one task is in every accuracy, and in the other shares.
    standing.results[1]["evaluations"][0] |= {"accuracy_by_task": {"charts": 0.0, "documents": 0.9}}
    first, second = task_table(standing)[1][:2]
    assert [row[at["seeds"]] for row in (first, second)] == ["2", "2"]
    assert first[at["charts"]] == "40.0 % (0.0-80.0)"
    assert second[at["lowest task's share"]] == "50.0 %"
    standing.results[1]["evaluations"][0] |= {"accuracy_by_task": {"charts": 0.4, "documents": 0.5}}
    for number, one in enumerate(standing.results.values()):
        one["spec"]["labels"]["reducer"] = "tome" if number < 3 else "random"
    columns, cells = task_table(standing)
    assert columns[:3] == ["training", "reducer", "answers from"]
    assert [row[:2] for row in cells[1:3]] == [["dualspeed", "tome"], ["dualspeed", "random"]]


def test_the_best_reducer_comes_first() -> None:
    def result(reducer: str, seed: int, accuracies: list[float]) -> dict:
        entries = [
            {"prune_ratio": ratio, "accuracy_by_task": {"charts": accuracy}, "accuracy": accuracy}
            for ratio, accuracy in zip((0.75, 0.9), accuracies, strict=True)
        ]
        labels = {"method": "all_tokens", "reducer": reducer, "positions": "compact", "seed": seed}
        return {"spec": {"labels": labels}, "evaluations": entries}

    found = [result("random", 0, [0.5, 0.25]), result("tome", 0, [0.75, 0.5]), result("tome", 1, [0.25, 1.0])]
    standing = SimpleNamespace(results=dict(enumerate(found)), word=lambda method: method)
    columns, cells = ranking_table(standing)
    assert columns[3:] == ["charts, p = 0.75", "charts, p = 0.9", "mean, p = 0.75", "mean, p = 0.9"]
    assert [row[1] for row in cells] == ["tome", "random"]
    assert cells[0][3:5] == ["50.0 % (25.0-75.0)", "75.0 % (50.0-100.0)"]
    assert cells[1][3:] == ["50.0 %", "25.0 %", "50.0 %", "25.0 %"]


class TestCheckpoints:
    def test_without_them_stages_are_as_before_and_with_them_there_is_no_limit(self) -> None:
        settings = Settings(steps=200)
        (before,) = plan_runs(PREPARED, settings, ["dualspeed"], [0])
        (after,) = plan_runs(PREPARED, replace(settings, checkpoints=5), ["dualspeed"], [0])
        assert before.extra == {}
        assert before.stages[1]["save_total_limit"] == 1
        assert after.extra == {"checkpoints": 5}
        assert after.stages[1]["save_steps"] == 40
        assert "save_total_limit" not in after.stages[1]
        assert after.stage_ids[0] == before.stage_ids[0]
        assert after.stage_ids[1] != before.stage_ids[1]

    def test_each_method_has_as_many(self) -> None:
        names = ("all_tokens", "all_tokens_shorter", "fast_then_few_slow_longer")
        runs = plan_runs(PREPARED, Settings(steps=200, checkpoints=5), names, [0])
        assert [run.stages[1]["save_steps"] for run in runs] == [40, 20, 66]

    def test_they_are_asked_at_their_steps_and_the_last_is_the_model(self, tmp_path: Path, monkeypatch) -> None:
        (run,) = plan_runs(PREPARED, Settings(steps=6, checkpoints=3), ["all_tokens"], [0])
        folder = Path(run.recipes(tmp_path)[1]["output_dir"])
        # That of step 3 was saved because the run was asked to stop.
        write_json_atomically(folder / "times.json", {str(step): [step, 2 * step] for step in (2, 3, 4, 6)})
        asked = []

        def evaluate(evaluation, folder, recipe) -> list[dict]:
            asked.append((evaluation.inferences, evaluation.scenes, folder.name))
            return [{"accuracy": 0.25 * len(asked), "accuracy_by_task": {"charts": 0.5}}]

        monkeypatch.setattr(worker, "evaluate_tasks", evaluate)
        last = {"inference": "full", "accuracy": 0.75, "accuracy_by_task": {"charts": 1.0}}
        found = worker.ask_checkpoints(run, tmp_path, {"evaluations": [{"inference": "pruned"}, last]})
        assert asked == [(({"name": "full"},), 200, "checkpoint-2"), (({"name": "full"},), 200, "checkpoint-4")]
        assert [(one["step"], one["cpu_seconds"], one["seconds"]) for one in found] == [
            (2, 2, 4),
            (4, 4, 8),
            (6, 6, 12),
        ]
        assert [one["accuracy"] for one in found] == [0.25, 0.5, 0.75]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--reducer", "divprun"], "reducer='divprun' is unknown: did you mean 'divprune'?"),
        (["--prune-ratio", "1.5"], "prune_ratio=1.5"),
        (["--rank", "divprune,randm"], "reducer='randm' is unknown: did you mean 'random'?"),
        (["--rank", "all", "--ratios", "0.5", "2"], "prune_ratio=2.0"),
        (["--rank", "tome", "--rank-positions", "compact,first"], "positions='first'"),
        (["--tasks", "charts,maps"], "tasks='charts,maps': 'maps' is unknown, use one of digits, easy_vqa"),
        (["--split", "dev"], "split='dev': use one of train, validation, test"),
        (["--seeds", "0"], "seeds=0: give at least 1"),
        (["--vary", "grid=12,24"], "--vary grid: use one of reducer, positions, .*, lora_r; other settings make"),
        (["--vary", "reducr=tome"], "--vary reducr: did you mean 'reducer'"),
        (["--vary", "reducer=tome,randm"], "reducer='randm' is unknown: did you mean 'random'?"),
        (["--vary", "prune_ratio=2"], "prune_ratio=2"),
        (["--vary", "learning_rate=1e-3,fast"], "learning_rate='fast' is a str, expected float"),
        (["--vary", "steps=0"], "steps=0: give at least 1"),
        (["--vary", "reducer=tome", "--rank", "tome"], "--vary and --rank: give one of them"),
        (["--checkpoints", "201"], r"checkpoints=201: give at most one per step \(200\)"),
        (["--table"], "has no sweep"),
    ],
)
def test_bad_input_is_told_before_anything_is_made(tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(SaccadeError, match=message):
        main([*words, "--output", str(tmp_path / "smol")])
    assert not (tmp_path / "smol").exists()


def test_help_tells_every_setting(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "--pretrain-steps INT steps of stage one, captions, projector only (default: 20)" in told
    assert "--tower-steps INT steps of a tower's pretraining, or 0 for the tower that lies in" in told
    assert "--compiled compile the decoder layers, which costs about a minute per run --checkpoints INT" in told


def small_command(folder: Path, *words: str) -> list[str]:
    """The command at a size that learns nothing, with a random language model."""
    language_model = make_language_model(folder / "language", "qwen2")
    sizes = {
        "tower-steps": 1,
        "projector-batches": 1,
        "rows": 2,
        "turns": 2,
        "pretrain-steps": 1,
        "steps": 2,
        "batch-size": 2,
        "questions": 2,
    }
    flags = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    return [*flags, "--language-model", str(language_model), "--output", str(folder / "smol"), *words]


@pytest.mark.slow
def test_from_nothing_to_a_table(tmp_path: Path, capfd, monkeypatch) -> None:
    command = small_command(tmp_path)
    assert main(command) == 0
    assert "all tokens" in capfd.readouterr().out
    runs = tmp_path / "smol" / "runs-12"
    result = json.loads((runs / "runs" / "dualspeed-seed0" / "result.json").read_text())
    assert [entry["inference"] for entry in result["evaluations"]] == ["full", "pruned", "pruned_isolator"]
    for entry in result["evaluations"]:
        assert entry["accuracy_by_task"].keys() == TASKS.keys()
        assert entry["samples"] == 2 * len(TASKS)
    full, pruned = (entry["mean_prompt_length"] for entry in result["evaluations"][:2])
    assert round(full - pruned) == 144 - 14
    assert all(stage["cpu_seconds"] > 0 for stage in result["stages"].values())
    # The same models, asked again.
    trained = sorted((tmp_path / "smol" / "stages").iterdir())
    assert main([*command, "--methods", "all_tokens", "--rank", "random,tome", "--ratios", "0.9"]) == 0
    assert sorted((tmp_path / "smol" / "stages").iterdir()) == trained
    table = (tmp_path / "smol" / "ranking-12" / "tasks.md").read_text()
    assert "tome" in table
    assert "charts, p = 0.9" in table
    table = (runs / "tasks.md").read_text().splitlines()
    assert len(table) == 2 + 2 + 3
    # And with their checkpoints.
    assert main([*command, "--methods", "all_tokens,fast_then_few_slow_longer", "--checkpoints", "2"]) == 0
    over_time = tmp_path / "smol" / "runs-over-time-12"
    assert (over_time / "over_time.png").is_file()
    assert (over_time / "over_time.md").read_text().startswith("| checkpoint | all tokens | CPU time | fast, then few")
    timed = json.loads((over_time / "runs" / "all_tokens-seed0" / "result.json").read_text())
    assert [one["step"] for one in timed["checkpoints"]] == [1, 2]
    full, _ = timed["evaluations"]
    assert timed["checkpoints"][1]["accuracy_by_task"] == full["accuracy_by_task"]
    setup = json.loads((tmp_path / "smol" / "setup.json").read_text())
    assert setup["tower-12"]["cpu_seconds"] > 0
    assert setup["model-12"]["visual_tokens"] == 144
    assert setup["model-12"]["projector"]["validation"].keys() == TASKS.keys()
    # The same command finds everything, and an evaluation that was broken off goes on with the tasks that it lacks.
    (kept,) = (Path(result["model"]) / "evaluations").glob("digits-*.json")
    entries = json.loads(kept.read_text())
    write_json_atomically(kept, [{**entry, "accuracy": 0.125} for entry in entries])
    (runs / "runs" / "dualspeed-seed0" / "result.json").unlink()
    # Of any commit: one may be made while this runs.
    assert main([*command, "--any-commit"]) == 0
    assert "all_tokens-seed0: found, not trained again" in capfd.readouterr().out
    again = json.loads((runs / "runs" / "dualspeed-seed0" / "result.json").read_text())
    assert again["stages"] == result["stages"]
    assert {entry["accuracy_by_task"]["digits"] for entry in again["evaluations"]} == {0.125}
    assert main([*command, "--table"]) == 0
    with pytest.raises(SaccadeError, match=r"holds a model of language_model='.*language': give that one"):
        main([*command, "--language-model", str(tmp_path)])
    monkeypatch.setattr(study, "generators", lambda: "other")
    with pytest.raises(SaccadeError, match=r"has seen pictures of other code \(.*, today other\): give another"):
        main(command)


@pytest.mark.slow
def test_the_larger_grid_has_its_own_tower_and_two_tasks_their_own_runs(tmp_path: Path, monkeypatch) -> None:
    real = tower.score_tower
    monkeypatch.setattr(tower, "score_tower", lambda *args: real(*args, number=2))
    tasks = ("easy_vqa", "charts")
    assert main(small_command(tmp_path, "--grid", "24", "--methods", "dualspeed", "--tasks", ",".join(tasks))) == 0
    setup = json.loads((tmp_path / "smol" / "setup.json").read_text())
    assert setup["model-24"]["visual_tokens"] == 576
    report = json.loads((tmp_path / "smol" / "tower-24" / tower.REPORT_FILE).read_text())
    assert report["settings"]["start"] == str(tmp_path / "smol" / "tower-12")
    runs = tmp_path / "smol" / "runs-24-easy_vqa-charts"
    result = json.loads((runs / "runs" / "dualspeed-seed0" / "result.json").read_text())
    assert set(result["evaluations"][0]["accuracy_by_task"]) == set(tasks)
    assert "documents" not in (runs / "tasks.md").read_text()
    full, pruned = (entry["mean_prompt_length"] for entry in result["evaluations"][:2])
    assert round(full - pruned) == 576 - 58
