"""Local tasks for lmms-eval on digit scenes: the shapes, prompts and scoring of POPE, MME and ScienceQA."""

from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset, DatasetDict, Features, Image, Sequence, Value

from saccade.data import digit_scenes

TASKS = ("digits_pope", "digits_mme", "digits_choice")

POPE = {
    "doc_to_visual": "lmms_eval.tasks.pope.utils.pope_doc_to_visual",
    "doc_to_text": "lmms_eval.tasks.pope.utils.pope_doc_to_text",
    "process_results": "lmms_eval.tasks.pope.utils.pope_process_results",
    "metric_list": {
        "pope_accuracy": "lmms_eval.tasks.pope.utils.pope_aggregate_accuracy",
        "pope_f1_score": "lmms_eval.tasks.pope.utils.pope_aggregate_f1_score",
    },
}
MME = {
    "doc_to_visual": "lmms_eval.tasks.mme.utils.mme_doc_to_visual",
    "doc_to_text": "lmms_eval.tasks.mme.utils.mme_doc_to_text",
    "process_results": "lmms_eval.tasks.mme.utils.mme_process_results",
    "metric_list": {
        "mme_perception_score": "lmms_eval.tasks.mme.utils.mme_aggregate_results",
        "mme_cognition_score": "lmms_eval.tasks.mme.utils.mme_aggregate_results",
    },
}
CHOICE = {
    "doc_to_visual": "lmms_eval.tasks.scienceqa.utils.sqa_doc_to_visual",
    "doc_to_text": "lmms_eval.tasks.scienceqa.utils.sqa_doc_to_text",
    "process_results": "lmms_eval.tasks.scienceqa.utils.sqa_process_results",
    "metric_list": {"exact_match": "mean"},
}


def yes_no_documents(scenes: int) -> list[dict[str, Any]]:
    """For each scene a question to be answered with yes and one to be answered with no."""
    documents = []
    for number, row in enumerate(digit_scenes("sft", "test", scenes, seed=7, kinds=["read"])):
        present = set(row["answer"].split())
        absent = sorted({str(value) for value in range(10)} - present)
        for digit, answer in ((min(present), "yes"), (absent[number % len(absent)], "no")):
            documents.append(
                {
                    "question_id": str(number),
                    "question": f"is there a {digit} ?",
                    "answer": answer,
                    # Perception and cognition of MME, two questions of one image in the same one.
                    "category": "existence" if number % 2 else "numerical_calculation",
                    "image": row["images"][0],
                }
            )
    return documents


def choice_documents(scenes: int) -> list[dict[str, Any]]:
    """Questions with two options, one document without an image among them."""
    documents: list[dict[str, Any]] = []
    for number, row in enumerate(digit_scenes("sft", "test", scenes, seed=8, kinds=["max"])):
        wrong = str((int(row["answer"]) + 1) % 10)
        choices = [row["answer"], wrong] if number % 2 else [wrong, row["answer"]]
        documents.append(
            {
                "hint": "",
                "question": "what is the maximum ?",
                "choices": choices,
                "answer": 1 - number % 2,
                "image": row["images"][0] if number else None,
            }
        )
    return documents


def write_tasks(folder: Path, scenes: int = 6) -> Path:
    """Write the data and the YAML of every task of `TASKS` to `folder`, and return the folder of the YAML."""
    yes_no = {
        **{name: Value("string") for name in ("question_id", "question", "answer", "category")},
        "image": Image(),
    }
    choice = {
        "hint": Value("string"),
        "question": Value("string"),
        "choices": Sequence(Value("string")),
        "answer": Value("int64"),
        "image": Image(),
    }
    tables = {
        "digits_pope": (POPE, yes_no_documents(scenes), yes_no),
        "digits_mme": (MME, yes_no_documents(scenes), yes_no),
        "digits_choice": (CHOICE, choice_documents(scenes), choice),
    }
    for name, (shape, documents, features) in tables.items():
        rows = Dataset.from_list(documents, features=Features(features))
        DatasetDict({"test": rows}).save_to_disk(folder / "data" / name)
        write_task(folder / "tasks", name, shape, folder / "data" / name)
    return folder / "tasks"


def write_task(folder: Path, name: str, shape: dict[str, Any], data: Path, **changes: Any) -> None:
    """Write one task's YAML; what names a function becomes `!function`."""
    functions = {key: shape[key] for key in ("doc_to_visual", "doc_to_text", "process_results")}
    metrics = "".join(
        f"  - metric: {metric}\n"
        f"    aggregation: {'!function ' if '.' in how else ''}{how}\n"
        "    higher_is_better: true\n"
        for metric, how in shape["metric_list"].items()
    )
    plain = {
        "task": name,
        "dataset_path": str(data),
        "dataset_kwargs": {"load_from_disk": True},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_target": "answer",
        "generation_kwargs": {"max_new_tokens": 3, "temperature": 0, "do_sample": False, "until": ["ASSISTANT:"]},
        "lmms_eval_specific_kwargs": {"default": {"format": "default", "pre_prompt": "", "post_prompt": ""}},
        **changes,
    }
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(plain) + "".join(f"{key}: !function {value}\n" for key, value in functions.items())
    (folder / f"{name}.yaml").write_text(f"{text}metric_list:\n{metrics}")
