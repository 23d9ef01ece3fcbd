"""`saccade view`: draw the patches of an image that each reducer keeps and merges."""

import argparse
from pathlib import Path

from saccade.cli.early import check_model, check_reducer
from saccade.cli.pruning_flags import add_pruning_flags, given_pruning
from saccade.files import check_exists

EXAMPLES = """
saccade view photo.jpg
saccade view photo.jpg --reducer divprune,visionzip,tome --prune-ratio 0.95 --output kept.png
saccade view photo.jpg --reducer cdpruner --prompt "How many digits are there?" --model out/sft
saccade view photo.jpg --reducer divprune,vispruner --keep-tokens 32
saccade view photo.jpg --reducer all
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", metavar="IMAGE", help="any image file")
    parser.add_argument(
        "--reducer",
        default="divprune,dpp,uniform,avgpool",
        metavar="A,B,C",
        help="reducers, one panel each, or all of them with `all` (default: %(default)s)",
    )
    add_pruning_flags(parser, "a ratio of 0.9", ("prune_ratio", "keep_tokens"))
    add_pruning_flags(parser, "none", ("patch_tolerance",))
    parser.add_argument(
        "--model", default="tiny", metavar="FOLDER", help="folder of a model (default: the embedded one, tiny)"
    )
    parser.add_argument(
        "--prompt",
        default="Describe the image.",
        metavar="TEXT",
        help="the user's words, which cdpruner uses (default: %(default)r)",
    )
    parser.add_argument(
        "--output", default="view.png", metavar="FILE", help="PNG; JSON is written next to it (default: %(default)s)"
    )


def outputs(args: argparse.Namespace) -> list[str]:
    """The picture, and the JSON beside it."""
    return [args.output, str(Path(args.output).with_suffix(".json"))]


def run(args: argparse.Namespace) -> int:
    from saccade.errors import SaccadeError

    # Before the seconds that the imports take.
    check_exists(args.image, "image", "give an image file")
    # Of this verb, the flag names several.
    names, args.reducer = [name.strip() for name in args.reducer.split(",")], None
    repeated = [name for number, name in enumerate(names) if name in names[:number]]
    if repeated:
        raise SaccadeError(f"reducer {repeated[0]!r} is given twice: name each once")
    everything = names == ["all"]
    for name in () if everything else names:
        check_reducer(name)
    options = given_pruning(args)
    check_model(args.model)
    from saccade.images import open_image
    from saccade.reducers import PruningConfig, list_reducers
    from saccade.report.view import view_reducers

    names = list_reducers() if everything else names
    # Before anything is loaded, so that mistakes show at once.
    pruning = PruningConfig(names[0], **options)
    for name in names:
        pruning.replace(reducer=name)
    image = open_image(args.image)

    from saccade.report.lines import wrapped
    from saccade.training import ModelOptions, load_model

    model, processor = load_model(ModelOptions(model=args.model))
    report = view_reducers(model, processor, image, names, args.prompt, args.output, pruning, args.model)
    rows, columns = report["grid"]
    print(wrapped(report["source"]))
    for panel in report["panels"]:
        kept = len(panel["kept"])
        merged = len([token for token in panel.get("merged_into", ()) if token >= 0])
        note = f", into which {merged} are merged" if "merged_into" in panel else ""
        note += f"; {len(panel['absent'])} were dropped before the tower" if "absent" in panel else ""
        drawn = f", {kept} of {rows * columns} of the {report['part']}, which is drawn" if report["part"] else ""
        print(f"{panel['reducer']}: {panel['keeps']} of {report['tokens']} tokens{drawn}{note}")
    print(f"written to {args.output}")
    return 0
