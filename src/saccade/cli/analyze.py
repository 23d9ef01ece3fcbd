"""`saccade analyze`: what feed-forward networks do to visual tokens, what skipping them changes, and what it saves."""

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saccade.benchmark.shapes import Shape

EXAMPLES = """
saccade analyze ffn
saccade analyze ffn photo.jpg other.png --model out/sft --output ratio.png
saccade analyze skip-error --preset 64/156 --count 16
saccade analyze skip-error --split divprune --retained 0.2 --skipped 0.3
saccade analyze flops
saccade analyze flops --shape llama3-8b --visual-tokens 2880 --budget full,576+576,288 --attention causal
saccade analyze flops --shape tiny --budget full,100/156 --measure
"""

PROMPT = "Describe the image."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of each of the three."""
    verbs = parser.add_subparsers(dest="what", required=True, metavar="ffn|skip-error|flops")
    ffn = verbs.add_parser("ffn", help="||FFN(u)|| / ||u|| of visual, summary and text rows", allow_abbrev=False)
    _model_arguments(ffn, preset="256/320", output="ffn.png")
    error = verbs.add_parser("skip-error", help="what skipping changes, beside a bound", allow_abbrev=False)
    _model_arguments(error, preset="100/156", output="skip_error.png")
    flops = verbs.add_parser("flops", help="operations and cache bytes of real model shapes", allow_abbrev=False)
    flops.add_argument(
        "--shape",
        default="all",
        metavar="A,B",
        help="tiny, llava-1.5-7b, llava-next-7b, qwen2.5-vl-7b, qwen3-vl-4b, llama3-8b, llava-llama3-8b",
    )
    flops.add_argument(
        "--budget",
        metavar="A,B",
        help="full, a number of kept tokens, a preset such as 100/156 as shares of the image's tokens, or rows "
        "as they are, such as 100+156 (default: full, a tenth, and every preset that fits)",
    )
    flops.add_argument("--visual-tokens", type=int, metavar="N", help="tokens of the image (default: the shape's)")
    flops.add_argument("--text-tokens", type=int, default=60, metavar="N", help="(default: %(default)s)")
    flops.add_argument("--label-rows", type=int, default=20, metavar="N", help="in training (default: %(default)s)")
    flops.add_argument("--layers", type=int, metavar="N", help="language layers to keep (default: all)")
    flops.add_argument("--width", type=int, metavar="D", help="of the language model (default: the shape's)")
    flops.add_argument(
        "--attention", default="full", metavar="KIND", help="count all pairs (full) or a causal kernel's (causal)"
    )
    flops.add_argument("--measure", action="store_true", help="also time full against skipping, on random weights")
    flops.add_argument("--device", default="cpu", help="for --measure (default: %(default)s)")
    flops.add_argument("--dtype", default="float32", help="for --measure (default: %(default)s)")
    flops.add_argument("--repeats", type=int, default=5, metavar="N", help="for --measure (default: %(default)s)")
    flops.add_argument("--output", default="flops.json", metavar="FILE", help="JSON (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Measure or count, print a table, and say what was written."""
    return {"ffn": _ffn, "skip-error": _skip_error, "flops": _flops}[args.what](args)


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
    """Model, processor, samples and options; slips cost no wait."""
    from saccade.errors import SaccadeError
    from saccade.images import open_image
    from saccade.report.analysis import check_output
    from saccade.skip_vision import SkipVisionConfig

    check_output(args.output)
    if args.count < 1:
        raise SaccadeError(f"count={args.count!r}: give 1 scene or more")
    options = {name: getattr(args, name) for name in ("split", "retained", "skipped")}
    options = {name: value for name, value in options.items() if value is not None}
    config = SkipVisionConfig.preset(args.preset, **options)
    samples = [(open_image(path), args.prompt) for path in args.images]
    if not samples:
        from saccade.data import digit_scenes

        rows = digit_scenes("sft", "test", args.count, seed=args.seed, kinds=["count", "max", "leftmost", "sum"])
        samples = [(row["images"][0], row["messages"][0]["content"]) for row in rows]

    from saccade.training import ModelOptions, load_model

    model, processor = load_model(ModelOptions(model=args.model))
    return model.eval(), processor, samples, config


def _ffn(args: argparse.Namespace) -> int:
    from saccade.report.analysis import analyze_ffn
    from saccade.report.tables import print_table

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
    from saccade.report.analysis import analyze_skip_error
    from saccade.report.tables import print_table

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
    print_table("largest change of a row behind each layer, and attention of text", columns, rows)
    logits = report["logits"]
    print(
        f"logits of text: largest change {logits['max_change']:.3g} (rms {logits['rms_change']:.3g} of "
        f"{logits['rms']:.3g}), KL {logits['kl']:.3g}, same choice in {100 * logits['same_choice']:.1f} % of rows"
    )
    print(f"written to {args.output}, and as JSON beside it")
    return 0


def _figures(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.3g}")


