"""`saccade serve`: check a folder, start vLLM's server or that of transformers on it, and print how to query it."""

import http.client
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from saccade.errors import SaccadeError
from saccade.files import check_exists, reading
from saccade.launch.processes import end_with
from saccade.model_files import check_files
from saccade.serving.vllm_plugin import SETTING, check_prunes, folder_pruning
from saccade.values import ENGINES, check_choice, check_port

VLLM = "vllm.entrypoints.openai.api_server"
"""What `vllm serve` runs. The command itself exits at once in vLLM's CPU build, whose package has another name."""
TRANSFORMERS = "saccade.serving.transformers_server"
PLUGIN = "saccade"
INSTALL_VLLM = 'pip install "CLONE[vllm]", with the path of a clone of Saccade, in a separate environment'
"""Not in the one that trains: vLLM needs an older transformers."""
POLL = 0.5
"""Seconds between two checks of whether the server answers."""
PATIENCE = 30.0
"""Seconds that an engine is given to end, before it is killed."""
LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""Addresses that stand for all of the machine's, and one at which it reaches itself."""


def serve_folder(
    folder: str | Path,
    setting: Mapping[str, Any] | bool | None = None,
    flags: Sequence[str] = (),
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    engine: str | None = None,
) -> int:
    """Serve a trained folder until the server ends or is told to stop, and return its exit status.

    Once the server answers, its URL and a curl line are printed.

    Args:
        setting: pruning options that override the folder's, False for all tokens, None for the folder's own.
        flags: further flags of the engine's command.
        name: what clients call the model; defaults to the folder's name. Not with transformers, whose clients use the
            folder's path.
        engine: one of `ENGINES`; defaults to vLLM if it is installed, otherwise transformers.

    Raises:
        SaccadeError: if the folder has no complete model, a setting is wrong, the engine is not installed, or the port
            is taken.
    """
    folder = Path(folder)
    check_folder(folder)
    config = folder_pruning(folder, setting)
    engine = installed_engine(engine)
    if engine == "vllm":
        if config is not None:
            with reading(f"model={str(folder)!r}: its config.json cannot be read"):
                stock = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            check_prunes(folder, stock, config)
        name = folder.resolve().name if name is None else name
        command = vllm_command(folder, setting, flags, host, port, name)
    else:
        if name is not None:
            raise SaccadeError(
                f"name={name!r}: the server of transformers calls a model by its path, here {str(folder)!r}: leave "
                "--name out, or use --engine vllm"
            )
        name = str(folder)
        command = transformers_command(folder, setting, flags, host, port)
    # An engine takes long to say so itself, and meanwhile whoever has the port would answer in its place.
    check_port(host, port)
    told: list[int] = []
    with running(command, told) as server:
        root = root_url(host, port)
        if wait_until_ready(server, f"{root}/health"):
            print(ready_text(root, name), flush=True)
        status = server.wait()
    return 0 if told or status == 0 else 1  # engines differ in what they call an interruption


@contextmanager
def running(command: Sequence[str], told: list[int]) -> Iterator[subprocess.Popen]:
    """A server that is told to stop when this process is, and ends with the block, or with this process.

    Args:
        told: receives the signals that came.
    """
    # In another process group, or the terminal's Ctrl-C would reach the engine's processes before their parent.
    server = subprocess.Popen(
        command,
        env=engine_environment(os.environ),
        start_new_session=True,
        preexec_fn=partial(end_with, os.getpid(), signal.SIGTERM),
    )

    def pass_on(number: int, _frame: FrameType | None) -> None:
        told.append(number)
        if server.poll() is None:
            # Of a terminal that closes, engines know nothing: it would end them without their own processes.
            server.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

    before = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # started with nohup
            before[number] = signal.signal(number, pass_on)
        yield server
    finally:
        if server.poll() is None:
            server.terminate()
        try:
            server.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def root_url(host: str, port: int) -> str:
    """The URL by which this machine reaches a server that listens at an address."""
    host = LOOPBACK.get(host, host)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def check_folder(folder: Path) -> None:
    """Refuse a path that is not the folder of a complete model.

    Raises:
        SaccadeError: saying what is wrong with it.
    """
    check_exists(folder, "model", "name the folder of an export or of a run", folder=True)
    check_files(folder)
    if not (folder / "config.json").is_file():
        hint = "give a folder with a config.json"
        if (folder / "adapter_config.json").is_file():
            command = f"saccade export {shlex.quote(str(folder))} --output FOLDER"
            hint = f"it has adapters only: `{command}` makes a complete model of them"
        raise SaccadeError(f"model={str(folder)!r} is not a complete model: {hint}")


