"""`saccade sweep`: many runs, several at a time, and one table; over a recipe's fields, or a study of the paper."""

import argparse

PASS_UNKNOWN = True
EXAMPLES = """
saccade sweep tiny-digits/sft --pretrain tiny-digits/pretrain --grid prune_ratio=0.8,0.9 --seeds 3
saccade sweep my.yaml --grid reducer=divprune,random --grid learning_rate=1e-4,2e-4 --jobs 2 --output out/rates
saccade sweep --output out/rates --table                     what is done so far
saccade sweep --study reducers --jobs 2 --output out/studies which reducer, three seeds, hours
saccade sweep --study reducers --only prune_ratio=0.9 --only seed=0 --output out/studies
saccade sweep --output out/studies --write-docs docs         the page of all studies in a folder
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
        help="values of a field, every combination is run; pretrain.FIELD and sft.FIELD name one stage",
    )
    parser.add_argument(
        "--pretrain", metavar="RECIPE", help="recipe that is run before (default: the one that the recipe names)"
    )
    parser.add_argument(
        "--study",
        metavar="NAME",
        help="a study: reducers, prune_ratio, slow_probability, isolator_length, stage, parts, inference, "
        "changing_r, speeds, trade_off, over_time",
    )
    parser.add_argument("--seeds", type=int, metavar="N", help="seeds 0 to N-1 (default: the recipe's; 3 for a study)")
    parser.add_argument("--steps", type=int, metavar="N", help="of a study: steps of fine-tuning, for a short look")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="LABEL=A,B",
        help="make these runs of the plan only, such as seed=0 or reducer=random,divprune",
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads a run (default: %(default)s)")
    parser.add_argument("--scenes", type=int, default=1000, metavar="N", help="digit scenes to evaluate on")
    parser.add_argument("--split", default="test", help="split of those scenes (default: %(default)s)")
    parser.add_argument(
        "--any-commit", action="store_true", help="take runs of other commits and versions as they are"
    )
    parser.add_argument("--output", default="out/sweep", metavar="DIR", help="where to write (default: %(default)s)")
    parser.add_argument("--table", action="store_true", help="run nothing, show what is done so far")
    parser.add_argument("--write-docs", metavar="DIR", help="write results.md and pictures of the studies in --output")


def run(args: argparse.Namespace) -> int:
    import sys
    from dataclasses import replace
    from pathlib import Path

    from rich.console import Console

    from saccade.errors import SaccadeError
    from saccade.sweeps.digits import QUICK
    from saccade.sweeps.docs import write_docs
    from saccade.sweeps.grid import parse_grid
    from saccade.sweeps.plan import Plan, plan_study
    from saccade.sweeps.sweep import run_sweep
    from saccade.sweeps.table import Standing

    output = Path(args.output)
    folder = output / args.study if args.study else output
    console = Console()
    if args.recipe and args.study:
        raise SaccadeError(f"recipe={args.recipe!r} and --study {args.study}: give one of them")
    if args.recipe and args.write_docs:
        raise SaccadeError(
            f"--write-docs {args.write_docs}: the page is of studies, a sweep over a recipe has table.md"
        )
    for name in ("seeds", "steps", "jobs", "threads", "scenes"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise SaccadeError(f"{name}={value}: give at least 1")
    if args.table:
        standing = Standing(Plan.read(folder), folder)
        standing.write()
        standing.show(console)
        return 0
    if args.write_docs and not (args.study or args.recipe):
        print(f"written to {write_docs(output, Path(args.write_docs))}")
        return 0
    if args.study:
        if args.grid or args.pretrain or args.overrides:
            raise SaccadeError(f"--study {args.study} has its own recipes: leave out --grid, --pretrain and fields")
        settings = QUICK if args.steps is None else QUICK.shrink(args.steps)
        settings = replace(settings, test_scenes=args.scenes, split=args.split, threads=args.threads)
        plan = plan_study(args.study, settings, args.seeds or 3)
    elif args.recipe:
        plan = plan_recipe(args)
    else:
        raise SaccadeError("nothing to run: give a recipe, or --study NAME, or --table for what is done so far")
    only = parse_grid(args.only, "--only")
    outcome = run_sweep(plan, folder, output / "stages", only, args.jobs, args.any_commit, console)
    console.print(f"Written to {folder}: sweep.json, table.json, table.md, runs; models in {output / 'stages'}")
    if args.write_docs:
        print(f"written to {write_docs(output, Path(args.write_docs))}")
    for failure in outcome.failures.values():
        print(f"saccade: {failure}", file=sys.stderr)
    if outcome.failures:
        print(f"saccade: {len(outcome.failures)} runs failed; the same command tries them again", file=sys.stderr)
    return 1 if outcome.failures else 0


def plan_recipe(args: argparse.Namespace):
    """The plan of a grid over a recipe, and over the one that comes before it if there is one."""
    from saccade.errors import SaccadeError
    from saccade.sweeps.grid import parse_grid, place, plan_grid
    from saccade.sweeps.plan import make_plan
    from saccade.training.recipe import parse_overrides, read_recipe

    if args.steps is not None:
        raise SaccadeError(f"steps={args.steps} is for studies: a recipe takes --max_steps and --pretrain.max_steps")
    recipe = read_recipe(args.recipe)
    before = args.pretrain or recipe.get("pretrain")
    recipe.pop("pretrain", None)
    stages = {"sft": recipe}
    if before:
        recipe.pop("model", None)
        stages = {"pretrain": read_recipe(before), **stages}
    place(stages, parse_overrides(args.overrides))
    grid = parse_grid(args.grid)
    runs = plan_grid(stages["sft"], stages.get("pretrain"), grid, args.seeds, args.scenes, args.split, args.threads)
    return make_plan(args.recipe, runs)
