"""The finished runs of a sweep: their figures, the spread over seeds, the table, and the finding in a sentence."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console

from saccade.files import write_json_atomically, write_text_atomically
from saccade.reducers.config import PRUNING_OPTIONS
from saccade.report.environment import environment
from saccade.report.tables import markdown_table, print_table
from saccade.sweeps.digits import LABELS
from saccade.sweeps.plan import Plan
from saccade.sweeps.runner import read_failure, read_result
from saccade.sweeps.spec import RunSpec
from saccade.values import is_number

FIGURES: Mapping[str, tuple[str, str | None]] = {
    "accuracy_full": ("accuracy, all tokens", None),
    "share_of_all_tokens": ("share of all-token", None),
    "accuracy_pruned": ("accuracy, pruned", None),
    "accuracy_pruned_isolator": ("pruned + isolator", None),
    "accuracy_skip": ("accuracy, skipping", None),
    "train_loss": ("last loss", "{:.3f}"),
    "train_seconds": ("training time", "{:.0f} s"),
    "speedup": ("speed-up", "{:.2f}x"),
    "speedup_steps": ("speed-up of steps", "{:.2f}x"),
    "speedup_tokens": ("tokens allow", "{:.2f}x"),
}
"""The columns of a table: heading, and the format of figures that are not fractions."""
EVALUATED = ("prune_ratio", "positions")
"""Labels that distinguish the rows of a run that was evaluated in several ways."""
HOW = frozenset(
    (
        *PRUNING_OPTIONS, "schedule", "slow_probability", "modes", "ratio_schedule", "prune_ratio_start", "fit_slow",
        "isolator_length", "distill_weight", "distill_temperature", "skip_vision", "skip_mode",
        "method", "part", "pruned_stages",
    )
)  # fmt: skip
"""Labels that say how many tokens are kept and how: fields of recipes, and the words for them in studies."""
SYMBOLS = {"prune_ratio": "p", "slow_probability": "r", "isolator_length": "l"}
"""The papers' symbols for options, for short names."""
Spread = Mapping[str, float]


