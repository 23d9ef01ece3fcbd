"""What a serving benchmark asks of, and how: bursts of requests at servers of vLLM, and at `generate`.

A burst is a number of requests that arrive at once. Each has a different picture, so that no cache has seen it.
"""

import base64
import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin, StoppingCriteria, StoppingCriteriaList

from saccade import PruningConfig, apply_pruning
from saccade.errors import SaccadeError
from saccade.pruning.cache import cache_of
from saccade.serving import vllm_request
from saccade.serving.start import vllm_command, wait_until_ready

QUESTION = "What is shown in this picture?"


@dataclass(frozen=True)
class Request:
    """One answered request.

    Args:
        first: seconds from the start of its burst to its first token.
        further: mean seconds between two of its tokens.
        prompt_tokens: rows that its prompt took of the key-value cache.
        answer: token ids.
    """

    first: float
    further: float
    prompt_tokens: int
    answer: list[int]


Burst = tuple[float, list[Request]]
"""Seconds until all were answered, and each."""


class Provider(Protocol):
    """Something that answers."""

    def burst(self, numbers: Sequence[int]) -> Burst:
        """Answer one request for each number, which is that of its picture, all at once."""
        ...


def picture(number: int, side: int) -> Image.Image:
    """A picture of smooth colours, another for each number, `side` pixels wide and high."""
    colours = torch.randint(0, 256, (8, 8, 3), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
    return Image.fromarray(colours.numpy()).resize((side, side), Image.Resampling.BILINEAR)


def data_url(image: Image.Image) -> str:
    """The picture as a chat client sends it."""
    written = io.BytesIO()
    image.save(written, "PNG")
    return f"data:image/png;base64,{base64.b64encode(written.getvalue()).decode()}"


def timed(
    start: float, chunks: Iterable[Mapping[str, Any]], clock: Callable[[], float] = time.perf_counter
) -> Request:
    """Read the chunks of a streamed chat completion as they come, against the clock.

    Raises:
        SaccadeError: if the stream ends without two tokens at two times, or without its usage.
    """
    first = last = None
    answer: list[int] = []
    at_first = prompt_tokens = 0
    for chunk in chunks:
        now = clock()
        new = [token for choice in chunk.get("choices", ()) for token in choice.get("token_ids") or ()]
        if new:
            if first is None:
                first, at_first = now, len(new)
            last = now
            answer += new
        if chunk.get("usage"):
            prompt_tokens = chunk["usage"]["prompt_tokens"]
    if first is None or last is None or len(answer) == at_first or not prompt_tokens:
        raise SaccadeError(f"the server's answer of {len(answer)} tokens was not a stream with usage: look at its log")
    return Request(first - start, (last - first) / (len(answer) - at_first), prompt_tokens, answer)


def all_at_once(asks: Sequence[Callable[[float], Request]], clock: Callable[[], float] = time.perf_counter) -> Burst:
    """Ask all at the same time, each in a thread; each is handed the time at which the burst starts."""
    with ThreadPoolExecutor(len(asks)) as pool:
        start = clock()
        requests = list(pool.map(lambda ask: ask(start), asks))
        return clock() - start, requests


def stream(url: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Chunks of a streamed chat completion.

    Raises:
        SaccadeError: if the server refuses.
    """
    place = urlsplit(url)
    connection = http.client.HTTPConnection(place.netloc, timeout=3600)
    try:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", f"{place.path}/chat/completions", json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            raise SaccadeError(f"the server answered {response.status}: {response.read(500).decode(errors='replace')}")
        for line in response:
            data = line.removeprefix(b"data: ").strip()
            if line.startswith(b"data: ") and data != b"[DONE]":
                yield json.loads(data)
    finally:
        connection.close()


@dataclass(frozen=True)
class Server:
    """A server of vLLM, asked over HTTP as chat clients ask.

    Args:
        url: where it answers.
        blocks, block_size: its key-value cache, in blocks, and the tokens of one.
        side: of the pictures.
        new_tokens: of an answer.
        prepare: makes content parts of a picture; None sends the picture itself.
    """

    url: str
    blocks: int
    block_size: int
    side: int
    new_tokens: int
    prepare: Callable[[Image.Image], list[dict[str, Any]]] | None = None

    def burst(self, numbers: Sequence[int]) -> Burst:
        images = [picture(number, self.side) for number in numbers]
        sent = [None if self.prepare else [image_part(image)] for image in images]
        return all_at_once([self._ask(image, parts) for image, parts in zip(images, sent, strict=True)])

    def _ask(self, image: Image.Image, parts: list[dict[str, Any]] | None) -> Callable[[float], Request]:
        def ask(start: float) -> Request:
            content = [*(parts or self.prepare(image)), {"type": "text", "text": QUESTION}]
            body = {
                "model": "model",
                "messages": [{"role": "user", "content": content}],
                "temperature": 0,
                "max_tokens": self.new_tokens,
                "min_tokens": self.new_tokens,
                "stream": True,
                "stream_options": {"include_usage": True},
                "return_token_ids": True,
            }
            return timed(start, stream(self.url, body))

        return ask


def image_part(image: Image.Image) -> dict[str, Any]:
    """The content part of a chat message that is a picture."""
    return {"type": "image_url", "image_url": {"url": data_url(image)}}


def preparing(
    model: PreTrainedModel, processor: ProcessorMixin, config: PruningConfig
) -> Callable[[Image.Image], list[dict[str, Any]]]:
    """Encodes pictures in this process, one after the other, and keeps what `config` keeps."""
    one = threading.Lock()

    def prepare(image: Image.Image) -> list[dict[str, Any]]:
        with one:
            return vllm_request(model, processor, image, processor.image_token, config).parts

    return prepare


class Generate:
    """`generate` of transformers in this process, a burst as one batch.

    Args:
        config: how it prunes in place; None keeps all tokens.
        side: of the pictures.
        new_tokens: of an answer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        config: PruningConfig | None,
        side: int,
        new_tokens: int,
    ) -> None:
        self.model, self.processor, self.config = model, processor, config
        self.side, self.new_tokens = side, new_tokens
        content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
        self.prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    @torch.inference_mode()
    def burst(self, numbers: Sequence[int]) -> Burst:
        images = [[picture(number, self.side)] for number in numbers]
        marks = Marks()
        pruning = None if self.config is None else apply_pruning(self.model, self.config)
        try:
            start = time.perf_counter()
            inputs = self.processor(images=images, text=[self.prompt] * len(images), return_tensors="pt")
            inputs = inputs.to(self.model.device, dtype=self.model.dtype)
            output = self.model.generate(
                **inputs,
                max_new_tokens=self.new_tokens,
                min_new_tokens=self.new_tokens,
                do_sample=False,
                stopping_criteria=StoppingCriteriaList([marks]),
                return_dict_in_generate=True,
            )
            seconds = time.perf_counter() - start
        finally:
            if pruning is not None:
                pruning.remove()
        first, further = marks.seconds[0] - start, (marks.seconds[-1] - marks.seconds[0]) / (self.new_tokens - 1)
        # The last token of an answer is never read.
        prompt_tokens = cache_of(output).get_seq_length() - (self.new_tokens - 1)
        answers = output.sequences[:, -self.new_tokens :].tolist()
        return seconds, [Request(first, further, prompt_tokens, answer) for answer in answers]


class Marks(StoppingCriteria):
    """Stops nothing, and notes when each token was chosen."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        done.any().item()  # waits for the device
        self.seconds.append(time.perf_counter())
        return done


@contextmanager
def vllm_servers(
    python: Path,
    folder: Path,
    settings: Mapping[str, Mapping[str, Any] | None],
    flags: Sequence[str],
    variables: Mapping[str, str],
    logs: Path,
    together: bool = True,
) -> Iterator[dict[str, str]]:
    """The URLs of servers on a folder by name, stopped at the end.

    Args:
        python: of the environment that has vLLM.
        settings: how each prunes, for the plug-in; None is a server of vLLM alone, without it.
        flags, variables: of the engine's command, and of its environment.
        logs: folder that gets the log of each.
        together: start all at once. On a GPU each measures the free memory as it starts, so one waits for the other.

    Raises:
        SaccadeError: if one ends before it answers.
    """
    running: dict[str, tuple[subprocess.Popen, str]] = {}
    logs.mkdir(parents=True, exist_ok=True)
    try:
        for name, setting in settings.items():
            port = free_port()
            command = vllm_command(folder, setting, flags, "127.0.0.1", port, "model")[1:]
            plugins = "" if setting is None else "saccade"
            # Without what is put in the way of this environment's packages, which are not those of the engine's.
            environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
            log = logs / f"{re.sub('[^a-z0-9.]+', '-', name.lower())}.log"
            with log.open("w") as written:
                process = subprocess.Popen(
                    [python, *command],
                    env={**environment, **variables, "VLLM_PLUGINS": plugins},
                    stdout=written,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            running[name] = (process, f"http://127.0.0.1:{port}")
            if not together:
                _wait(*running[name], log)
        for process, root in running.values():
            _wait(process, root, logs)
        yield {name: f"{root}/v1" for name, (_, root) in running.items()}
    finally:
        for process, _ in running.values():
            process.send_signal(signal.SIGINT)
        for process, _ in running.values():
            process.wait(120)


def _wait(process: subprocess.Popen, root: str, log: Path) -> None:
    if not wait_until_ready(process, f"{root}/health"):
        raise SaccadeError(f"a server ended before it answered: see {log}")


def free_port() -> int:
    """A port of the loopback that nothing listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def cache_blocks(url: str) -> tuple[int, int]:
    """Blocks of a server's key-value cache, and the tokens of one, from its metrics.

    Raises:
        SaccadeError: if they do not say.
    """
    with urllib.request.urlopen(url.removesuffix("/v1") + "/metrics") as answer:
        lines = [line for line in answer.read().decode().splitlines() if line.startswith("vllm:cache_config_info")]
    found = [re.search(rf'[{{,]{name}="(\d+)"', line) for line in lines for name in ("num_gpu_blocks", "block_size")]
    if len(found) != 2 or None in found:
        raise SaccadeError(f"{url}: the metrics of this version of vLLM do not tell the size of its cache")
    return int(found[0][1]), int(found[1][1])
