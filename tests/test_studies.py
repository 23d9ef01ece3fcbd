"""The papers' studies: what they plan, their page, and that a study runs as a user runs it."""

import json
import shutil
from itertools import product
from pathlib import Path

import pytest
from PIL import Image

from experiments.studies.__main__ import main
from experiments.studies.results_page import INTRODUCTION, NO_NOTES, read_notes, write_docs
from experiments.studies.studies import STUDIES, plan_study
from saccade.cli.main import guarded
from saccade.errors import SaccadeError
from saccade.reducers import list_reducers
from saccade.reducers.frames import KNOW_TIME
from saccade.sweeps import QUICK
from saccade.sweeps.plan import Plan, check_runs

PAGE = (Path(__file__).parent.parent / "docs" / "results.md").read_text()


def test_the_committed_page_says_what_would_be_written_today() -> None:
    assert PAGE.startswith(INTRODUCTION)
    assert [line for line in PAGE.splitlines() if line.startswith("## ")] == [
        f"## {study.title}" for study in STUDIES.values()
    ]
    # The reducers study had one more reducer when its page was made, which the text about what varies names.
    varies = [study.varies for name, study in STUDIES.items() if name != "reducers"]
    assert [text for text in varies if f"\n{text}\n" not in PAGE] == []
    assert [study.paper for study in STUDIES.values() if f"**The paper.** {study.paper}\n" not in PAGE] == []


class TestStudies:
    @pytest.mark.parametrize("name", STUDIES)
    def test_every_run_can_start(self, name: str) -> None:
        plan = plan_study(name, QUICK, 2)
        assert len({spec.name for spec in plan.runs}) == len(plan.runs)
        check_runs(plan.runs)

    @pytest.mark.parametrize("name", STUDIES)
    def test_panels_find_runs(self, name: str) -> None:
        labels = {label for spec in plan_study(name, QUICK, 1).runs for label in spec.labels}
        for panel in STUDIES[name].panels:
            assert {panel.x, *panel.series, *dict(panel.where)} <= labels

    def test_the_order_of_the_reducers_study(self) -> None:
        runs = plan_study("reducers", QUICK, 3).runs
        plugins = [spec.labels for spec in runs if spec.labels["part"] == "plugin"]
        reducers = [name for name in list_reducers() if name not in ("none", *KNOW_TIME)]
        first = plugins[: len(reducers)]
        assert {(run["prune_ratio"], run["positions"], run["seed"]) for run in first} == {(0.9, "compact", 0)}
        assert sorted(run["reducer"] for run in first) == reducers
        settings = {(run["reducer"], run["prune_ratio"], run["positions"], run["seed"]) for run in plugins}
        compact = set(product(reducers, (0.5, 0.7, 0.8, 0.9, 0.95), ["compact"], range(3)))
        assert settings == compact | set(product(reducers, (0.9,), ["original"], range(3)))
        after = plugins[3 * len(reducers) :]
        core = [run["reducer"] in ("divprune", "random", "avgpool") for run in after]
        assert core.index(False) == sum(core), "the other ratios of the core come before those of the rest"

    def test_inference_only_shares_one_model_a_seed(self) -> None:
        runs = [spec for spec in plan_study("reducers", QUICK, 2).runs if spec.labels["part"] != "plugin"]
        for seed in range(2):
            assert len({spec.stage_ids for spec in runs if spec.labels["seed"] == seed}) == 1

    def test_pruning_in_one_stage(self) -> None:
        runs = {spec.labels["pruned_stages"]: spec.stages for spec in plan_study("stage", QUICK, 1).runs}
        ratios = {name: tuple(stage["prune_ratio"] for stage in stages) for name, stages in runs.items()}
        assert ratios == {"none": (0, 0), "pretrain": (0.9, 0), "sft": (0, 0.9), "both": (0.9, 0.9)}


