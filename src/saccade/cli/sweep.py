"""`saccade sweep`: a grid over a recipe's fields and seeds, several runs at a time, and one table."""

import argparse
import re

from saccade.cli.early import check_values
from saccade.files import check_exists
from saccade.values import SPLITS, STAGES, check_choice, check_counts

OUTPUT_IS_FOLDER = True
PASS_UNKNOWN = True
EXAMPLES = """
saccade sweep tiny-digits/sft --pretrain tiny-digits/pretrain --grid prune_ratio=0.8,0.9 --seeds 3
saccade sweep my.yaml --grid reducer=divprune,random --grid learning_rate=1e-4,2e-4 --jobs 2 --output out/rates
saccade sweep --output out/rates --table                     what is done so far
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe", nargs="?", help="YAML file, or the name of a shipped recipe; fields are overridden by --field value"
    )
    parser.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="FIELD=A,B,C",
        help="values of a field; every combination is run; pretrain.FIELD and sft.FIELD apply to one stage",
    )
    parser.add_argument(
        "--pretrain", metavar="RECIPE", help="recipe to run first (default: the one that the recipe names)"
    )
    parser.add_argument("--seeds", type=int, metavar="N", help="seeds 0 to N-1 (default: the recipe's)")
    add_run_arguments(parser)
    parser.add_argument("--output", default="out/sweep", metavar="DIR", help="where to write (default: %(default)s)")


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that control how the runs of a plan are made."""
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="LABEL=A,B",
        help="make only these runs of the plan, such as seed=0 or reducer=random,divprune",
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads per run (default: %(default)s)")
    parser.add_argument("--scenes", type=int, default=1000, metavar="N", help="digit scenes to evaluate on")
    parser.add_argument("--split", default="test", help="split of those scenes (default: %(default)s)")
    parser.add_argument("--any-commit", action="store_true", help="accept existing runs of other commits and versions")
    parser.add_argument("--table", action="store_true", help="run nothing, show what is done so far")


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from saccade.errors import SaccadeError
    from saccade.recipes import check_early, parse_grid, parse_overrides, put_over

    # Before the seconds that the imports take.
    check_counts(seeds=args.seeds, jobs=args.jobs, threads=args.threads, scenes=args.scenes)
    check_choice("split", args.split, SPLITS)
    if args.table:
        check_exists(args.output, "output", "give the folder of a sweep")
    elif not args.recipe:
        raise SaccadeError("nothing to run: give a recipe, or --table for what is done so far")
    else:
        grid = parse_grid(args.grid)
        overrides = [_of_any_stage(word) for word in args.overrides]
        check_early(args.recipe, [*overrides, *(f"{_of_any_stage(f'--{name}')}=" for name in grid)], vars(args))
        recipe, given = check_early(args.recipe, []), parse_overrides(args.overrides)
        parts = {name: name.rpartition(".") for name in given}
        for stage in ("", *STAGES):  # a ratio for one stage and a number of tokens for all are no conflict
            mine = {field: given[name] for name, (of, _, field) in parts.items() if of == stage}
            check_values(put_over(recipe, mine))
        for name, values in grid.items():
            for value in values:
                check_values({_of_any_stage(f"--{name}")[2:]: value})
    from rich.console import Console

    from saccade.sweeps.plan import Plan
    from saccade.sweeps.runner import run_sweep
    from saccade.sweeps.table import Standing

    output, console = Path(args.output), Console()
    if args.table:
        Standing(Plan.read(output), output).report(console)
        return 0
    only = parse_grid(args.only, "--only")
    plan = plan_recipe(args)
    outcome = run_sweep(plan, output, None, only, args.jobs, args.any_commit, console)
    Standing(plan, output).report(console)
    console.print(f"Written to {output}: sweep.json, table.json, table.md, runs; models in {output / 'stages'}")
    return outcome.tell_failures()


def _of_any_stage(word: str) -> str:
    """A field's flag without the stage that it is for."""
    return re.sub(r"^--(pretrain|sft)\.", "--", word)


def plan_recipe(args: argparse.Namespace):
    """The plan of a grid over a recipe, and over the recipe before it if there is one."""
    from saccade.recipes import parse_grid, parse_overrides, read_recipe
    from saccade.sweeps.plan import make_plan, plan_grid

    recipe = read_recipe(args.recipe)
    before = args.pretrain or recipe.get("pretrain")
    recipe.pop("pretrain", None)
    if before:
        recipe.pop("model", None)
    runs = plan_grid(
        recipe,
        read_recipe(before) if before else None,
        parse_grid(args.grid),
        args.seeds,
        args.scenes,
        args.split,
        args.threads,
        parse_overrides(args.overrides),
    )
    return make_plan(args.recipe, runs)