class Standing:
    """The finished runs of a plan, read from their folders. Runs of any commit count, but only with the same spec.

    `words` are names of label values, `figures` the columns of the table.
    """

    def __init__(
        self, plan: Plan, output: Path, words: Mapping[str, str] = LABELS, figures: Mapping[str, Any] = FIGURES
    ) -> None:
        self.plan, self.output, self.words, self.figures = plan, output, words, figures
        found = {spec.name: read_result(output, spec) for spec in plan.runs}
        self.results = {name: result for name, result in found.items() if result is not None}
        self.failed = [spec.name for spec in plan.runs if found[spec.name] is None and read_failure(output, spec)]
        compared = baselines_of(plan.runs)
        self._baseline_runs = set(compared.values())
        self.baselines = {name: self.results[base] for name, base in compared.items() if base in self.results}
        """By name of a run, the result of training and answering with all tokens that it is compared with."""
        self.rows = self._rows()
        labels = {label for spec in plan.runs for label in spec.labels} | set(EVALUATED)
        self.keys = list(dict.fromkeys(name for row in self.rows for name in row if name in labels - {"seed"}))

    def _rows(self) -> list[dict[str, Any]]:
        """One row of labels and figures per run, or per evaluation if a run was evaluated in several ways."""
        rows = []
        for spec in self.plan.runs:
            result = self.results.get(spec.name)
            if result is None:
                continue
            if has_own_training(result):
                figures = run_figures(result, self.baselines.get(spec.name))
                rows.append({**spec.labels, **figures, "is_baseline": spec.name in self._baseline_runs})
                continue
            for entry in result["evaluations"]:
                # Its training is that of the baseline, which has its own row.
                way = {name: entry[name] for name in (*EVALUATED, "mean_prompt_length")}
                rows.append({**spec.labels, **way, f"accuracy_{entry['inference']}": entry["accuracy"]})
        return rows

    @property
    def progress(self) -> str:
        """How many runs are done and which have failed."""
        line = f"{len(self.results)} of {len(self.plan.runs)} runs done"
        return line + (f", {len(self.failed)} failed: {', '.join(self.failed)}" if self.failed else "")

    def baseline(self) -> Spread | None:
        """The spread of accuracy for training and inference on all tokens; None until such a run is done."""
        entries = summarise([row for row in self.rows if row.get("is_baseline")], ())
        return entries[0].get("accuracy_full") if entries else None

    def summary(self, where: Sequence[tuple[str, Any]] = ()) -> list[dict[str, Any]]:
        """An entry per combination of labels over its seeds, sorted by amounts; a run must have the labels `where`."""
        rows = [row for row in self.rows if all(row.get(name) == value for name, value in where)]
        ranks = {key: list(dict.fromkeys(row.get(key) for row in rows)) for key in self.keys}

        def order(entry: Mapping[str, Any]) -> tuple:
            values = ((key, entry[key]) for key in self.keys)
            return tuple(
                (1, value) if isinstance(value, (int, float)) else (0, ranks[key].index(value))
                for key, value in values
            )

        return sorted(summarise(rows, self.keys), key=order)

    def table(self, where: Sequence[tuple[str, Any]] = ()) -> tuple[list[str], list[list[Any]]]:
        """Columns and cells of `summary`, without columns that are empty or fixed by `where`."""
        entries = self.summary(where)
        keys = [key for key in self.keys if key not in dict(where) and any(one[key] is not None for one in entries)]
        shown = [name for name in self.figures if any(name in entry for entry in entries)]
        if "accuracy_full" in shown or "accuracy_pruned" in shown:
            shown = [name for name in shown if name != "train_loss"]
        columns = [*(key.replace("_", " ") for key in keys), "seeds", *(self.figures[name][0] for name in shown)]
        cells = [
            [
                *(self.word(entry[key]) for key in keys),
                entry["seeds"],
                *(_cell(entry.get(name), self.figures[name][1]) for name in shown),
            ]
            for entry in entries
        ]
        return columns, cells

    def word(self, value: Any) -> str | None:
        """A label's value as shown in tables and pictures."""
        return value if value is None else self.words.get(str(value), str(value))

    def name(self, labels: Mapping[str, Any]) -> str:
        """What distinguishes a run or an entry of `summary` from others, such as "DualSpeed, p = 0.9"."""
        varying = [key for key in self.keys if len({str(row.get(key)) for row in self.rows}) > 1] or self.keys
        known = [(key, labels[key]) for key in varying if labels.get(key) is not None]
        words = (
            self.word(value) if isinstance(value, str) else f"{SYMBOLS.get(key, key.replace('_', ' '))} = {value}"
            for key, value in known
        )
        return ", ".join(words) or "the recipe"

    def groups(self) -> dict[str, list[dict[str, Any]]]:
        """The results of runs that have their own training, by `name`."""
        groups: dict[str, list[dict[str, Any]]] = {}
        for result in filter(has_own_training, self.results.values()):
            groups.setdefault(self.name(result["spec"]["labels"]), []).append(result)
        return groups

    def ranked(self) -> list[dict[str, Any]]:
        """The entries of `summary`, the most accurate on all tokens first, or the one with the lowest loss.

        Each also has `name`, and `is_baseline`: whether it is training on all tokens.
        """
        ordinary = {tuple(row.get(key) for key in self.keys) for row in self.rows if row.get("is_baseline")}
        entries = [
            {**one, "name": self.name(one), "is_baseline": tuple(one[key] for key in self.keys) in ordinary}
            for one in self.summary()
        ]
        if any("accuracy_full" in one for one in entries):
            return sorted(entries, key=lambda one: -one.get("accuracy_full", {"mean": 0})["mean"])
        return sorted(entries, key=lambda one: one.get("train_loss", {"mean": float("inf")})["mean"])

    def finding(self) -> str:
        """The result in one line: the best setting other than all-token training, compared with it if there is one.

        Of compact and original positions, the compact ones count, as published.
        """
        entries = [one for one in self.ranked() if not one["is_baseline"]] or self.ranked()
        entries = [one for one in entries if one.get("positions") in (None, "compact")] or entries
        first = entries[0]
        if "share_of_all_tokens" in first and not first["is_baseline"]:
            time = 100 / first["speedup"]["mean"]
            share = percent(first["share_of_all_tokens"])
            return f"{first['name']}: {share} of all-token accuracy in {time:.0f} % of the time"
        if "accuracy_full" in first:
            return f"{first['name']}: {percent(first['accuracy_full'])} right from all tokens, best of {len(entries)}"
        if "train_loss" in first:
            return f"{first['name']}: last loss {spread(first['train_loss'], '{:.3f}')}, lowest of {len(entries)}"
        return self.progress

    def report(self, console: Console) -> None:
        """Write `table.json`, with every row and every spread, and `table.md`, and print the table."""
        columns, cells = self.table()
        title = f"{self.plan.title}. {self.progress}"
        record = {
            "title": self.plan.title,
            "progress": self.progress,
            "command": self.plan.command,
            "environment": environment(),
            "summary": self.summary(),
            "rows": self.rows,
        }
        write_json_atomically(self.output / "table.json", record)
        write_text_atomically(self.output / "table.md", markdown_table(columns, cells) if cells else "")
        if cells:
            print_table(title, columns, cells, file=console.file)
        else:
            console.print(title, markup=False, highlight=False)


