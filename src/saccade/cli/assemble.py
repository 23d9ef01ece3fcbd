"""`saccade assemble`: a LLaVA with a new projector, from a vision tower and a language model."""

import argparse

from saccade.cli.field_flags import add_field_flags
from saccade.training.assemble_options import AssembleOptions
from saccade.values import CROPS, DTYPES, PROJECTORS, check_choice

OUTPUT_IS_FOLDER = True
EXAMPLES = """
saccade assemble --vision-tower openai/clip-vit-large-patch14-336 --language-model lmsys/vicuna-7b-v1.5 \\
    --output out/llava-1.5-7b/start                    where LLaVA-1.5's stage one starts
saccade assemble --vision-tower google/siglip-so400m-patch14-384 --language-model Qwen/Qwen3-4B --output out/start
saccade assemble --vision-tower tiny --language-model FOLDER --gguf-file SmolLM2-135M-Instruct.Q4_1.gguf \\
    --output out/smol                                  a language model in a GGUF file
saccade assemble --vision-tower tiny --language-model tiny --projector resampler \\
    --output out/chain-of-sight/start                  the embedded model with Chain-of-Sight's resampler
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--vision-tower",
        required=True,
        metavar="MODEL",
        help="folder or hub id of a CLIP or SigLIP model, or of a LLaVA that has one; or tiny",
    )
    parser.add_argument(
        "--language-model",
        required=True,
        metavar="MODEL",
        help="folder or hub id of a Llama, Mistral, Qwen2 or Qwen3 language model, or a LLaVA that has one; or tiny",
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="folder to create, or an empty one")
    add_field_flags(parser, AssembleOptions)
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")


def run(args: argparse.Namespace) -> int:
    check_choice("crops", args.crops, CROPS)
    check_choice("projector", args.projector, PROJECTORS)
    check_choice("dtype", args.dtype, DTYPES)
    from dataclasses import fields

    from saccade.files import to_json
    from saccade.training.assemble import assemble_model
    from saccade.training.export import loads_in

    options = AssembleOptions(**{entry.name: getattr(args, entry.name) for entry in fields(AssembleOptions)})
    summary = assemble_model(args.vision_tower, args.language_model, args.output, options)
    if args.json:
        print(to_json(summary))
        return 0
    print(
        f"written to {summary['output']}: {summary['architecture']}, {summary['parameters']:,} parameters, of which "
        f"{summary['projector_parameters']:,} are the new projector's, {summary['dtype']}"
    )
    print(
        f"chat template: {summary['chat_template']}; a picture has {summary['visual_tokens']} visual tokens; "
        f"loads in {loads_in(summary)}, every key checked"
    )
    return 0
