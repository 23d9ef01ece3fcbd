"""`saccade train`: one recipe, one command, one or many processes."""

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saccade.cli.early import check_dataset, check_model, check_values, stage_to_come

if TYPE_CHECKING:
    from saccade.training import Recipe

PASS_UNKNOWN = True
EXAMPLES = """
saccade train tiny-digits/pretrain                      a shipped recipe, on the embedded model and scenes
saccade train tiny-digits/sft --prune_ratio 0.8         any field can be overridden
saccade train my.yaml --resume auto                     resumes from the newest whole checkpoint
saccade train my.yaml --overwrite                       starts again, removing what an earlier run left in output_dir
saccade train my.yaml --dataset data.jsonl --lora true  your own rows: {"messages": [...], "images": [...]}
saccade train my.yaml --launch fsdp2 --processes 8      sharded over eight GPUs
saccade train llava-1.5-7b/sft_lora --dry-run           what it would take; nothing is downloaded or trained
"""

PLAN_FLAGS = ("text_tokens", "label_rows", "images", "devices", "shards")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="YAML file, or the name of a shipped recipe such as tiny-digits/sft")
    parser.add_argument(
        "--launch", default=None, metavar="NAME", help="ddp, fsdp2, zero2, zero3, or the path of an accelerate config"
    )
    parser.add_argument(
        "--processes", type=int, default=None, help="how many processes (default: the config's, or one per GPU)"
    )
    parser.add_argument(
        "--overwrite",
        nargs="?",
        const="true",
        choices=("true", "false"),
        help="remove what an earlier run left in output_dir, and start again",
    )
    parser.add_argument(
        "--check",
        action="store_const",
        const="recipe",
        help="read the recipe, report the first mistake, and stop; on any machine",
    )
    # For the launcher: also whether the recipe runs on this machine.
    parser.add_argument("--check-here", dest="check", action="store_const", const="here", help=argparse.SUPPRESS)
    parser.add_argument(
        "--dry-run", action="store_true", help="count weights, tokens, operations and memory, then stop"
    )
    parser.add_argument("--output", metavar="FILE", help="with --dry-run: also write JSON to FILE")
    parser.add_argument(
        "--text-tokens",
        type=int,
        metavar="N",
        help="with --dry-run: text tokens of a sample (default: those of the recipe's rows, or of a shipped table of "
        "captions or instructions)",
    )
    parser.add_argument(
        "--label-rows",
        type=int,
        metavar="N",
        help="with --text-tokens: how many of these have labels (default: half)",
    )
    parser.add_argument("--images", type=int, metavar="N", help="with --text-tokens: images of a sample (default: 1)")
    parser.add_argument("--devices", type=int, metavar="N", help="with --dry-run: number of GPUs (default: 8)")
    parser.add_argument(
        "--shards",
        type=int,
        metavar="N",
        help="with --dry-run: GPUs that share weights, gradients and optimizer states, as FSDP and ZeRO-3 do "
        "(default: 1)",
    )
    parser.epilog = f"Any field of the recipe can be given as --field value.\n\n{parser.epilog}"


def run(args: argparse.Namespace) -> int:
    from saccade.errors import SaccadeError
    from saccade.recipes import check_early

    if args.overwrite is not None:
        args.overrides += ["--overwrite", args.overwrite]
    values = check_early(args.recipe, args.overrides, vars(args))
    check_values(values)
    if args.dry_run:
        return _dry_run(args)
    for name in ("output", *PLAN_FLAGS):
        if getattr(args, name) is not None:
            raise SaccadeError(f"--{name.replace('_', '-')} goes with --dry-run: leave it out, or add --dry-run")
    to_come = stage_to_come(args.recipe, values.get("model"))
    if to_come is None:
        check_model(values.get("model"))
    elif args.check:
        # The recipes of a job that trains one after the other may all be checked before it starts.
        print(f"saccade: note: {to_come}", file=sys.stderr)
    else:
        raise SaccadeError(to_come)
    check_dataset(values.get("dataset"))
    if args.launch is not None:
        return _launch(args)
    if args.processes is not None:
        raise SaccadeError(f"processes={args.processes!r} without --launch: add --launch ddp, fsdp2, zero2 or zero3")
    from saccade.dualspeed.config import NoGPUError
    from saccade.training import LOG_FILE, load_recipe, train_recipe
    from saccade.training.run import check_recipe, find_resume

    try:
        recipe = load_recipe(args.recipe, args.overrides)
    except NoGPUError as error:
        if args.check != "recipe":
            raise
        print(f"saccade: note: {error}", file=sys.stderr)
        recipe = load_recipe(args.recipe, [*args.overrides, "--use_cpu", "true"])
    if args.check:
        check_recipe(recipe)
        find_resume(recipe)
        return 0
    trainer = train_recipe(recipe)
    if recipe.trainer.should_save and trainer.sigterm.stopped:
        checkpoint = f"{recipe.trainer.output_dir}/checkpoint-{trainer.state.global_step}"
        print(f"stopped by SIGTERM, saved {checkpoint}; --resume auto continues from it")
    elif recipe.trainer.should_save:
        isolator = "" if trainer.isolator is None else "isolator, "
        print(f"saved {recipe.trainer.output_dir} (model, processor, {isolator}{LOG_FILE})")
        print(_next(recipe, logged=any("loss" in entry for entry in trainer.state.log_history)))
    # If a rank exits while another is still saving, the run may be aborted.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    return 0