def is_baseline(spec: RunSpec) -> bool:
    """Whether a run trains on all tokens in every stage and is evaluated on all of them."""
    ways = [fields["name"] for fields in spec.evaluation.inferences] if spec.evaluation else []
    ordinary = all(
        values.get("prune_ratio", 0.9) == 0 and values.get("skip_vision") is None and not values.get("modes")
        for values in spec.stages
    )
    return "full" in ways and ordinary


def baselines_of(runs: Sequence[RunSpec]) -> dict[str, str]:
    """By name of each run, the name of the run on all tokens that it is compared with, if there is one such run.

    Both have the same seed, and whatever else their labels say, except how many tokens are kept and how. Of several,
    it is the one of most steps, and of those the one with most labels in common.
    """
    ordinary = [spec for spec in runs if is_baseline(spec)]
    found = {}
    for spec in runs:
        ranks = {
            other.name: (_length(other.stages[-1]), len(spec.labels.items() & other.labels.items()))
            for other in ordinary
            if all(
                other.labels[name] == spec.labels[name] or _says_how(name)
                for name in spec.labels.keys() & other.labels
            )
        }
        best = [name for name, rank in ranks.items() if rank == max(ranks.values())]
        if len(best) == 1:
            found[spec.name] = best[0]
    return found


def _says_how(label: str) -> bool:
    """Whether a label says how many tokens are kept or how, rather than what else runs have in common."""
    return label.rpartition(".")[2] in HOW


def _length(stage: Mapping[str, Any]) -> tuple[float, float]:
    """What orders stages by how long they train: steps, or where none are given, more than any, and epochs."""
    steps = stage.get("max_steps", -1)
    return (steps, 0.0) if steps > 0 else (math.inf, stage.get("num_train_epochs", 3.0))


def has_own_training(result: Mapping[str, Any]) -> bool:
    """Whether a run has its own training, rather than several evaluations of a model trained by another run."""
    names = [entry["inference"] for entry in result["evaluations"]]
    return len(names) == len(set(names))


