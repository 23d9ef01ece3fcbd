"""Starts the processes of one machine, and ends together with them."""

import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from saccade.launch.plan import LaunchPlan

_POLL_SECONDS = 0.1


def run_processes(plan: LaunchPlan, command: Sequence[str], patience_seconds: float = 15.0) -> int:
    """Run `command` once a process of this machine, wait for all, and return the exit status of the run.

    SIGTERM is handed on to every process, so that all of them save and stop. If one fails, the others get
    `patience_seconds` to end by themselves, since they may be waiting for it forever, and are then killed.

    Returns:
        0 if all ended well, otherwise the status of the process that failed first; 1 if a signal killed it.
    """
    started: list[subprocess.Popen] = []

    def hand_on(number: int, frame: object) -> None:
        for process in started:
            if process.poll() is None:
                process.send_signal(number)

    before = signal.signal(signal.SIGTERM, hand_on)
    try:
        for local_rank in range(plan.local_processes):
            started.append(subprocess.Popen(command, env=plan.environment_of(local_rank)))
        failed = _wait(started, None)
        if failed is None:
            return 0
        _wait(started, time.monotonic() + patience_seconds, all_of_them=True)
        status = started[failed].returncode
        rank = plan.machine_rank * plan.local_processes + failed
        if status < 0:
            name = signal.Signals(-status).name
            hint = ", often for want of memory" if -status == signal.SIGKILL else ""
            print(
                f"saccade: error: rank {rank} was killed by {name}{hint}; --resume auto goes on from the newest whole "
                "checkpoint",
                file=sys.stderr,
            )
            return 1
        return status
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
            process.wait()
        signal.signal(signal.SIGTERM, before)


def _wait(processes: list[subprocess.Popen], until: float | None, all_of_them: bool = False) -> int | None:
    """Wait for all to end, or until one failed unless `all_of_them`; the number of one that failed, or None."""
    while True:
        states = [process.poll() for process in processes]
        failed = next((number for number, state in enumerate(states) if state), None)
        if None not in states or (failed is not None and not all_of_them):
            return failed
        if until is not None and time.monotonic() > until:
            return failed
        time.sleep(_POLL_SECONDS)
