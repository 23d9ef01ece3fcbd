"""`saccade train`: one recipe, one command, one or many processes."""

import argparse
import os
import subprocess
import sys

PASS_UNKNOWN = True
EXAMPLES = """
saccade train tiny-digits/pretrain                      a shipped recipe, on the embedded model and scenes
saccade train tiny-digits/sft --prune_ratio 0.8         any field can be overridden
saccade train my.yaml --resume auto                     goes on from the newest whole checkpoint
saccade train my.yaml --dataset data.jsonl --lora true  your own rows: {"messages": [...], "images": [...]}
saccade train my.yaml --launch fsdp2 --processes 8      sharded over eight GPUs
saccade train my.yaml --launch zero2 --processes 16 --machines 2 --machine-rank 0 --main-address 10.0.0.1:29500
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="YAML file, or the name of a shipped recipe such as tiny-digits/sft")
    parser.add_argument(
        "--launch", default=None, metavar="NAME", help="ddp, fsdp2, zero2, zero3, or the path of an accelerate config"
    )
    parser.add_argument(
        "--processes", type=int, default=None, help="processes on all machines (default: the config's, or one a GPU)"
    )
    parser.add_argument("--machines", type=int, default=None, help="number of machines (default: 1)")
    parser.add_argument("--machine-rank", type=int, default=None, help="number of this machine, from 0 (default: 0)")
    parser.add_argument("--main-address", default=None, metavar="HOST:PORT", help="where machine 0 listens")
    parser.add_argument("--check", action="store_true", help="read the recipe, report the first mistake, and stop")
    parser.epilog = f"Any field of the recipe can be given as --field value.\n\n{parser.epilog}"


def run(args: argparse.Namespace) -> int:
    if args.launch is not None:
        return _launch(args)
    _check_alone(args)
    from saccade.training import LOG_FILE, load_recipe, train_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    if args.check:
        return 0
    trainer = train_recipe(recipe)
    if recipe.trainer.should_save and trainer.watch.stopped:
        checkpoint = f"{recipe.trainer.output_dir}/checkpoint-{trainer.state.global_step}"
        print(f"stopped by SIGTERM, saved {checkpoint}; --resume auto goes on from it")
    elif recipe.trainer.should_save:
        isolator = "" if trainer.isolator is None else "isolator, "
        print(f"saved {recipe.trainer.output_dir} (model, processor, {isolator}{LOG_FILE})")
    # A rank that leaves while another still saves can abort the run after its end.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    return 0


def _launch(args: argparse.Namespace) -> int:
    from saccade.errors import SaccadeError
    from saccade.launch import make_plan, run_processes

    if "LOCAL_RANK" in os.environ:
        raise SaccadeError(
            f"launch={args.launch!r} inside a process of another launcher: leave --launch out, or start it plainly"
        )
    plan = make_plan(args.launch, args.processes, args.machines or 1, args.machine_rank or 0, args.main_address)
    command = [sys.executable, "-m", "saccade.cli.main", "train", args.recipe]
    # Once, so that a mistake is one line and not one a process; not here, since the options look at the GPU and would
    # hold memory of it from then on.
    status = subprocess.run([*command, "--check", *args.overrides]).returncode
    return status or run_processes(plan, [*command, *args.overrides])


def _check_alone(args: argparse.Namespace) -> None:
    from saccade.errors import SaccadeError

    for name in ("processes", "machines", "machine_rank", "main_address"):
        value = getattr(args, name)
        if value is not None:
            raise SaccadeError(f"{name}={value!r} without --launch: add --launch ddp, fsdp2, zero2 or zero3")
