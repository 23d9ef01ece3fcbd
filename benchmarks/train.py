"""Times of training steps: one model shape, both stages of a recipe, every variant, and the speed-up FLOPs allow.

python -m benchmarks.train                                          the tiny model on this machine
python -m benchmarks.train --shape llava-1.5-7b --layers 2 --width 512 --tower-layers 2 --batch-size 4
python -m benchmarks.train --shape smol --batch-size 2 --repeats 5 --warm-up 1 --lora --dtype bfloat16
python -m benchmarks.train --shape llava-1.5-7b --lora --gradient-checkpointing --device cuda --dtype bfloat16
"""

import argparse
import hashlib
import json
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

import saccade
from benchmarks.ledger import append_rows, check_ledger, figures, origin, percentiles
from benchmarks.plots import plot_parts, plot_speedups
from benchmarks.shapes import build_shape, check_place, get_shape
from benchmarks.steps import Stage, Timing, measure_stage, token_rate, whole_schedule
from benchmarks.variants import STOCK, Settings
from saccade.cli.main import Parser, guarded
from saccade.errors import SaccadeError
from saccade.families import get_family
from saccade.files import to_json, write_json_atomically
from saccade.reducers import PruningConfig
from saccade.report.environment import environment
from saccade.report.tables import print_table
from saccade.skip_vision import SkipVisionConfig
from saccade.training.length_table import LLAVA_558K, LLAVA_665K, Source
from saccade.values import check_counts

DIGITS = (Source("digit scenes", 1, 4, 10, 3),)
"""Questions about the embedded digit scenes, four per scene."""
DIGIT_CAPTIONS = (Source("captions of digit scenes", 1, 1, 4, 20),)
SMOL = (Source("questions of the testbed", 1, 6, 18, 3),)
"""Six per picture. Tokens of both are about the means of its rows, with the chat format."""
SMOL_CAPTIONS = (Source("captions of the testbed", 1, 1, 30, 15),)
TEXTS = {
    "tiny": ((DIGIT_CAPTIONS, 558), (DIGITS, 665)),
    "smol": ((SMOL_CAPTIONS, 0.08), (SMOL, 0.6)),
}
"""What the rows of both stages say, and thousands of rows in the whole schedule; those of LLaVA-1.5 for other shapes,
whose numbers of rows the digit scenes are weighted by too."""

ROOMS = ("dualspeed", "skip_vision", "pruning", "families", "reducers", "tokens")
RESULT_FILE = "bench_train.json"
UNFINISHED_FILE = "bench_train.unfinished.json"


@dataclass(frozen=True)
class TrainBench:
    """What to measure.

    Args:
        shape: name of a model shape.
        layers, width, tower_layers: size to cut the model to.
        batch_size: rows per step, in both stages.
        repeats, warm_up: timed steps per variant and stage, and untimed ones before them.
        prune_ratio, slow_probability, reducer, skip: settings of the methods.
        lora: train LoRA adapters of the language model, as the published recipe does.
        gradient_checkpointing: recompute activations in the backward pass.
        compile: measure compiled decoder layers too; compiling takes minutes.
        device, dtype, threads: where and how to run.

    Raises:
        SaccadeError: on an unknown name or a value out of range.
    """

    shape: str = "tiny"
    layers: int | None = None
    width: int | None = None
    tower_layers: int | None = None
    batch_size: int = 8
    repeats: int = 10
    warm_up: int = 2
    prune_ratio: float = 0.9
    slow_probability: float = 0.1
    reducer: str = "divprune"
    skip: str = "100/156"
    lora: bool = False
    gradient_checkpointing: bool = False
    compile: bool = False
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 1

    def __post_init__(self) -> None:
        check_counts(**{name: getattr(self, name) for name in ("batch_size", "repeats", "threads")})
        if self.warm_up < 0:
            raise SaccadeError(f"warm_up={self.warm_up}: give 0 or more")
        check_place(self.device, self.dtype, ("float32", "bfloat16"))
        if not 0 < self.slow_probability < 1:
            raise SaccadeError(f"slow_probability={self.slow_probability!r}: give a share between 0 and 1")
        if not get_shape(self.shape).crops:
            raise SaccadeError(f"shape={self.shape!r} has no vision tower: choose another shape")
        # Both refuse what they do not know.
        PruningConfig(self.reducer, prune_ratio=self.prune_ratio)
        SkipVisionConfig.preset(self.skip)

    @property
    def settings(self) -> Settings:
        """Settings of the methods."""
        return Settings(
            self.prune_ratio, self.slow_probability, reducer=self.reducer, skip=self.skip, compiled=self.compile
        )

    @property
    def stages(self) -> list[Stage]:
        """Captions with only the projector trainable, then questions with the language model trainable too."""
        captions, questions = TEXTS.get(self.shape, ((LLAVA_558K, 558), (LLAVA_665K, 665)))
        return [
            Stage("pretrain", *captions, self.batch_size, language=False),
            Stage("sft", *questions, self.batch_size, language=True),
        ]


