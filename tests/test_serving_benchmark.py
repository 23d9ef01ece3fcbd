"""The serving benchmark without an engine: streams against a clock, counts, ratios, and a server that only pretends.

That it measures vLLM is in test_serve.py, which needs vLLM.
"""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random

import pytest
import torch

from benchmarks import serving
from benchmarks.serving_load import Request, all_at_once, picture, stream, timed
from benchmarks.serving_tables import operations, requests_that_fit, spread, summarise, tables
from saccade.cli.main import guarded
from saccade.errors import SaccadeError
from saccade.evaluation.counting import count_flops
from saccade.pruning.cache import cache_of
from saccade.skip_vision.cache import cache_name
from saccade.tiny import build_tiny_llava
from saccade.training.flops import TextShape, score_flops


def chunk(ids=(), prompt=None):
    usage = {} if prompt is None else {"usage": {"prompt_tokens": prompt}}
    return {"choices": [{"token_ids": list(ids)}] if ids else [], **usage}


def test_a_stream_is_timed_from_the_start_of_its_burst():
    """The role comes before any token, and a late reader gets two tokens at once."""
    moments = iter([11.0, 12.5, 13.0, 14.5, 15.0])
    chunks = [chunk(), chunk([5]), chunk([6]), chunk([7, 8]), chunk(prompt=40)]
    found = timed(10.0, chunks, lambda: next(moments))
    assert found == Request(first=2.5, further=(14.5 - 12.5) / 3, prompt_tokens=40, answer=[5, 6, 7, 8])


@pytest.mark.parametrize("chunks", [[], [chunk([5]), chunk(prompt=3)], [chunk([5]), chunk([6])]])
def test_what_cannot_be_timed_is_an_error(chunks):
    with pytest.raises(SaccadeError, match="was not a stream with usage"):
        timed(0.0, chunks)


def test_requests_of_a_burst_run_at_once_and_keep_their_order():
    together = threading.Barrier(5, timeout=30)
    starts = []

    def ask(number):
        def run(start):
            together.wait()  # never passed by four
            starts.append(start)
            return Request(number, 0.0, 1, [])

        return run

    seconds, requests = all_at_once([ask(number) for number in range(5)])
    assert [each.first for each in requests] == list(range(5))
    assert len(set(starts)) == 1
    assert seconds > 0


def test_pictures_differ_by_their_number_alone():
    assert picture(3, 16).tobytes() == picture(3, 16).tobytes() != picture(4, 16).tobytes()
    assert picture(3, 16).size == (16, 16)


def test_summaries_are_those_of_a_naive_count():
    random, names = Random(3), ("stock", "pruned")
    cells, rows = [], {"stock": 90, "pruned": 30}
    for repeat in range(3):
        for name in names:
            requests = [
                {"first": random.random(), "further": random.random(), "prompt_tokens": rows[name]} for _ in range(5)
            ]
            cells.append(
                {"provider": name, "at_once": 5, "repeat": repeat, "seconds": random.random(), "requests": requests}
            )
    # A repeat of one alone counts for its own figures, and for no ratio.
    lonely = {"provider": "pruned", "at_once": 5, "repeat": 3, "seconds": 0.5, "requests": cells[-1]["requests"]}
    other = {"provider": "stock", "at_once": 1, "repeat": 0, "seconds": 9.0, "requests": cells[0]["requests"][:1]}
    result = {
        "bench": {"new_tokens": 4},
        "visual_tokens": 64,
        "providers": {
            "stock": {"baseline": "stock", "cache": [10, 16]},
            "pruned": {"baseline": "stock", "cache": [10, 16]},
            "absent": {"baseline": "stock"},
        },
        "operations": {"stock": {"first": 100, "request": 120}, "pruned": {"first": 25, "request": 40}},
        "cells": [*cells, lonely, other],
    }
    found = summarise(result, 5)
    assert list(found) == ["stock", "pruned"]

    def middle_first(cell):
        return sorted(each["first"] for each in cell["requests"])[2]

    stock, pruned = cells[0::2], cells[1::2]
    ratios = sorted(middle_first(a) / middle_first(b) for a, b in zip(stock, pruned, strict=True))
    assert found["pruned"].first_ratio == pytest.approx((ratios[1], ratios[0], ratios[2]))
    rates = sorted(b["seconds"] / a["seconds"] for b, a in zip(stock, pruned, strict=True))
    assert found["pruned"].rate_ratio == pytest.approx((rates[1], rates[0], rates[2]))
    firsts = sorted(map(middle_first, [*pruned, lonely]))
    assert found["pruned"].first == pytest.approx(((firsts[1] + firsts[2]) / 2, firsts[0], firsts[3]))
    assert found["stock"].first_ratio == (1, 1, 1)
    assert (found["pruned"].first_bound, found["pruned"].rate_bound) == (4, 3)
    assert (found["pruned"].cached, found["stock"].cached) == (34, 94)
    assert (found["pruned"].fit, found["stock"].fit) == (3, 1)  # 3 and 6 blocks of 10
    shown = tables(result)
    assert len(shown) == 4
    for title, line in (("first token", 4), ("whole requests", 3)):
        columns, lines = next(shown[name] for name in shown if name.startswith("5 requests") and title in name)
        assert [len(line) for line in lines] == 2 * [len(columns)]
        middle = ratios[1] if title == "first token" else rates[1]
        assert lines[1][columns.index("reached")] == f"{100 * middle / line:.0f} %"


