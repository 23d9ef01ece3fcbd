"""Suites and tables of their scores, from result folders of lmms-eval's shape; lmms-eval itself is not needed."""

import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from saccade.cli import evaluate
from saccade.cli.main import Parser, main
from saccade.errors import SaccadeError
from saccade.evaluation.compare import compare_results, read_scores
from saccade.evaluation.rows import choose_split, file_rows
from saccade.evaluation.suites import SUITES

PAGE = Path(__file__).parent.parent / "docs" / "evaluation.md"

# Raw numbers as lmms-eval writes them, of a baseline and of a model.
DUALSPEED = {
    "vqav2_val": ("exact_match", 0.785, 0.768),
    "gqa": ("exact_match", 0.619, 0.601),
    "scienceqa_img": ("exact_match", 0.695, 0.69),
    "textvqa_val": ("exact_match", 0.582, 0.56),
    "pope": ("pope_f1_score", 0.859, 0.83),
    "mme": ("mme_perception_score", 1506.5, 1440.0),
    "mmbench_en_dev_static": ("gpt_eval_score", 64.7, 63.0),
    "mmbench_cn_dev": ("gpt_eval_score", 58.1, 56.0),
    "seedbench": ("seed_image", 0.661, 0.64),
}
SKIP_VISION = {
    "mme": ("mme_perception_score", 1535.0, 1519.0),
    "textvqa_val": ("exact_match", 0.586, 0.565),
    "mmbench_en_dev_static": ("gpt_eval_score", 72.2, 72.5),
    "mmvet": ("gpt_eval_score", 32.8, 32.4),
    "mmmu_val": ("mmmu_acc", 0.396, 0.388),
    "mathvista_testmini_format": ("llm_as_judge_eval", 21.3, 21.2),
    "ocrbench": ("ocrbench_accuracy", 0.327, 0.307),
    "mmstar": ("average", 0.365, 0.365),
}

# What `evaluate_inferences` returns of one way to run a model.
RESULT = {
    "inference": "full",
    "accuracy": 0.5,
    "accuracy_by_kind": {"rows": 0.5},
    "samples": 10,
    "mean_prompt_length": 100,
}