def installed_engine(engine: str | None) -> str:
    """The requested or default engine.

    Raises:
        SaccadeError: if there is no such engine, or it is not installed.
    """
    if engine is not None:
        check_choice("engine", engine, ENGINES)
    if engine != "transformers" and importlib.util.find_spec("vllm") is not None:
        return "vllm"
    if engine == "vllm":
        raise SaccadeError(f"engine='vllm' is not installed: {INSTALL_VLLM}; or leave --engine out")
    if importlib.util.find_spec("fastapi") is None or importlib.util.find_spec("uvicorn") is None:
        raise SaccadeError(
            f"saccade serve needs vLLM or the server of transformers: {INSTALL_VLLM}, or pip install "
            '"transformers[serving]" here'
        )
    return "transformers"


def vllm_command(
    folder: Path, setting: Mapping[str, Any] | bool | None, flags: Sequence[str], host: str, port: int, name: str
) -> list[str]:
    """The command that starts vLLM's server.

    Raises:
        SaccadeError: if the flags override what the setting needs.
    """
    given = ["--host", host, "--port", str(port), "--served-model-name", name]
    if setting is not None:
        # vLLM takes underscores for dashes, and a key behind a dot; of several, the last one would win.
        names = [flag.partition("=")[0].partition(".")[0].replace("_", "-") for flag in flags]
        if "--hf-overrides" in names:
            raise SaccadeError(
                f'--hf-overrides: put the setting there, as {{"{SETTING}": ...}}, and leave its flags out'
            )
        given += ["--hf-overrides", json.dumps({SETTING: setting if setting is False else dict(setting)})]
    return [sys.executable, "-m", VLLM, "--model", str(folder), *given, *flags]


def transformers_command(
    folder: Path, setting: Mapping[str, Any] | bool | None, flags: Sequence[str], host: str, port: int
) -> list[str]:
    """The command that starts the server of transformers."""
    given = ["--host", host, "--port", str(port)]
    return [sys.executable, "-m", TRANSFORMERS, str(folder), json.dumps(setting), *given, *flags]


def engine_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The server's environment; if the user has listed vLLM's plug-ins in it, this one is added."""
    listed = environment.get("VLLM_PLUGINS")
    if listed is None or PLUGIN in listed.split(","):
        return dict(environment)
    return {**environment, "VLLM_PLUGINS": ",".join([*filter(None, listed.split(",")), PLUGIN])}


def wait_until_ready(server: subprocess.Popen, url: str) -> bool:
    """Wait until the server answers at `url`, and return True; False if its process ends first."""
    # Without the environment's proxies, which do not lead to this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while server.poll() is None:
        try:
            with opener.open(url, timeout=5) as answer:
                if answer.status == 200:
                    return True
        except (OSError, http.client.HTTPException):
            pass
        time.sleep(POLL)
    return False


def ready_text(root: str, name: str) -> str:
    """What is printed once the server answers: its URL, and how to query it."""
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,'$(base64 -w0 picture.png)'"}}
    content = [image, {"type": "text", "text": "What is this?"}]
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": content}], "max_tokens": 64})
    return (
        f"saccade: serving {name} at {root}/v1, for any OpenAI client; for example\n"
        f"curl {root}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'"
    )
