"""From the results of the demo's runs to its table, its JSON and its pictures."""

from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console

from saccade.data import digit_scenes
from saccade.demo.plan import MAIN_METHODS, METHODS, RunSpec
from saccade.evaluation.digits import collate_prompts
from saccade.families import get_family
from saccade.files import write_json_atomically, write_text_atomically
from saccade.pruning import reduce
from saccade.reducers import get_reducer
from saccade.report.environment import environment
from saccade.report.kept_tokens import draw_kept_tokens
from saccade.report.plots import plot_accuracy_over_time, plot_loss_by_mode
from saccade.report.tables import markdown_table, print_table
from saccade.tokens import TokenBudget
from saccade.training import ModelOptions, load_model

LABELS = {
    "all_tokens": "all tokens",
    "prune_only": "pruning only",
    "slow_steps": "+ slow steps",
    "slow_steps_isolator": "+ isolator",
    "dualspeed": "DualSpeed",
}
COLUMNS = (
    "training",
    "positions",
    "accuracy, all tokens",
    "share of all-token",
    "accuracy, pruned",
    "pruned + isolator",
    "training time",
    "speed-up",
    "of steps",
    "tokens allow",
    "mean length",
)


def write_report(results: list[dict[str, Any]], output: Path, command: str, jobs: int) -> dict[str, Any]:
    """Collect the runs into `report.json`, and return what it holds."""
    baselines = {result["spec"]["seed"]: result for result in results if result["spec"]["method"] == "all_tokens"}
    rows = [_row(result, baselines[result["spec"]["seed"]]) for result in results]
    report = {
        "runs": [row for row in rows if row["method"] in MAIN_METHODS],
        "ablation": [row for row in rows if row["method"] not in MAIN_METHODS],
        "summary": _summarise(rows),
        "settings": results[0]["spec"]["settings"],
        "command": command,
        "jobs": jobs,
        "environment": environment(),
    }
    write_json_atomically(output / "report.json", report)
    return report


def _row(result: dict[str, Any], baseline: dict[str, Any]) -> dict[str, Any]:
    spec, evaluations = result["spec"], result["evaluations"]
    accuracy = evaluations["full"]["accuracy"]
    seconds = _seconds(result)
    tokens: dict[str, float] = {}
    for stage in result["stages"].values():
        for name, value in stage["tokens"].items():
            tokens[name] = tokens.get(name, 0.0) + value
    samples = sum(spec["settings"][f"{stage}_steps"] * spec["settings"]["batch_size"] for stage in ("pretrain", "sft"))
    isolator = evaluations.get("pruned_isolator")
    return {
        "method": spec["method"],
        "label": LABELS[spec["method"]],
        "positions": spec["positions"],
        "seed": spec["seed"],
        "accuracy_full": accuracy,
        "accuracy_pruned": evaluations["pruned"]["accuracy"],
        "accuracy_pruned_isolator": isolator["accuracy"] if isolator else None,
        "accuracy_by_kind": {name: entry["accuracy_by_kind"] for name, entry in evaluations.items()},
        "share_of_all_tokens": accuracy / baseline["evaluations"]["full"]["accuracy"]
        if baseline["evaluations"]["full"]["accuracy"]
        else None,
        "train_seconds": seconds,
        "speedup": _seconds(baseline) / seconds,
        # Within the run: a slow step less its teacher, over the mean step of stage two.
        "speedup_steps": result["stages"]["sft"]["step_speedup"] if spec["method"] != "all_tokens" else None,
        # A forward and backward pass over a token costs three times the teacher's forward pass over it.
        "speedup_tokens": 3 * tokens["full"] / (3 * tokens["trained"] + tokens.get("teacher", 0.0)),
        "mean_sequence_length": tokens["trained"] / samples,
        "mean_sequence_length_full": tokens["full"] / samples,
    }


def _seconds(result: dict[str, Any]) -> float:
    return sum(stage["seconds"] for stage in result["stages"].values())


