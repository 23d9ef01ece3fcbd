"""`saccade data check`: read a whole dataset before a training run does."""

import argparse
from contextlib import ExitStack
from typing import Any

from saccade.cli.early import check_dataset, check_model
from saccade.cli.field_flags import listed
from saccade.cli.pruning_flags import add_pruning_flags, given_pruning
from saccade.errors import SaccadeError, counted
from saccade.values import check_choice, check_counts

EXAMPLES = """
saccade data check llava_v1_5_mix665k.json --image-folder data/images
saccade data check chat.jsonl --image-folder coco,ocr --model llava-hf/llava-1.5-7b-hf --prune-ratio 0.9
saccade data check my_recipe.yaml                       every source that the recipe trains on
saccade data check rows.parquet --output report.json
"""
SHOWN = 20
RECIPE_FIELDS = (
    *("dataset_format", "dataset_split", "dataset_rows", "image_folder", "image_urls", "image_cache"),
    *("max_image_pixels", "video_frames", "video_fps", "model", "max_length"),
)
"""Flags that set a field of the recipe."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["check"], metavar="check", help="read every row, image and video")
    parser.add_argument("path", metavar="PATH", help="data file, folder, hub id, or recipe")
    parser.add_argument("--format", dest="dataset_format", metavar="NAME", help="llava, chat or auto (default: auto)")
    parser.add_argument(
        "--image-folder", metavar="A,B", help="where images and videos are (default: the data file's folder)"
    )
    parser.add_argument(
        "--image-urls", type=listed, metavar="A,B", help="what addresses of images to fetch begin with (none)"
    )
    parser.add_argument(
        "--image-cache", metavar="DIR", help="where what was fetched is kept (default: the user's cache folder)"
    )
    parser.add_argument(
        "--split", dest="dataset_split", metavar="NAME", help="split, if there are several (default: train)"
    )
    parser.add_argument("--rows", dest="dataset_rows", type=int, metavar="N", help="check the first N rows only")
    parser.add_argument("--max-image-pixels", type=int, metavar="N", help="largest image (default: 89478485)")
    parser.add_argument("--video-frames", type=int, metavar="N", help="most frames taken of a video (default: 32)")
    parser.add_argument("--video-fps", type=float, metavar="N", help="frames taken per second (default: evenly)")
    parser.add_argument("--model", metavar="FOLDER", help="count tokens with this model's processor; tiny is embedded")
    add_pruning_flags(parser, "as the recipe says, or a ratio of 0.9", ("prune_ratio", "keep_tokens"))
    add_pruning_flags(parser, "as the recipe says, or none", ("fit_length",))
    parser.add_argument("--max-length", type=int, metavar="N", help="count rows longer than this (default: 2048)")
    parser.add_argument("--jobs", type=int, metavar="N", help="processes (default: one per core)")
    parser.add_argument(
        "--output", default="data_check.json", metavar="FILE", help="report, as JSON (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Check, show, write the report, and return 1 if a record is bad or the check was interrupted."""
    from saccade.data.conversation import FORMATS
    from saccade.recipes import check_early, is_recipe

    # Before the seconds that the other imports take.
    given = _given(args)
    check_choice("dataset format", args.dataset_format or "auto", FORMATS)
    check_dataset(args.path)
    if is_recipe(args.path):
        check_dataset(check_early(args.path, []).get("dataset"))
    elif args.model is None:
        check_counts(max_length=args.max_length)
        for name in ("prune_ratio", "keep_tokens", "fit_length", "max_length"):
            if name in given:
                flag = f"--{name.replace('_', '-')} {given[name]}"
                raise SaccadeError(f"{flag} counts tokens, which needs a processor: give --model, or leave it out")
    check_model(args.model)
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from saccade.files import write_json_atomically
    from saccade.report.environment import available_cores
    from saccade.training.checks import check_data

    columns = (TextColumn("reading"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True))
    task = bar.add_task("rows", total=None)
    with ExitStack() as shown:

        def start(total: int) -> None:
            # Only now, so that bad input shows nothing but the line that names it.
            bar.update(task, total=total)
            shown.enter_context(bar)

        report = check_data(
            args.path,
            given,
            jobs=available_cores() if args.jobs is None else args.jobs,
            start=start,
            progress=lambda count: bar.advance(task, count),
        )
    write_json_atomically(args.output, report)
    _show(report)
    print(f"written to {args.output}")
    if not report["complete"]:
        raise KeyboardInterrupt
    return 1 if report["bad"] else 0


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of a recipe that the flags set."""
    fields = {name: value for name, value in vars(args).items() if name in RECIPE_FIELDS and value is not None}
    return fields | given_pruning(args)


def _show(report: dict[str, Any]) -> None:
    from saccade.report.tables import print_table

    names = ("checked", "images", "videos", "frames", "text_only", "turns", "bad")
    print_table("", ["records", *names], [[report["records"], *(report[name] for name in names)]])
    tokens = report["tokens"]
    if tokens and tokens["full"]:
        rows = [[name, *tokens[name].values()] for name in ("full", "shortened")]
        kept, ratio = tokens["keep_tokens"], tokens["prune_ratio"]
        budget = f"prune ratio {ratio}" if kept is None else f"{counted(kept, 'visual token')} per {tokens['budget']}"
        print_table(f"tokens per row, {budget}", ["length", *tokens["full"]], rows)
        if tokens["cut"]:
            print(
                f"{tokens['cut']} rows do not fit under fit_length={tokens['fit_length']}: each has "
                f"{tokens['lost'] / tokens['cut']:.0f} visual tokens fewer than its budget, on average"
            )
        if tokens["longer"]:
            print(
                f"{tokens['longer']} rows are longer than max_length={tokens['max_length']}: training truncates them"
            )
    if report["ignored"]:
        named = ", ".join(f"{name} ({counted(count, 'row')})" for name, count in report["ignored"].items())
        print(f"ignored fields: {named}")
    if report["checked"] and not report["images"] and not report["videos"]:
        print("no row has an image or a video: there is nothing to prune")
    for entry in report["bad_records"][:SHOWN]:
        print(f"{entry['record']}: {entry['reason']}")
    if report["bad"] > SHOWN:
        print(f"... and {report['bad'] - SHOWN} more, all of them in the report")