def write_results(
    folder: Path, scores: dict[str, Any], args: str = "pretrained=a", name: str = "", **more: Any
) -> Path:
    """A results file as lmms-eval writes it: `scores` are metrics by task."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "results": {
            task: {"alias": task, "samples": 10, **{f"{metric},none": value for metric, value in metrics.items()}}
            for task, metrics in scores.items()
        },
        "higher_is_better": {task: dict.fromkeys(metrics, True) for task, metrics in scores.items()},
        "n-samples": {task: {"original": 10, "effective": 10} for task in scores},
        "config": {"model": "saccade", "model_args": args, "limit": None},
        **more,
    }
    path = folder / f"{name or '20261121_120000'}_results.json"
    path.write_text(json.dumps(content))
    return path


def write_pair(folder: Path, table: dict[str, tuple[str, float, float]]) -> tuple[Path, Path]:
    """A baseline's folder and a model's."""
    for column, name in enumerate(("base", "model"), start=1):
        scores = {task: {"submission": None, row[0]: row[column]} for task, row in table.items()}
        write_results(folder / name / "org__model", scores, args=f"pretrained={name}")
    return folder / "base", folder / "model"


def test_dualspeed_is_the_mean_of_nine_shares(tmp_path: Path) -> None:
    comparison = compare_results(*write_pair(tmp_path, DUALSPEED))
    shares = [model / base for _, base, model in DUALSPEED.values()]
    assert comparison["suite"] == "dualspeed"
    assert [row["task"] for row in comparison["rows"]] == SUITES["dualspeed"].tasks
    assert [row["share"] for row in comparison["rows"]] == pytest.approx(shares)
    assert comparison["mean_share"] == pytest.approx(sum(shares) / 9)
    assert (comparison["shares"], comparison["benchmarks"], comparison["average"]) == (9, 9, None)
    # In the units of the papers: percent, MME in points.
    by_name = {row["benchmark"]: row["baseline"] for row in comparison["rows"]}
    assert by_name["GQA"] == pytest.approx(61.9)
    assert by_name["MME"] == 1506.5
    assert by_name["MMBench"] == 64.7
    assert comparison["notes"] == []


def test_skip_vision_averages_seven_scores_as_published(tmp_path: Path) -> None:
    """The published rows of LLaVA, whose average is printed as 42.0, and of 100/156, printed as 41.3."""
    comparison = compare_results(*write_pair(tmp_path, SKIP_VISION))
    average = comparison["average"]
    assert comparison["suite"] == "skip-vision"
    assert round(average["baseline"], 1) == 42.0
    assert round(average["model"], 1) == 41.2  # of the printed scores, which are rounded themselves
    assert average["share"] == pytest.approx(average["model"] / average["baseline"])
    assert (average["scores"], average["of"], comparison["shares"]) == (7, 7, 8)


@given(st.lists(st.tuples(st.floats(0.01, 1), st.floats(0, 1)), min_size=9, max_size=9))
def test_the_mean_share_is_the_formula(tmp_path_factory: pytest.TempPathFactory, values: list) -> None:
    folder = tmp_path_factory.mktemp("pair")
    table = {task: (row[0], *pair) for (task, row), pair in zip(DUALSPEED.items(), values, strict=True)}
    expected = sum(model / base for base, model in values) / 9
    assert compare_results(*write_pair(folder, table))["mean_share"] == pytest.approx(expected)


def test_a_mean_over_a_part_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, model = write_pair(tmp_path, DUALSPEED)
    write_results(tmp_path / "some", {"gqa": {"exact_match": 0.6}, "pope": {"pope_f1_score": 0.8}})
    assert main(["eval", "compare", str(base), str(tmp_path / "some")]) == 0
    shown = capsys.readouterr().out
    assert "mean share (2 of 9)" in shown
    assert "SEED-Bench: no score in" in shown
    # A single benchmark that two suites share belongs to neither.
    write_results(tmp_path / "mme", {"mme": {"mme_perception_score": 1400.0}})
    alone = compare_results(tmp_path / "mme", tmp_path / "mme")
    assert (alone["suite"], alone["benchmarks"], alone["mean_share"]) == (None, 1, 1.0)
    named = compare_results(tmp_path / "mme", model, "skip-vision")
    assert (named["shares"], named["benchmarks"], named["average"]["scores"]) == (1, 8, 0)


def test_a_baseline_of_nothing_has_no_share(tmp_path: Path) -> None:
    write_results(tmp_path / "a", {"gqa": {"exact_match": 0.0}, "pope": {"pope_f1_score": 0.5}})
    write_results(tmp_path / "b", {"gqa": {"exact_match": 0.2}, "pope": {"pope_f1_score": 0.25}})
    comparison = compare_results(tmp_path / "a", tmp_path / "b")
    assert [row["share"] for row in comparison["rows"]] == [None, 0.5]
    assert (comparison["mean_share"], comparison["shares"]) == (0.5, 1)
    assert "GQA: the baseline's score is 0" in comparison["notes"][0]


def test_other_numbers_of_documents_are_noted(tmp_path: Path) -> None:
    write_results(tmp_path / "a", {"gqa": {"exact_match": 0.5}})
    write_results(tmp_path / "b", {"gqa": {"exact_match": 0.5}}, **{"n-samples": {"gqa": {"effective": 4}}})
    assert compare_results(tmp_path / "a", tmp_path / "b")["notes"] == [
        "GQA: 10 documents against 4, not the same benchmark"
    ]


def test_the_newest_result_of_a_task_counts(tmp_path: Path) -> None:
    old = write_results(tmp_path, {"gqa": {"exact_match": 0.5}}, name="old")
    new = write_results(tmp_path, {"gqa": {"exact_match": 0.25}}, name="a_new")
    os.utime(old, (1, 1))
    os.utime(new, (2, 2))
    assert read_scores(tmp_path)["gqa"].value == 25.0
    assert read_scores(old)["gqa"].value == 50.0


def test_a_task_of_no_suite_stands_for_its_first_number(tmp_path: Path) -> None:
    scores = {"own": {"submission": None, "errors": 3.0, "right": 0.5, "right_stderr": 0.1, "other": 0.7}}
    write_results(tmp_path, scores, higher_is_better={"own": {"errors": False, "right": True}})
    assert read_scores(tmp_path)["own"].value == 0.5


def test_digit_scenes_compare_inference_by_inference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        flags = ["--num-samples", "6", "--batch-size", "6", "--inference", "full,pruned"]
        (tmp_path / name).mkdir()
        assert main(["eval", "tiny", *flags, "--output", str(tmp_path / name / "eval.json")]) == 0
    path = tmp_path / "b" / "eval.json"
    content = json.loads(path.read_text())
    content["results"][0]["accuracy"], content["results"][1]["accuracy"] = 0.8, 0.4
    path.write_text(json.dumps(content))
    reference = tmp_path / "a" / "eval.json"
    changed = json.loads(reference.read_text())
    changed["results"][0]["accuracy"] = changed["results"][1]["accuracy"] = 0.5
    reference.write_text(json.dumps(changed))
    capsys.readouterr()
    output = tmp_path / "table.json"
    assert main(["eval", "compare", str(tmp_path / "a"), str(path), "--output", str(output)]) == 0
    comparison = json.loads(output.read_text())
    assert [row["share"] for row in comparison["rows"]] == pytest.approx([1.6, 0.8])
    assert comparison["prompt_length"]["share"] == 1.0
    shown = capsys.readouterr().out
    assert "digits/pruned" in shown
    assert "120.0 %" in shown


def test_results_of_two_ways_to_run_a_model_are_not_mixed(tmp_path: Path) -> None:
    write_results(tmp_path, {"gqa": {"exact_match": 0.5}}, "inference=full", "gqa")
    write_results(tmp_path, {"pope": {"pope_f1_score": 0.5}}, "inference=pruned", "pope")
    with pytest.raises(SaccadeError, match="a model run in two ways"):
        read_scores(tmp_path)


def write_evaluation(folder: Path, accuracy: float = 0.5, inference: str = "full", **more: Any) -> Path:
    """An `eval.json` as `saccade eval` writes it, of no weights beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    entry = {"inference": inference, "accuracy": accuracy, "samples": 10, "mean_prompt_length": 100}
    path = folder / "eval.json"
    path.write_text(json.dumps({"model": "m", "weights": "w", **more, "results": [entry]}))
    return path


