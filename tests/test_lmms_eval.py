"""lmms-eval's own evaluator on local tasks, with the embedded model run in every way."""

import re
import subprocess
import sys
from argparse import Namespace
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed; `make test-eval` has it in a separate venv")

import torch
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import get_model
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import load_yaml_config
from lmms_tasks import TASKS, choice_documents, write_tasks, yes_no_documents

from saccade import apply_pruning, prune_inputs
from saccade.cli.main import main
from saccade.errors import SaccadeError
from saccade.evaluation import INFERENCES, Inference, plan_inferences
from saccade.evaluation.compare import read_scores
from saccade.evaluation.lmms import SaccadeModel, cut_at, generation_options
from saccade.evaluation.suites import SUITES
from saccade.pruning import ModeIsolator
from saccade.reducers.config import PRUNING_OPTIONS
from saccade.skip_vision import SkipVisionConfig, apply_skip_vision
from saccade.tiny import load_tiny

PAGE = Path(__file__).parent.parent / "docs" / "evaluation.md"
SCENES = 4
PRUNED = {"reducer": "uniform", "prune_ratio": 0.8}
MODEL_ARGS = "prune_ratio=0.8,reducer=uniform"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the YAML of the local tasks."""
    return write_tasks(tmp_path_factory.mktemp("lmms"), SCENES)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as training leaves it: the embedded model, with an isolator and a summary head."""
    folder = tmp_path_factory.mktemp("trained")
    model, processor = load_tiny()
    torch.manual_seed(0)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    ModeIsolator(4, model.config.text_config.hidden_size).save_pretrained(folder)
    skip = apply_skip_vision(model, SkipVisionConfig(retained=20, skipped=40))
    skip.save_pretrained(folder)
    skip.remove()
    return folder


@pytest.fixture(scope="module")
def results(tasks: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """The results of all four inferences, by task: what lmms-eval's own evaluator found."""
    found: dict[str, dict] = {}
    manager = TaskManager(include_path=str(tasks), model_name="saccade")
    for name in INFERENCES:
        options = PRUNED if name.startswith("pruned") else {}
        output = tmp_path_factory.mktemp(name)
        # One at a time: some of lmms-eval's tasks count in globals of their module, which loading a task makes anew.
        found[name] = {
            task: evaluate(SaccadeModel(str(trained), name, batch_size=3, **options), task, manager, output)
            for task in TASKS
        }
    return found


def evaluate(lm: SaccadeModel, task: str, manager: TaskManager, output: Path, **options: Any) -> dict[str, Any]:
    """What lmms-eval's evaluator says of one task; it takes the model apart afterwards."""
    return simple_evaluate(
        model=lm,
        tasks=[task],
        task_manager=manager,
        log_samples=False,
        cli_args=Namespace(output_path=str(output), process_with_media=False),
        **options,
    )


def naive_answers(inference: Inference, questions: list[tuple[str, Any]]) -> list[str]:
    """One prompt at a time, written out as text, without lmms-eval and without the plug-in."""
    model, processor = load_tiny()
    answers = []
    for question, image in questions:
        text = f"<s><user>{'' if image is None else 'image <image>'} {question}<assistant>"
        inputs = processor(
            text=[text],
            images=None if image is None else [image.convert("RGB")],
            return_tensors="pt",
            add_special_tokens=False,
        )
        with inference.on(model) as prepare, torch.no_grad():
            prepared = prepare(dict(inputs))
            output = model.generate(**prepared, max_new_tokens=3, do_sample=False)
        new = output[0, prepared["input_ids"].shape[1] :]
        answers.append(processor.decode(new, skip_special_tokens=True).strip())
    return answers


def f1_of_yes(pairs: list[tuple[str, str]]) -> float:
    hits = sum(gold == said == "yes" for gold, said in pairs)
    said_yes, are_yes = (sum(pair[side] == "yes" for pair in pairs) for side in (1, 0))
    precision, recall = (hits / count if count else 0.0 for count in (said_yes, are_yes))
    return 2 * precision * recall / (precision + recall) if hits else 0.0


def mme_points(documents: list[dict[str, Any]], answers: list[str]) -> float:
    """Per image: percent of right answers, and 100 if both are right; the mean over images."""
    right = defaultdict(list)
    for document, answer in zip(documents, answers, strict=True):
        right[document["question_id"]].append(answer == document["answer"])
    return sum(100 * sum(pair) / 2 + 100 * all(pair) for pair in right.values()) / len(right)


@pytest.mark.parametrize("name", INFERENCES)
def test_scores_are_those_of_prompts_one_at_a_time(results: dict[str, dict], trained: Path, name: str) -> None:
    (inference,) = plan_inferences(trained, [name], reducer="uniform", prune_ratio=0.8)
    documents = yes_no_documents(SCENES)
    answers = naive_answers(inference, [(document["question"], document["image"]) for document in documents])
    assert set(answers) & {"yes", "no"}, "no answer is a word that the task scores"
    found = results[name]
    pope = found["digits_pope"]["results"]["digits_pope"]
    gold = [document["answer"] for document in documents]
    pairs = list(zip(gold, answers, strict=True))
    assert pope["pope_accuracy,none"] == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))
    assert pope["pope_f1_score,none"] == pytest.approx(f1_of_yes(pairs))
    mme = found["digits_mme"]["results"]["digits_mme"]
    for metric, category in (("perception", "existence"), ("cognition", "numerical_calculation")):
        part = [pair for pair in zip(documents, answers, strict=True) if pair[0]["category"] == category]
        expected = mme_points([document for document, _ in part], [answer for _, answer in part])
        assert mme[f"mme_{metric}_score,none"] == pytest.approx(expected)
    choices = choice_documents(SCENES)
    prompts = [f"{row['question']}\nA. {row['choices'][0]}\nB. {row['choices'][1]}" for row in choices]
    said = naive_answers(inference, [(prompt, row["image"]) for prompt, row in zip(prompts, choices, strict=True)])
    right = [answer == "ab"[row["answer"]] for answer, row in zip(said, choices, strict=True)]
    assert found["digits_choice"]["results"]["digits_choice"]["exact_match,none"] == sum(right) / len(right)


