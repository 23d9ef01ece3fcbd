"""What only a GPU can say, in calls of ten minutes: training steps, prompts and selection at the models' real sizes.

python -m experiments.gpu --output out/gpu                      what fits into ten minutes; call it until all is done
python -m experiments.gpu --only train-llava-1.5-7b             one part
python -m experiments.gpu --size small --device cpu             all of it at toy size, to see that it runs

Weights are random: speed and memory do not depend on them. Each part runs in a separate process and leaves its
results and `part.json` in a separate folder. A part that fails is reported, and the others go on; the next call tries
it last. One that runs out of time goes on at the next call: training steps with the variants that are not measured
yet. A variant that runs out of memory is recorded as such.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.selection import SHAPES
from benchmarks.shapes import check_place
from saccade.cli.main import Parser, guarded
from saccade.errors import SaccadeError, counted
from saccade.files import write_json_atomically
from saccade.report.environment import environment
from saccade.report.tables import print_table
from saccade.values import check_choice

PART_FILE, BEGUN_FILE, LOG_FILE, LEDGER_FILE = "part.json", "begun.json", "log.txt", "ledger.csv"
SIZES = ("real", "small")
MINIMUM = 30.0
"""Seconds that must be left for another part to be begun."""


@dataclass(frozen=True)
class Part:
    """One measurement.

    Args:
        name: of it and of its folder.
        shows: what its figures are, in a few words.
        module: the benchmark that measures it.
        real: its flags at the model's real size, on a GPU.
        small: its flags at toy size, on any device.
        writes: whether the benchmark takes `--output`, for its JSON and pictures.
    """

    name: str
    shows: str
    module: str
    real: tuple[str, ...]
    small: tuple[str, ...]
    writes: bool = False

    def command(self, folder: Path, size: str, device: str, dtype: str) -> list[str]:
        """The command line that measures this part into a folder."""
        flags = self.real if size == "real" else self.small
        place = ["--device", device, "--dtype", dtype, "--ledger", str(folder / LEDGER_FILE)]
        output = ["--output", str(folder)] if self.writes else []
        return [sys.executable, "-m", self.module, *flags, *place, *output]


def _train(shape: str, batch_size: int, cut: Sequence[str], extra: Sequence[str] = (), suffix: str = "") -> Part:
    steps = ("--shape", shape, "--lora", "--gradient-checkpointing", *extra)
    return Part(
        f"train-{shape}{suffix}",
        "steps of stock TRL, of the released procedure, of DualSpeed and Skip-Vision; peak memory; waits",
        "benchmarks.train",
        (*steps, "--batch-size", str(batch_size), "--repeats", "6", "--warm-up", "2"),
        (*steps, *cut, "--batch-size", "1", "--repeats", "1", "--warm-up", "0"),
        writes=True,
    )


_LLAVA = ("--layers", "1", "--width", "128", "--tower-layers", "2")
_QWEN = ("--layers", "1", "--width", "896", "--tower-layers", "2")

PARTS: dict[str, Part] = {
    part.name: part
    for part in (
        _train("llava-1.5-7b", 16, _LLAVA),
        _train("llava-next-7b", 4, _LLAVA),
        _train("qwen2.5-vl-7b", 16, _QWEN),
        *(
            Part(
                f"generate-llava-1.5-7b-{images}",
                f"prefill, decoding and cache of all, pruned and skipped tokens of {counted(int(images), 'image')}",
                "benchmarks.generate",
                ("--shape", "llava-1.5-7b", "--images", images),
                ("--images", "1", "--repeats", "1", "--new-tokens", "2"),
            )
            for images in ("1", "4", "8")
        ),
        *(
            Part(
                f"selection-{rows}",
                f"what each reducer takes of {rows} rows, beside its loop over images",
                "benchmarks.selection",
                ("--repeats", "7", "--rows", rows),
                ("--quick", "--rows", "2", "--repeats", "1", "--only", "divprune; random"),
            )
            for rows in map(str, sorted(rows for rows, *_ in SHAPES))
        ),
        _train("llava-1.5-7b", 16, _LLAVA, ("--compile",), "-compiled"),
    )
}
"""All parts by name, the most important first."""


def run_parts(
    parts: Sequence[Part],
    output: Path,
    size: str,
    device: str,
    dtype: str,
    budget: float,
    log: Callable[[str], None] = print,
) -> dict[str, str]:
    """Measure the parts that `output` does not hold yet, as far as the time goes.

    Args:
        output: has a folder for each part.
        size: "real" or "small".
        budget: seconds; a part that would outlast them is stopped, and goes on at the next call.

    Returns:
        For each part "done", "failed", or "not reached".
    """
    started, state, tried = time.monotonic(), {}, False
    # A part that has failed before would otherwise take the time of those that were never tried, at each call.
    for part in sorted(parts, key=lambda part: _begun(output / part.name).get("failed", False)):
        folder, left = output / part.name, budget - (time.monotonic() - started)
        command = part.command(folder, size, device, dtype)
        if _measured(folder, command):
            state[part.name] = "done"
        elif tried and left < MINIMUM:
            state[part.name] = "not reached"
        else:
            tried = True
            log(f"{part.name}: {part.shows}")
            state[part.name] = _measure(part, folder, command, left, log)
    return state


def _measured(folder: Path, command: Sequence[str]) -> bool:
    """Whether a folder holds what this command measured, and not one of another size or device."""
    file = folder / PART_FILE
    return file.is_file() and json.loads(file.read_text())["command"] == shlex.join(command[1:])


def _begun(folder: Path) -> dict[str, Any]:
    """The command that was last begun in a folder, and whether it failed."""
    file = folder / BEGUN_FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _measure(part: Part, folder: Path, command: Sequence[str], left: float, log: Callable[[str], None]) -> str:
    begun = {"command": shlex.join(command[1:])}
    if _begun(folder).get("command") != begun["command"]:
        # What was measured otherwise must not mix with this.
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LEDGER_FILE).unlink(missing_ok=True)
    write_json_atomically(folder / BEGUN_FILE, begun)
    began = time.monotonic()
    with (folder / LOG_FILE).open("w", encoding="utf-8") as file:
        try:
            code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, timeout=left, check=False).returncode
        except subprocess.TimeoutExpired:
            log(f"{part.name}: the time is up after {left:.0f} s; the next call goes on with it, or begins it anew")
            return "not reached"
    if code:
        write_json_atomically(folder / BEGUN_FILE, {**begun, "failed": True})
        last = (folder / LOG_FILE).read_text(encoding="utf-8").strip().splitlines()[-1:]
        log(f"{part.name}: failed with status {code}: {' '.join(last)} (all of it in {folder / LOG_FILE})")
        return "failed"
    facts: dict[str, Any] = {
        "command": shlex.join(command[1:]),
        "seconds": time.monotonic() - began,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(),
    }
    write_json_atomically(folder / PART_FILE, facts)
    return "done"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, show what is done, and return 1 if a part failed.

    Raises:
        SaccadeError: on bad input, before anything is measured.
    """
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser("experiments.gpu", description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--only", metavar="A,B", help=f"parts to measure: {', '.join(PARTS)}")
    parser.add_argument("--size", default="real", help="real or small (default: %(default)s)")
    parser.add_argument("--device", default="cuda", help="(default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help="float32 or bfloat16 (default: %(default)s)")
    parser.add_argument("--budget", type=float, default=540, metavar="SECONDS", help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("out/gpu"), metavar="DIR", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    check_choice("size", args.size, SIZES)
    if args.budget <= 0:
        raise SaccadeError(f"budget={args.budget:g}: give a number of seconds above 0")
    names = list(PARTS) if args.only is None else args.only.split(",")
    for name in names:
        if name not in PARTS:
            raise SaccadeError(f"only={name!r} is not a part: choose from {', '.join(PARTS)}")
    check_place(args.device, args.dtype, ("float32", "bfloat16"))
    if args.size == "real" and torch.device(args.device).type != "cuda":
        raise SaccadeError(f"device={args.device!r}: real sizes need a GPU; add --size small to see that it runs")
    parts = [PARTS[name] for name in names]
    state = run_parts(
        parts, args.output, args.size, args.device, args.dtype, args.budget, lambda line: print(line, flush=True)
    )
    print_table(f"written to {args.output}", ["part", "state"], [[name, found] for name, found in state.items()])
    if "not reached" in state.values():
        print("the same command measures the rest")
    return int("failed" in state.values())


if __name__ == "__main__":
    sys.exit(guarded(main))
