"""Turn the results of the demo's runs into its table, its JSON and its pictures."""

from pathlib import Path
from typing import Any

from rich.console import Console

from saccade.data import digit_scenes
from saccade.demo.plan import MAIN_METHODS
from saccade.evaluation.digits import collate_prompts
from saccade.families import get_family
from saccade.files import write_json_atomically, write_text_atomically
from saccade.reducers import PruningConfig, reduce
from saccade.report.environment import environment
from saccade.report.kept_tokens import draw_kept_tokens
from saccade.report.plots import plot_accuracy_over_time, plot_loss_by_mode
from saccade.report.tables import markdown_table, print_table
from saccade.sweeps import LABELS, METHODS
from saccade.sweeps.figures import percent, run_figures, spread, summarise
from saccade.training import ModelOptions, load_model

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


def write_report(
    results: list[dict[str, Any]], output: Path, settings: dict[str, Any], command: str, jobs: int
) -> dict[str, Any]:
    """Collect the runs into `report.json`, and return its content."""
    labels = [result["spec"]["labels"] for result in results]
    baselines = {
        label["seed"]: result for label, result in zip(labels, results, strict=True) if label["method"] == "all_tokens"
    }
    rows = [
        {**label, "label": LABELS[label["method"]], **run_figures(result, baselines[label["seed"]])}
        for label, result in zip(labels, results, strict=True)
    ]
    order = list(METHODS)
    summary = summarise(sorted(rows, key=lambda row: order.index(row["method"])), ("method", "positions"))
    report = {
        "runs": [row for row in rows if row["method"] in MAIN_METHODS],
        "ablation": [row for row in rows if row["method"] not in MAIN_METHODS],
        "summary": summary,
        "settings": settings,
        "command": command,
        "jobs": jobs,
        "environment": environment(),
    }
    write_json_atomically(output / "report.json", report)
    return report


def table_rows(report: dict[str, Any]) -> list[list[str]]:
    """The report's summary as the cells of `COLUMNS`."""
    rows = []
    for entry in report["summary"]:
        baseline = entry["method"] == "all_tokens"
        rows.append(
            [
                LABELS[entry["method"]],
                "-" if baseline else entry["positions"],
                percent(entry["accuracy_full"]),
                percent(entry.get("share_of_all_tokens")),
                percent(entry["accuracy_pruned"]),
                percent(entry.get("accuracy_pruned_isolator")),
                spread(entry["train_seconds"], "{:.0f} s"),
                spread(entry["speedup"], "{:.2f}x"),
                "-" if baseline else spread(entry.get("speedup_steps"), "{:.2f}x"),
                f"{entry['speedup_tokens']['mean']:.2f}x",
                f"{entry['mean_sequence_length']['mean']:.0f}",
            ]
        )
    return rows


def finding(report: dict[str, Any]) -> str:
    """What the demo found, in a sentence: DualSpeed and pruning only beside all-token training, as published."""
    entries = {entry["method"]: entry for entry in report["summary"] if entry["positions"] == "compact"}
    found = [
        f"{name} reaches {percent(entry['share_of_all_tokens'])} of the accuracy of all-token training in "
        f"{100 / entry['speedup']['mean']:.0f} % of its training time"
        for name, entry in (("DualSpeed", entries.get("dualspeed")), ("pruning only", entries.get("prune_only")))
        if entry is not None and "share_of_all_tokens" in entry
    ]
    if not found:
        return "All-token training answered nothing right after so few steps: there is nothing to compare with."
    seeds = max(entry["seeds"] for entry in entries.values())
    conditions = f"answering from all tokens, compact positions, {seeds} seed{'s' if seeds > 1 else ''}"
    return f"{', and '.join(found)} ({conditions})."


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
    chosen = next(result for result in results if result["spec"]["labels"]["method"] == "dualspeed")
    plot_loss_by_mode(chosen["stages"]["sft"]["log_history"], output / "loss.png")
    draw_scene(Path(chosen["model"]), report["settings"], output / "kept_tokens.png")


def draw_scene(model_folder: Path, settings: dict[str, Any], path: Path) -> None:
    """Draw a test scene with the tokens that the reducer and two plain ones keep."""
    model, processor = load_model(ModelOptions(model=str(model_folder)))
    scenes = digit_scenes("sft", "test", 200, kinds=["read"])
    row = scenes[max(range(len(scenes)), key=lambda index: scenes[index]["num_digits"])]
    family = get_family(model)
    context = family.encode(collate_prompts(processor, [row])).context
    panels = []
    for name in (settings["reducer"], "uniform", "random"):
        reduction = reduce(context, PruningConfig(name, prune_ratio=settings["prune_ratio"]))
        panels.append((name, reduction.index[0], None))
    _, rows, columns = context.grid[0].tolist()
    caption = "A test scene, and the tokens that each reducer keeps with the model that DualSpeed trained."
    draw_kept_tokens(row["images"][0], panels, (rows, columns), path, caption=caption)
