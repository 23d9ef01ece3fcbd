"""Time and tensor operations of every reducer, compared to a per-image loop.

    python -m benchmarks.selection [--quick] [--only NAMES] [--rows 16,80] [--threads 1] [--repeats 7]
        [--device cuda] [--ledger FILE]

Each provider runs once to warm up; then all alternate until each has run `--repeats` times, so other load on the
machine affects all equally. A provider that takes less than a fifth of a second runs once untimed before each timing.
Both wall-clock and CPU time are reported; other load hardly affects the latter. Operations of the batched versions are
counted on the meta device, which gives those that a GPU would run. Each (shape, provider, metric) becomes one row of
the append-only ledger.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.counting import OperationCount
from benchmarks.ledger import append_rows, check_ledger, figures, origin
from benchmarks.loops import LOOPS
from saccade.cli.main import guarded
from saccade.errors import SaccadeError
from saccade.reducers import Reducer, get_reducer, list_reducers
from saccade.reducers.frames import KNOW_TIME
from saccade.tokens import Reduction, VisualContext

SHAPES = [(16, 576, 58), (80, 576, 58), (4, 2880, 288)]
QUICK_SHAPES = [(4, 144, 14), (2, 576, 58)]
LOOP = ", loop over images"
SEEDED = "random, seeded"
METRICS = {"time": "ms", "cpu_time": "ms", "operations": "count"}
HEAD_WIDTH = 64
WORDS = 16
SHORT_SECONDS = 0.2
LEDGER = Path(__file__).with_name("ledger.csv")


def full_grid(tokens: int) -> tuple[int, int]:
    """Rows and columns of the most nearly square full grid of N tokens."""
    rows = next(rows for rows in range(math.isqrt(tokens), 0, -1) if tokens % rows == 0)
    return rows, tokens // rows


def make_context(shape: tuple[int, int, int], width: int, dtype: torch.dtype, device: torch.device) -> VisualContext:
    """B rows of N random tokens, with every input that a reducer may need; the meta device holds no values."""
    rows, tokens, _ = shape
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator)

    # The shared direction makes the tokens of one image resemble each other, as real ones do.
    features = (draw(rows, tokens, width) + draw(rows, 1, width)).to(device, dtype)
    return VisualContext(
        features,
        encoder_features=features,
        grid=torch.tensor((1, *full_grid(tokens))).expand(rows, 3).to(device),
        saliency=draw(rows, tokens).softmax(dim=1).to(device),
        keys=draw(rows, tokens, HEAD_WIDTH).to(device),
        relevance=draw(rows, tokens).tanh().to(device),
        word_relevance=(0.1 * draw(rows, tokens, WORDS)).to(device),
    )


def providers() -> dict[str, Reducer]:
    """The timed reducers by name, including options that change a reducer's cost.

    Those that know time are left out: of an image, which has one frame, they keep what another reducer does.
    """
    return {name: get_reducer(name) for name in list_reducers() if name not in KNOW_TIME} | {
        **{f"{name}, float64": get_reducer(name, precision="float64") for name in ("cdpruner", "divprune", "dpp")},
        SEEDED: get_reducer("random"),
    }


def seed_rows(name: str, context: VisualContext) -> VisualContext:
    """`context`, with seeds if the provider needs them."""
    seeds = torch.arange(context.shape[0], device=context.features.device)
    return context.replace(seed=seeds) if name == SEEDED else context


def reduce_batch(name: str, reducer: Reducer, context: VisualContext, keep: int) -> Reduction:
    """Reduce all images at once."""
    return reducer(seed_rows(name, context), keep)


def loop_over_images(name: str, context: VisualContext, keep: int) -> Reduction:
    """Reduce image by image with the implementation in `loops.py`."""
    context = seed_rows(name, context)
    images = [context.select_rows(slice(row, row + 1)) for row in range(context.shape[0])]
    formula = LOOPS.get(name) or LOOPS[name.partition(",")[0]]
    found = [formula(image, keep) for image in images]
    weights = [weight for _, weight in found if weight is not None]
    return Reduction(torch.stack([index for index, _ in found]), torch.stack(weights) if weights else None)


def rows_equal(batched: Reduction, looped: Reduction) -> int:
    """Number of rows in which both keep the same tokens and merge them with the same weights."""
    same = (batched.index == looped.index).all(dim=1)
    if batched.weight is not None:
        same &= (batched.weight - looped.weight).abs().amax(dim=(1, 2)) < 1e-4
    return int(same.sum())


def measure(
    chosen: dict[str, Reducer],
    shape: tuple[int, int, int],
    width: int,
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
) -> dict:
    """By provider: milliseconds per repeat and operation counts, batched and in a loop, and how many rows agree.

    `random` and its loop draw different numbers, so their rows are not compared.
    """
    keep, meta = shape[2], torch.device("meta")
    context = make_context(shape, width, dtype, device)
    empty = make_context(shape, width, dtype, meta)
    calls: dict[str, Callable[[], Reduction]] = {}
    results: dict[str, dict] = {}
    warm: dict[str, bool] = {}
    for name, reducer in chosen.items():
        calls[name] = partial(reduce_batch, name, reducer, context, keep)
        calls[name + LOOP] = partial(loop_over_images, name, context, keep)
        with OperationCount() as batched:
            reduce_batch(name, reducer, empty, keep)
        begun = time.perf_counter()
        reduction = calls[name]()
        synchronize(device)
        # A short one, timed right after others, would otherwise pay for the cache misses that its loop is spared.
        warm[name] = warm[name + LOOP] = time.perf_counter() - begun < SHORT_SECONDS
        with OperationCount() as looped:
            loop = calls[name + LOOP]()
        same = None if name.startswith("random") else rows_equal(reduction, loop)
        results[name] = {"time": [], "cpu_time": [], "operations": [batched.count], "equal": same}
        results[name + LOOP] = {"time": [], "cpu_time": [], "operations": [looped.count], "equal": None}
    for _ in range(repeats):
        for name, call in calls.items():
            if warm[name]:
                call()
            synchronize(device)
            start, start_cpu = time.perf_counter(), time.process_time()
            call()
            synchronize(device)
            results[name]["cpu_time"].append(1000 * (time.process_time() - start_cpu))
            results[name]["time"].append(1000 * (time.perf_counter() - start))
    return results


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def ledger_rows(shape: tuple[int, int, int], results: dict, arguments: argparse.Namespace) -> list[dict]:
    """One row per provider and metric; ratios are relative to the loop over images, so below one means cheaper."""
    device = torch.device(arguments.device)
    shared = origin("selection", device, arguments.dtype, arguments.repeats, ("reducers", "tokens"))
    shared["shape"] = f"B={shape[0]} N={shape[1]} k={shape[2]} D={arguments.width}"
    rows = []
    for name in results:
        loop = results[name.removesuffix(LOOP) + LOOP]
        for metric, unit in METRICS.items():
            row = {**shared, "provider": name, "metric": metric, "unit": unit}
            rows.append({**row, **figures(results[name][metric], loop[metric])})
    return rows


def show(console: Console, rows: list[dict], results: dict) -> None:
    first = rows[0]
    title = f"{first['shape']}  {first['device']}, {first['threads']} thread(s), load {first['load']}"
    table = Table(title=title, caption="x loop: relative to the loop over images; equal: rows with the same tokens")
    for column in ("provider", "ms p50", "x loop", "cpu ms p50", "x loop ", "ops", " x loop", "equal"):
        table.add_column(column, justify="left" if column == "provider" else "right", no_wrap=True)
    for start in range(0, len(rows), len(METRICS)):
        metrics = rows[start : start + len(METRICS)]
        shown = [metric[column] for metric in metrics for column in ("p50", "ratio_to_baseline")]
        same = results[metrics[0]["provider"]]["equal"]
        table.add_row(metrics[0]["provider"], *shown, "" if same is None else str(same))
    console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table for each shape, and append to the ledger.

    Raises:
        SaccadeError: on an unknown provider or number of rows, or a file that is not a ledger, before anything is
            measured.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes, nothing saved unless --ledger is given")
    parser.add_argument("--only", default="", help="names of providers, separated by semicolons (default: all)")
    parser.add_argument("--rows", metavar="A,B", help="shapes to measure, by their number of rows (default: all)")
    parser.add_argument("--width", type=int, default=1024, help="feature width D")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--ledger", type=Path, help=f"CSV file to append to (default: {LEDGER.name} next to this script)"
    )
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    ledger = arguments.ledger or (None if arguments.quick else LEDGER)
    if ledger is not None:
        check_ledger(ledger)
    known = providers()
    names = [name.strip() for name in arguments.only.split(";") if name.strip()] or list(known)
    if unknown := [name for name in names if name not in known]:
        raise SaccadeError(f"--only {unknown[0]!r}: choose from {'; '.join(known)}")
    chosen = {name: known[name] for name in names}
    shapes = {str(shape[0]): shape for shape in (QUICK_SHAPES if arguments.quick else SHAPES)}
    wanted = list(shapes) if arguments.rows is None else arguments.rows.split(",")
    if unknown := [rows for rows in wanted if rows not in shapes]:
        raise SaccadeError(f"--rows {unknown[0]!r}: choose from {', '.join(shapes)}")
    console = Console(width=None if sys.stdout.isatty() else 120)
    for shape in (shapes[rows] for rows in wanted):
        dtype = getattr(torch, arguments.dtype)
        results = measure(chosen, shape, arguments.width, dtype, torch.device(arguments.device), arguments.repeats)
        rows = ledger_rows(shape, results, arguments)
        show(console, rows, results)
        if ledger is not None:
            append_rows(ledger, rows)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
