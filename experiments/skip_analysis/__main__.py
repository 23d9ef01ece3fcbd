"""What feed-forward networks do to visual tokens, and what skipping them changes.

python -m experiments.skip_analysis ffn
python -m experiments.skip_analysis ffn photo.jpg other.png --model out/sft --output ratio.png
python -m experiments.skip_analysis skip-error --preset 64/156 --count 16
python -m experiments.skip_analysis skip-error --split divprune --retained 0.2 --skipped 0.3
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from experiments.skip_analysis.pictures import analyze_ffn, analyze_skip_error, check_output
from saccade.cli.main import Parser, guarded
from saccade.data import digit_scenes
from saccade.errors import SaccadeError
from saccade.images import open_image
from saccade.report.tables import print_table
from saccade.skip_vision import SkipVisionConfig
from saccade.training import ModelOptions, load_model

PROMPT = "Describe the image."


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, and say what was written."""
    parser = Parser(
        "experiments.skip_analysis", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="what", required=True, metavar="ffn|skip-error")
    ffn = verbs.add_parser("ffn", help="||FFN(u)|| / ||u|| of visual, summary and text rows", allow_abbrev=False)
    _model_arguments(ffn, preset="256/320", output="ffn.png")
    error = verbs.add_parser("skip-error", help="what skipping changes, compared to a bound", allow_abbrev=False)
    _model_arguments(error, preset="100/156", output="skip_error.png")
    args = parser.parse_args(argv)
    return {"ffn": _ffn, "skip-error": _skip_error}[args.what](args)


def _model_arguments(parser: argparse.ArgumentParser, preset: str, output: str) -> None:
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="image files (default: digit scenes)")
    parser.add_argument("--model", default="tiny", help="model id or folder (default: the embedded one, tiny)")
    parser.add_argument("--prompt", default=PROMPT, metavar="TEXT", help="about image files (default: %(default)r)")
    parser.add_argument("--count", type=int, default=8, metavar="N", help="digit scenes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of scenes and summary head (default: %(default)s)")
    parser.add_argument("--preset", default=preset, help="budget of retained/skipped tokens (default: %(default)s)")
    parser.add_argument("--split", metavar="NAME", help="cls_attention or a reducer (default: the preset's)")
    parser.add_argument("--retained", type=_amount, metavar="N", help="tokens or share (default: the preset's)")
    parser.add_argument("--skipped", type=_amount, metavar="N", help="tokens or share (default: the preset's)")
    parser.add_argument(
        "--output", default=output, metavar="FILE", help="PNG; JSON is written beside it (default: %(default)s)"
    )


def _amount(text: str) -> int | float:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    raise argparse.ArgumentTypeError(f"{text!r} is not a number: give a number of tokens, or a share of the image's")


def _setting(args: argparse.Namespace) -> tuple[Any, ...]:
    """Model, processor, samples and options; arguments are checked before anything is loaded."""
    check_output(args.output)
    if args.count < 1:
        raise SaccadeError(f"count={args.count!r}: give 1 scene or more")
    options = {name: getattr(args, name) for name in ("split", "retained", "skipped")}
    options = {name: value for name, value in options.items() if value is not None}
    config = SkipVisionConfig.preset(args.preset, **options)
    samples = [(open_image(path), args.prompt) for path in args.images]
    if not samples:
        rows = digit_scenes("sft", "test", args.count, seed=args.seed, kinds=["count", "max", "leftmost", "sum"])
        samples = [(row["images"][0], row["messages"][0]["content"]) for row in rows]

    model, processor = load_model(ModelOptions(model=args.model))
    return model.eval(), processor, samples, config


def _ffn(args: argparse.Namespace) -> int:
    report = analyze_ffn(*_setting(args), args.output, seed=args.seed)
    groups = ("text", "visual", "retained", "skipped", "summary")
    rows = [
        [number, *(None if layer[group] is None else round(layer[group]["p50"], 4) for group in groups)]
        for number, layer in enumerate(report["layers"])
    ]
    print_table("||FFN(u)|| / ||u||, median over rows", ["layer", *groups], rows)
    print(f"written to {args.output}, and as JSON beside it")
    return 0


def _skip_error(args: argparse.Namespace) -> int:
    report = analyze_skip_error(*_setting(args), args.output, seed=args.seed)
    rows = [
        [
            layer["layer"],
            *(_figures(layer["deviation"][group]) for group in ("skipped", "text", "summary")),
            *(_figures(layer["relative"][group]) for group in ("skipped", "text")),
            *(_figures(layer[name]) for name in ("injection", "gain", "bound", "spectral")),
            *(_figures(layer[name]) for name in ("attention_mass", "kv_drop")),
        ]
        for layer in report["layers"]
    ]
    columns = ["layer", "skipped", "text", "summary", "skipped, relative", "text, relative"]
    columns += ["||FFN||", "gain", "bound", "||FFN|| by weights", "mass on skipped", "without their keys"]
    print_table("largest change of a row after each layer, and attention of text", columns, rows)
    logits = report["logits"]
    print(
        f"logits of text: largest change {logits['max_change']:.3g} (rms {logits['rms_change']:.3g} of "
        f"{logits['rms']:.3g}), KL {logits['kl']:.3g}, same choice in {100 * logits['same_choice']:.1f} % of rows"
    )
    print(f"written to {args.output}, and as JSON beside it")
    return 0


def _figures(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.3g}")


if __name__ == "__main__":
    sys.exit(guarded(main))
