"""Prefill, decoding and cache bytes of a model that skips visual tokens, beside the same model without.

    python benchmarks/skip_generation.py                                  # the tiny shape on this machine's CPU
    python benchmarks/skip_generation.py --shape llama3-8b --device cuda --dtype bfloat16 --images 1,4
    python benchmarks/skip_generation.py --shape llama3-8b --layers 2 --width 1024

Weights are random, which changes no time. Images are encoded beforehand. After one turn each to warm up, full and
skipping prompts take turns until each has run `--repeats` times. Each (shape, provider, metric) becomes one row of the
ledger,
which is only appended to.
"""

import argparse
import os
import shlex
import statistics
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from selection import LEDGER, append, commit, cpu_name, percentiles

from saccade.benchmark.generation import MEASURED, Generation, generation_model, measure_generation
from saccade.skip_vision import PRESETS, SkipVisionConfig

ROOMS = ("benchmark", "skip_vision", "families", "tokens")
METRICS = ("prefill", "decode", "layout", "cache_peak", "cache")


def values_of(result: Generation, metric: str) -> tuple[list[float], str]:
    """What was measured, in its unit."""
    if metric.startswith("cache"):
        return [getattr(result, metric)], "bytes"
    return [1000 * seconds for seconds in getattr(result, metric)], "ms"


def ledger_rows(found: dict[str, Generation], images: int, arguments: argparse.Namespace) -> list[dict]:
    """One row per provider and metric; ratios are to the full prompt, below one is less."""
    cut = "".join(f" {name}={getattr(arguments, name)}" for name in ("layers", "width") if getattr(arguments, name))
    device = torch.device(arguments.device)
    shared = {
        "benchmark": "skip_generation",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": cpu_name(),
        "torch": torch.__version__,
        "saccade": commit(*ROOMS),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "threads": torch.get_num_threads(),
        "dtype": arguments.dtype,
        "repeats": arguments.repeats,
        "load": f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores",
    }
    rows = []
    for provider, result in found.items():
        kinds = " ".join(f"{kind}={count}" for kind, count in result.prompt_rows.items())
        for metric in METRICS:
            values, unit = values_of(result, metric)
            if not values:
                continue
            base, _ = values_of(found["full"], metric)
            ratio = f"{statistics.median(values) / statistics.median(base):.4g}" if base else ""
            low, middle, high = (f"{value:.5g}" if unit == "ms" else str(value) for value in percentiles(values))
            figures = {"p20": low, "p50": middle, "p80": high, "ratio_to_baseline": ratio}
            shape = f"{arguments.shape}{cut} images={images} {kinds}"
            name = "full" if provider == "full" else f"skip {arguments.preset}"
            rows.append({**shared, "shape": shape, "provider": name, "metric": metric, "unit": unit, **figures})
    return rows


def show(console: Console, rows: list[dict]) -> None:
    first = rows[0]
    title = f"{first['shape']}  {first['device']}, {first['threads']} thread(s), load {first['load']}"
    table = Table(title=title)
    for column in ("provider", "metric", "unit", "p20", "p50", "p80", "x full"):
        table.add_column(column, justify="right" if column[0] in "px" and column != "provider" else "left")
    for row in rows:
        table.add_row(
            *(row[name] for name in ("provider", "metric", "unit", "p20", "p50", "p80", "ratio_to_baseline"))
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=MEASURED, default="tiny")
    parser.add_argument("--preset", choices=[name for name in PRESETS if name != "576/576"], default="100/156")
    parser.add_argument("--images", default="1,4,16", help="images in the prompt, one run each (default: %(default)s)")
    parser.add_argument("--text-tokens", type=int, default=60)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--layers", type=int, help="language layers to keep")
    parser.add_argument("--width", type=int, help="of the language model")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ledger", type=Path, default=LEDGER, help="CSV file to append to (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    model = generation_model(arguments.shape, arguments.layers, arguments.width, dtype, arguments.device)
    config = SkipVisionConfig.preset(arguments.preset)
    for images in map(int, arguments.images.split(",")):
        counts = (images, arguments.text_tokens, arguments.new_tokens, arguments.repeats)
        rows = ledger_rows(measure_generation(model, config, *counts), images, arguments)
        show(Console(), rows)
        append(arguments.ledger, rows)


if __name__ == "__main__":
    main()