def test_its_own_command_knows_the_model_and_its_results_are_compared(
    results: dict[str, dict], trained: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert get_model("saccade") is SaccadeModel
    command = [sys.executable, "-m", "lmms_eval", "--model", "saccade", "--tasks", "digits_pope,digits_mme"]
    command += ["--model_args", f"pretrained={trained},inference=pruned,{MODEL_ARGS}", "--batch_size", "2"]
    command += ["--include_path", str(tasks), "--output_path", str(tmp_path), "--log_samples"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    scores = read_scores(tmp_path)
    found = results["pruned"]
    pope, mme = (found[task]["results"][task] for task in ("digits_pope", "digits_mme"))
    assert scores["digits_pope"].value == pytest.approx(pope["pope_accuracy,none"])
    assert scores["digits_mme"].value == pytest.approx(mme["mme_perception_score,none"])
    assert {task: score.documents for task, score in scores.items()} == dict.fromkeys(scores, 2 * SCENES)
    assert set(scores) == {"digits_pope", "digits_mme"}
    assert main(["eval", "compare", str(tmp_path), str(tmp_path)]) == 0
    assert "100.0 %" in capsys.readouterr().out


def test_a_stock_model_of_lmms_eval_prunes_in_place(
    tasks: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lmms-eval's own LLaVA, whose code knows nothing of it: the answers that it scores are those of kept tokens."""
    lm = get_model("llava_hf")(pretrained=str(trained), device="cpu", dtype="float32", device_map="cpu")
    answered = []
    with apply_pruning(lm.model, **PRUNED):
        generate = lm.model.generate

        def noted(**inputs: Any) -> torch.Tensor:
            output = generate(**inputs)
            answered.append((inputs, output[:, inputs["input_ids"].shape[1] :]))
            return output

        monkeypatch.setitem(lm.model.__dict__, "generate", noted)
        samples = evaluate(lm, "digits_pope", TaskManager(include_path=str(tasks), model_name="llava_hf"), tmp_path)
        monkeypatch.undo()
    assert len(answered) == samples["n-samples"]["digits_pope"]["effective"] == 2 * SCENES
    model, _ = load_tiny()
    for inputs, output in answered:
        given = {name: inputs.pop(name) for name in ("input_ids", "attention_mask", "pixel_values")}
        pruned = prune_inputs(model, given, **PRUNED)
        assert pruned["input_ids"].shape[1] < given["input_ids"].shape[1] - 100
        assert torch.equal(model.generate(**pruned, **inputs)[:, pruned["input_ids"].shape[1] :], output)


def test_the_task_of_the_page_runs(trained: Path, tasks: Path, tmp_path: Path) -> None:
    text = re.search(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
    (tmp_path / "my_task.yaml").write_text(text.replace("/data/my_task ", f"{tasks.parent}/data/digits_pope "))
    manager = TaskManager(include_path=str(tmp_path), model_name="saccade")
    found = evaluate(SaccadeModel(str(trained)), "my_task", manager, tmp_path, limit=2)
    assert found["n-samples"]["my_task"]["effective"] == 2
    assert 0 <= found["results"]["my_task"]["pope_accuracy,none"] <= 1


def test_the_page_names_the_model_args() -> None:
    named = re.search(r"`model_args` takes (.*?)\. ", PAGE.read_text().replace("\n", " "))[1]
    assert set(re.findall(r"`(\w+)`", named)) == {
        "pretrained",
        "inference",
        "dtype",
        "trust_remote_code",
        *PRUNING_OPTIONS,
    }


@pytest.fixture(scope="module")
def manager() -> TaskManager:
    return TaskManager()


@pytest.mark.parametrize(("suite", "number"), [("dualspeed", 9), ("skip-vision", 8)])
def test_lmms_eval_has_the_benchmarks_of_a_suite(manager: TaskManager, suite: str, number: int) -> None:
    benchmarks = SUITES[suite].benchmarks
    assert len(benchmarks) == number
    for benchmark in benchmarks:
        assert benchmark.task in manager.all_subtasks
        # In full: with the code that scores it, and so with everything that this code imports.
        config = load_yaml_config(manager.task_index[benchmark.task]["yaml_path"], mode="full")
        metrics = {entry["metric"]: entry for entry in config["metric_list"]}
        assert metrics[benchmark.metric]["higher_is_better"] is True
        assert config["output_type"] == "generate_until"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prune_ratios": 0.5}, "model_args: prune_ratios=0.5 is unknown"),
        ({"inference": "fast"}, "inference='fast' is unknown"),
        ({"inference": "skip"}, "needs the folder of a run"),
        ({"prune_ratio": 2.0}, "prune_ratio"),
        ({"batch_size": "auto"}, "batch_size='auto': give a number"),
    ],
)
def test_bad_model_args(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SaccadeError, match=message):
        SaccadeModel("tiny", **options)


def test_what_cannot_be_asked_of_it() -> None:
    lm = SaccadeModel("tiny")
    with pytest.raises(SaccadeError, match="task='t' asks for log-likelihoods"):
        lm.loglikelihood([SimpleNamespace(task_name="t")])
    lm.task_dict = {"t": {"test": [None]}}
    messages = [{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}]
    request = SimpleNamespace(args=("", lambda _: messages, {}, 0, "t", "test"))
    with pytest.raises(SaccadeError, match="document 0 has a video or a sound"):
        lm.generate_until([request])


def test_generation_options() -> None:
    greedy = {"max_new_tokens": 16, "num_beams": 1, "do_sample": False}
    assert generation_options({"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "until": ["x"]}) == greedy
    assert generation_options({"temperature": 0.2, "do_sample": False})["do_sample"] is False
    sampled = generation_options({"temperature": 0.2, "top_p": 0.9})
    assert (sampled["do_sample"], sampled["temperature"], sampled["top_p"]) == (True, 0.2, 0.9)
    assert sampled["max_new_tokens"] == 1024


def test_an_answer_ends_at_the_first_stop() -> None:
    assert cut_at(" yes\n\nQuestion: ASSISTANT: no", ["ASSISTANT:", "\n\n"]) == "yes"
    assert cut_at("B. two ", None) == "B. two"
    assert cut_at("a;b", ";") == "a"
