"""`saccade train`: one recipe, one command."""

import argparse

PASS_UNKNOWN = True
EXAMPLES = """
saccade train tiny-digits/pretrain                      a shipped recipe, on the embedded model and scenes
saccade train tiny-digits/sft --prune_ratio 0.8         any field can be overridden
saccade train my.yaml --resume auto                     goes on from the newest whole checkpoint
saccade train my.yaml --dataset data.jsonl --lora true  your own rows: {"messages": [...], "images": [...]}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="YAML file, or the name of a shipped recipe such as tiny-digits/sft")
    parser.epilog = f"Any field of the recipe can be given as --field value.\n\n{parser.epilog}"


def run(args: argparse.Namespace) -> int:
    from saccade.training import LOG_FILE, load_recipe, train_recipe

    recipe = load_recipe(args.recipe, args.overrides)
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