def _summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean, least and greatest over seeds of every number, one entry for each method and position mode."""
    summary = []
    for method in METHODS:
        for positions in ("compact", "original"):
            group = [row for row in rows if (row["method"], row["positions"]) == (method, positions)]
            if not group:
                continue
            entry: dict[str, Any] = {"method": method, "positions": positions, "seeds": len(group)}
            for name in group[0]:
                values = [row[name] for row in group if isinstance(row[name], (int, float))]
                if values and name != "seed":
                    entry[name] = {"mean": mean(values), "min": min(values), "max": max(values)}
            summary.append(entry)
    return summary


def table_rows(report: dict[str, Any]) -> list[list[str]]:
    """The report's summary as the cells of `COLUMNS`."""
    rows = []
    for entry in report["summary"]:
        baseline = entry["method"] == "all_tokens"
        rows.append(
            [
                LABELS[entry["method"]],
                "-" if baseline else entry["positions"],
                _percent(entry["accuracy_full"]),
                _percent(entry.get("share_of_all_tokens")),
                _percent(entry["accuracy_pruned"]),
                _percent(entry.get("accuracy_pruned_isolator")),
                _spread(entry["train_seconds"], "{:.0f} s"),
                _spread(entry["speedup"], "{:.2f}x"),
                "-" if baseline else _spread(entry.get("speedup_steps"), "{:.2f}x"),
                f"{entry['speedup_tokens']['mean']:.2f}x",
                f"{entry['mean_sequence_length']['mean']:.0f}",
            ]
        )
    return rows


def _percent(value: dict[str, float] | None) -> str:
    return _spread(value and {name: 100 * share for name, share in value.items()}, "{:.1f} %")


def _spread(value: dict[str, float] | None, form: str) -> str:
    """The mean, and the least and the greatest behind it where they differ."""
    if value is None:
        return "-"
    text = form.format(value["mean"])
    if value["min"] == value["max"]:
        return text
    number = form.partition("}")[0] + "}"
    return f"{text} ({number.format(value['min'])}-{number.format(value['max'])})"


def markdown(report: dict[str, Any]) -> str:
    """The table as Markdown, for README and docs."""
    return markdown_table(COLUMNS, table_rows(report))


def show(report: dict[str, Any], console: Console) -> None:
    """Print the table."""
    seeds = max(entry["seeds"] for entry in report["summary"])
    scenes = report["settings"]["test_scenes"]
    title = f"Digit scenes, {scenes} test scenes, {seeds} seed(s)"
    print_table(title, COLUMNS, table_rows(report), file=console.file)


def write_pictures(report: dict[str, Any], results: list[dict[str, Any]], output: Path) -> None:
    """Write the table as Markdown; draw accuracy over time, the loss by mode, and a scene with its kept tokens."""
    write_text_atomically(output / "table.md", markdown(report))
    drawn = [{**row, "speedup": None} if row["method"] == "all_tokens" else row for row in report["runs"]]
    plot_accuracy_over_time(drawn + report["ablation"], output / "accuracy_over_time.png")
    chosen = next(result for result in results if result["spec"]["method"] == "dualspeed")
    plot_loss_by_mode(chosen["stages"]["sft"]["log_history"], output / "loss.png")
    spec = RunSpec.from_json(chosen["spec"])
    draw_scene(output / "runs" / spec.name / "sft", spec, output / "kept_tokens.png")


def draw_scene(model_folder: Path, spec: RunSpec, path: Path) -> None:
    """Draw a test scene with the tokens that the reducer and two plain ones keep."""
    model, processor = load_model(ModelOptions(model=str(model_folder)))
    scenes = digit_scenes("sft", "test", 200, kinds=["read"])
    row = scenes[max(range(len(scenes)), key=lambda index: scenes[index]["num_digits"])]
    family = get_family(model)
    context = family.encode(collate_prompts(processor, [row])).context
    panels = []
    for name in (spec.settings.reducer, "uniform", "random"):
        reduction = reduce(context, get_reducer(name), TokenBudget(spec.settings.prune_ratio))
        panels.append((name, reduction.index[0], None))
    _, rows, columns = context.grid[0].tolist()
    draw_kept_tokens(row["images"][0], panels, (rows, columns), path)
