"""FLOPs and cache bytes of real model shapes in closed form, with optional timings (`--measure`).

python -m benchmarks.flops
python -m benchmarks.flops --shape llama3-8b --visual-tokens 2880 --budget full,576+576,288 --attention causal
python -m benchmarks.flops --shape tiny --budget full,100/156 --measure
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedConfig

from benchmarks.generation import generation_model, measure_generation
from benchmarks.shapes import SHAPES, check_place, get_shape, shape_config
from saccade.cli.main import Parser, guarded
from saccade.errors import SaccadeError
from saccade.files import write_json_atomically
from saccade.reducers import PruningConfig
from saccade.report.environment import environment
from saccade.report.tables import print_table
from saccade.skip_vision import PRESETS, SkipVisionConfig
from saccade.training.flops import (
    TextShape,
    VisualRows,
    head_flops,
    linear_flops,
    projector_flops,
    score_flops,
    skip_rows,
    tower_flops,
    training_flops,
)
from saccade.training.model_presets import Shape


def parse_budget(name: str, shape: Shape, tokens: int) -> VisualRows:
    """Rows of the budget that a command-line value describes.

    Args:
        name: "full"; a number of kept tokens; the name of a preset, whose shares are applied to the image's tokens; or
            absolute numbers of rows, retained+skipped, each with its summary rows.
        shape: model shape, which determines whether there is a thumbnail.
        tokens: visual tokens of the image.

    Raises:
        SaccadeError: on any other value, or if more tokens would be kept than there are.
    """
    if name == "full":
        return VisualRows(tokens)
    if name in PRESETS:
        config = SkipVisionConfig.preset(name)
        if config.split == "thumbnail":
            if shape.crops < 2 and tokens <= 576:
                raise SaccadeError(f"budget={name!r}: {shape.name} has no thumbnail, give another preset, or rows")
            tokens = 576
        return skip_rows(config, tokens)
    parts = name.split("+")
    if len(parts) > 2 or not all(part.isdigit() for part in parts):
        raise SaccadeError(
            f"budget={name!r}: give 'full', a number of tokens, rows such as 100+156, or one of " + ", ".join(PRESETS)
        )
    numbers = [int(part) for part in parts]
    if sum(numbers) > tokens or not numbers[0]:
        raise SaccadeError(f"budget={name!r}: {shape.name} has {tokens} visual tokens, keep from 1 to all of them")
    return VisualRows(numbers[0]) if len(parts) == 1 else VisualRows(numbers[0], 1 + (numbers[1] > 0), numbers[1])


def prefill_flops(text: TextShape, rows: VisualRows, text_tokens: int, attention: str = "full") -> int:
    """FLOPs of reading a prompt with one image, up to the logits of its last row.

    In the last layer skipped rows need keys and values only; scores are still computed.
    """
    elided = 2 * rows.skipped * 2 * text.width * text.query_width
    length = rows.total + text_tokens
    linear = linear_flops(text, rows, text_tokens) - elided
    return linear + score_flops(text, length, attention) + head_flops(text, 1)


def decode_flops(text: TextShape, cached: int) -> int:
    """FLOPs of generating one token after `cached` rows."""
    row = text.attention_row + text.feed_forward_row + 2 * (cached + 1) * text.query_width
    return 2 * text.layers * row + head_flops(text, 1)


def cache_bytes(text: TextShape, rows: int, bytes_a_value: int = 2) -> int:
    """Size of the keys and values of `rows` rows in all layers; the default of two bytes per value is bfloat16."""
    return 2 * text.layers * text.key_width * rows * bytes_a_value


def count(
    shape: Shape,
    config: PreTrainedConfig,
    rows: VisualRows,
    text_tokens: int = 60,
    label_rows: int = 20,
    attention: str = "full",
    bytes_a_value: int = 2,
) -> dict[str, Any]:
    """Cost of one sample with one image.

    Args:
        shape: shape of the image; without crops, the tower costs nothing.
        config: configuration of the model, possibly cut down.
        text_tokens: text tokens of the prompt, and of the training sample.
        label_rows: how many of these text tokens are labels in training.

    Returns:
        `tower`, `projector`, `prefill`, `decode_step` and `training` in FLOPs; `cache_bytes_prompt` while the prompt
        is read and `cache_bytes` once skipped rows are dropped; and the number of `rows` of each kind.

    Raises:
        SaccadeError: on a negative number of rows, or an unknown `attention`.
    """
    for name, value in (("text_tokens", text_tokens), ("label_rows", label_rows)):
        if not isinstance(value, int) or value < 0:
            raise SaccadeError(f"{name}={value!r}: give a number of tokens, 0 or more")
    if label_rows > text_tokens:
        raise SaccadeError(f"label_rows={label_rows!r}: there are {text_tokens} text tokens, give that many or fewer")
    text = TextShape.of(config)
    kept = rows.kept + text_tokens
    return {
        "rows": asdict(rows),
        "tower": tower_flops(config, shape.crops, shape.grid) if shape.crops else 0,
        "projector": projector_flops(config, shape.crops, shape.grid) if shape.crops else 0,
        "prefill": prefill_flops(text, rows, text_tokens, attention),
        "decode_step": decode_flops(text, kept),
        "training": training_flops(text, rows, text_tokens, label_rows, attention=attention),
        "cache_bytes_prompt": cache_bytes(text, rows.total + text_tokens, bytes_a_value),
        "cache_bytes": cache_bytes(text, kept, bytes_a_value),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Count, print a table for each shape, and write `--output`.

    Raises:
        SaccadeError: on bad input, before anything is built.
    """
    parser = Parser("benchmarks.flops", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="all", metavar="A,B", help=", ".join(SHAPES))
    parser.add_argument(
        "--budget",
        metavar="A,B",
        help="full, a number of kept tokens, a preset such as 100/156 scaled to the image's tokens, or absolute "
        "numbers of rows such as 100+156 (default: full, a tenth, and every preset that fits)",
    )
    parser.add_argument("--visual-tokens", type=int, metavar="N", help="tokens per image (default: the shape's)")
    parser.add_argument("--text-tokens", type=int, default=60, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--label-rows", type=int, default=20, metavar="N", help="labels in training (default: %(default)s)"
    )
    parser.add_argument("--layers", type=int, metavar="N", help="language layers to keep (default: all)")
    parser.add_argument("--width", type=int, metavar="D", help="language model's width (default: the shape's)")
    parser.add_argument(
        "--attention",
        default="full",
        metavar="KIND",
        help="count all query-key pairs (full) or only the causal ones (causal)",
    )
    parser.add_argument("--measure", action="store_true", help="also time full against skipping, on random weights")
    parser.add_argument("--device", default="cpu", help="for --measure (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", help="for --measure (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="for --measure (default: %(default)s)")
    parser.add_argument("--output", default="flops.json", type=Path, metavar="FILE", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    names = list(SHAPES) if args.shape == "all" else [name.strip() for name in args.shape.split(",")]
    if args.visual_tokens is not None and args.visual_tokens < 1:
        raise SaccadeError(f"visual_tokens={args.visual_tokens!r}: give 1 or more")
    if len(names) > 1 and (args.measure or args.layers or args.width):
        raise SaccadeError(f"shape={args.shape!r}: --measure, --layers and --width need one shape, give --shape")
    if args.output.suffix != ".json":
        raise SaccadeError(f"output={str(args.output)!r}: give a name that ends in .json")
    presets = _check_measure(args) if args.measure else []
    results = []
    for name in names:
        shape, config = get_shape(name), shape_config(name, args.layers, args.width)
        tokens = args.visual_tokens or shape.visual_tokens
        given = args.text_tokens, args.label_rows, args.attention
        counts = {budget: count(shape, config, rows, *given) for budget, rows in _budgets(shape, tokens, args.budget)}
        full = count(shape, config, VisualRows(tokens), *given)
        results.append({"shape": name, "visual_tokens": tokens, "full": full, "budgets": counts})
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


def _budgets(shape: Shape, tokens: int, text: str | None) -> list[tuple[str, VisualRows]]:
    """Names and rows of the requested budgets; by default, of all that fit."""
    names = ["full", str(max(1, round(tokens / 10))), "100/156", "64/156", "256/320"]
    names += ["576/576"] if shape.crops > 1 else []
    if text is not None:
        names = [name.strip() for name in text.split(",")]
    return [(name, parse_budget(name, shape, tokens)) for name in names]


def _table(result: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    columns = ["budget", "rows", "tower, projector", "prefill", "% of full", "per token", "training", "% of full "]
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
    """The presets among the budgets, after checking every argument that `--measure` needs."""
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
    """Median times of full prompts and of each preset, measured in alternation."""
    model = generation_model(name, args.layers, args.width, getattr(torch, args.dtype), args.device)
    results, rows = [], []
    for preset in presets:
        found = measure_generation(
            model,
            SkipVisionConfig.preset(preset),
            PruningConfig(),
            text_tokens=args.text_tokens,
            repeats=args.repeats,
        )
        results.append({"preset": preset, **{kind: vars(result) for kind, result in found.items()}})
        base = found["full"]
        for kind, result in found.items():
            seconds = median(result.prefill), median(result.decode), median(result.layout or [0.0])
            cells: list[Any] = [preset, kind, *(_figures(1000 * value) for value in seconds)]
            cells += [round(seconds[0] / median(base.prefill), 3), round(seconds[1] / median(base.decode), 3)]
            rows.append([*cells, _figures(result.cache_peak / 2**20), _figures(result.cache / 2**20)])
    columns = ["preset", "prompt", "prefill ms", "token ms", "layout ms", "prefill / full", "token / full"]
    print_table("measured, random weights", [*columns, "cache peak MiB", "cache MiB"], rows)
    return results


def _figures(value: float) -> float:
    return float(f"{value:.3g}")


if __name__ == "__main__":
    sys.exit(guarded(main))
