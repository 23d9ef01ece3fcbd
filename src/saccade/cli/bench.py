"""`saccade bench`: times of training steps and of generation, every way in one run, beside what FLOPs allow."""

import argparse
from pathlib import Path
from typing import Any

EXAMPLES = """
saccade bench train                                          the tiny model on this machine
saccade bench train --shape llava-1.5-7b --layers 2 --width 512 --tower-layers 2 --batch-size 4
saccade bench train --shape llava-1.5-7b --lora --gradient-checkpointing --device cuda --dtype bfloat16 --batch-size 16
saccade bench generate                                       prefill, decoding and cache with skipped tokens
saccade bench generate --shape llama3-8b --device cuda --dtype bfloat16 --images 1,4
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of both."""
    verbs = parser.add_subparsers(dest="what", required=True, metavar="train|generate")
    train = verbs.add_parser("train", help="steps of every way to train, both stages", allow_abbrev=False)
    _shared(train)
    train.add_argument("--tower-layers", type=int, metavar="N", help="layers of the vision tower to keep")
    train.add_argument("--batch-size", type=int, default=8, metavar="B", help="rows a step (default: %(default)s)")
    train.add_argument("--warm-up", type=int, default=2, metavar="N", help="untimed steps (default: %(default)s)")
    train.add_argument("--prune-ratio", type=float, default=0.9, help="p (default: %(default)s)")
    train.add_argument("--slow-probability", type=float, default=0.1, help="r (default: %(default)s)")
    train.add_argument("--reducer", default="divprune", help="what chooses tokens (default: %(default)s)")
    train.add_argument("--skip", default="100/156", metavar="PRESET", help="of Skip-Vision (default: %(default)s)")
    train.add_argument("--lora", action="store_true", help="train adapters of the language model in stage two")
    train.add_argument("--gradient-checkpointing", action="store_true", help="recompute activations")
    train.add_argument("--compile", action="store_true", help="measure compiled decoder layers too")
    train.add_argument("--output", default="out/bench", metavar="DIR", help="JSON and PNGs (default: %(default)s)")
    generate = verbs.add_parser("generate", help="prefill, decoding and cache bytes", allow_abbrev=False)
    _shared(generate)
    generate.add_argument("--preset", default="100/156", help="of Skip-Vision (default: %(default)s)")
    generate.add_argument("--images", default="1,4,16", metavar="A,B", help="in the prompt (default: %(default)s)")
    generate.add_argument("--text-tokens", type=int, default=60, metavar="N", help="(default: %(default)s)")
    generate.add_argument("--new-tokens", type=int, default=16, metavar="N", help="(default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Measure, print tables, and say what was written."""
    return {"train": _train, "generate": _generate}[args.what](args)


def _shared(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shape", default="tiny", help="model shape; `saccade analyze flops` lists them (default: %(default)s)"
    )
    parser.add_argument("--layers", type=int, metavar="N", help="language layers to keep")
    parser.add_argument("--width", type=int, metavar="D", help="of the language model")
    parser.add_argument("--repeats", type=int, default=10, metavar="N", help="timed turns (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", help="float32 or bfloat16 (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of the CPU (default: %(default)s)")
    parser.add_argument("--ledger", metavar="FILE", help="CSV file to append every figure to")


def _options(args: argparse.Namespace, cls: type) -> dict[str, Any]:
    names = {name for name in cls.__dataclass_fields__ if hasattr(args, name)}
    return {name: getattr(args, name) for name in names}


def _train(args: argparse.Namespace) -> int:
    from saccade.benchmark.run_train import RESULT_FILE, TrainBench, bench_train, show

    bench = TrainBench(**_options(args, TrainBench))
    output = Path(args.output)
    ledger = Path(args.ledger) if args.ledger else None
    result = bench_train(bench, output, ledger, progress=lambda text: print(text, flush=True))
    show(result)
    print(f"written to {output / RESULT_FILE}" + (f" and {ledger}" if ledger else ""))
    return 0


def _generate(args: argparse.Namespace) -> int:
    from saccade.benchmark.run_generate import GenerateBench, bench_generate, show_rows
    from saccade.errors import SaccadeError

    try:
        args.images = tuple(int(part) for part in args.images.split(","))
    except ValueError as error:
        raise SaccadeError(f"images={args.images!r}: give numbers from 1 on, such as 1,4,16") from error
    ledger = Path(args.ledger) if args.ledger else None
    bench_generate(GenerateBench(**_options(args, GenerateBench)), ledger, show_rows)
    if ledger:
        print(f"written to {ledger}")
    return 0
