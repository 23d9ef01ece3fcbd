"""`saccade eval`: evaluate a trained model on all visual tokens and on a few; compare two result folders."""

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

from saccade.cli.early import check_dataset, check_model
from saccade.cli.field_flags import listed
from saccade.cli.pruning_flags import FLAGS, add_pruning_flags, given_pruning
from saccade.errors import SaccadeError
from saccade.files import check_exists
from saccade.values import INFERENCES, SPLITS, check_choice, check_counts

EXAMPLES = """
saccade eval out/sft                                      all tokens, pruned, and pruned with the isolator
saccade eval out/sft --prune-ratio 0.95 --reducer random  other ways to prune
saccade eval out/sft --reducer vispruner --keep-tokens 16  16 tokens per image, by another method
saccade eval out/sft --inference full --split validation  one way only, on another split
saccade eval out/skip_vision --inference full,skip        with Skip-Vision as trained, and without
saccade eval out/sft --dataset test.json                  your own rows, by exact match of the last answer
saccade eval out/sft --dataset me/data --split test       a folder or a hub id, of which one split counts
saccade eval compare out/eval/full out/eval/pruned        each score, and the mean share of the first folder's

benchmarks run through lmms-eval's own command: python -m lmms_eval --model saccade, see docs/evaluation.md
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", help="folder of a trained model, with or without LoRA adapters; tiny is the embedded one; or compare"
    )
    parser.add_argument(
        "folders", nargs="*", metavar="A B", help="with compare: two folders of results, the baseline's first"
    )
    parser.add_argument(
        "--inference",
        type=listed,
        metavar="A,B",
        help="full, pruned, pruned_isolator, skip (default: all that the folder allows)",
    )
    add_pruning_flags(parser, "as trained")
    parser.add_argument("--dataset", default=None, metavar="PATH", help="rows to evaluate on in place of the scenes")
    parser.add_argument("--image-folder", type=listed, metavar="A,B", help="with --dataset: its images and videos")
    parser.add_argument(
        "--image-urls", type=listed, metavar="A,B", help="with --dataset: what addresses to fetch begin with (none)"
    )
    parser.add_argument(
        "--image-cache", default=None, metavar="DIR", help="where what was fetched is kept (default: the user's cache)"
    )
    parser.add_argument(
        "--split",
        default=None,
        help="of the scenes: train, validation or test (default: test); of --dataset, where it has several",
    )
    parser.add_argument("--num-samples", type=int, default=None, help="scenes or rows to evaluate on (default: 1000)")
    parser.add_argument(
        "--batch-size", type=int, default=None, help="prompts at a time (default: 100, with --dataset 8)"
    )
    parser.add_argument("--suite", default=None, help="with compare: benchmarks of a paper, dualspeed or skip-vision")
    parser.add_argument(
        "--output",
        default=None,
        metavar="PATH",
        help="a JSON file (default: eval.json in the model's folder, where another evaluation is kept as eval.1.json; "
        "with compare none)",
    )


def outputs(args: argparse.Namespace) -> list[str]:
    """The JSON, which a comparison writes only where it is asked for."""
    if args.output is None and args.model == "compare":
        return []
    return [args.output or _beside(args.model)]


def run(args: argparse.Namespace) -> int:
    if args.model == "compare":
        return _compare(args)
    if args.folders:
        raise SaccadeError(
            f"argument {args.folders[0]!r}: give one model, or `saccade eval compare A B` for two folders"
        )
    _refuse(args, ("suite",), "is for compare only: benchmarks run through `python -m lmms_eval --model saccade`")
    check_counts(num_samples=args.num_samples, batch_size=args.batch_size)
    for name in args.inference or ():
        check_choice("inference", name, INFERENCES)
    given = given_pruning(args)
    if args.inference and not any(name.startswith("pruned") for name in args.inference):
        _refuse(
            args, FLAGS, f"has no effect on --inference {','.join(args.inference)}, which does not prune: leave it out"
        )
    check_model(args.model)
    if args.dataset is None:
        _refuse(args, ("image_folder", "image_urls", "image_cache"), "is for --dataset only: leave it out")
        check_choice("split", args.split or "test", SPLITS)
    else:
        check_dataset(args.dataset)
        if args.image_cache is not None and args.image_urls is None:
            raise SaccadeError("--image-cache goes with --image-urls: give both, or leave it out")
    # What comes from here on takes seconds to import.
    from saccade.data import digit_scenes
    from saccade.data.addresses import ImageAddresses
    from saccade.dualspeed.identity import identify_rows
    from saccade.dualspeed.weights import identify_weights
    from saccade.evaluation import evaluate_inferences, plan_inferences
    from saccade.evaluation.rows import choose_split, file_rows, trained_sampling
    from saccade.files import write_json_atomically
    from saccade.report.environment import environment
    from saccade.report.tables import print_table
    from saccade.training import ModelOptions, load_to_run
    from saccade.training.models import load_processor

    inferences = plan_inferences(args.model, args.inference, **given)
    count = args.num_samples or 1000
    if args.dataset is None:
        measured, batch_size = {"split": args.split or "test"}, args.batch_size or 100
        scenes, what = digit_scenes("sft", measured["split"], count), f"scenes of the {measured['split']} split"
    else:
        # Its name alone: a model card repeats it.
        measured, batch_size = {"dataset": Path(args.dataset).name}, args.batch_size or 8
        split = choose_split(args.dataset, args.split)
        if split is not None:
            measured["split"] = split
        addresses = None if args.image_urls is None else ImageAddresses(args.image_urls, args.image_cache)
        reader = load_processor(ModelOptions(model=args.model))[:2]
        sampling = trained_sampling(args.model)
        scenes = file_rows(args.dataset, args.image_folder, count, sampling, addresses, split, reader)
        scenes.select_columns("answer")[:]  # a bad row is named before the model is loaded
        # Of the texts: images and videos may lie elsewhere on another machine.
        measured["rows"] = identify_rows(scenes.select_columns("messages"))["fingerprint"]
        what = f"rows of {args.dataset}" if split is None else f"rows of the {split} split of {args.dataset}"
    weights = identify_weights(args.model)
    model, processor = load_to_run(ModelOptions(model=args.model))
    results = evaluate_inferences(model, processor, scenes, inferences, batch_size)
    kinds = sorted(results[0]["accuracy_by_kind"])
    columns = ["kind", *(result["inference"] for result in results)]
    rows = [[kind, *(f"{100 * result['accuracy_by_kind'][kind]:.1f} %" for result in results)] for kind in kinds]
    rows.append(["all", *(f"{100 * result['accuracy']:.1f} %" for result in results)])
    rows.append(["mean prompt length", *(f"{result['mean_prompt_length']:.0f}" for result in results)])
    print_table(f"{args.model} on {model.device}, {len(scenes)} {what}", columns, rows)
    output = args.output or _beside(args.model)
    record = {"model": args.model, "weights": weights, **measured, "results": results}
    if args.output is None:
        _keep_earlier(Path(output), record)
    write_json_atomically(output, {**record, "environment": environment()})
    print(f"written to {output}")
    return 0


def _compare(args: argparse.Namespace) -> int:
    from saccade.evaluation.suites import get_suite

    names = ("inference", *FLAGS, "dataset", "image_folder", "image_urls", "image_cache")
    names += ("split", "num_samples", "batch_size")
    _refuse(args, names, "is not for compare: leave it out")
    if len(args.folders) != 2:
        raise SaccadeError(
            f"compare takes two folders of results, the baseline's first, and was given {len(args.folders)}"
        )
    for folder in args.folders:
        check_exists(folder, "folder", "give what an evaluation wrote")
    if args.suite is not None:
        get_suite(args.suite)
    from saccade.evaluation.compare import compare_results, comparison_rows
    from saccade.files import write_json_atomically
    from saccade.report.tables import print_table

    comparison = compare_results(*args.folders, suite=args.suite)
    columns, rows = comparison_rows(comparison)
    print_table(f"{comparison['model']} against {comparison['baseline']}", columns, rows)
    for note in comparison["notes"]:
        print(f"note: {note}")
    if args.output is not None:
        print(f"written to {write_json_atomically(args.output, comparison)}")
    return 0


def _keep_earlier(path: Path, record: dict[str, Any]) -> None:
    """Move aside what the same command with other options has written, which the new results would replace."""
    from saccade.reducers.config import pruned_how

    def what(content: dict[str, Any]) -> list[Any]:
        """Everything but the scores: what was measured, and in which ways."""
        ways = [(entry["inference"], entry["samples"], pruned_how(entry)) for entry in content["results"]]
        return [ways, *(content.get(name) for name in ("model", "weights", "dataset", "split", "rows"))]

    try:
        same = what(json.loads(path.read_text(encoding="utf-8"))) == what(record)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # no such results
    if not same:
        names = (path.with_suffix(f".{number}.json") for number in itertools.count(1))
        aside = next(name for name in names if not name.exists())
        path.rename(aside)
        print(f"{path} was of another evaluation, and is now {aside}")


def _refuse(args: argparse.Namespace, names: Any, why: str) -> None:
    """Refuse flags that would have no effect."""
    for name in names:
        # Not by equality, since 0 == False but is a given value.
        if getattr(args, name) is not None and getattr(args, name) is not False:
            raise SaccadeError(f"--{name.replace('_', '-')} {why}")


def _beside(model: str) -> str:
    """Where the result goes: into the model's folder, or the current one if the model is not a folder."""
    return str(Path(model) / "eval.json") if Path(model).is_dir() else "eval.json"
