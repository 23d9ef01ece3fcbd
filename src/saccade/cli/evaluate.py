"""`saccade eval`: accuracy of a trained model on the digit scenes, on all visual tokens and on a few."""

import argparse

EXAMPLES = """
saccade eval out/sft                                      all tokens, pruned, and pruned with the isolator
saccade eval out/sft --prune-ratio 0.95 --reducer random  other ways to prune
saccade eval out/sft --reducer downsample --keep-tokens 16 a lower resolution, 16 tokens an image
saccade eval out/sft --inference full --split validation  one way only, on another split
saccade eval out/skip_vision --inference full,skip        with Skip-Vision as it was trained, and without
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", help="folder of a trained model, with or without LoRA adapters; tiny is the embedded one"
    )
    parser.add_argument(
        "--inference",
        default=None,
        metavar="A,B",
        help="full, pruned, pruned_isolator, skip (default: all that the folder allows)",
    )
    parser.add_argument("--reducer", default=None, help="method that prunes (default: the one it was trained with)")
    parser.add_argument(
        "--prune-ratio", type=float, default=None, help="share of visual tokens to drop (default: as trained)"
    )
    parser.add_argument("--keep-tokens", type=int, default=None, metavar="K", help="tokens to keep, not a ratio")
    parser.add_argument(
        "--budget", default=None, help="what shares a budget: crop, image or sample (default: as trained)"
    )
    parser.add_argument(
        "--adaptive",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="share each batch's tokens out by how varied its images are (default: as trained)",
    )
    parser.add_argument(
        "--newlines", default=None, help="keep or drop newlines of anyres images (default: as trained)"
    )
    parser.add_argument("--positions", default=None, help="compact or original (default: as trained)")
    parser.add_argument("--split", default="test", help="train, validation or test (default: %(default)s)")
    parser.add_argument("--num-samples", type=int, default=1000, help="scenes to evaluate on (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=100, help="scenes at a time (default: %(default)s)")
    parser.add_argument(
        "--output", default=None, metavar="FILE", help="JSON (default: eval.json in the model's folder)"
    )


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from saccade.data import digit_scenes
    from saccade.errors import SaccadeError
    from saccade.evaluation import evaluate_inferences, plan_inferences
    from saccade.files import write_json_atomically
    from saccade.report.environment import environment
    from saccade.report.tables import print_table
    from saccade.training import ModelOptions, load_model

    for name in ("num_samples", "batch_size"):
        if getattr(args, name) < 1:
            raise SaccadeError(f"{name}={getattr(args, name)}: give at least 1")
    names = None if args.inference is None else args.inference.split(",")
    inferences = plan_inferences(
        args.model,
        names,
        args.reducer,
        args.prune_ratio,
        args.positions,
        keep_tokens=args.keep_tokens,
        budget=args.budget,
        adaptive=args.adaptive,
        newlines=args.newlines,
    )
    scenes = digit_scenes("sft", args.split, args.num_samples)
    model, processor = load_model(ModelOptions(model=args.model))
    results = evaluate_inferences(model, processor, scenes, inferences, args.batch_size)
    kinds = sorted(results[0]["accuracy_by_kind"])
    columns = ["kind", *(result["inference"] for result in results)]
    rows = [[kind, *(f"{100 * result['accuracy_by_kind'][kind]:.1f} %" for result in results)] for kind in kinds]
    rows.append(["all", *(f"{100 * result['accuracy']:.1f} %" for result in results)])
    rows.append(["mean prompt length", *(f"{result['mean_prompt_length']:.0f}" for result in results)])
    print_table(f"{args.model}, {args.num_samples} scenes of the {args.split} split", columns, rows)
    folder = Path(args.model)
    output = Path(args.output or (folder / "eval.json" if folder.is_dir() else "eval.json"))
    write_json_atomically(
        output, {"model": args.model, "split": args.split, "results": results, "environment": environment()}
    )
    print(f"written to {output}")
    return 0
