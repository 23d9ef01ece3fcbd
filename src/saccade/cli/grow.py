"""`saccade grow`: a Chain-of-Sight model for larger images, with one more scale."""

import argparse

from saccade.cli.early import check_model

OUTPUT_IS_FOLDER = True
EXAMPLES = """
saccade grow out/skip-vision/cos_pretrain --image-size 448 --output out/skip-vision/cos_grown
                                                       16 + 64 tokens at 224 pixels become 16 + 256 + 1,024
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder of a model of `saccade assemble --projector resampler`, trained or not")
    parser.add_argument(
        "--image-size", type=int, required=True, help="pixels along an edge, a multiple of the present"
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="folder to create, or an empty one")
    parser.add_argument(
        "--max-shard-size", default="5GB", help="split weights into files of this size (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")


def run(args: argparse.Namespace) -> int:
    check_model(args.model)
    from saccade.files import to_json
    from saccade.training.grow import grow_model

    summary = grow_model(args.model, args.output, args.image_size, args.max_shard_size)
    if args.json:
        print(to_json(summary))
        return 0
    scales = " + ".join(f"{count:,}" for count in summary["scales"])
    print(
        f"written to {summary['output']}: {summary['image_size']} x {summary['image_size']} pixels, "
        f"{scales} = {summary['visual_tokens']:,} visual tokens, {summary['parameters']:,} parameters"
    )
    return 0