def bench_train(
    bench: TrainBench, output: Path, ledger: Path | None, progress: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Measure, write `bench_train.json` and the plots into `output`, append to the ledger, and return the result.

    What is measured is kept in `output` at once: the same call goes on where one that was interrupted had come to.

    Raises:
        SaccadeError: on bad input, before a model is built.
    """
    settings = bench.settings
    if ledger is not None:
        check_ledger(ledger)
    torch.set_num_threads(bench.threads)
    model = build_model(bench)
    found, unfinished = environment(), output / UNFINISHED_FILE
    origin = {"bench": asdict(bench), "code": _code(), **{name: found[name] for name in ("packages", "cpu", "gpus")}}
    kept = _measured_before(unfinished, origin)
    output.mkdir(parents=True, exist_ok=True)
    timings: dict[str, dict[str, Timing]] = {}
    for stage in bench.stages:
        progress(f"stage {stage.name}")
        known = kept.setdefault(stage.name, {})
        measured = measure_stage(
            model,
            stage,
            settings,
            bench.repeats,
            bench.warm_up,
            known,
            lambda: write_json_atomically(unfinished, {"origin": origin, "timings": _as_json(kept)}),
        )
        timings[stage.name] = {timing.variant: timing for timing in measured}
    result = {
        "bench": asdict(bench),
        "environment": found,
        "date": date.today().isoformat(),
        "load": f"{os.getloadavg()[0]:.1f}",
        "timings": _as_json(timings),
        "whole_schedule": whole_schedule(bench.stages, timings),
    }
    write_json_atomically(output / RESULT_FILE, result)
    plot_speedups({name: _speedups(found) for name, found in timings.items()}, output / "bench_train_speedups.png")
    plot_parts(
        {name: timing.parts for name, timing in timings["sft"].items() if timing.parts},
        output / "bench_train_parts.png",
    )
    if ledger is not None:
        append_rows(ledger, _ledger_rows(bench, timings))
    unfinished.unlink()
    return result


def _code() -> str:
    """A hash of what is measured and of what measures: a commit does not tell uncommitted changes apart."""
    folders = (Path(saccade.__file__).parent, Path(__file__).parent)
    files = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def _measured_before(file: Path, origin: Mapping[str, Any]) -> dict[str, dict[str, Timing]]:
    """Measurements by stage and variant of an interrupted run of the same benchmark, code and machine."""
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if found.get("origin") != json.loads(to_json(origin)):
        return {}
    return {
        stage: {entry["variant"]: Timing(**entry) for entry in entries} for stage, entries in found["timings"].items()
    }


def _as_json(timings: Mapping[str, Mapping[str, Timing]]) -> dict[str, list[dict[str, Any]]]:
    return {stage: [timing.as_json() for timing in found.values()] for stage, found in timings.items()}


def tables(result: Mapping[str, Any]) -> dict[str, tuple[list[str], list[list[Any]]]]:
    """Columns and cells of the tables, one per stage and one for the whole schedule."""
    found = {}
    for stage, entries in result["timings"].items():
        timings = [Timing(**entry) for entry in entries]
        stock = timings[0]
        columns = ["training", "ms p20", "p50", "p80", "speed-up", "FLOPs allow", "share reached", "tokens/s", "waits"]
        on_gpu = any(timing.peak_bytes is not None for timing in timings)
        columns.append("peak GiB" if on_gpu else "MiB kept for backward")
        cells = []
        for timing in timings:
            if timing.out_of_memory:
                cells.append([timing.variant, "out of memory", *[""] * (len(columns) - 2)])
                continue
            milliseconds = percentiles([1000 * seconds for seconds in timing.seconds])
            times = [f"{value:.0f}" if value >= 1000 else f"{value:.4g}" for value in milliseconds]
            against = ["", "", ""]
            if timing.ratios:
                speedup, allowed = statistics.median(timing.ratios), stock.flops / timing.flops
                against = [f"{speedup:.2f}x", f"{allowed:.2f}x", f"{100 * speedup / allowed:.0f} %"]
            memory = timing.saved_bytes / 2**20 if timing.peak_bytes is None else timing.peak_bytes / 2**30
            cells.append(
                [
                    timing.variant, *times, *against,
                    f"{token_rate(timing):.0f}", f"{timing.syncs:.4g}", f"{memory:.1f}",
                ]
            )  # fmt: skip
        found[f"stage {stage}"] = (columns, cells)
    schedule = sorted(result["whole_schedule"].items(), key=lambda item: -item[1])
    found["both stages, by their numbers of samples"] = (
        ["training", "speed-up"],
        [[name, f"{ratio:.2f}x"] for name, ratio in schedule],
    )
    return found


def show(result: Mapping[str, Any]) -> None:
    """Print the tables."""
    for title, (columns, cells) in tables(result).items():
        print_table(title, columns, cells)


def build_model(bench: TrainBench) -> PreTrainedModel:
    """The shape, cut down as asked, with adapters where they train."""
    model = build_shape(
        bench.shape,
        bench.layers,
        bench.width,
        getattr(torch, bench.dtype),
        bench.device,
        tower_layers=bench.tower_layers,
    )
    if bench.lora:
        targets = rf".*language_model.*\.({'|'.join(_linear_names(model))})"
        model = get_peft_model(model, LoraConfig(r=128, lora_alpha=256, lora_dropout=0.05, target_modules=targets))
    if bench.gradient_checkpointing:
        get_family(model).model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _linear_names(model: PreTrainedModel) -> list[str]:
    names = {
        name.rpartition(".")[2]
        for name, module in get_family(model).language_layers.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    return sorted(names)


def _speedups(found: Mapping[str, Timing]) -> dict[str, tuple[float, float, float, float]]:
    """By variant: the median speed-up, its 20th and 80th percentile, and the speed-up that FLOPs allow."""
    stock = found[STOCK]
    speedups = {}
    for name, timing in found.items():
        if name == STOCK or not timing.ratios:
            continue
        figure = figures(timing.ratios)
        low, middle, high = (float(figure[column]) for column in ("p20", "p50", "p80"))
        speedups[name] = (middle, low, high, stock.flops / timing.flops)
    return speedups


def _ledger_rows(bench: TrainBench, timings: Mapping[str, Mapping[str, Timing]]) -> Sequence[dict[str, Any]]:
    shared = origin("train", torch.device(bench.device), bench.dtype, bench.repeats, ROOMS)
    cuts = "".join(
        f" {name}={getattr(bench, name)}"
        for name in ("layers", "width", "tower_layers")
        if getattr(bench, name) is not None
    )
    kinds = "".join(f" {name}" for name in ("lora", "gradient_checkpointing") if getattr(bench, name))
    rows = []
    for stage, found in timings.items():
        shape = f"{bench.shape}{cuts}{kinds} {stage} B={bench.batch_size}"
        stock = found[STOCK]
        for name, timing in found.items():
            if timing.out_of_memory:
                continue
            metrics = [
                ("step", "ms", [1000 * value for value in timing.seconds], [1000 * value for value in stock.seconds]),
                ("flops", "count", [timing.flops], [stock.flops]),
                ("syncs", "count", [timing.syncs], None),
                ("saved", "bytes", [timing.saved_bytes], [stock.saved_bytes]),
            ]
            if timing.peak_bytes is not None:
                metrics.append(("peak", "bytes", [timing.peak_bytes], [stock.peak_bytes]))
            for metric, unit, values, baseline in metrics:
                digits = 5 if unit == "ms" else 12
                row = {**shared, "shape": shape, "provider": name, "metric": metric, "unit": unit}
                rows.append({**row, **figures(values, None if stock.out_of_memory else baseline, digits)})
    return rows


def shared_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that the training and generation benchmarks share."""
    parser.add_argument("--shape", default="tiny", help="as `python -m benchmarks.flops` lists (default: %(default)s)")
    parser.add_argument("--layers", type=int, metavar="N", help="language layers to keep")
    parser.add_argument("--width", type=int, metavar="D", help="width of the language model")
    parser.add_argument("--repeats", type=int, default=10, metavar="N", help="timed repeats (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", help="float32 or bfloat16 (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads (default: %(default)s)")
    parser.add_argument("--ledger", type=Path, metavar="FILE", help="CSV file to append all measurements to")


def options(args: argparse.Namespace, cls: type) -> dict[str, Any]:
    """The flags that are fields of the dataclass `cls`."""
    return {name: getattr(args, name) for name in cls.__dataclass_fields__ if hasattr(args, name)}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print tables, and say what was written.

    Raises:
        SaccadeError: on bad input, before a model is built.
    """
    parser = Parser("benchmarks.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared_arguments(parser)
    parser.add_argument("--tower-layers", type=int, metavar="N", help="layers of the vision tower to keep")
    parser.add_argument("--batch-size", type=int, default=8, metavar="B", help="rows per step (default: %(default)s)")
    parser.add_argument("--warm-up", type=int, default=2, metavar="N", help="untimed steps (default: %(default)s)")
    parser.add_argument("--prune-ratio", type=float, default=0.9, help="p (default: %(default)s)")
    parser.add_argument("--slow-probability", type=float, default=0.1, help="r (default: %(default)s)")
    parser.add_argument("--reducer", default="divprune", help="reducer that selects tokens (default: %(default)s)")
    parser.add_argument(
        "--skip", default="100/156", metavar="PRESET", help="Skip-Vision preset (default: %(default)s)"
    )
    parser.add_argument("--lora", action="store_true", help="train adapters of the language model in stage two")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="recompute activations")
    parser.add_argument("--compile", action="store_true", help="measure compiled decoder layers too")
    parser.add_argument("--output", type=Path, default="out/bench", metavar="DIR", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    bench = TrainBench(**options(args, TrainBench))
    show(bench_train(bench, args.output, args.ledger, progress=lambda text: print(text, flush=True)))
    print(f"written to {args.output / RESULT_FILE}" + (f" and {args.ledger}" if args.ledger else ""))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