def _flops(args: argparse.Namespace) -> int:
    from saccade.benchmark.flops import VisualRows, count
    from saccade.benchmark.shapes import SHAPES, get_shape, shape_config
    from saccade.errors import SaccadeError
    from saccade.files import write_json_atomically
    from saccade.report.environment import environment
    from saccade.report.tables import print_table

    names = list(SHAPES) if args.shape == "all" else [name.strip() for name in args.shape.split(",")]
    if args.visual_tokens is not None and args.visual_tokens < 1:
        raise SaccadeError(f"visual_tokens={args.visual_tokens!r}: give 1 or more")
    if len(names) > 1 and (args.measure or args.layers or args.width):
        raise SaccadeError(f"shape={args.shape!r}: --measure, --layers and --width need one shape, name it")
    if not args.output.endswith(".json"):
        raise SaccadeError(f"output={args.output!r}: give a name that ends with .json")
    presets = _check_measure(args) if args.measure else []
    results = []
    for name in names:
        shape, config = get_shape(name), shape_config(name, args.layers, args.width)
        tokens = args.visual_tokens or shape.visual_tokens
        budgets = _budgets(shape, tokens, args.budget)
        counts = {
            budget: count(shape, config, rows, args.text_tokens, args.label_rows, args.attention)
            for budget, rows in budgets.items()
        }
        base = count(shape, config, VisualRows(tokens), args.text_tokens, args.label_rows, args.attention)
        results.append({"shape": name, "visual_tokens": tokens, "full": base, "budgets": counts})
    report = {
        **{name: getattr(args, name) for name in ("text_tokens", "label_rows", "attention", "layers", "width")},
        "environment": environment(),
        "shapes": results,
    }
    for result in results:
        title = f"{result['shape']}, {result['visual_tokens']} visual tokens: GFLOP; rows retained + summary + skipped"
        print_table(title, *_table(result))
    if args.measure:
        report["measured"] = _measure(args, names[0], presets)
    write_json_atomically(args.output, report)
    print(f"written to {args.output}")
    return 0


def _budgets(shape: "Shape", tokens: int, text: str | None) -> dict[str, Any]:
    """The rows of each budget asked for, or of those that fit."""
    from saccade.benchmark.flops import parse_budget

    names = ["full", str(max(1, round(tokens / 10))), "100/156", "64/156", "256/320"]
    names += ["576/576"] if shape.crops > 1 else []
    if text is not None:
        names = [name.strip() for name in text.split(",")]
    return {name: parse_budget(name, shape, tokens) for name in names}


def _table(result: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    columns = ["budget", "rows", "tower, projector", "prefill", "% of full", "a token", "training", "% of full "]
    columns += ["cache MiB", "% of full  "]
    rows, full = [], result["full"]
    for name, found in result["budgets"].items():
        cells: list[Any] = [name, " + ".join(map(str, found["rows"].values()))]
        cells += [_figures((found["tower"] + found["projector"]) / 1e9)]
        cells += [_figures(found["prefill"] / 1e9), round(100 * found["prefill"] / full["prefill"], 1)]
        cells += [_figures(found["decode_step"] / 1e9)]
        cells += [_figures(found["training"] / 1e9), round(100 * found["training"] / full["training"], 1)]
        cells += [_figures(found["cache_bytes"] / 2**20), round(100 * found["cache_bytes"] / full["cache_bytes"], 1)]
        rows.append(cells)
    return columns, rows


def _check_measure(args: argparse.Namespace) -> list[str]:
    """The presets among the budgets, once all that the measurement needs is found in order."""
    from saccade.benchmark.shapes import check_place
    from saccade.errors import SaccadeError
    from saccade.skip_vision import PRESETS

    wanted = [part.strip() for part in (args.budget or "100/156,64/156,256/320").split(",")]
    presets = [part for part in wanted if part in PRESETS and part != "576/576"]
    if not presets:
        raise SaccadeError(f"budget={args.budget!r}: --measure needs a preset among them, such as 100/156")
    if args.visual_tokens is not None:
        raise SaccadeError(
            f"visual_tokens={args.visual_tokens!r}: --measure takes the shape's own image, leave it out"
        )
    check_place(args.device, args.dtype, ("float32", "bfloat16", "float16"))
    if args.repeats < 1:
        raise SaccadeError(f"repeats={args.repeats!r}: give 1 or more")
    return presets


def _measure(args: argparse.Namespace, name: str, presets: list[str]) -> list[dict[str, Any]]:
    """Median times of full prompts and of each preset, turn by turn."""
    from statistics import median

    import torch

    from saccade.benchmark.generation import generation_model, measure_generation
    from saccade.report.tables import print_table
    from saccade.skip_vision import SkipVisionConfig

    model = generation_model(name, args.layers, args.width, getattr(torch, args.dtype), args.device)
    results, rows = [], []
    for preset in presets:
        found = measure_generation(
            model, SkipVisionConfig.preset(preset), text_tokens=args.text_tokens, repeats=args.repeats
        )
        results.append({"preset": preset, **{kind: vars(result) for kind, result in found.items()}})
        base = found["full"]
        for kind, result in found.items():
            seconds = median(result.prefill), median(result.decode), median(result.layout or [0.0])
            cells: list[Any] = [preset, kind, *(_figures(1000 * value) for value in seconds)]
            cells += [round(seconds[0] / median(base.prefill), 3), round(seconds[1] / median(base.decode), 3)]
            rows.append([*cells, _figures(result.cache_peak / 2**20), _figures(result.cache / 2**20)])
    columns = ["preset", "prompt", "prefill ms", "token ms", "split and merge ms", "prefill / full", "token / full"]
    print_table("measured, random weights", [*columns, "cache peak MiB", "cache MiB"], rows)
    return results