@pytest.mark.parametrize("measured", [{"split": "test"}, {"split": "validation"}, {"dataset": "test.json"}])
@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"weights": "w"}, "full in .*a/eval.json and in .*b/eval.json: name the folder of one"),
        (
            {"weights": "v", "inference": "pruned"},
            "results of two models, in .*a/eval.json and in .*b/eval.json: name",
        ),
        ({"weights": None, "model": "n", "inference": "pruned"}, "results of two models"),
    ],
)
def test_evaluations_that_one_folder_mixes_are_refused(
    tmp_path: Path, measured: dict[str, str], second: dict[str, Any], message: str
) -> None:
    write_evaluation(tmp_path / "a", **measured)
    write_evaluation(tmp_path / "b", **measured, **second)
    with pytest.raises(SaccadeError, match=message):
        read_scores(tmp_path)


def test_one_model_may_have_evaluations_of_several_kinds_in_a_folder(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "scenes", split="test")
    write_evaluation(tmp_path / "other", split="validation")
    write_evaluation(tmp_path / "rows", dataset="test.json")
    write_results(tmp_path, {"gqa": {"exact_match": 0.5}})
    assert set(read_scores(tmp_path)) == {"digits/full", "digits/validation/full", "test.json/full", "gqa"}


def test_other_splits_and_other_rows_are_told_apart(tmp_path: Path) -> None:
    for split in ("test", "validation"):
        write_evaluation(tmp_path / split, split=split)
    with pytest.raises(SaccadeError, match=r"has digits/validation/full and model=.* digits/full: no benchmark"):
        compare_results(tmp_path / "validation", tmp_path / "test")
    for rows in ("one", "another", None):
        write_evaluation(tmp_path / str(rows), dataset="test.json", rows=rows)
    base = tmp_path / "one"
    assert compare_results(base, tmp_path / "another")["notes"] == [
        "test.json/full: other rows under the same name, not the same benchmark"
    ]
    assert compare_results(base, base)["notes"] == compare_results(base, tmp_path / "None")["notes"] == []


def test_answers_from_images_that_were_pruned_otherwise_are_told_apart(tmp_path: Path) -> None:
    for name, reducer, ratio in (("a", "divprune", 0.5), ("b", "random", 0.95)):
        result = {**RESULT, "inference": "pruned", "reducer": reducer, "prune_ratio": ratio}
        path = write_evaluation(tmp_path / name)
        path.write_text(json.dumps({**json.loads(path.read_text()), "results": [result]}))
    notes = compare_results(tmp_path / "a", tmp_path / "b")["notes"]
    assert notes == ["digits/pruned: pruned by divprune, ratio 0.5 against random, ratio 0.95"]
    assert compare_results(tmp_path / "a", tmp_path / "a")["notes"] == []


