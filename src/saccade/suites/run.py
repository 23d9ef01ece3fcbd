"""Benchmarks of lmms-eval on a trained model, one file of results for each."""

import difflib
import json
import os
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from saccade.companions import ENDING
from saccade.errors import SaccadeError
from saccade.evaluation import Inference
from saccade.files import write_json_atomically
from saccade.reducers import PruningConfig
from saccade.report.environment import environment
from saccade.suites.definitions import BENCHMARKS, get_suite
from saccade.training import ModelOptions, load_model
from saccade.training.sources import check_family

INSTALL = "pip install 'saccade[eval]'"
KEYS = ("OPENAI_API_KEY", "AZURE_API_KEY")
"""What lmms-eval's judges read their key from."""


def check_lmms_eval() -> None:
    """Check that lmms-eval, which is optional, is there.

    Raises:
        SaccadeError: if it is not installed.
    """
    if find_spec("lmms_eval") is None:
        raise SaccadeError(f"lmms-eval is not installed, which runs the benchmarks: {INSTALL}, see docs/evaluation.md")


def choose_tasks(suite: str | None, tasks: Sequence[str] | None) -> list[str]:
    """The tasks of a suite, those of them that `tasks` names, or without a suite just those.

    Raises:
        SaccadeError: if there is nothing to run, a task is not of the suite or named twice, or one is scored by a
            judge and no key is set.
    """
    if suite is None and not tasks:
        raise SaccadeError("suite and tasks are not given: name a suite, or tasks of lmms-eval")
    if tasks is not None and len(set(tasks)) < len(tasks):
        raise SaccadeError(f"tasks={','.join(tasks)!r} names a task twice: name each once")
    chosen = list(tasks or get_suite(suite or "").tasks)
    if suite is not None:
        for task in chosen:
            if task not in get_suite(suite).tasks:
                raise SaccadeError(
                    f"tasks: {task!r} is not of suite {suite!r}, which has {', '.join(get_suite(suite).tasks)}"
                )
    judged = [task for task in chosen if task in BENCHMARKS and BENCHMARKS[task].judge == "all"]
    if judged and not _has_key():
        rest = [task for task in chosen if task not in judged]
        leave = f", or leave them out: --tasks {','.join(rest)}" if rest else ""
        raise SaccadeError(f"tasks: {', '.join(judged)} are scored by a judge: set {' or '.join(KEYS)}{leave}")
    return chosen


def judge_notes(tasks: Sequence[str]) -> list[str]:
    """What to know of tasks that ask a judge for some answers, where no key is set."""
    if _has_key():
        return []
    names = [BENCHMARKS[task].name for task in tasks if task in BENCHMARKS and BENCHMARKS[task].judge == "rest"]
    return [
        f"{name}: {' or '.join(KEYS)} is not set, so answers without a clear letter get a random one" for name in names
    ]


def run_suite(
    model: str | Path,
    inferences: Sequence[Inference],
    output: str | Path,
    tasks: Sequence[str],
    include_path: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    dtype: str = "auto",
    resume: bool = False,
) -> dict[str, Path]:
    """Evaluate a model on benchmarks, in each of several ways to run it.

    Everything that can be wrong with the request is found before the model is loaded, the data of the benchmarks
    included. Each benchmark is a file of its own, so that what is done stays done.

    Args:
        model: folder that training wrote, hub id of a stock checkpoint, or "tiny".
        inferences: of `plan_inferences`.
        output: folder; an inference's files go to the folder in it that has its name.
        tasks: of `choose_tasks`.
        include_path: folder with further tasks as YAML files.
        limit: documents of each benchmark, to try it; all when left out.
        batch_size: documents at a time.
        dtype: dtype to load the weights in.
        resume: leave out what `output` has of the same model, run in the same way on as many documents.

    Returns:
        The folder of each inference, by its name.

    Raises:
        SaccadeError: if lmms-eval is not installed, a task is unknown, its data cannot be loaded or it does not
            generate, a number is below 1, or the model cannot be loaded.
        OSError: if `output` cannot be written to.
    """
    check_lmms_eval()
    for name, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise SaccadeError(f"{name}={value}: give at least 1")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise SaccadeError("WORLD_SIZE: this runs one process; for several GPUs use lmms-eval itself, --model saccade")
    if include_path is not None and not Path(include_path).is_dir():
        raise SaccadeError(f"include_path={str(include_path)!r} is not a folder: give the one with the tasks' YAML")
    if str(model) != "tiny":
        check_family(str(model))
    folders = {inference.name: Path(output) / inference.name for inference in inferences}
    for folder in folders.values():
        # A place that cannot be written to shows now, and not after hours.
        folder.mkdir(parents=True, exist_ok=True)
    identity = _identity(model)
    settings = {inference.name: model_args(model, inference, dtype) for inference in inferences}
    open_tasks = {
        name: [
            task for task in tasks if not (resume and _is_done(_file(folder, task), settings[name], limit, identity))
        ]
        for name, folder in folders.items()
    }
    if not any(open_tasks.values()):
        return folders
    manager = _task_manager(include_path)
    wanted = [task for task in tasks if any(task in names for names in open_tasks.values())]
    _check_tasks(manager, wanted)
    loaded = load_model(ModelOptions(model=str(model), dtype=dtype))
    for inference in inferences:
        for task in open_tasks[inference.name]:
            folder = folders[inference.name]
            results = _evaluate(manager, loaded, inference, task, folder, settings[inference.name], limit, batch_size)
            results["saccade"] |= {"model": identity, "environment": environment()}
            write_json_atomically(_file(folder, task), results)
    return folders


