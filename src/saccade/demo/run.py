"""The demo: a small LLaVA trained on handwritten digits with all tokens, with pruning only, and with DualSpeed."""

from pathlib import Path

from rich.console import Console

from saccade.data import digit_scenes
from saccade.reducers import PruningConfig
from saccade.report.environment import available_cores
from saccade.report.plots import plot_curves, plot_trade_off
from saccade.report.training_log import losses
from saccade.report.view import view_reducers
from saccade.sweeps import METHODS, DigitSettings, RunSpec, digit_run
from saccade.sweeps.plan import make_plan
from saccade.sweeps.runner import run_sweep
from saccade.sweeps.table import Standing, trade_off
from saccade.training import ModelOptions, load_model
from saccade.values import check_counts

SHORT = DigitSettings(pretrain_steps=60, sft_steps=240, batch_size=16, test_scenes=500)
FULL = DigitSettings(pretrain_steps=100, sft_steps=800, test_scenes=2000)
MAIN_METHODS = ("all_tokens", "prune_only", "dualspeed")


def plan_runs(settings: DigitSettings, seeds: int, full: bool) -> list[RunSpec]:
    """The runs of a demo, seed by seed, so that an interrupted one contains complete comparisons.

    `full` adds `slow_steps` and `slow_steps_isolator`, the steps of the paper's Table 3, and original positions.
    """
    variants = [(method, "compact") for method in METHODS if full or method in MAIN_METHODS]
    variants += [(method, "original") for method in ("prune_only", "dualspeed") if full]
    return [
        digit_run(
            f"{method}-{positions}-seed{seed}",
            {"method": method, "positions": positions},
            settings,
            method,
            seed,
            {"positions": positions},
        )
        for seed in range(seeds)
        for method, positions in variants
    ]


def run_demo(
    output: str | Path,
    full: bool = False,
    seeds: int | None = None,
    settings: DigitSettings | None = None,
    jobs: int | None = None,
) -> Standing:
    """Make the missing runs, print the table and what was found, and write both and the pictures into `output`.

    A demo is a sweep: finished runs in `output` are reused, so an interrupted demo continues where it stopped.

    Args:
        full: longer runs, and the parts of the method added one by one.
        seeds: number of seeds; by default 1, or 3 with `full`.
        settings: by default those of the short or the full demo.
        jobs: runs at a time; by default two where there are two cores.

    Raises:
        SaccadeError: on a number of seeds or jobs below 1, a folder with another sweep, or a run that failed.
    """
    output, console = Path(output), Console()
    check_counts(seeds=seeds)
    settings = settings or (FULL if full else SHORT)
    jobs = min(2, available_cores()) if jobs is None else jobs
    title = f"The demo: digit scenes, {settings.test_scenes} test scenes"
    plan = make_plan(title, plan_runs(settings, seeds or (3 if full else 1), full))
    outcome = run_sweep(plan, output, jobs=jobs, console=console)
    standing = Standing(plan, output)
    standing.report(console)
    outcome.raise_failures()
    plot_trade_off(trade_off(standing.groups()), output / "accuracy_over_time.png", title=title)
    chosen = next(one for one in standing.results.values() if one["spec"]["labels"]["method"] == "dualspeed")
    curves = losses(chosen["stages"]["sft"]["log_history"])
    plot_curves(curves, "optimizer step", "training loss", output / "loss.png", chosen["spec"]["name"], smooth=True)
    draw_scene(Path(chosen["model"]), settings, output / "kept_tokens.png")
    console.print(
        f"\nWritten to {output}: table.md, table.json, accuracy_over_time.png, kept_tokens.png, loss.png; "
        f"`saccade report {output}` makes a page of it",
        highlight=False,
    )
    console.print(f"\n{standing.finding()}", highlight=False)
    return standing


def draw_scene(model_folder: Path, settings: DigitSettings, path: Path) -> None:
    """Draw a test scene with the tokens that the reducer and two plain ones keep."""
    model, processor = load_model(ModelOptions(model=str(model_folder)))
    scenes = digit_scenes("sft", "test", 200, kinds=["read"])
    row = scenes[max(range(len(scenes)), key=lambda index: scenes[index]["num_digits"])]
    reducers, pruning = (settings.reducer, "uniform", "random"), PruningConfig(prune_ratio=settings.prune_ratio)
    question = row["messages"][-2]["content"]
    view_reducers(model, processor, row["images"][0], reducers, question, path, pruning, model_folder.name)