def test_requests_fit_as_a_naive_allocator_places_them():
    for blocks, size, rows in [(7, 4, 1), (7, 4, 4), (7, 4, 5), (7, 4, 29), (100, 32, 130), (1, 1, 2)]:
        free, placed = blocks, 0
        while True:
            left, taken = rows, 0
            while left > 0:
                left, taken = left - size, taken + 1
            if taken > free:
                break
            free, placed = free - taken, placed + 1
        assert requests_that_fit(blocks, size, rows) == placed


def test_spread():
    assert spread([3.0, 1.0, 2.0, 10.0]) == (2.5, 1.0, 10.0)


def test_operations_of_a_request_are_those_that_torch_counts(processor):
    """Tower, projector, prefill and each further token, run one after the other with a cache."""
    model, new = build_tiny_llava(processor, seed=0).eval(), 4
    visual = processor(images=[picture(0, 96)], text="<image>", return_tensors="pt")
    question = processor(text="how many digits ?", return_tensors="pt")["input_ids"]
    ids = torch.cat((visual["input_ids"], question), dim=1)
    images = int((ids == model.config.image_token_id).sum())
    rows, text = ids.shape[1], TextShape.of(model.config)

    @torch.no_grad()
    def answer(tokens):
        given = {"pixel_values": visual["pixel_values"]}
        cache, read = {}, ids
        for _ in range(tokens):
            output = model(input_ids=read, **given, use_cache=True, logits_to_keep=1, **cache)
            cache, given = {cache_name(model.forward): cache_of(output)}, {}
            read = output.logits[:, -1:].argmax(dim=-1)

    found = operations(model.config, 1, images, rows, rows, new)
    # torch counts the scores of all pairs.
    masked = score_flops(text, rows, "full") - score_flops(text, rows, "causal")
    assert count_flops(lambda: answer(1)) - masked == found["first"]
    assert count_flops(lambda: answer(new)) - masked == found["request"]
    fewer = operations(model.config, 1, images, rows - images + 10, rows, new)
    assert fewer["first"] < found["first"]


class Pretender(BaseHTTPRequestHandler):
    """Answers as vLLM's server does, at once, with the tokens 1, 2, 3, ...; a question by itself is refused."""

    protocol_version = "HTTP/1.1"
    asked: list[dict] = []  # noqa: RUF012

    def do_GET(self):
        lines = 'vllm:other 1\nvllm:cache_config_info{block_size="16",cache_dtype="auto",num_gpu_blocks="100"} 1.0\n'
        self.send_response(200)
        self.send_header("Content-Length", str(len(lines)))
        self.end_headers()
        self.wfile.write(lines.encode())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        parts = body["messages"][0]["content"]
        refused = len(parts) < 2
        self.send_response(400 if refused else 200)
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        if refused:
            self.wfile.write(b'{"message": "no picture"}')
            return
        chunks = [chunk(), *(chunk([n + 1]) for n in range(body["max_tokens"])), chunk(prompt=30)]
        for each in chunks:
            self.wfile.write(f"data: {json.dumps(each)}\n\n".encode())
            self.wfile.flush()
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_):
        pass


