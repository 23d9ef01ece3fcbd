"""What a trainer's log says about a run: its curves, and where its time went."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from saccade.values import is_number

TEACHER = "teachers"
EVALUATION = "evaluation while training"
OTHER = "waiting for batches, saving, start-up"


def modes_of(log_history: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of the modes that the log has losses for, in order."""
    keys = dict.fromkeys(key for entry in log_history for key in entry)
    return [key.removeprefix("loss_") for key in keys if key.startswith("loss_")]


def part_of(mode: str) -> str:
    """The name of a mode's steps in `time_parts`."""
    return f"{mode.replace('_', ' ')} steps"


def losses(log_history: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """The loss over the steps of each mode, or of all steps if the log does not tell modes apart."""
    found = {part_of(mode): curve(log_history, f"loss_{mode}") for mode in sorted(modes_of(log_history))}
    known = {name: points for name, points in found.items() if points}
    return known or {"all steps": curve(log_history, "loss")}


def curve(log_history: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """(step, value) of each entry with a finite number under `key`."""
    return [(entry["step"], entry[key]) for entry in log_history if "step" in entry and _is_finite(entry.get(key))]


def last(log_history: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """The last finite number under `key`, or None."""
    found = [entry[key] for entry in log_history if _is_finite(entry.get(key))]
    return found[-1] if found else None


def not_finite(log_history: Sequence[Mapping[str, Any]]) -> list[int]:
    """The steps whose logged loss was NaN or infinite, which JSON files store as null."""
    return [
        entry["step"] for entry in log_history if "step" in entry and "loss" in entry and not _is_finite(entry["loss"])
    ]


def time_parts(log_history: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """Where the time went, in seconds, up to the last log; None if the log has no step times.

    The time between two logs is derived from their counts: samples = trained tokens / `length_in`, and seconds =
    samples x `length_full` / `tokens_per_second`. So it is also known for unfinished and resumed runs.

    Returns:
        Seconds of the steps of each mode, without their teacher's pass; `TEACHER`; `EVALUATION`; and `OTHER`, the
        rest. Parts of zero length are left out.
    """
    modes = modes_of(log_history)
    seconds = dict.fromkeys([*map(part_of, modes), TEACHER, EVALUATION, OTHER], 0.0)
    steps, tokens, wall = dict.fromkeys(modes, 0.0), 0.0, 0.0
    for entry in log_history:
        seconds[EVALUATION] += entry.get("eval_runtime") or 0.0
        if not all(_is_finite(entry.get(key)) for key in ("num_tokens", "length_in", "tokens_per_second")):
            continue
        if entry["length_in"] and entry["tokens_per_second"]:
            samples = (entry["num_tokens"] - tokens) / entry["length_in"]
            wall += samples * entry["length_full"] / entry["tokens_per_second"]
        tokens = entry["num_tokens"]
        for mode in modes:
            count = entry.get(f"steps_{mode}", steps[mode]) - steps[mode]
            steps[mode] += count
            teacher = count * (entry.get(f"teacher_seconds_{mode}") or 0.0)
            seconds[TEACHER] += teacher
            seconds[part_of(mode)] += count * (entry.get(f"step_seconds_{mode}") or 0.0) - teacher
    if not wall:
        return None
    seconds[OTHER] = max(0.0, wall - sum(seconds.values()))
    return {name: value for name, value in seconds.items() if value > 0}


def _is_finite(value: Any) -> bool:
    return is_number(value) and math.isfinite(value)
