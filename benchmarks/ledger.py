"""The ledger: an append-only CSV file of all measurements."""

import csv
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from saccade.errors import SaccadeError, counted
from saccade.report.environment import cpu_model

COLUMNS = (
    *("benchmark", "provider", "metric", "unit", "shape", "p20", "p50", "p80", "ratio_to_baseline"),
    *("device", "cpu", "torch", "saccade", "date", "command", "threads", "dtype", "repeats", "load"),
)


def origin(benchmark: str, device: torch.device, dtype: str, repeats: int, rooms: Sequence[str]) -> dict[str, Any]:
    """The columns that all rows of one run share: what ran, on which machine and when.

    Args:
        rooms: subpackages whose uncommitted changes could affect the results; `benchmarks` is always checked.
    """
    words = ["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]
    return {
        "benchmark": benchmark,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": cpu_model(),
        "torch": torch.__version__,
        "saccade": commit(*rooms),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(words),
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "repeats": repeats,
        "load": f"{os.getloadavg()[0]:.1f} on {counted(os.cpu_count(), 'core')}",
    }


def figures(values: Sequence[float], baseline: Sequence[float] | None = None, digits: int = 5) -> dict[str, str]:
    """Percentiles of the measured values, and the ratio of their median to the baseline's: below one is better."""
    low, middle, high = percentiles(values)
    ratio = f"{middle / statistics.median(baseline):.4g}" if baseline else ""
    return {
        **{name: f"{value:.{digits}g}" for name, value in (("p20", low), ("p50", middle), ("p80", high))},
        "ratio_to_baseline": ratio,
    }


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentiles."""
    if len(values) == 1:
        return (values[0],) * 3
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return cuts[1], statistics.median(values), cuts[7]


def check_ledger(path: Path) -> None:
    """Reject a file that is not a ledger, before anything is measured.

    Raises:
        SaccadeError: if the first line is not the header that `append_rows` writes.
    """
    if path.exists() and path.read_text(encoding="utf-8").partition("\n")[0].split(",") != list(COLUMNS):
        raise SaccadeError(f"ledger={str(path)!r}: its first line is not a ledger's header; give another file")


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add rows to the ledger, with a header if it is new.

    Raises:
        SaccadeError: like `check_ledger`.
    """
    check_ledger(path)
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def commit(*rooms: str) -> str:
    """The current commit, marked if files of these subpackages or of `benchmarks` have uncommitted changes."""
    root = Path(__file__).resolve().parents[1]
    run = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*run, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        paths = ["--", "benchmarks/*.py", *(f"src/saccade/{room}" for room in rooms)]
        changed = subprocess.run([*run, "diff", "--quiet", "HEAD", *paths], check=False).returncode
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+changes" if changed else "")