def model_args(model: str | Path, inference: Inference, dtype: str = "auto") -> str:
    """How a model is run, as `--model_args` of lmms-eval says it."""
    given = {"pretrained": str(model), "inference": inference.name}
    if dtype != "auto":
        given["dtype"] = dtype
    if inference.prunes:
        values = {entry.name: getattr(inference.pruning, entry.name) for entry in fields(PruningConfig)}
        values["reducer_options"] = json.dumps(values["reducer_options"]) if values["reducer_options"] else None
        given |= {n: str(value) for n, value in values.items() if value is not None and n != "isolator"}
    return ",".join(f"{name}={value}" for name, value in given.items())


def _has_key() -> bool:
    return any(os.environ.get(key) for key in KEYS)


def _file(folder: Path, task: str) -> Path:
    return folder / f"{task}_results.json"


def _identity(model: str | Path) -> dict[str, Any]:
    """The name of a model and, of a folder, the sizes and times of its weights: training may write there again."""
    folder = Path(model)
    weights = [path for ending in (".safetensors", ENDING) for path in sorted(folder.glob(f"*{ending}"))]
    stats = {path.name: path.stat() for path in weights}
    return {"name": str(model), "weights": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}}


def _is_done(file: Path, settings: str, limit: int | None, identity: dict[str, Any]) -> bool:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        config = content["config"]
        return (config["model_args"], config["limit"], content["saccade"]["model"]) == (settings, limit, identity)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _task_manager(include_path: str | Path | None) -> Any:
    # It says what it thinks of every file of its own otherwise.
    os.environ.setdefault("LOGURU_LEVEL", "WARNING")
    from lmms_eval.tasks import TaskManager

    return TaskManager(include_path=None if include_path is None else str(include_path), model_name="saccade")


def _check_tasks(manager: Any, tasks: Sequence[str]) -> None:
    """Load the data of every task once, which downloads what is not there yet."""
    from lmms_eval.tasks import get_task_dict

    for task in tasks:
        if task not in manager.all_subtasks:
            close = difflib.get_close_matches(task, manager.all_subtasks, 3)
            hint = f"did you mean {' or '.join(close)}?" if close else "give a task of lmms-eval or an include_path"
            raise SaccadeError(f"tasks: {task!r} is not a task of lmms-eval: {hint}")
    for task in tasks:
        try:
            loaded = get_task_dict([task], manager, "chat")[task]
        # Whatever goes wrong here, a missing data set, hub or package, is the user's to mend and has no common type.
        except Exception as error:
            first: BaseException = error
            while first.__cause__ is not None:
                first = first.__cause__
            line = " ".join(str(first).split())[:300]
            raise SaccadeError(f"tasks: {task!r} cannot be loaded: {type(first).__name__}: {line}") from error
        kind = loaded.OUTPUT_TYPE
        if kind != "generate_until":
            raise SaccadeError(f"tasks: {task!r} is of output_type {kind}: use one of output_type generate_until")


def _evaluate(
    manager: Any,
    loaded: tuple[Any, Any],
    inference: Inference,
    task: str,
    folder: Path,
    settings: str,
    limit: int | None,
    batch_size: int,
) -> dict[str, Any]:
    """What lmms-eval says of one task, in plain JSON, with the lengths of prompts."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.utils import handle_non_serializable

    from saccade.suites.lmms import SaccadeModel

    lm = SaccadeModel.planned(inference, loaded, batch_size)
    # The task by name: some of lmms-eval's count in globals of their module, which loading a task makes anew.
    results = simple_evaluate(
        model=lm,
        model_args=settings,
        tasks=[task],
        batch_size=batch_size,
        limit=limit,
        log_samples=False,
        task_manager=manager,
        # Where tasks write submissions; and no image is kept in memory for scoring, as by lmms-eval's own command.
        cli_args=Namespace(output_path=str(folder), process_with_media=False),
    )
    plain = json.loads(json.dumps(results, default=handle_non_serializable))
    plain["saccade"] = {"inference": inference.name, "mean_prompt_length": lm.prompt_tokens / max(lm.prompts, 1)}
    return plain