@pytest.mark.parametrize(
    "content",
    [
        {"results": [{"inference": 1, "accuracy": None}]},
        {"results": [{"inference": "full", "accuracy": "high"}]},
        {"results": {"gqa": {"exact_match,none": 0.5}}, "config": [1]},
        {"results": {"gqa": {"exact_match,none": 0.5}}, "n-samples": {"gqa": 3}},
    ],
)
def test_a_damaged_result_is_one_line(content: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "eval.json").write_text(json.dumps(content))
    with pytest.raises(SaccadeError, match=r"eval.json' has results that cannot be read; evaluate again"):
        read_scores(tmp_path / "eval.json")


def test_an_evaluation_says_which_rows_it_is_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of the same name are told apart by their texts, and a file is the same wherever it lies."""
    monkeypatch.setattr("saccade.evaluation.evaluate_inferences", lambda *given: [dict(RESULT)])
    image = Image.new("RGB", (96, 96))
    found = []
    for name, answer in (("a", "3"), ("b", "3"), ("c", "4")):
        (tmp_path / name).mkdir()
        image.save(tmp_path / name / "scene.png")
        turns = [{"from": "human", "value": "<image>\nhow many ?"}, {"from": "gpt", "value": answer}]
        rows = tmp_path / name / "test.json"
        rows.write_text(json.dumps([{"image": "scene.png", "conversations": turns}]))
        output = tmp_path / name / "eval.json"
        assert main(["eval", "tiny", "--dataset", str(rows), "--output", str(output)]) == 0
        found.append(json.loads(output.read_text())["rows"])
    assert found[0] == found[1] != found[2]
    notes = compare_results(tmp_path / "a", tmp_path / "c")["notes"]
    assert notes == ["test.json/full: other rows under the same name, not the same benchmark"]


@pytest.fixture
def splits(tmp_path: Path) -> list[str]:
    """The data set of two splits as Parquet files, and as `save_to_disk` writes it."""
    turns = {
        name: [{"role": "user", "content": "how many ?"}, {"role": "assistant", "content": name}] for name in NAMES
    }
    tables = DatasetDict({name: Dataset.from_list([{"messages": turns[name]}] * 2) for name in NAMES})
    for name in NAMES:
        tables[name].to_parquet(tmp_path / "parquet" / "data" / f"{name}-00000-of-00001.parquet")
    tables.save_to_disk(tmp_path / "saved")
    return [str(tmp_path / "parquet"), str(tmp_path / "saved")]


NAMES = ("train", "test")


def test_the_split_to_evaluate_on_is_chosen_and_recorded(
    tmp_path: Path, splits: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []
    monkeypatch.setattr(
        "saccade.evaluation.evaluate_inferences", lambda *given: seen.append(given[2]) or [dict(RESULT)]
    )
    for path in splits:
        output = tmp_path / "results" / Path(path).name / "eval.json"
        command = ["eval", "tiny", "--dataset", path, "--output", str(output)]
        assert main([*command, "--split", "test"]) == 0
        assert set(seen[-1]["answer"]) == {"test"}
        assert json.loads(output.read_text())["split"] == "test"
        assert set(read_scores(output)) == {f"{Path(path).name}/test/full"}
        assert main(command) == 2
        assert "has the splits test, train: choose one of them with --split" in capsys.readouterr().err
        assert main([*command, "--split", "tset"]) == 2
        assert "split='tset' is unknown: did you mean 'test'?" in capsys.readouterr().err
    # What a stranger's README.md names is not opened.
    (Path(splits[0]) / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: /none.parquet\n---\n"
    )
    assert choose_split(splits[0], "test") == "test"
    # The only split, whatever it is called.
    (Path(splits[0]) / "data" / "train-00000-of-00001.parquet").unlink()
    assert set(file_rows(splits[0], split=choose_split(splits[0]))["answer"]) == {"test"}
    with pytest.raises(SaccadeError, match="a single file, which has no splits"):
        file_rows("test.json", split=choose_split("test.json", "test"))


def test_another_evaluation_does_not_replace_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    results = [dict(RESULT)]
    monkeypatch.setattr("saccade.evaluation.evaluate_inferences", lambda *given: results)
    assert main(["eval", "tiny"]) == 0
    # The same again, even with another score.
    results[0]["accuracy"] = 0.75
    assert main(["eval", "tiny"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["eval.json"]
    assert main(["eval", "tiny", "--split", "validation"]) == 0
    assert "eval.json was of another evaluation, and is now eval.1.json" in capsys.readouterr().out
    results[0] |= {"inference": "pruned", "reducer": "random", "prune_ratio": 0.9}
    assert main(["eval", "tiny", "--split", "validation"]) == 0
    found = {path.name: json.loads(path.read_text()) for path in sorted(tmp_path.iterdir())}
    assert [(name, one["split"], one["results"][0]["inference"]) for name, one in found.items()] == [
        ("eval.1.json", "test", "full"),
        ("eval.2.json", "validation", "full"),
        ("eval.json", "validation", "pruned"),
    ]
    # A file that is named is replaced.
    assert main(["eval", "tiny", "--output", "eval.json"]) == 0
    assert len(list(tmp_path.iterdir())) == 3


def test_an_answer_in_several_parts_is_one_text(tmp_path: Path) -> None:
    """As chat templates write it, and training learns it."""
    parts = [{"type": "text", "text": text} for text in ("1", "2")]
    messages = [{"role": "user", "content": "how many ?"}, {"role": "assistant", "content": parts}]
    (tmp_path / "rows.json").write_text(json.dumps([{"messages": messages}]))
    assert file_rows(str(tmp_path / "rows.json"))["answer"] == ["12"]


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("content", ["1 </s> 2", [{"type": "text", "text": text} for text in ("1 </", "s> 2")]])
def test_control_tokens_are_refused_in_rows_to_evaluate_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], place: int, content: Any
) -> None:
    messages = [{"role": "user", "content": "how many ?"}, {"role": "assistant", "content": "3"}]
    messages[place]["content"] = content
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"messages": messages}]))
    assert main(["eval", "tiny", "--dataset", str(rows), "--output", str(tmp_path / "eval.json")]) == 2
    told = capsys.readouterr().err
    assert "rows.json, row 1: '</s>' is in a text, and is a control token" in told
    assert "Loading weights" not in told
    assert not (tmp_path / "eval.json").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["compare", "a"], "compare takes two folders of results, the baseline's first, and was given 1"),
        (["compare", "nowhere", "b"], "folder='nowhere' does not exist"),
        (["compare", "a", "empty"], "folder='empty' has no scores"),
        (["compare", "a", "b"], "no benchmark is in both"),
        (["compare", "a", "a", "--suite", "skip-vision"], "no benchmark of suite skip-vision is in both"),
        (["compare", "a", "a", "--suite", "nine"], "suite='nine' is unknown: use one of dualspeed, skip-vision"),
        (["compare", "a", "a", "--split", "test"], "--split is not for compare"),
        (["compare", "a", "broken"], "is not readable JSON"),
        (["compare", "a", "other.json"], "file='other.json' has no results"),
        (["compare", "a", "lacking"], "pope has no number for pope_f1_score, only for pope_accuracy"),
        (["tiny", "a"], "argument 'a': give one model"),
        (["tiny", "--suite", "dualspeed"], "--suite is for compare only: benchmarks run through `python -m lmms_eval"),
        (["tiny", "--num-samples", "0"], "num_samples=0: give at least 1"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_results(Path("a"), {"gqa": {"exact_match": 0.5}})
    write_results(Path("b"), {"pope": {"pope_f1_score": 0.5}})
    write_results(Path("lacking"), {"pope": {"pope_accuracy": 0.5}})
    Path("empty").mkdir()
    write_results(Path("broken"), {}).write_text("{")
    Path("other.json").write_text('{"results": [{"accuracy": 0.5}]}')
    assert main(["eval", *flags]) == 2
    line = capsys.readouterr().err
    assert message in line
    assert line.count("\n") == 1


def page_commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.startswith("saccade eval")]


@pytest.mark.parametrize("command", page_commands())
def test_the_commands_of_the_page_parse(command: str) -> None:
    parser = Parser(prog="saccade eval")
    evaluate.add_arguments(parser)
    args = parser.parse_args(shlex.split(command, comments=True)[2:])
    assert args.suite is None or args.suite in SUITES
    assert (args.model == "compare") == bool(args.folders)


def test_the_page_runs_the_tasks_of_each_suite() -> None:
    runs = re.findall(r"--tasks (\S+) ", PAGE.read_text())
    for suite in SUITES.values():
        assert ",".join(suite.tasks) in runs


def test_the_table_of_the_page_is_that_of_the_suites() -> None:
    rows = re.findall(r"^\| (`[a-z-]+`|both) \| (\S+) \| `(\w+)` \| `(\w+)`", PAGE.read_text(), re.MULTILINE)
    said = {(name, *row) for where, *row in rows for name in SUITES if where in ("both", f"`{name}`")}
    assert said == {
        (name, benchmark.name, benchmark.task, benchmark.metric)
        for name, suite in SUITES.items()
        for benchmark in suite.benchmarks
    }
