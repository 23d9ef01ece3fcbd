"""`saccade export`: a trained model as a plain Hugging Face checkpoint with a model card."""

import argparse
from pathlib import Path

from saccade.files import check_exists
from saccade.values import DTYPES, check_choice

OUTPUT_IS_FOLDER = True
EXAMPLES = """
saccade export out/sft --output out/my-model                      merges LoRA, checks every key, writes a card
saccade export out/sft/checkpoint-600 --output out/600            a checkpoint of a run
saccade export out/sft --output out/my-model --push-to-hub me/my-model
saccade export out/sft --output out/bf16 --dtype bfloat16 --json  in another dtype; the summary as JSON
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="output_dir of a run, or a checkpoint in it, with or without LoRA adapters")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="folder to create, or an empty one")
    parser.add_argument(
        "--dtype", default="auto", help="auto (as trained), float32, bfloat16 or float16 (default: %(default)s)"
    )
    parser.add_argument(
        "--max-shard-size", default="5GB", help="split weights into files of this size (default: %(default)s)"
    )
    parser.add_argument("--push-to-hub", metavar="USER/NAME", help="then upload the folder to the Hugging Face hub")
    parser.add_argument("--private", action="store_true", help="with --push-to-hub: a new repository is private")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")


def run(args: argparse.Namespace) -> int:
    check_exists(args.model, "model", "name the output_dir of a run, or a checkpoint in it", folder=True)
    check_choice("dtype", args.dtype, DTYPES)
    from saccade.errors import SaccadeError
    from saccade.files import to_json
    from saccade.training.export import export_model, loads_in
    from saccade.training.hub import check_hub, push_folder

    if args.push_to_hub is not None:
        check_hub(args.push_to_hub, args.private)
    elif args.private:
        raise SaccadeError("private=true is for push_to_hub only: leave it out, or say where to push")
    summary = export_model(args.model, args.output, args.dtype, args.max_shard_size)
    if args.push_to_hub is not None:
        summary["url"] = push_folder(Path(summary["output"]), args.push_to_hub, args.private)
    if args.json:
        print(to_json(summary))
        return 0
    merged = f", adapters merged into {summary['base_model']}" if summary["base_model"] else ""
    print(f"written to {summary['output']}: {summary['parameters']:,} parameters, {summary['dtype']}{merged}")
    for note in summary["notes"]:
        print(f"note: {note}")
    print(f"loads in {loads_in(summary)}, every key checked; {', '.join(summary['files'])}")
    if "url" in summary:
        print(f"published at {summary['url']}")
    return 0
