"""`saccade serve` beside its engine, here a few lines of Python: who answers, and that both end together."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from forked import Forked

from saccade import SaccadeError
from saccade.cli.main import main
from saccade.serving import start
from saccade.values import check_port

ENGINE = """
import socketserver, sys

class Answer(socketserver.StreamRequestHandler):
    def handle(self):
        self.rfile.readline()
        self.wfile.write(self.server.answer)

class Engine(socketserver.TCPServer):
    allow_reuse_address = True
    timeout = 10

with Engine(("127.0.0.1", int(sys.argv[1])), Answer) as engine:
    for engine.answer in (b"SSH-2.0-x\\r\\n", b"HTTP/1.0 503 Loading\\r\\n\\r\\n", b"HTTP/1.0 200 OK\\r\\n\\r\\n"):
        engine.handle_request()
"""
"""Speaks no HTTP at first, then is not ready, then is; and ends."""
WAITING = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
SERVE = """
import signal, sys
# Ignored where the tests run in the background of a script.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
from saccade.serving import start
start.installed_engine = lambda engine: "transformers"
start.transformers_command = lambda *given: [sys.executable, "-c", {code!r}]
sys.exit(start.serve_folder({folder!r}, port={port}))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], list[subprocess.Popen]]]:
    """Makes some code the engine, and returns the list of engines that are started."""
    started, popen = [], subprocess.Popen

    def begin(*given: object, **options: object) -> subprocess.Popen:
        started.append(popen(*given, **options))
        return started[-1]

    def use(code: str) -> list[subprocess.Popen]:
        monkeypatch.setattr(start, "installed_engine", lambda engine: "transformers")
        command = [sys.executable, "-c", code]
        monkeypatch.setattr(start, "transformers_command", lambda *given: [*command, str(given[-1])])
        monkeypatch.setattr(start.subprocess, "Popen", begin)
        return started

    yield use
    for process in started:
        process.kill()
        process.wait()


def test_a_server_is_ready_once_it_answers_itself(folder, port, engine, capsys, monkeypatch):
    """Whatever it said before, and whatever proxies the environment names."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(start, "POLL", 0.05)
    engine(ENGINE)
    assert start.serve_folder(folder, port=port) == 0
    assert f"serving {folder} at http://127.0.0.1:{port}/v1" in capsys.readouterr().out


def test_no_engine_is_started_where_it_cannot_listen(folder, port, engine, capsys):
    started = engine("raise SystemExit(3)")
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        for host, at, line in (
            ("127.0.0.1", taken, f"port={taken}: it cannot be listened at"),
            ("localhost", taken, f"port={taken}: it cannot be listened at"),
            ("0.0.0.0", taken, f"port={taken}: it cannot be listened at"),
            ("127.0.0.1", 70000, "port=70000: it cannot be listened at"),
            ("192.0.2.1", port, "host=192.0.2.1: it cannot be listened at"),
            ("a..b", port, "host=a..b: it cannot be listened at"),
            ("[::1]", port, "host=[::1]: it cannot be listened at"),
        ):
            assert main(["serve", str(folder), "--host", host, "--port", str(at)]) == 2
            (error,) = capsys.readouterr().err.strip().splitlines()
            assert line in error
    assert started == []
    check_port("localhost", port)


@pytest.mark.parametrize(
    ("host", "root"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("gpu-1", "http://gpu-1:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("::", "http://[::1]:8000"),
        ("::1", "http://[::1]:8000"),
        ("2001:db8::1", "http://[2001:db8::1]:8000"),
    ],
)
def test_the_url_of_a_host(host, root):
    assert start.root_url(host, 8000) == root


@pytest.mark.parametrize("stubborn", [False, True])
def test_whatever_ends_the_waiting_ends_the_engine(stubborn, folder, port, engine, monkeypatch):
    """Such as standard output that nobody reads any more; an engine that does not stop when told is killed."""

    def fail(server: subprocess.Popen, url: str) -> bool:
        server.stdout.readline()
        raise BrokenPipeError

    code = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {WAITING}" if stubborn else WAITING
    started = engine(code)
    begin = start.subprocess.Popen
    monkeypatch.setattr(start.subprocess, "Popen", lambda *given, **rest: begin(*given, stdout=-1, **rest))
    monkeypatch.setattr(start, "wait_until_ready", fail)
    monkeypatch.setattr(start, "PATIENCE", 0.2 if stubborn else 20)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with pytest.raises(BrokenPipeError):
        start.serve_folder(folder, port=port)
    (process,) = started
    process.stdout.close()
    assert process.returncode == -(signal.SIGKILL if stubborn else signal.SIGTERM)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == handlers


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_the_engine_ends_with_the_command(number, folder, port):
    """With a terminal that closes, and with a command that is killed, too."""
    code = SERVE.format(code=WAITING, folder=str(folder), port=port)
    command = Forked([sys.executable, "-c", code], stdout=subprocess.PIPE)
    pid = int(command.stdout.readline())
    try:
        command.send_signal(number)
        command.wait(60)
        until = time.monotonic() + 20
        while Path(f"/proc/{pid}").exists() and time.monotonic() < until:
            time.sleep(0.05)
        assert not Path(f"/proc/{pid}").exists()
        if number != signal.SIGKILL:
            assert command.returncode == 0
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_a_command_that_ignores_closed_terminals_goes_on(folder, port, engine, monkeypatch):
    """As under nohup."""
    code = "import os, signal; os.kill(os.getppid(), signal.SIGHUP); raise SystemExit(3)"
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        engine(code)
        assert start.serve_folder(folder, port=port) == 1  # it was not told to stop: the engine failed by itself
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_server_of_transformers_has_no_other_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "installed_engine", lambda engine: "transformers")
    with pytest.raises(SaccadeError, match="name='mine': the server of transformers calls a model by its path"):
        start.serve_folder(folder, name="mine")