def run_figures(result: Mapping[str, Any], baseline: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The figures of a run with one evaluation of each kind, None for those that are missing.

    `baseline`, the result of all-token training with the same seed, is for the share of its accuracy and the speed-up.
    """
    stages, entries = result["stages"], {entry["inference"]: entry for entry in result["evaluations"]}
    last = list(stages.values())[-1]
    ordinary = result["spec"]["stages"][-1].get("prune_ratio") == 0
    tokens = {name: sum(stage["tokens"][name] for stage in stages.values()) for name in last["tokens"]}
    samples = sum(stage["samples"] for stage in stages.values())
    full = entries["full"]["accuracy"] if "full" in entries else None
    base = baseline and next(one["accuracy"] for one in baseline["evaluations"] if one["inference"] == "full")
    ways = ("full", "pruned", "pruned_isolator", "skip")
    flops = {name: entry["prefill_flops"] / 1e9 for name, entry in entries.items() if "prefill_flops" in entry}
    return {
        **{f"accuracy_{name}": entries[name]["accuracy"] if name in entries else None for name in ways},
        "accuracy_by_kind": {name: entry["accuracy_by_kind"] for name, entry in entries.items()},
        "share_of_all_tokens": full / base if base and full is not None else None,
        "train_loss": next((log["loss"] for log in reversed(last["log_history"]) if "loss" in log), None),
        "train_seconds": train_seconds(result),
        "train_cpu_seconds": train_cpu_seconds(result),
        **{f"flops_{name}": value for name, value in flops.items()},
        "speedup": train_seconds(baseline) / train_seconds(result) if baseline else None,
        # Within the run: the time of a slow step, minus its teacher, over that of the mean step of stage two.
        "speedup_steps": None if ordinary else last["step_speedup"],
        # A forward and backward pass over a token costs three times the teacher's forward pass over it.
        "speedup_tokens": 3 * tokens["full"] / (3 * tokens["trained"] + tokens.get("teacher", 0.0)),
        "mean_sequence_length": tokens["trained"] / samples,
        "mean_sequence_length_full": tokens["full"] / samples,
    }


def train_seconds(result: Mapping[str, Any]) -> float:
    """Seconds of training of all stages, including those that another run trained and shares."""
    return sum(stage["seconds"] for stage in result["stages"].values())


def train_cpu_seconds(result: Mapping[str, Any]) -> float | None:
    """CPU time of the training process for all stages, excluding time spent waiting for a CPU. None if unknown."""
    seconds = [stage.get("cpu_seconds") for stage in result["stages"].values()]
    return None if None in seconds else sum(seconds)


def trade_off(groups: Mapping[str, Sequence[Mapping[str, Any]]], seconds_of: Any = train_seconds) -> list[dict]:
    """One point per group of results and way to run its models, in the form that `plot_trade_off` takes."""
    points = []
    for name, results in groups.items():
        ways: dict[str, list[dict[str, Any]]] = {}
        for entry in (entry for one in results for entry in one["evaluations"]):
            ways.setdefault(entry["inference"], []).append(entry)
        for inference, entries in ways.items():
            reached = mean_and_range([entry["accuracy"] for entry in entries])
            flops = [entry.get("prefill_flops") or 0.0 for entry in entries]
            points.append(
                {
                    "training": name,
                    "inference": inference,
                    "accuracy": reached["mean"],
                    "accuracy_low": reached["min"],
                    "accuracy_high": reached["max"],
                    "seconds": mean(map(seconds_of, results)),
                    "tokens": mean(entry["mean_prompt_length"] for entry in entries),
                    "flops": mean(flops) if all(flops) else None,
                }
            )
    return points


def summarise(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[dict[str, Any]]:
    """One entry per combination of `keys`, in order of first occurrence: the keys, `seeds`, and the spread of every
    number, with "seeds" if fewer have it, as a share whose all-token run is missing.
    """
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    entries = []
    for values, members in groups.items():
        entry = {**dict(zip(keys, values, strict=True)), "seeds": len(members)}
        for name in {name: None for row in members for name in row if name not in (*keys, "seed")}:
            found = [row.get(name) for row in members]
            numbers = [one for one in found if is_number(one)]
            if numbers:
                fewer = {"seeds": len(numbers)} if len(numbers) < len(members) else {}
                entry[name] = {**mean_and_range(numbers), **fewer}
        entries.append(entry)
    return entries


def mean_and_range(numbers: Sequence[float]) -> dict[str, float]:
    """The spread of at least one number: "mean", "min" and "max"."""
    return {"mean": mean(numbers), "min": min(numbers), "max": max(numbers)}


def percent(value: Spread | None) -> str:
    """A spread of fractions as text in percent."""
    return spread(value, None)


def _cell(value: Spread | None, form: str | None) -> str:
    """As `spread`, with the number of seeds if it is not that of the row."""
    return spread(value, form) + (f", n = {value['seeds']}" if value and "seeds" in value else "")


def spread(value: Spread | None, form: str | None) -> str:
    """The mean, followed by minimum and maximum if they differ as text; fractions in percent without a format."""
    if value is None:
        return "-"
    scale, form = (1, form) if form else (100, "{:.1f} %")
    low, high = ((form.partition("}")[0] + "}").format(scale * value[name]) for name in ("min", "max"))
    text = form.format(scale * value["mean"])
    return text if low == high else f"{text} ({low}-{high})"
