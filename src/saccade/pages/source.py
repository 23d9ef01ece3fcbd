"""Read the contents of a folder, with a clear one-line error if that fails."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saccade.dualspeed.checkpoint import newest_checkpoint
from saccade.dualspeed.folder import EVALUATION_FILE, RUN_FILE
from saccade.dualspeed.weights import read_evaluation
from saccade.errors import SaccadeError
from saccade.files import check_entries, check_exists
from saccade.sweeps.plan import PLAN_FILE
from saccade.sweeps.runner import RUNS
from saccade.sweeps.worker import RESULT_FILE
from saccade.training import LOG_FILE

STATE_FILE = "trainer_state.json"


@dataclass
class RunRecord:
    """What the folder of a run says about it; None for what is not recorded."""

    model: Path
    log_history: list[dict[str, Any]]
    recipe: dict[str, Any] = field(default_factory=dict)  # as given; empty if there is only a checkpoint
    config: dict[str, Any] = field(default_factory=dict)  # the options that a resumed run must share
    tokens: dict[str, float] = field(default_factory=dict)  # of the full batches, the trained passes, the teacher
    environment: dict[str, Any] | None = None
    finished: str | None = None  # the date
    evaluation: dict[str, Any] | None = None  # of `saccade eval` on the digit scenes, with these weights
    left_out: str | None = None  # why an evaluation in the folder does not belong to these weights
    checkpoint: str | None = None  # what was read because there is no log of a finished run


def is_sweep(folder: Path) -> bool:
    """Whether a folder contains a sweep, such as the demo, rather than a run.

    Raises:
        SaccadeError: if it is missing or contains neither.
    """
    shown = f"folder={str(folder)!r}"
    check_exists(folder, "folder", "give the folder of a run, a sweep or a demo")
    if not folder.is_dir():
        raise SaccadeError(f"{shown} is a file: give the folder of a run, a sweep or a demo")
    check_entries(folder, "folder")
    if (folder / PLAN_FILE).is_file():
        return True
    if (folder / RUNS).is_dir():
        raise SaccadeError(f"{shown} contains runs without {PLAN_FILE}: the command that made them writes it")
    if (folder / LOG_FILE).is_file() or (folder / STATE_FILE).is_file() or newest_checkpoint(folder):
        return False
    inside = sorted(path.parent.name for path in folder.glob(f"*/{PLAN_FILE}"))
    if inside:
        raise SaccadeError(f"{shown} contains several sweeps: give one of them, {', '.join(inside)}")
    result = folder / RESULT_FILE
    if result.is_file() and "model" in (found := read_json(result)):
        raise SaccadeError(f"{shown} is one run of a sweep: give the sweep, or its model {found['model']}")
    raise SaccadeError(
        f"{shown} contains no run: there is neither {LOG_FILE} nor a whole checkpoint "
        f"({STATE_FILE} and {RUN_FILE}), nor {PLAN_FILE} of a sweep"
    )


def read_json(path: Path, *keys: str) -> dict[str, Any]:
    """The mapping in a file.

    Raises:
        SaccadeError: if it is half-written, is not a mapping, or lacks one of the keys.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SaccadeError(
            f"{path} is half-written or damaged ({error}): wait until it is whole, or move it away"
        ) from error
    missing = [key for key in keys if key not in found] if isinstance(found, dict) else list(keys)
    if missing or not isinstance(found, dict):
        raise SaccadeError(f"{path} is not what Saccade writes, it lacks {', '.join(missing) or 'all'}: move it away")
    return found


def read_run(folder: Path) -> RunRecord:
    """The record of a run, read from its log, or from its newest complete checkpoint as long as there is no log.

    Raises:
        SaccadeError: if a file in it is half-written.
    """
    if (folder / LOG_FILE).is_file():
        log = read_json(folder / LOG_FILE, "log_history")
        record = RunRecord(folder, log["log_history"], log.get("recipe", {}))
        record.environment, record.finished = log.get("environment"), log.get("finished")
    else:
        model = folder if (folder / STATE_FILE).is_file() else newest_checkpoint(folder)
        record = RunRecord(model, read_json(model / STATE_FILE, "log_history")["log_history"], checkpoint=model.name)
    log = record.log_history
    if not isinstance(log, list) or not all(isinstance(entry, dict) for entry in log):
        raise SaccadeError(f"the log of {record.model} is not a list of entries: move it away, or train again")
    if record.environment is None and (folder / RESULT_FILE).is_file():
        record.environment = read_json(folder / RESULT_FILE).get("environment")  # a stage of a sweep
    if (record.model / RUN_FILE).is_file():
        run = read_json(record.model / RUN_FILE, "config")
        record.config, record.tokens = run["config"], run.get("tokens", {})
    path = folder / EVALUATION_FILE
    if path.is_file() and _is_of_digits(read_json(path).get("results")):
        record.evaluation, record.left_out = read_evaluation(folder)
    return record


def _is_of_digits(results: Any) -> bool:
    """Whether these are results of `evaluate_inferences`, not of another benchmark."""
    keys = {"inference", "accuracy", "accuracy_by_kind", "mean_prompt_length", "samples"}
    return isinstance(results, list) and bool(results) and all(keys <= set(result) for result in results)
