"""`saccade serve`: checks a folder, starts a server on it, vLLM's or that of transformers, and says how to ask it."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from saccade.errors import SaccadeError, needs_package
from saccade.serving.vllm_plugin import SETTING, folder_pruning

ENGINES = ("vllm", "transformers")
VLLM = "vllm.entrypoints.openai.api_server"
"""What `vllm serve` runs. That command itself ends at once in vLLM's build for CPUs, which goes by another name."""
TRANSFORMERS = "saccade.serving.transformers_server"
PLUGIN = "saccade"
POLL = 0.5
"""Seconds between two looks at whether the server answers."""


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
    """Serve a trained folder until the server ends or is told to, and return its exit status.

    Once the server answers, its URL and a curl line are printed.

    Args:
        setting: options of pruning in place of the folder's, False for all tokens, None for the folder's own.
        flags: further flags of the engine's own command.
        name: what clients call the model; the folder's name when left out. transformers goes by the folder's path.
        engine: of `ENGINES`; vLLM where it is installed, and transformers where it is not, when left out.

    Raises:
        SaccadeError: if the folder holds no whole model, a setting is wrong, or the engine is not installed.
    """
    folder = Path(folder)
    check_folder(folder)
    folder_pruning(folder, setting)
    engine = installed_engine(engine)
    if engine == "vllm":
        name = folder.resolve().name if name is None else name
        command = vllm_command(folder, setting, flags, host, port, name)
    else:
        name = str(folder)
        command = transformers_command(folder, setting, flags, host, port)
    # Not in this process's group: the terminal's Ctrl-C would reach the engine's processes before their parent.
    server = subprocess.Popen(command, env=engine_environment(os.environ), start_new_session=True)
    told: list[int] = []

    def pass_on(number: int, _frame: FrameType | None) -> None:
        told.append(number)
        if server.poll() is None:
            server.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)
    root = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
    if wait_until_ready(server, f"{root}/health"):
        print(ready_text(root, name), flush=True)
    status = server.wait()
    return 0 if told or status == 0 else 1  # engines differ in what they call an interruption


def check_folder(folder: Path) -> None:
    """Refuse what is not a whole model's folder.

    Raises:
        SaccadeError: saying what it is.
    """
    if not folder.is_dir():
        raise SaccadeError(f"model={str(folder)!r} is not a folder: name the folder of an export or of a run")
    if not (folder / "config.json").is_file():
        hint = "give a folder with a config.json"
        if (folder / "adapter_config.json").is_file():
            hint = f"it holds adapters: `saccade export {folder} --output FOLDER` makes a whole model of them"
        raise SaccadeError(f"model={str(folder)!r} holds no whole model: {hint}")


def installed_engine(engine: str | None) -> str:
    """The engine that is meant, once it is known to be installed.

    Raises:
        SaccadeError: if there is no such engine, or it is not installed.
    """
    if engine not in (None, *ENGINES):
        raise SaccadeError(f"engine={engine!r} is unknown: use one of {', '.join(ENGINES)}")
    if engine != "transformers" and importlib.util.find_spec("vllm") is not None:
        return "vllm"
    if engine == "vllm":
        raise needs_package("saccade serve --engine vllm", "vllm")
    if importlib.util.find_spec("fastapi") is None or importlib.util.find_spec("uvicorn") is None:
        raise SaccadeError(
            'saccade serve needs vllm, or the server of transformers: pip install "saccade[vllm]" in a separate '
            'environment, or pip install "transformers[serving]" here'
        )
    return "transformers"


def vllm_command(
    folder: Path, setting: Mapping[str, Any] | bool | None, flags: Sequence[str], host: str, port: int, name: str
) -> list[str]:
    """The command that starts vLLM's server.

    Raises:
        SaccadeError: if the flags set anew what a setting needs.
    """
    given = ["--host", host, "--port", str(port), "--served-model-name", name]
    if setting is not None:
        if any(flag.partition("=")[0] == "--hf-overrides" for flag in flags):
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
    """The environment of the server: where the user lists plug-ins of vLLM, this one is among them."""
    listed = environment.get("VLLM_PLUGINS")
    if listed is None or PLUGIN in listed.split(","):
        return dict(environment)
    return {**environment, "VLLM_PLUGINS": ",".join([*filter(None, listed.split(",")), PLUGIN])}


def wait_until_ready(server: subprocess.Popen, url: str) -> bool:
    """Whether the server came to answer at `url`; false once its process has ended."""
    while server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                if answer.status == 200:
                    return True
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(POLL)
    return False


def ready_text(root: str, name: str) -> str:
    """What is printed once the server answers: its URL, and how to ask it."""
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,'$(base64 -w0 picture.png)'"}}
    content = [image, {"type": "text", "text": "What is this?"}]
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": content}], "max_tokens": 64})
    return (
        f"saccade: serving {name} at {root}/v1, for any OpenAI client; for example\n"
        f"curl {root}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'"
    )
