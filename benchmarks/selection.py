"""Time and tensor operations of every reducer, beside a per-image loop.

    python benchmarks/selection.py [--quick] [--threads 1] [--repeats 7] [--device cpu|cuda] [--ledger FILE]

Each provider runs once to warm up, then all take turns until each has run `--repeats` times, so that other load on the
machine falls on all alike. Operations of the batched forms are counted on the meta device: those that a GPU is given.
Each (shape, provider, metric) becomes one row of the ledger, which is only appended to.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from loops import LOOPS
from rich.console import Console
from rich.table import Table
from torch import Tensor

from saccade.benchmark.ledger import append_rows, figures, origin
from saccade.counting import OperationCount
from saccade.reducers import Reducer, get_reducer, is_low_resolution, list_reducers
from saccade.tokens import VisualContext

SHAPES = [(16, 576, 58), (80, 576, 58), (4, 2880, 288)]
QUICK_SHAPES = [(4, 144, 14), (2, 576, 58)]
LOOP = ", loop over images"
HEAD_WIDTH = 64
LEDGER = Path(__file__).with_name("ledger.csv")


def make_context(shape: tuple[int, int, int], width: int, dtype: torch.dtype, device: torch.device) -> VisualContext:
    """B rows of N random tokens, with everything that a reducer may need."""
    rows, tokens, _ = shape
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator)

    # A shared direction, since the tokens of one image resemble each other.
    features = (draw(rows, tokens, width) + draw(rows, 1, width)).to(device, dtype)
    return VisualContext(
        features,
        encoder_features=features,
        saliency=draw(rows, tokens).softmax(dim=1).to(device),
        keys=draw(rows, tokens, HEAD_WIDTH).to(device),
        relevance=draw(rows, tokens).tanh().to(device),
    )


def empty_context(shape: tuple[int, int, int], width: int, dtype: torch.dtype) -> VisualContext:
    """The same without values, on the meta device: what it is asked to do is what a GPU would be."""
    rows, tokens, _ = shape
    features = torch.empty(rows, tokens, width, dtype=dtype, device="meta")
    scores = torch.empty(rows, tokens, device="meta")
    keys = torch.empty(rows, tokens, HEAD_WIDTH, device="meta")
    return VisualContext(features, encoder_features=features, saliency=scores, keys=keys, relevance=scores)


def reducers() -> dict[str, Reducer]:
    """What is timed, by name: every reducer of tokens."""
    found = {name: get_reducer(name) for name in list_reducers()}
    return {name: reducer for name, reducer in found.items() if not is_low_resolution(reducer)} | {
        "divprune, float64": get_reducer("divprune", precision="float64")
    }


def loop_over_images(name: str, reducer: Reducer, context: VisualContext, keep: int) -> Tensor:
    """Index `(B, K)`: image by image by the method's formula, or by the reducer where that is itself one line."""
    images = [context.select_rows(slice(row, row + 1)) for row in range(context.shape[0])]
    formula = LOOPS.get(name.partition(",")[0])
    if formula is None:
        return torch.cat([reducer(image, keep).index for image in images])
    return torch.tensor([formula(image, keep) for image in images])


def measure(shape: tuple[int, int, int], width: int, dtype: torch.dtype, device: torch.device, repeats: int) -> dict:
    """By reducer: seconds of each repeat and operations, batched and in a loop, and in how many rows they agree."""
    keep = shape[2]
    context, empty = make_context(shape, width, dtype, device), empty_context(shape, width, dtype)
    calls: dict[str, Callable[[], Tensor]] = {}
    results: dict[str, dict] = {}
    for name, reducer in reducers().items():
        calls[name] = lambda reducer=reducer: reducer(context, keep).index
        calls[name + LOOP] = lambda name=name, reducer=reducer: loop_over_images(name, reducer, context, keep)
        with OperationCount() as batched:
            reducer(empty, keep)
        index = calls[name]()
        with OperationCount() as looped:
            loop_index = calls[name + LOOP]()
        same = int((index.cpu() == loop_index.cpu()).all(dim=1).sum())
        results[name] = {"operations": batched.count, "seconds": [], "equal": same}
        results[name + LOOP] = {"operations": looped.count, "seconds": [], "equal": shape[0]}
    for _ in range(repeats):
        for name, call in calls.items():
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            results[name]["seconds"].append(time.perf_counter() - start)
    return results


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def ledger_rows(shape: tuple[int, int, int], results: dict, arguments: argparse.Namespace) -> list[dict]:
    """One row per provider and metric; the ratio is to the provider's loop over images, below one is less."""
    device = torch.device(arguments.device)
    shared = origin("selection", device, arguments.dtype, arguments.repeats, ("reducers", "tokens"))
    shared["shape"] = f"B={shape[0]} N={shape[1]} k={shape[2]} D={arguments.width}"
    rows = []
    for name in results:
        loop = results[name.removesuffix(LOOP) + LOOP]
        for metric, unit in (("time", "ms"), ("operations", "count")):
            values, baseline = (
                [1000 * value for value in result["seconds"]] if metric == "time" else [result["operations"]]
                for result in (results[name], loop)
            )
            row = {**shared, "provider": name, "metric": metric, "unit": unit}
            rows.append({**row, **figures(values, baseline)})
    return rows


def show(console: Console, rows: list[dict], results: dict) -> None:
    first = rows[0]
    title = f"{first['shape']}  {first['device']}, {first['threads']} thread(s), load {first['load']}"
    table = Table(title=title, caption="x loop: of the loop over images; equal: rows in which both chose the same")
    for column in ("provider", "ms p20", "ms p50", "ms p80", "x loop", "ops", "x loop ", "equal"):
        table.add_column(column, justify="left" if column == "provider" else "right", no_wrap=True)
    for timed, counted in zip(rows[::2], rows[1::2], strict=True):
        shown = [timed[column] for column in ("p20", "p50", "p80", "ratio_to_baseline")]
        equal = str(results[timed["provider"]]["equal"])
        table.add_row(timed["provider"], *shown, counted["p50"], counted["ratio_to_baseline"], equal)
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
    console = Console(width=None if sys.stdout.isatty() else 120)
    for shape in QUICK_SHAPES if arguments.quick else SHAPES:
        dtype = getattr(torch, arguments.dtype)
        results = measure(shape, arguments.width, dtype, torch.device(arguments.device), arguments.repeats)
        rows = ledger_rows(shape, results, arguments)
        show(console, rows, results)
        if ledger is not None:
            append_rows(ledger, rows)


if __name__ == "__main__":
    main()
