"""The state of a sweep so far: its rows, and its table on the terminal, in Markdown and in JSON."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from saccade.files import write_json_atomically, write_text_atomically
from saccade.report.environment import environment
from saccade.report.tables import markdown_table, print_table
from saccade.sweeps.digits import LABELS
from saccade.sweeps.figures import percent, run_figures, spread, summarise
from saccade.sweeps.plan import Plan
from saccade.sweeps.runner import read_failure, read_result
from saccade.sweeps.spec import RunSpec

FIGURES = {
    "accuracy_full": ("accuracy, all tokens", None),
    "share_of_all_tokens": ("share of all-token", None),
    "accuracy_pruned": ("accuracy, pruned", None),
    "accuracy_pruned_isolator": ("pruned + isolator", None),
    "accuracy_skip": ("accuracy, skipping", None),
    "train_loss": ("last loss", "{:.3f}"),
    "train_seconds": ("training time", "{:.0f} s"),
    "train_cpu_seconds": ("CPU time of training", "{:.0f} s"),
    "flops_full": ("GFLOPs of a prompt, all tokens", "{:.3f}"),
    "flops_pruned": ("pruned", "{:.3f}"),
    "flops_skip": ("skipping", "{:.3f}"),
    "speedup_steps": ("speed-up of steps", "{:.2f}x"),
    "speedup_tokens": ("tokens allow", "{:.2f}x"),
}
"""Headings, and the format of figures that are not fractions."""
EVALUATED = ("prune_ratio", "positions")
"""Labels that distinguish the rows of a run that was evaluated in several ways."""


class Standing:
    """The finished runs of a plan, read from their folders. Runs of any commit count, but only with the same spec.

    Args:
        plan: every run of the sweep.
        output: the sweep's folder.
        words: names of label values.
    """

    def __init__(self, plan: Plan, output: Path, words: Mapping[str, str] = LABELS) -> None:
        self.plan = plan
        self.output = output
        self.words = words
        found = {spec.name: read_result(output, spec) for spec in plan.runs}
        self.results = {name: result for name, result in found.items() if result is not None}
        self.failed = [spec.name for spec in plan.runs if found[spec.name] is None and read_failure(output, spec)]
        self.rows = self._rows()
        labels = {label for spec in plan.runs for label in spec.labels} | set(EVALUATED)
        self.keys = list(dict.fromkeys(name for row in self.rows for name in row if name in labels - {"seed"}))

    def _rows(self) -> list[dict[str, Any]]:
        """One row of labels and figures per run, or per evaluation if a run was evaluated in several ways."""
        done = [spec for spec in self.plan.runs if spec.name in self.results]
        baselines = {spec.labels["seed"]: self.results[spec.name] for spec in done if is_baseline(spec)}
        rows = []
        for spec in done:
            result = self.results[spec.name]
            names = [entry["inference"] for entry in result["evaluations"]]
            if len(names) == len(set(names)):
                figures = run_figures(result, baselines.get(spec.labels["seed"]))
                rows.append({**spec.labels, **figures, "is_baseline": is_baseline(spec)})
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

    def baseline(self, figure: str = "accuracy_full") -> Mapping[str, float] | None:
        """The spread of a figure for training and inference on all tokens; None until such a run is done."""
        entries = summarise([row for row in self.rows if row.get("is_baseline")], ())
        return entries[0].get(figure) if entries else None

    def summary(self, where: Sequence[tuple[str, Any]] = ()) -> list[dict[str, Any]]:
        """An entry per combination of labels over its seeds, sorted by amounts.

        Args:
            where: labels and values that a run must have.
        """
        rows = [row for row in self.rows if all(row.get(name) == value for name, value in where)]
        ranks = {key: list(dict.fromkeys(row.get(key) for row in rows)) for key in self.keys}

        def order(entry: Mapping[str, Any]) -> tuple:
            values = [entry[key] for key in self.keys]
            return tuple(
                (1, value) if isinstance(value, (int, float)) else (0, ranks[key].index(value))
                for key, value in zip(self.keys, values, strict=True)
            )

        return sorted(summarise(rows, self.keys), key=order)

    def table(self, where: Sequence[tuple[str, Any]] = ()) -> tuple[list[str], list[list[Any]]]:
        """Columns and cells of `summary`, without columns that are empty or fixed by `where`."""
        entries = self.summary(where)
        fixed = dict(where)
        keys = [key for key in self.keys if key not in fixed and any(entry[key] is not None for entry in entries)]
        shown = [name for name in FIGURES if any(name in entry for entry in entries)]
        if "accuracy_full" in shown or "accuracy_pruned" in shown:
            shown = [name for name in shown if name != "train_loss"]
        columns = [*(key.replace("_", " ") for key in keys), "seeds", *(FIGURES[name][0] for name in shown)]
        cells = [
            [
                *(self.word(entry[key]) for key in keys),
                entry["seeds"],
                *(_cell(name, entry.get(name)) for name in shown),
            ]
            for entry in entries
        ]
        return columns, cells

    def word(self, value: Any) -> str | None:
        """A label's value as shown in tables and pictures."""
        return self.words.get(value, value) if isinstance(value, str | None) else str(value)

    def show(self, console: Console) -> None:
        """Print the table."""
        columns, cells = self.table()
        title = f"{self.plan.title}. {self.progress}"
        if cells:
            print_table(title, columns, cells, file=console.file)
        else:
            console.print(title, markup=False, highlight=False)

    def report(self, console: Console) -> None:
        """Write the table and print it."""
        self.write()
        self.show(console)

    def write(self) -> None:
        """Write `table.json`, with every row and every spread, and `table.md`."""
        record = {
            "title": self.plan.title,
            "progress": self.progress,
            "command": self.plan.command,
            "environment": environment(),
            "summary": self.summary(),
            "rows": self.rows,
        }
        write_json_atomically(self.output / "table.json", record)
        columns, cells = self.table()
        write_text_atomically(self.output / "table.md", markdown_table(columns, cells) if cells else "")


def is_baseline(spec: RunSpec) -> bool:
    """Whether a run trains on all tokens in every stage and is evaluated on all of them."""
    ways = [fields["name"] for fields in spec.evaluation.inferences] if spec.evaluation else []
    ordinary = all(
        values.get("prune_ratio", 0.9) == 0 and values.get("skip_vision") is None and not values.get("modes")
        for values in spec.stages
    )
    return "full" in ways and ordinary


def _cell(name: str, value: Mapping[str, float] | None) -> str | None:
    form = FIGURES[name][1]
    return None if value is None else spread(value, form) if form else percent(value)