def made_up(spec, accuracy: float) -> dict:
    stage = {
        "seconds": 10.0,
        "samples": 100,
        "tokens": {"full": 3000.0, "trained": 1000.0, "teacher": 0.0},
        "step_speedup": 2.0,
        "log_history": [{"loss": 1.0}],
    }
    ways = [
        {
            "inference": fields["name"],
            "reducer": fields.get("reducer"),
            "prune_ratio": fields.get("prune_ratio", 0.0),
            "positions": fields.get("positions", "compact"),
            "accuracy": accuracy,
            "accuracy_by_kind": {},
            "samples": 8,
            "mean_prompt_length": 20.0,
        }
        for fields in spec.evaluation.inferences
    ]
    packages = dict.fromkeys(("torch", "transformers", "trl"), "1.0")
    environment = {
        "commit": "0123456789",
        "packages": packages,
        "python": "3.11",
        "cpu": "a processor",
        "cores": 2,
        "memory_gib": 8,
    }
    stages = dict.fromkeys(("pretrain", "sft"), stage)
    return {"spec": spec.as_json(), "environment": environment, "stages": stages, "evaluations": ways}


@pytest.fixture
def studies(tmp_path):
    """All of `parts`, and of `reducers` the runs up to the first with another ratio."""
    for name, last in (("parts", "dualspeed-seed2"), ("reducers", "plugin-divprune-p0.5-compact-seed0")):
        plan = plan_study(name, QUICK, 3)
        plan.write(tmp_path / name)
        for spec in plan.runs[: [spec.name for spec in plan.runs].index(last) + 1]:
            accuracy = 0.9 if "all_tokens" in spec.name else 0.5 + spec.labels["seed"] / 10
            folder = tmp_path / name / "runs" / spec.name
            folder.mkdir(parents=True)
            (folder / "result.json").write_text(json.dumps(made_up(spec, accuracy)))
    return tmp_path


def test_the_page_has_the_means_and_the_missing_seeds(studies) -> None:
    page = write_docs(studies, studies / "docs").read_text()
    parts = page.partition("## Part by part")[2]
    assert "| DualSpeed | 3 | 60.0 % (50.0-70.0) | 66.7 % (55.6-77.8) |" in parts
    assert "| all tokens | 3 | 90.0 % | 100.0 % |" in parts
    assert "99.61 %" in parts
    reducers = page.partition("## Which reducer")[2].partition("\n## ")[0]
    plugin = reducers.partition("**As the plug-in of DualSpeed**")[2]
    line = next(line for line in plugin.splitlines() if line.startswith("| divprune |"))
    cells = [cell.strip() for cell in line.split("|")]
    assert cells[2] == "50.0 %, n = 1"
    assert cells[3] == "60.0 % (50.0-70.0)"  # p = 0.9, all three seeds
    plan = Plan.read(studies / "reducers")
    done = len(list((studies / "reducers" / "runs").glob("*/result.json")))
    assert f"{done} of {len(plan.runs)} runs done" in reducers
    assert "commit 0123456; a processor (2 cores, 8 GiB), 1 thread per run; Python 3.11" in reducers
    for name in ("parts", "reducers"):
        with Image.open(studies / "docs" / "images" / f"study_{name}.png") as image:
            assert image.width >= 800


def test_notes_are_kept(studies) -> None:
    docs = studies / "docs"
    page = write_docs(studies, docs)
    assert read_notes(page.read_text()) == {"reducers": NO_NOTES, "parts": NO_NOTES}
    text = page.read_text().replace(NO_NOTES, "Agrees: *parts*.\n\nDisagrees:\n- nothing", 2)
    page.write_text(text.replace("## Part by part", "## Something that is generated"))
    write_docs(studies, docs)
    again = page.read_text()
    assert read_notes(again) == dict.fromkeys(("reducers", "parts"), "Agrees: *parts*.\n\nDisagrees:\n- nothing")
    assert again == text
    shutil.rmtree(studies / "parts")
    with pytest.raises(SaccadeError, match="has notes on parts, which output="):
        write_docs(studies, docs)
    assert page.read_text() == text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to run: give one of reducers, prune_ratio"),
        (["nope"], "study='nope' is unknown: use one of reducers, prune_ratio"),
        (["parts", "--grid", "seed=1"], "--grid"),
        (["parts", "--seeds", "0"], "seeds=0"),
        (["parts", "--steps", "0"], "steps=0"),
        (["parts", "--only", "method=nope"], "--only method=nope: no run has it"),
        (["over_time", "--steps", "9"], "over_time saves 10 checkpoints"),
        (["parts", "--table"], "has no sweep"),
        (["--write-docs", "docs"], "has no study with a finished run"),
    ],
)
def test_bad_input_is_one_line_before_anything_starts(words, message, tmp_path, capsys) -> None:
    output = tmp_path / "out"
    assert guarded(lambda: main([*words, "--output", str(output)])) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not output.exists()
