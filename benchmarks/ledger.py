"""The ledger: a CSV file of everything that was measured, which is only appended to."""

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

from saccade.errors import SaccadeError
from saccade.report.environment import cpu_model

COLUMNS = (
    *("benchmark", "provider", "metric", "unit", "shape", "p20", "p50", "p80", "ratio_to_baseline"),
    *("device", "cpu", "torch", "saccade", "date", "command", "threads", "dtype", "repeats", "load"),
)


def origin(benchmark: str, device: torch.device, dtype: str, repeats: int, rooms: Sequence[str]) -> dict[str, Any]:
    """The columns that all rows of one run share: what ran, where and when.

    Args:
        rooms: folders of the library whose uncommitted changes would change the figures, as those of this folder do.
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
        "load": f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores",
    }


def figures(values: Sequence[float], baseline: Sequence[float] | None = None, digits: int = 5) -> dict[str, str]:
    """Percentiles of what was measured, and its median over the baseline's: below one is less."""
    low, middle, high = percentiles(values)
    ratio = f"{middle / statistics.median(baseline):.4g}" if baseline else ""
    return {
        **{name: f"{value:.{digits}g}" for name, value in (("p20", low), ("p50", middle), ("p80", high))},
        "ratio_to_baseline": ratio,
    }


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The 20th, the 50th and the 80th."""
    if len(values) == 1:
        return (values[0],) * 3
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return cuts[1], statistics.median(values), cuts[7]


def check_ledger(path: Path) -> None:
    """Refuse a file that is no ledger, before anything is measured.

    Raises:
        SaccadeError: if the first line is not the header that `append_rows` writes.
    """
    if path.exists() and path.read_text(encoding="utf-8").partition("\n")[0].split(",") != list(COLUMNS):
        raise SaccadeError(f"ledger={str(path)!r}: its first line is not a ledger's header; give another file")


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add rows to the ledger, with a header if it is new.

    Raises:
        SaccadeError: as `check_ledger` raises.
    """
    check_ledger(path)
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def commit(*rooms: str) -> str:
    """The commit that ran, with a mark if the files of these rooms, or those that measure, differ from it."""
    root = Path(__file__).resolve().parents[1]
    run = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*run, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        paths = ["--", "benchmarks/*.py", *(f"src/saccade/{room}" for room in rooms)]
        changed = subprocess.run([*run, "diff", "--quiet", "HEAD", *paths], check=False).returncode
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+changes" if changed else "")