@pytest.fixture
def pretender():
    """The URL of a server, and what it was asked."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (Pretender,), {"asked": []}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", server.RequestHandlerClass.asked
    server.shutdown()
    server.server_close()


def test_a_refused_request_is_an_error_that_says_why(pretender):
    url, _ = pretender
    body = {"messages": [{"role": "user", "content": [{"type": "text", "text": "?"}]}], "max_tokens": 2}
    with pytest.raises(SaccadeError, match=r"answered 400: .*no picture"):
        list(stream(url, body))


def test_it_measures_and_goes_on_where_it_stopped(pretender, processor, tmp_path, monkeypatch, capsys):
    """Everything but the engine: the tiny model's `generate`, prepared requests, selection, tables and picture."""
    url, asked = pretender
    folder, output = tmp_path / "model", tmp_path / "found" / "serving.json"
    build_tiny_llava(processor, seed=0).save_pretrained(folder)
    processor.save_pretrained(folder)
    started = []

    @contextmanager
    def servers(python, folder, settings, *_):
        started.append(dict(settings))
        yield dict.fromkeys(settings, url)

    monkeypatch.setattr(serving, "vllm_servers", servers)
    monkeypatch.setattr(serving, "PAUSE", 0)
    monkeypatch.setattr(serving, "engine_versions", lambda python: {"vllm": "0"})
    python = tmp_path / "python"
    python.touch()
    words = ["--model", str(folder), "--at-once", "1,3", "--ratios", "0.5,0.75", "--new-tokens", "3", "--threads", "1"]
    words += ["--python", str(python), "--output", str(output)]
    assert serving.main([*words, "--repeats", "1"]) == 0
    assert started == [
        {
            "vLLM, all tokens": None,
            "plug-in, ratio 0.5": {"reducer": "divprune", "prune_ratio": 0.5},
            "plug-in, ratio 0.75": {"reducer": "divprune", "prune_ratio": 0.75},
        }
    ]
    result = json.loads(output.read_text())
    assert len(result["cells"]) == 6 * 2
    kinds = [body["messages"][0]["content"][0]["type"] for body in asked]
    assert (kinds.count("image_url"), kinds.count("image_embeds")) == (3 * (1 + 1 + 3), 1 + 1 + 3)
    sent = [body["messages"][0]["content"][0].get("image_url", {}).get("url") for body in asked]
    assert len(set(sent) - {None}) == 1 + 1 + 3  # each picture is new, and the same for all
    # 144 visual tokens of the tiny model; 36 of them are left.
    prompts = {cell["provider"]: cell["requests"][0]["prompt_tokens"] for cell in result["cells"]}
    assert prompts["generate, all tokens"] - prompts["generate, ratio 0.75"] == 144 - 36
    assert all(len(each["answer"]) == 3 for cell in result["cells"] for each in cell["requests"])
    assert result["providers"]["plug-in, ratio 0.5"]["cache"] == [100, 16]
    assert set(result["selection"]) == {"plug-in, ratio 0.5", "plug-in, ratio 0.75"}
    assert output.with_suffix(".png").stat().st_size > 10000
    shown = capsys.readouterr().out
    assert "3 requests at a time" in shown
    assert "generate, ratio 0.75" in shown
    # Another repeat of what was there, and nothing of it anew; without `generate` and larger bursts.
    asked.clear()
    assert serving.main([*words, "--repeats", "2", "--no-generate", "--at-once", "1"]) == 0
    after = json.loads(output.read_text())
    assert after["cells"][:12] == result["cells"]
    assert {(cell["at_once"], cell["repeat"]) for cell in after["cells"][12:]} == {(1, 1)}
    assert len(after["cells"]) == 12 + 4
    assert len(asked) == 4 * 2
    # Nothing is left to do: no server starts, and the tables come from the file.
    assert serving.main([*words, "--repeats", "1"]) == 0
    assert started[2:] == [{}]
    assert guarded(lambda: serving.main([*words, "--reducer", "random"])) == 2
    assert "was measured with reducer='divprune', not 'random'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--at-once", "1,none"], "at_once='1,none': give numbers with commas"),
        (["--at-once", "0"], "at_once=(0,): give numbers from 1 on"),
        (["--ratios", "1.5"], "prune_ratio=1.5"),
        (["--new-tokens", "1"], "new_tokens=1: give at least 2"),
        (["--crops", "two"], "crops='two' is unknown"),
        (["--device", "tpu"], "device='tpu'"),
        (["--python", "nowhere"], "python='nowhere' is not there"),
        (["--output", "found.txt"], "give a name that ends with .json"),
    ],
)
def test_bad_input_is_refused_before_anything_starts(words, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert guarded(lambda: serving.main(words)) == 2
    assert line in capsys.readouterr().err
