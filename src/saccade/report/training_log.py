"""What a trainer's log says of a run: its curves, and where its time went."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

MODES = ("fast", "slow")
TIME_PARTS = {
    "fast": "fast steps",
    "slow": "slow steps, without their teacher",
    "slow_with_teacher": "slow steps, their teacher included",
    "teacher": "teacher of slow steps",
    "evaluation": "evaluation while training",
    "other": "waiting for batches, saving, start-up",
}


def curve(log_history: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """(step, value) of each entry that holds a finite number under `key`."""
    return [(entry["step"], entry[key]) for entry in log_history if "step" in entry and _is_finite(entry.get(key))]


def last(log_history: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """The last finite number under `key`, or None."""
    found = [entry[key] for entry in log_history if _is_finite(entry.get(key))]
    return found[-1] if found else None


def not_finite(log_history: Sequence[Mapping[str, Any]]) -> list[int]:
    """The steps whose logged loss was NaN or infinite, which JSON files hold as null."""
    return [
        entry["step"] for entry in log_history if "step" in entry and "loss" in entry and not _is_finite(entry["loss"])
    ]


def time_parts(log_history: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """Seconds of each of `TIME_PARTS` that occurs, up to the last log; None where the log has no times of steps.

    The time between two logs follows from what they count: samples = trained tokens / `length_in`, and seconds =
    samples x `length_full` / `tokens_per_second`. So it is known of unfinished and of resumed runs too. What neither
    the steps nor an evaluation took is `other`.
    """
    seconds = dict.fromkeys(TIME_PARTS, 0.0)
    steps, tokens, wall = dict.fromkeys(MODES, 0.0), 0.0, 0.0
    for entry in log_history:
        seconds["evaluation"] += entry.get("eval_runtime") or 0.0
        if not all(_is_finite(entry.get(key)) for key in ("num_tokens", "length_in", "tokens_per_second")):
            continue
        if entry["length_in"] and entry["tokens_per_second"]:
            samples = (entry["num_tokens"] - tokens) / entry["length_in"]
            wall += samples * entry["length_full"] / entry["tokens_per_second"]
        tokens = entry["num_tokens"]
        for mode in MODES:
            count = entry[f"steps_{mode}"] - steps[mode]
            steps[mode] = entry[f"steps_{mode}"]
            spent = count * (entry.get(f"step_seconds_{mode}") or 0.0)
            if mode == "slow" and entry.get("teacher_seconds") is None and entry.get("kl") is not None:
                seconds["slow_with_teacher"] += spent
                continue
            teacher = count * (entry.get("teacher_seconds") or 0.0) if mode == "slow" else 0.0
            seconds["teacher"] += teacher
            seconds[mode] += spent - teacher
    if not wall:
        return None
    inside = sum(seconds.values())
    seconds["other"] = max(0.0, wall - inside)
    return {name: value for name, value in seconds.items() if value > 0}


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
