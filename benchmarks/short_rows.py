"""Attention of packed rows on a CPU in bfloat16, forward and backward: plain products beside SDPA.

    python -m benchmarks.short_rows [--lengths 76 202 400 750 1024] [--heads 9] [--key-heads 3] [--repeats 15]

Both alternate, and CPU time counts; `saccade.dualspeed.packing.SHORT` is the length up to which products are used.
"""

import argparse
import time
from collections.abc import Sequence
from statistics import median
from unittest.mock import patch

import torch
from torch import nn

from saccade.cli.main import guarded
from saccade.dualspeed import packing
from saccade.errors import SaccadeError
from saccade.report.tables import markdown_table
from saccade.values import check_counts

WIDTH = 64


def measure_row(length: int, heads: int, key_heads: int, repeats: int) -> tuple[float, float]:
    """Median milliseconds of CPU time for one row: of plain products, of SDPA."""
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(1, number, length, WIDTH, dtype=torch.bfloat16, requires_grad=True)
        for number in (heads, key_heads, key_heads)
    )
    module = nn.Module()
    module.num_key_value_groups = heads // key_heads
    rows = packing.PackedRows([length], torch.tensor([0, length], dtype=torch.int32))
    spent: dict[int, list[float]] = {length: [], 0: []}
    for _ in range(repeats + 1):
        for short, times in spent.items():
            with patch.object(packing, "SHORT", short):
                started = time.process_time()
                output, _ = packing.packed_attention(module, query, key, value, None, packed_rows=rows)
                output.backward(torch.ones_like(output))
                times.append(1000 * (time.process_time() - started))
    # The first of each warms up.
    products, sdpa = (median(times[1:]) for times in spent.values())
    return products, sdpa


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[76, 202, 400, 750, 1024])
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--key-heads", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args(argv)
    check_counts(heads=args.heads, key_heads=args.key_heads, repeats=args.repeats, lengths=min(args.lengths))
    if args.heads % args.key_heads:
        raise SaccadeError(f"heads={args.heads}: give a multiple of key_heads={args.key_heads}")
    torch.set_num_threads(1)
    cells = []
    for length in args.lengths:
        products, sdpa = measure_row(length, args.heads, args.key_heads, args.repeats)
        cells.append([str(length), f"{products:.3f} ms", f"{sdpa:.3f} ms", f"{sdpa / products:.1f}x"])
    print(markdown_table(["tokens of a row", "plain products", "SDPA", "ratio"], cells))
    return 0


if __name__ == "__main__":
    raise SystemExit(guarded(main))
