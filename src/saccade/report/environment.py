"""The environment of a run: versions, machine, and known problems with them."""

import importlib.util
import os
import platform
import subprocess
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from saccade.errors import counted
from saccade.interfaces import TESTED, installed, is_tested, known_range

PACKAGES = ("saccade", *TESTED)


def environment() -> dict[str, Any]:
    """Versions, machine and warnings, ready for JSON, so that every result can record where it came from.

    Keys: `python`, `platform`, `packages` (name to version, None if not installed), `commit` (None outside a checkout;
    ends in "+" if tracked files differ from it), `cpu`, `cores` and `memory_gib` that this process may use, `gpus`
    (name and `memory_gib` each), `cuda` (the CUDA version of the torch build), `threads` of torch, `warnings`.
    """
    torch = _import_torch()
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: installed(name) for name in PACKAGES},
        "commit": _commit(),
        "cpu": cpu_model(),
        "cores": available_cores(),
        "memory_gib": _memory_gib(),
        "gpus": _gpus(torch),
        "cuda": torch.version.cuda if torch else None,
        "threads": torch.get_num_threads() if torch else None,
    }
    found["warnings"] = _warnings(found)
    return found


def environment_lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Pairs of name and readable text from what `environment` returned, now or in an older record."""
    packages = {name: version or "not installed" for name, version in found.get("packages", {}).items()}
    gpus = ", ".join(f"{gpu['name']} ({gpu['memory_gib']} GiB)" for gpu in found.get("gpus", []))
    cores = counted(found.get("cores"), "core")
    saccade = packages.pop("saccade", "-")
    return [
        ("saccade", saccade + (f" at {found['commit']}" if found.get("commit") else "")),
        ("python", found.get("python", "-")),
        *packages.items(),
        ("platform", found.get("platform", "-")),
        ("cpu", f"{found.get('cpu')}, {cores}, {counted(found.get('threads'), 'torch thread')}"),
        ("memory", f"{found.get('memory_gib')} GiB"),
        ("gpu", gpus or "none"),
        ("cuda", found.get("cuda") or "none"),
    ]


def _import_torch() -> Any:
    try:
        return import_module("torch")
    except Exception:  # a broken torch must be reported, not end the report
        return None


def _commit() -> str | None:
    """The commit of Saccade's own checkout, with "+" if tracked files differ from it."""
    package = Path(__file__).resolve().parent.parent
    top = _git(package, "rev-parse", "--show-toplevel")
    # A package in site-packages may be inside another project's checkout, whose commit says nothing about Saccade.
    if top is None or Path(top).resolve() / "src" / "saccade" != package:
        return None
    head = _git(package, "rev-parse", "HEAD")
    changed = _git(package, "status", "--porcelain", "--untracked-files=no")
    return f"{head}+" if head and changed else head


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def cpu_model() -> str:
    """The name of the processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    """Memory of the machine, or of the container if that is less."""
    sizes = []
    with suppress(AttributeError, OSError, ValueError):
        sizes.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with suppress(OSError, ValueError):  # absent, or "max"
        sizes.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return round(min(sizes) / 2**30, 1) if sizes else None


def _gpus(torch: Any) -> list[dict[str, Any]]:
    if torch is None or not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return [{"name": entry.name, "memory_gib": round(entry.total_memory / 2**30, 1)} for entry in properties]


def _torchvision_fault() -> str | None:
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        import_module("torchvision")
    except Exception as error:  # missing CUDA libraries raise OSError, RuntimeError or ImportError
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def _warnings(found: dict[str, Any]) -> list[str]:
    packages, warnings = found["packages"], []
    newest = TESTED["transformers"][1]
    if found["threads"] is None:
        warnings.append("torch cannot be imported: `pip install torch`, then look at `python -c 'import torch'`")
    if packages["transformers"] is None:
        warnings.append(f"transformers is not installed: `pip install transformers=={newest}.*`")
    for name, found_version in packages.items():
        if name in TESTED and found_version is not None and not is_tested(name, found_version):
            warnings.append(f"{name} {found_version} is outside the tested range: {name} {known_range(name)}")
    fault = _torchvision_fault()
    if fault:
        warnings.append(
            f"torchvision is installed but broken ({fault}), which breaks the model classes of transformers: "
            "`pip uninstall torchvision`, or install the build that belongs to your torch (docs/install.md)"
        )
    return warnings


def available_cores() -> int:
    """Number of cores that this process may use, possibly fewer than the machine has in a container or batch job."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
