"""The figures of a run, and their mean and range over seeds."""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any


def run_figures(result: Mapping[str, Any], baseline: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The figures of a run with one evaluation of each kind; None for those that are missing.

    Args:
        baseline: the result of all-token training with the same seed, for the share of its accuracy and the speed-up.
    """
    spec, stages = result["spec"], result["stages"]
    entries = {entry["inference"]: entry for entry in result["evaluations"]}
    accuracy = {name: entry["accuracy"] for name, entry in entries.items()}
    last = list(stages.values())[-1]
    ordinary = spec["stages"][-1].get("prune_ratio") == 0
    tokens = {name: sum(stage["tokens"][name] for stage in stages.values()) for name in last["tokens"]}
    samples = sum(stage["samples"] for stage in stages.values())
    full, base = accuracy.get("full"), baseline and _accuracy(baseline)
    return {
        "accuracy_full": full,
        "accuracy_pruned": accuracy.get("pruned"),
        "accuracy_pruned_isolator": accuracy.get("pruned_isolator"),
        "accuracy_skip": accuracy.get("skip"),
        "accuracy_by_kind": {name: entry["accuracy_by_kind"] for name, entry in entries.items()},
        "share_of_all_tokens": full / base if base and full is not None else None,
        "train_loss": next((log["loss"] for log in reversed(last["log_history"]) if "loss" in log), None),
        "train_seconds": train_seconds(result),
        "train_cpu_seconds": train_cpu_seconds(result),
        **{
            f"flops_{name}": entry["prefill_flops"] / 1e9
            for name, entry in entries.items()
            if "prefill_flops" in entry
        },
        "speedup": train_seconds(baseline) / train_seconds(result) if baseline else None,
        # Within the run: the time of a slow step, minus its teacher, over that of the mean step of stage two.
        "speedup_steps": None if ordinary else last["step_speedup"],
        # A forward and backward pass over a token costs three times the teacher's forward pass over it.
        "speedup_tokens": 3 * tokens["full"] / (3 * tokens["trained"] + tokens.get("teacher", 0.0)),
        "mean_sequence_length": tokens["trained"] / samples,
        "mean_sequence_length_full": tokens["full"] / samples,
    }


def _accuracy(result: Mapping[str, Any]) -> float:
    return next(entry["accuracy"] for entry in result["evaluations"] if entry["inference"] == "full")


def train_seconds(result: Mapping[str, Any]) -> float:
    """Seconds of training of all stages, including those that another run trained and shares."""
    return sum(stage["seconds"] for stage in result["stages"].values())


def train_cpu_seconds(result: Mapping[str, Any]) -> float | None:
    """CPU time of the training process for all stages, excluding time spent waiting for a CPU. None if unknown."""
    seconds = [stage.get("cpu_seconds") for stage in result["stages"].values()]
    return None if None in seconds else sum(seconds)


def summarise(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[dict[str, Any]]:
    """One entry per combination of `keys`, in order of first occurrence: the keys, `seeds`, and for every number a
    mapping with "mean", "min" and "max".
    """
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    entries = []
    for values, members in groups.items():
        entry = {**dict(zip(keys, values, strict=True)), "seeds": len(members)}
        for name in {name: None for row in members for name in row if name not in (*keys, "seed")}:
            numbers = [
                row[name]
                for row in members
                if isinstance(row.get(name), (int, float)) and not isinstance(row[name], bool)
            ]
            if numbers:
                entry[name] = mean_and_range(numbers)
        entries.append(entry)
    return entries


def mean_and_range(numbers: Sequence[float]) -> dict[str, float]:
    """Mean, minimum and maximum of at least one number."""
    return {"mean": mean(numbers), "min": min(numbers), "max": max(numbers)}


def percent(value: Mapping[str, float] | None) -> str:
    """A spread of fractions as text in percent."""
    return spread(value and {name: 100 * share for name, share in value.items()}, "{:.1f} %")


def spread(value: Mapping[str, float] | None, form: str) -> str:
    """The mean, followed by minimum and maximum if they differ as text."""
    if value is None:
        return "-"
    number = form.partition("}")[0] + "}"
    low, high = (number.format(value[name]) for name in ("min", "max"))
    text = form.format(value["mean"])
    return text if low == high else f"{text} ({low}-{high})"
