"""Time and tensor operations of every reducer, beside a per-image loop.

    python benchmarks/selection.py [--quick] [--threads 1] [--repeats 7] [--device cpu|cuda] [--ledger FILE]

Each provider runs once to warm up, then all take turns until each has run `--repeats` times, so that other load on the
machine falls on all alike. Each (shape, provider, metric) becomes one row of the ledger, which is only appended to.
"""

import argparse
import csv
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from saccade.reducers import get_reducer, list_reducers
from saccade.tokens import VisualContext

COLUMNS = [
    *("benchmark", "provider", "metric", "unit", "shape", "p20", "p50", "p80", "ratio_to_baseline"),
    *("device", "cpu", "torch", "saccade", "date", "command", "threads", "dtype", "repeats", "load"),
]
SHAPES = [(16, 576, 58), (80, 576, 58), (4, 2880, 288)]
QUICK_SHAPES = [(4, 144, 14), (2, 576, 58)]
BASELINE = "divprune, loop over images"
LEDGER = Path(__file__).with_name("ledger.csv")


class OperationCount(TorchDispatchMode):
    """Counts the tensor operations that compute something: views are free, each other one is at least a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def divprune_per_image(features: Tensor, keep: int) -> Tensor:
    """The greedy max-min selection of DivPrune, image by image as its formula reads: `(B, N, D)` to long `(B, keep)`.

    In float32 like a plain implementation, with a running minimum over the kept tokens.
    """
    index = []
    for image in features.float():
        unit = image / image.norm(dim=1, keepdim=True)
        distance = 1.0 - unit @ unit.T
        others = distance.clone().fill_diagonal_(float("inf"))
        chosen = [int(others.min(dim=1).values.argmax())]
        nearest = torch.full_like(distance[0], float("inf"))
        while len(chosen) < keep:
            nearest = torch.minimum(nearest, distance[chosen[-1]])
            nearest[chosen[-1]] = -1.0
            chosen.append(int(nearest.argmax()))
        index.append(sorted(chosen))
    return torch.tensor(index, device=features.device)


def providers(keep: int) -> dict[str, Callable[[VisualContext], Tensor]]:
    """What is timed: each takes a context and returns its index `(B, K)`."""
    reducers = {name: get_reducer(name) for name in list_reducers()}
    calls = {
        name: (lambda context, reducer=reducer: reducer(context, keep).index)
        for name, reducer in reducers.items()
        if not reducer.needs
    }
    float64 = get_reducer("divprune", precision="float64")
    return {
        BASELINE: lambda context: divprune_per_image(context.features, keep),
        **calls,
        "divprune, float64": lambda context: float64(context, keep).index,
    }


def measure(shape: tuple[int, int, int], width: int, dtype: torch.dtype, device: torch.device, repeats: int) -> dict:
    """Seconds of each repeat and the number of operations, by provider."""
    rows, tokens, keep = shape
    generator = torch.Generator().manual_seed(0)
    # A shared direction, since the tokens of one image resemble each other.
    features = torch.randn(rows, tokens, width, generator=generator) + torch.randn(rows, 1, width, generator=generator)
    context = VisualContext(features.to(device, dtype))
    calls = providers(keep)
    results: dict = {name: {"seconds": []} for name in calls}
    for name, call in calls.items():
        with OperationCount() as counter:
            results[name]["index"] = call(context)
        results[name]["operations"] = counter.count
    for _ in range(repeats):
        for name, call in calls.items():
            synchronize(device)
            start = time.perf_counter()
            call(context)
            synchronize(device)
            results[name]["seconds"].append(time.perf_counter() - start)
    same = (results["divprune"]["index"] == results[BASELINE]["index"]).all(dim=1).sum()
    results["rows equal"] = f"{int(same)} of {rows}"
    return results


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def percentiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return cuts[1], statistics.median(values), cuts[7]


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit(*rooms: str) -> str:
    """The commit of the library that ran, with a mark if the files of these rooms differ from it."""
    run = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*run, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        paths = ["--", *(f":/src/saccade/{room}" for room in rooms)]
        changed = subprocess.run([*run, "diff", "--quiet", "HEAD", *paths], check=False).returncode
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+changes" if changed else "")


def ledger_rows(shape: tuple[int, int, int], results: dict, arguments: argparse.Namespace) -> list[dict]:
    """One row per provider and metric; the ratio is to the loop over images, below one is less."""
    device = torch.device(arguments.device)
    shared = {
        "benchmark": "selection",
        "shape": f"B={shape[0]} N={shape[1]} k={shape[2]} D={arguments.width}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": cpu_name(),
        "torch": torch.__version__,
        "saccade": commit("reducers", "tokens"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "threads": torch.get_num_threads(),
        "dtype": arguments.dtype,
        "repeats": arguments.repeats,
        "load": f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores",
    }
    rows = []
    names = [name for name in results if name != "rows equal"]
    base = {"time": statistics.median(results[BASELINE]["seconds"]), "operations": results[BASELINE]["operations"]}
    for name in names:
        for metric, unit in (("time", "ms"), ("operations", "count")):
            values = results[name]["seconds"] if metric == "time" else [results[name]["operations"]]
            scale = 1000 if metric == "time" else 1
            low, middle, high = (f"{value * scale:.5g}" for value in percentiles(values))
            ratio = f"{statistics.median(values) / base[metric]:.4g}"
            figures = {"p20": low, "p50": middle, "p80": high, "ratio_to_baseline": ratio}
            rows.append({**shared, "provider": name, "metric": metric, "unit": unit, **figures})
    return rows


def append(path: Path, rows: list[dict]) -> None:
    """Add rows to the ledger, with a header if it is new."""
    new = not path.exists()
    if not new and path.read_text().splitlines()[0].split(",") != COLUMNS:
        raise SystemExit(f"{path}: the first line is not the header that this script writes; choose another --ledger")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def show(console: Console, rows: list[dict], equal: str) -> None:
    first = rows[0]
    title = f"{first['shape']}  {first['device']}, {first['threads']} thread(s), load {first['load']}"
    table = Table(title=title, caption=f"divprune chose the loop's tokens in {equal} rows")
    for column in ("provider", "ms p20", "ms p50", "ms p80", "x loop", "ops", "x loop "):
        table.add_column(column, justify="left" if column == "provider" else "right", no_wrap=True)
    for timed, counted in zip(rows[::2], rows[1::2], strict=True):
        figures = [timed[column] for column in ("p20", "p50", "p80", "ratio_to_baseline")]
        table.add_row(timed["provider"], *figures, counted["p50"], counted["ratio_to_baseline"])
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes, nothing kept unless --ledger is given")
    parser.add_argument("--width", type=int, default=1024, help="feature width D")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--ledger", type=Path, help=f"CSV file to append to; {LEDGER.name} beside this script by default"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    ledger = arguments.ledger or (None if arguments.quick else LEDGER)
    console = Console()
    for shape in QUICK_SHAPES if arguments.quick else SHAPES:
        dtype = getattr(torch, arguments.dtype)
        results = measure(shape, arguments.width, dtype, torch.device(arguments.device), arguments.repeats)
        rows = ledger_rows(shape, results, arguments)
        show(console, rows, results["rows equal"])
        if ledger is not None:
            append(ledger, rows)


if __name__ == "__main__":
    main()