def _next(recipe: "Recipe", logged: bool) -> str:
    """What to do with a trained model; a run that has `logged` no loss has no page."""
    from saccade.report.lines import room

    folder, exported = (shlex.quote(f"{recipe.trainer.output_dir}{end}") for end in ("", "-export"))
    merged = ", adapters merged" if recipe.options.lora else ""
    steps = {f"saccade report {folder}": "one page: losses, speed, what is kept"} if logged else {}
    # The embedded scenes are the only data that the library has a test split of.
    if recipe.options.dataset == "digits":
        steps[f"saccade eval {folder}"] = "accuracy on all visual tokens and on a few"
    steps[f"saccade export {folder} --output {exported}"] = f"a plain checkpoint{merged}, for `saccade serve`"
    width, columns = max(map(len, steps)), room()
    below = columns is not None and max(2 + width + 2 + len(what) for what in steps.values()) > columns
    ends = [f"{command}\n      {what}" if below else f"{command:<{width}}  {what}" for command, what in steps.items()]
    return "\n".join(["next:", *(f"  {end}" for end in ends)])


def _launch(args: argparse.Namespace) -> int:
    from saccade.errors import SaccadeError
    from saccade.launch import make_plan, run_processes

    if "LOCAL_RANK" in os.environ:
        raise SaccadeError(
            f"launch={args.launch!r} inside a process of another launcher: leave out --launch, or that launcher"
        )
    # A check starts none of them, and may run where there is no GPU to count.
    plan = make_plan(args.launch, args.processes or (1 if args.check else None))
    command = [sys.executable, "-m", "saccade.cli.main", "train", args.recipe]
    # Check once, so that a mistake is reported in one line rather than one per process. In a subprocess, since parsing
    # the options initialises the GPU and would keep memory allocated.
    check = "--check" if args.check else "--check-here"
    status = subprocess.run([*command, check, *args.overrides]).returncode
    return status if args.check else status or run_processes(plan, [*command, *args.overrides])


def _dry_run(args: argparse.Namespace) -> int:
    from saccade.files import write_json_atomically
    from saccade.training.plan import plan_recipe

    given = {name: getattr(args, name) for name in PLAN_FLAGS if getattr(args, name) is not None}
    plan = plan_recipe(args.recipe, args.overrides, **given)
    _print(plan)
    if args.output:
        write_json_atomically(args.output, plan)
        print(f"written to {args.output}")
    return 0


def _print(plan: dict[str, Any]) -> None:
    from saccade.report.lines import wrapped
    from saccade.report.tables import print_table

    parameters, expected, batch, lengths = (plan[name] for name in ("parameters", "expected", "batch", "lengths"))
    checked = "the answer and its end, checked"
    if not plan["chat_checked"]:
        checked = "not checked, the processor is not available"
    rows = [
        ["model", plan["model"] if plan["model"] == plan["shape"] else f"{plan['model']} ({plan['shape']})"],
        ["parameters", f"{parameters['total']:,}"],
        ["trainable", f"{parameters['trainable']:,}, of these adapters {parameters['adapters']:,}"],
        ["isolator and summary head", f"{parameters['own']:,}"],
        ["visual tokens per image", plan["visual_tokens"]],
        ["visual tokens per image, expected", f"{expected['visual_rows']:.1f}"],
        ["sequence length, expected", f"{expected['length']:.1f} of {plan['baseline']['length']:.1f}"],
        ["speed-up of a step, in operations", f"{expected['speedup']:.2f}x"],
        ["speed-up of the language model", f"{expected['speedup_language']:.2f}x"],
        [
            "global batch",
            f"{batch['global']} = {batch['per_device']} x {batch['accumulation']} steps x {batch['devices']} devices",
        ],
        ["learned in a turn", checked],
    ]
    print_table(f"dry run of {plan['recipe']}", ["", "value"], rows)
    columns = ["mode", "share of steps", "kept", "skipped", "summary", "isolator", "length", "TFLOP per sample"]
    keys = ("name", "probability", "kept", "skipped", "summary", "isolator", "length")
    cut = {mode["name"]: mode["cut"] for mode in plan["modes"] if mode["cut"]}
    modes = [*plan["modes"], {**plan["baseline"], "name": "(all tokens)", "probability": None}]
    print()
    print_table("modes", columns, [[*(mode[key] for key in keys), mode["flops"] / 1e12] for mode in modes])
    print()
    if cut:
        named = ", ".join(f"{share:.1%} in {name}" for name, share in cut.items())
        print(f"samples that keep fewer visual tokens, so that they fit under fit_length: {named}\n")
    stages, published = plan["schedule"]["stages"], plan["published"]
    rows = [
        [Path(one["recipe"]).stem, f"{one['samples']:,.0f}", one["lengths"]["text_tokens"], f"{one['speedup']:.2f}x"]
        for one in stages
    ]
    if len(rows) > 1:
        rows.append(["both stages", "", None, f"{plan['schedule']['speedup']:.2f}x"])
    print_table("schedule", ["stage", "samples", "text tokens per sample", "speed-up, in operations"], rows)
    if published:
        names = {"stage two": "stage two, an estimate from the other two"}
        said = "; ".join(f"{value}x ({names.get(name, name)})" for name, value in published.items())
        print(wrapped(f"published, in seconds on one L40: {said}"))
    print()
    sizes = [[name, f"{value / 2**30:.3f}"] for name, value in plan["memory"].items()]
    print_table("memory, GiB", ["per device, estimated", "GiB"], sizes)
    text, learned, images = (lengths[name] for name in ("text_tokens", "label_rows", "images"))
    print()
    said = (
        f"A sample has {text:.0f} tokens of text, {learned:.0f} of them learned, and {images:.2f} images: "
        f"{lengths['source']}. Operations are counted, without padding, not timed; memory is an estimate for the "
        "longest samples."
    )
    print(wrapped(said))
