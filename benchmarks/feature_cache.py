"""Time saved by reading a frozen tower's features from disk instead of running the tower.

    python -m benchmarks.feature_cache [--shape tiny] [--batch-size 8] [--device cpu] [--folder DIR] [--ledger FILE]

Times a fast step of stage two (p = 0.9, DivPrune) and the image encoding within it, on the same batches in
alternation: without a cache, in a first epoch (every feature is computed and stored), and in a later epoch (every
feature is read). The files have just been written, so they are read from the page cache: to measure a slow disk, put
`--folder` on it and use more features than fit into memory.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.batches import label_count, make_batch
from benchmarks.ledger import append_rows, check_ledger, figures, origin
from benchmarks.shapes import build_shape
from benchmarks.steps import seconds_on, train_stage
from benchmarks.train import TrainBench
from saccade.cli.main import Parser, guarded
from saccade.dualspeed.step import DualSpeedStep, ModePlan
from saccade.families import get_family
from saccade.families.cache import FeatureCache, tower_fingerprint
from saccade.families.store import SUFFIX
from saccade.pruning import Pruner
from saccade.reducers import PruningConfig
from saccade.training.length_table import draw_lengths
from saccade.values import check_counts

NONE, FIRST, LATER = WAYS = ("no cache", "first epoch", "later epochs")
METRICS = ("encode", "step")
UNBOUNDED = 2**50


def checked(arguments: argparse.Namespace) -> TrainBench:
    """The options shared with `python -m benchmarks.train`, checked.

    Raises:
        SaccadeError: on a value out of range.
    """
    check_counts(batches=arguments.batches)
    names = TrainBench.__dataclass_fields__.keys() & vars(arguments).keys()
    return TrainBench(**{name: getattr(arguments, name) for name in names})


class Bench:
    """The model, its batches and a folder for cached features.

    Args:
        arguments: parsed command line.
        folder: where features are cached; its subfolders are deleted.
    """

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        dtype, device = getattr(torch, arguments.dtype), torch.device(arguments.device)
        self.model = build_shape(
            arguments.shape, arguments.layers, arguments.width, dtype, device, tower_layers=arguments.tower_layers
        )
        self.device, self.family = device, get_family(self.model)
        stage = checked(arguments).stages[-1]
        train_stage(self.model, self.family, stage)
        texts = draw_lengths(stage.sources, arguments.batch_size * arguments.batches, seed=0)
        self.batches = [
            make_batch(self.family, texts[start : start + arguments.batch_size], seed=start)
            for start in range(0, len(texts), arguments.batch_size)
        ]
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5)
        fast = Pruner(PruningConfig(prune_ratio=0.9))
        self.step = DualSpeedStep(self.family, {"fast": ModePlan(fast)}, 1.0, 1.0)
        self.folder = folder
        self.caches = {way: FeatureCache(self.family, folder / way, UNBOUNDED) for way in (FIRST, LATER)}
        started = seconds_on(device)
        tower_fingerprint(self.family.vision_tower, self.family.vision_feature_layers)
        self.fingerprint_seconds = seconds_on(device) - started
        for batch in self.batches:  # also the warm-up
            for way in WAYS:
                for metric in METRICS:
                    self.seconds(way, metric, batch)

    def serving(self, way: str) -> AbstractContextManager[None]:
        return nullcontext() if way == NONE else self.caches[way].serving()

    def seconds(self, way: str, metric: str, batch: dict[str, Any]) -> float:
        """Duration of one encoding or one step, depending on `metric`."""
        if way == FIRST:
            for path in (self.folder / FIRST).rglob(f"*{SUFFIX}"):
                path.unlink()
        self.optimizer.zero_grad(set_to_none=True)
        started = seconds_on(self.device)
        with self.serving(way):
            if metric == "encode":
                self.family.encode(batch)
            else:
                self.step("fast", batch, label_count(batch)).loss.backward()
                self.optimizer.step()
        return seconds_on(self.device) - started

    def row_bytes(self) -> float:
        """Bytes on disk of one image or one crop."""
        return statistics.mean(path.stat().st_size for path in (self.folder / LATER).rglob(f"*{SUFFIX}"))

    def image_bytes(self) -> float:
        """Bytes on disk of one sample's image, including all of its crops."""
        files = len(list((self.folder / LATER).rglob(f"*{SUFFIX}")))
        return self.row_bytes() * files / sum(len(batch["input_ids"]) for batch in self.batches)


def measure(arguments: argparse.Namespace, folder: Path) -> tuple[Bench, dict[tuple[str, str], list[float]]]:
    """Seconds by variant and metric; the variants alternate in a rotating order."""
    bench = Bench(arguments, folder)
    found: dict[tuple[str, str], list[float]] = {(way, metric): [] for metric in METRICS for way in WAYS}
    turn = 0
    for _ in range(arguments.repeats):
        for batch in bench.batches:
            for place in range(len(found)):
                way, metric = list(found)[(turn + place) % len(found)]
                found[way, metric].append(bench.seconds(way, metric, batch))
            turn += 1
    return bench, found


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="tiny", help="model shape, as for `python -m benchmarks.train`")
    parser.add_argument("--layers", type=int, help="language layers to keep")
    parser.add_argument("--width", type=int, help="width of the language model")
    parser.add_argument("--tower-layers", type=int, help="layers of the vision tower to keep")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5, help="passes over the batches")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, help="folder for cached features (default: a temporary one)")
    parser.add_argument("--ledger", type=Path, help="CSV file to append to")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    checked(arguments)
    if arguments.ledger is not None:
        check_ledger(arguments.ledger)
    if arguments.folder is not None:
        arguments.folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="features-", dir=arguments.folder))
    try:
        bench, found = measure(arguments, folder)
        row_bytes, image_bytes = bench.row_bytes(), bench.image_bytes()
    finally:
        shutil.rmtree(folder)
    console = Console(width=None if sys.stdout.isatty() else 120)
    table = Table("ms", *WAYS, "first / none", "later / none")
    for metric in METRICS:
        middle = [statistics.median(found[way, metric]) * 1000 for way in WAYS]
        table.add_row(metric, *(f"{value:.4g}" for value in middle), *(f"{x / middle[0]:.3g}" for x in middle[1:]))
    console.print(table)
    console.print(
        f"{row_bytes / 1e6:.3g} MB on disk per crop, {image_bytes / 1e6:.3g} MB per image; the tower's fingerprint "
        f"took {bench.fingerprint_seconds:.2g} s, once per run"
    )
    if arguments.ledger is not None:
        rooms = ("dualspeed", "families", "reducers", "tokens")
        shared = origin("feature_cache", bench.device, arguments.dtype, arguments.repeats, rooms)
        cuts = f"layers {arguments.layers}, width {arguments.width}, tower_layers {arguments.tower_layers}"
        shared["shape"] = f"{arguments.shape}, {cuts}, {arguments.batch_size} rows"
        rows = [
            {**shared, "provider": way, "metric": metric, "unit": "ms"}
            | figures([1000 * x for x in values], [1000 * x for x in found[NONE, metric]])
            for (way, metric), values in found.items()
        ]
        append_rows(arguments.ledger, rows)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
