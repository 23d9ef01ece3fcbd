"""Start the processes of a run, and end together with them."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial

from saccade.launch.plan import LaunchPlan

_POLL_SECONDS = 0.1
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def run_processes(plan: LaunchPlan, command: Sequence[str], patience_seconds: float = 15.0) -> int:
    """Run `command` once per process, wait for all, and return the exit status of the run.

    SIGTERM and Ctrl-C are passed on to every process, so that all of them save and stop. If one fails, the others get
    `patience_seconds` to end by themselves and are then killed, since they may be waiting for it forever. If this
    process dies in any way, so do they.

    Returns:
        0 if all succeeded, otherwise the status of the process that failed first; 1 if a signal killed it.
    """
    started: list[subprocess.Popen] = []

    def hand_on(number: int, frame: object) -> None:
        for process in started:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for rank in range(plan.processes):
            # In separate process groups, so that Ctrl-C in a terminal reaches each of them exactly once, from here.
            started.append(
                subprocess.Popen(
                    command,
                    env=plan.environment_of(rank),
                    process_group=0,
                    preexec_fn=partial(end_with, os.getpid()),
                )
            )
        failed = _wait(started, None)
        if failed is None:
            return 0
        _wait(started, time.monotonic() + patience_seconds, all_of_them=True)
        status = started[failed].returncode
        if status < 0:
            name = signal.Signals(-status).name
            hint = ", often because memory ran out" if -status == signal.SIGKILL else ""
            print(
                f"saccade: error: rank {failed} was killed by {name}{hint}; --resume auto continues from the newest "
                "whole checkpoint",
                file=sys.stderr,
            )
            return 1
        return status
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
            process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def end_with(launcher: int, number: int = signal.SIGKILL) -> None:
    """Called in a new process before its program starts: make the system send it a signal when the launcher dies."""
    if _libc is None:
        return
    _libc.prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != launcher:  # the launcher died before `prctl`
        os._exit(1)


def _wait(processes: list[subprocess.Popen], until: float | None, all_of_them: bool = False) -> int | None:
    """Wait until all end, or until one fails unless `all_of_them`; return the index of one that failed, or None."""
    while True:
        states = [process.poll() for process in processes]
        failed = next((number for number, state in enumerate(states) if state), None)
        if None not in states or (failed is not None and not all_of_them):
            return failed
        if until is not None and time.monotonic() > until:
            return failed
        time.sleep(_POLL_SECONDS)
