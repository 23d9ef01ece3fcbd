"""LoRA steps in bfloat16, with the casts of each layer's input that autocast undoes and without them.

python -m benchmarks.lora_casts                                               the testbed's model, on this machine
python -m benchmarks.lora_casts --shape llava-1.5-7b --batch-size 8 --device cuda

Adapters have no dropout. Both ways alternate on the same batch; on a CPU, CPU time counts. Memory is what autograd
keeps for the backward pass.
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from statistics import median
from unittest.mock import patch

import torch
from torch import nn

from benchmarks import variants
from benchmarks.batches import make_batch
from benchmarks.counting import count_saved_bytes
from benchmarks.steps import own_seconds_on, train_stage
from benchmarks.train import TrainBench, build_model, options, shared_arguments
from benchmarks.variants import ALL_PACKED, PRUNED_PACKED, training_variants
from saccade.cli.main import Parser, guarded
from saccade.families import get_family
from saccade.report.tables import markdown_table
from saccade.training.length_table import draw_lengths


def measure_casts(bench: TrainBench) -> dict[str, dict[bool, tuple[float, int]]]:
    """By kind of step: median seconds, and bytes kept for the backward pass, with the casts (true) and without them.

    Args:
        bench: of which `repeats` steps are timed, on a batch of stage two.
    """
    torch.manual_seed(0)
    model = build_model(bench)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # with it, the casts stay on a CPU
    family, stage = get_family(model), bench.stages[-1]
    train_stage(model, family, stage)
    batch = make_batch(family, draw_lengths(stage.sources, stage.batch_size, seed=0), seed=0)
    device, parameters = family.model.device, list(model.parameters())
    found: dict[str, dict[bool, tuple[float, int]]] = {}
    every, _ = training_variants(model, bench.settings, slow=True)
    for variant in (one for one in every if one.name in (ALL_PACKED, PRUNED_PACKED)):
        seconds: dict[bool, list[float]] = {True: [], False: []}
        saved = {}
        for number in range(bench.warm_up + bench.repeats):
            for casts in (True, False) if number % 2 else (False, True):
                kept = patch.object(variants, "spare_casts") if casts else nullcontext()
                with kept, variant.active() as loss:
                    if number == 0:
                        with count_saved_bytes(iter(parameters)) as memory:
                            loss(batch)
                        saved[casts] = memory.peak
                    started = own_seconds_on(device)
                    loss(batch).backward()
                    seconds[casts].append(own_seconds_on(device) - started)
                model.zero_grad(set_to_none=True)
        found[variant.name] = {
            casts: (median(times[bench.warm_up :]), saved[casts]) for casts, times in seconds.items()
        }
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print a Markdown table.

    Raises:
        SaccadeError: on bad input, before a model is built.
    """
    parser = Parser("benchmarks.lora_casts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared_arguments(parser)
    parser.add_argument("--batch-size", type=int, default=4, metavar="B", help="rows per step (default: %(default)s)")
    parser.set_defaults(shape="smol", dtype="bfloat16", repeats=7, lora=True)
    bench = TrainBench(**options(parser.parse_args(argv), TrainBench))
    torch.set_num_threads(bench.threads)
    cells = [
        [
            step,
            f"{1000 * with_casts:.0f} ms",
            f"{1000 * without:.0f} ms",
            f"{with_casts / without:.2f}x",
            f"{more / 2**20:.2f} MiB",
            f"{fewer / 2**20:.2f} MiB",
        ]
        for step, found in measure_casts(bench).items()
        for (with_casts, more), (without, fewer) in [(found[True], found[False])]
    ]
    print(markdown_table(["step", "with casts", "without", "ratio", "kept with casts", "kept without"], cells))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
