"""Prefill time, decoding time and cache size, with all visual tokens, with pruned and with skipped ones.

`prefill` starts from prompts that are laid out. What choosing, merging and laying out tokens takes is `layout`: the
first token of a pruned or skipping prompt takes both.

python -m benchmarks.generate
python -m benchmarks.generate --shape llama3-8b --device cuda --dtype bfloat16 --images 1,4
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.generation import FULL, MEASURED, PRUNE, SKIP, Generation, generation_model, measure_generation
from benchmarks.ledger import append_rows, check_ledger, figures, origin
from benchmarks.shapes import check_place
from benchmarks.train import options, shared_arguments
from saccade.cli.main import Parser, guarded
from saccade.errors import SaccadeError
from saccade.reducers import PruningConfig
from saccade.report.tables import print_table
from saccade.skip_vision import SkipVisionConfig
from saccade.values import check_counts

ROOMS = ("skip_vision", "families", "tokens")
METRICS = ("prefill", "decode", "layout", "cache_peak", "cache")


@dataclass(frozen=True)
class GenerateBench:
    """What to measure.

    Args:
        shape: name of a model shape.
        layers, width: size to cut its language model to.
        preset: Skip-Vision preset with the budgets of retained and skipped tokens.
        reducer, prune_ratio: what pruning drops, and which share.
        images: numbers of images per prompt, one measurement for each.
        text_tokens, new_tokens: text tokens of the prompt, and tokens of the answer.
        repeats: timed repeats of each variant.
        device, dtype, threads: where and how to run.

    Raises:
        SaccadeError: on a value out of range.
    """

    shape: str = "tiny"
    layers: int | None = None
    width: int | None = None
    preset: str = "100/156"
    reducer: str = "divprune"
    prune_ratio: float = 0.9
    images: tuple[int, ...] = (1, 4, 16)
    text_tokens: int = 60
    new_tokens: int = 16
    repeats: int = 10
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 1

    def __post_init__(self) -> None:
        check_counts(**{name: getattr(self, name) for name in ("text_tokens", "new_tokens", "repeats", "threads")})
        if not self.images or min(self.images) < 1:
            raise SaccadeError(f"images={self.images!r}: give numbers from 1 on, such as 1,4,16")
        if self.shape not in MEASURED:
            raise SaccadeError(f"shape={self.shape!r} cannot be timed: choose one of {', '.join(MEASURED)}")
        check_place(self.device, self.dtype, ("float32", "bfloat16"))


def bench_generate(
    bench: GenerateBench, ledger: Path | None, on_rows: Callable[[Sequence[Mapping[str, Any]]], None]
) -> list[dict[str, Any]]:
    """Measure each number of images, append the results to the ledger, and return all ledger rows.

    Args:
        on_rows: called with the rows of each number of images.

    Raises:
        SaccadeError: on bad input, before anything is measured.
    """
    if ledger is not None:
        check_ledger(ledger)
    config = SkipVisionConfig.preset(bench.preset)
    pruning = PruningConfig(reducer=bench.reducer, prune_ratio=bench.prune_ratio)
    torch.set_num_threads(bench.threads)
    model = generation_model(bench.shape, bench.layers, bench.width, getattr(torch, bench.dtype), bench.device)
    every = []
    for images in bench.images:
        found = measure_generation(model, config, pruning, images, bench.text_tokens, bench.new_tokens, bench.repeats)
        rows = _ledger_rows(bench, found, images)
        on_rows(rows)
        if ledger is not None:
            append_rows(ledger, rows)
        every += rows
    return every


def show_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the rows of one number of images."""
    first = rows[0]
    columns = ("provider", "metric", "unit", "p20", "p50", "p80", "ratio_to_baseline")
    cells = [[row[name] for name in columns] for row in rows]
    title = f"{first['shape']}; {first['device']}, {first['threads']} thread(s), load {first['load']}"
    print_table(title, [*columns[:-1], "x full"], cells)


def _ledger_rows(bench: GenerateBench, found: Mapping[str, Generation], images: int) -> list[dict[str, Any]]:
    """One row per provider and metric; ratios are relative to the full prompt, so below one means cheaper."""
    cut = "".join(f" {name}={getattr(bench, name)}" for name in ("layers", "width") if getattr(bench, name))
    shared = origin("generate", torch.device(bench.device), bench.dtype, bench.repeats, ROOMS)
    rows = []
    for provider, result in found.items():
        kinds = " ".join(f"{kind}={count}" for kind, count in result.prompt_rows.items())
        name = {PRUNE: f"prune {bench.prune_ratio}", SKIP: f"skip {bench.preset}"}.get(provider, provider)
        shape = f"{bench.shape}{cut} images={images} {kinds}"
        for metric in METRICS:
            values, unit = _values(result, metric)
            if values:
                row = {**shared, "shape": shape, "provider": name, "metric": metric, "unit": unit}
                baseline, _ = _values(found[FULL], metric)
                rows.append({**row, **figures(values, baseline, digits=5 if unit == "ms" else 12)})
    return rows


def _values(result: Generation, metric: str) -> tuple[list[float], str]:
    """Values of one metric, and their unit."""
    if metric.startswith("cache"):
        return [getattr(result, metric)], "bytes"
    return [1000 * seconds for seconds in getattr(result, metric)], "ms"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print tables, and say what was written.

    Raises:
        SaccadeError: on bad input, before a model is built.
    """
    parser = Parser("benchmarks.generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared_arguments(parser)
    parser.add_argument("--preset", default="100/156", help="Skip-Vision preset (default: %(default)s)")
    parser.add_argument("--reducer", default="divprune", help="reducer of the pruned prompt (default: %(default)s)")
    parser.add_argument("--prune-ratio", type=float, default=0.9, metavar="P", help="(default: %(default)s)")
    parser.add_argument("--images", default="1,4,16", metavar="A,B", help="images per prompt (default: %(default)s)")
    parser.add_argument("--text-tokens", type=int, default=60, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=16, metavar="N", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        args.images = tuple(int(part) for part in args.images.split(","))
    except ValueError as error:
        raise SaccadeError(f"images={args.images!r}: give numbers from 1 on, such as 1,4,16") from error
    bench_generate(GenerateBench(**options(args, GenerateBench)), args.ledger, show_rows)
    if args.ledger:
        print(f"written to {args.ledger}")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
