"""Python programs as separate processes that do not each import torch, transformers and TRL.

The imports take longer than a small run does. Here every program is a fork of one process that has imported them and
done nothing else: no model was made in it, no random number drawn, no test run.
"""

import contextlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.reduction import DupFd
from types import SimpleNamespace
from typing import Any
from unittest import mock

PRELOADED = ["peft", "saccade.training", "saccade.evaluation", "saccade.tiny"]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOADED)


class Forked:
    """What callers here use of `subprocess.Popen`, for a command that is `python SCRIPT`, `python -m MODULE` or
    `python -c CODE`.

    The standard streams are files, pipes, or this process's own.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        stdin: Any = None,
        stdout: Any = None,
        stderr: Any = None,
        env: Mapping[str, str] | None = None,
        text: bool = True,
        process_group: int | None = None,
        preexec_fn: Callable[[], None] | None = None,
    ) -> None:
        # The launcher's, which make the system kill a process with its parent: here that is the server.
        del process_group, preexec_fn
        assert command[0] == sys.executable or command[0].endswith("python")
        assert text
        self.stdin = self.stdout = self.stderr = None
        given, theirs = {"stdin": stdin, "stdout": stdout, "stderr": stderr}, []
        for number, (name, stream) in enumerate(given.items()):
            if stream != subprocess.PIPE:
                theirs.append(os.dup(number if stream is None else stream.fileno()))
                continue
            read, write = os.pipe()
            theirs.append(read if name == "stdin" else write)
            setattr(self, name, os.fdopen(write, "w") if name == "stdin" else os.fdopen(read))
        variables = dict(os.environ if env is None else env)
        self._process = _context.Process(target=_Program(command[1:], variables, theirs))
        self._process.start()
        for descriptor in theirs:
            os.close(descriptor)
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("a forked program", timeout)
        return self.returncode

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run_forked(command: Sequence[str], env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess:
    """Run a command to its end, as `subprocess.run` with `capture_output` does."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        status = Forked(command, stdout=out, stderr=err, env=env).wait()
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(command, status, out.read(), err.read())


def forking(module: str) -> Any:
    """Make a module's `subprocess.Popen` a `Forked`, as a context."""
    return mock.patch(f"{module}.subprocess", SimpleNamespace(Popen=Forked, PIPE=subprocess.PIPE))


class _Program:
    """The body of the forked process."""

    def __init__(self, words: Sequence[str], variables: Mapping[str, str], streams: Sequence[int]) -> None:
        self.words, self.variables, self.descriptors = list(words), dict(variables), streams

    def __getstate__(self) -> dict[str, Any]:
        # Descriptors are handed over while the process starts, which is when this is pickled.
        return {**self.__dict__, "descriptors": [DupFd(descriptor) for descriptor in self.descriptors]}

    def __call__(self) -> None:
        for number, descriptor in enumerate(self.descriptors):
            os.dup2(descriptor.detach(), number)
        sys.stdin, sys.stdout, sys.stderr = (
            os.fdopen(number, mode, buffering=1, closefd=False) for number, mode in enumerate(("r", "w", "w"))
        )
        # The way that this process was started would be that of its data workers too.
        multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
        os.environ.clear()
        os.environ.update(self.variables)
        if self.words[0] == "-m":
            sys.argv = self.words[1:]
            runpy.run_module(self.words[1], run_name="__main__", alter_sys=True)
        elif self.words[0] == "-c":
            sys.argv = ["-c", *self.words[2:]]
            exec(self.words[1], {"__name__": "__main__"})
        else:
            sys.argv = self.words
            runpy.run_path(self.words[0], run_name="__main__")
