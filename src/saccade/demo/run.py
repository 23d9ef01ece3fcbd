"""The demo: a small LLaVA trained on handwritten digits with all tokens, with pruning only, and with DualSpeed."""

import shlex
from pathlib import Path

from rich.console import Console

from saccade.data import digit_scenes
from saccade.evaluation.digits import collate_prompts
from saccade.families import get_family
from saccade.reducers import PruningConfig, reduce
from saccade.report.environment import available_cores
from saccade.report.kept_tokens import draw_kept_tokens
from saccade.report.plots import plot_curves, plot_trade_off
from saccade.report.training_log import losses
from saccade.report.view import panel, shown_row
from saccade.sweeps import METHODS, DigitSettings, RunSpec, digit_run
from saccade.sweeps.plan import make_plan
from saccade.sweeps.runner import run_sweep
from saccade.sweeps.table import Standing, percent, trade_off
from saccade.training import ModelOptions, load_model
from saccade.values import check_counts

SHORT = DigitSettings(pretrain_steps=60, sft_steps=240, batch_size=16, test_scenes=500)
FULL = DigitSettings(pretrain_steps=100, sft_steps=800, test_scenes=2000)
MAIN_METHODS = ("all_tokens", "prune_only", "dualspeed")


def plan_runs(settings: DigitSettings, seeds: int, full: bool) -> list[RunSpec]:
    """The runs of a demo, seed by seed, so that an interrupted one contains complete comparisons.

    Args:
        settings: what all runs share.
        seeds: number of seeds.
        full: also `slow_steps` and `slow_steps_isolator`, the steps of the paper's Table 3, and original positions.
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
        output: the demo's folder.
        full: three seeds by default, and the parts of the method added one by one.
        seeds: number of seeds; by default 1, or 3 with `full`.
        settings: the shared settings; by default those of the short or the full demo.
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
        f"`saccade report {shlex.quote(str(output))}` makes a page of it",
        highlight=False,
    )
    console.print(f"\n{conclusion(standing)}", highlight=False)
    return standing


def conclusion(standing: Standing) -> str:
    """What a demo whose runs are all done has found, in one sentence."""
    entries = {one["method"]: one for one in standing.ranked() if one["positions"] == "compact"}
    every, only, dualspeed = (entries[method] for method in MAIN_METHODS)
    reached, time = [percent(entry["accuracy_full"]) for entry in (dualspeed, every, only)], dualspeed["speedup"]
    # There is no share of nothing.
    early = "share_of_all_tokens" in dualspeed and dualspeed["share_of_all_tokens"]["mean"] > 1
    return (
        f"Answering from all tokens, DualSpeed reaches {reached[0]} after {100 / time['mean']:.0f} % of the time in "
        f"which training on all tokens reaches {reached[1]}; pruning only reaches {reached[2]}."
        + (" All-token training has not converged in so few steps." if early else "")
    )


def draw_scene(model_folder: Path, settings: DigitSettings, path: Path) -> None:
    """Draw a test scene with the tokens that the reducer and two plain ones keep."""
    model, processor = load_model(ModelOptions(model=str(model_folder)))
    scenes = digit_scenes("sft", "test", 200, kinds=["read"])
    row = scenes[max(range(len(scenes)), key=lambda index: scenes[index]["num_digits"])]
    context = get_family(model).encode(collate_prompts(processor, [row])).context
    shown, panels = shown_row(model, processor, context), []
    for name in (settings.reducer, "uniform", "random"):
        panels.append(panel(name, reduce(context, PruningConfig(name, prune_ratio=settings.prune_ratio)), shown))
    caption = "A test scene, and the tokens that each reducer keeps with the model that DualSpeed trained."
    draw_kept_tokens(row["images"][0], panels, shown.grid, path, caption=caption)
