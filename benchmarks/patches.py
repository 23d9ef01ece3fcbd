"""How much of an image `patch_tolerance` drops before the vision tower, and what that saves and changes.

    python -m benchmarks.patches                    # shares of drawn pages and screenshots, and of photographs
    python -m benchmarks.patches --tower-layers 2   # also times a tower of Qwen2.5-VL's width

The pictures are drawn from a seed (`pictures.py`), or are the files of `--images-from`, and go through the stock image
processor of Qwen2.5-VL, which resizes them to whole squares of 28 px. Shares are those of the squares that become a
token each. The tower has random weights, which take the time that real ones take; one of its layers, the last, attends
to the whole image, as one in eight does in the released models. All settings take turns on the same picture. `encode`
is all of `family.encode`: the predictor, the tower and the merger; its ratio is of the medians. The cosine is that of
kept tokens' features with those of the tower on the whole image; with random weights it tells little of accuracy:
see `patches_read.py`. On one thread of a CPU, seconds are processor time, which other load hardly affects.
"""

import argparse
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

from benchmarks.pictures import KINDS
from benchmarks.steps import own_seconds_on
from saccade.cli.main import Parser, guarded
from saccade.errors import SaccadeError
from saccade.families import Family, get_family
from saccade.families.some_patches import window_grids, windows_of
from saccade.files import write_json_atomically
from saccade.images import open_image
from saccade.reducers import Needs, reproduced
from saccade.report.environment import environment
from saccade.values import check_counts

PATCH, MERGE = 14, 2
WHOLE = "whole"
OWN = "files"
TOLERANCES = (0.0, 0.05, 0.1, 0.2)
PIXELS = 1280 * 28 * 28


def tower_family(vision: Mapping[str, Any], key_value_heads: int = 1) -> Family:
    """Qwen2.5-VL with this tower, random weights, and a language model that is not run."""
    width = vision["out_hidden_size"]
    text = {"hidden_size": width, "num_hidden_layers": 1, "intermediate_size": 8, "vocab_size": 16}
    text |= {"num_attention_heads": width // 16, "num_key_value_heads": key_value_heads}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}}
    text |= dict.fromkeys(("bos_token_id", "eos_token_id"))
    config = Qwen2_5_VLConfig(vision_config=dict(vision), text_config=text, image_token_id=1, video_token_id=2)
    return get_family(Qwen2_5_VLForConditionalGeneration(config))


def build_family(layers: int, width: int, device: torch.device) -> Family:
    """`tower_family` with so many layers of this width."""
    vision = {
        "depth": layers,
        "hidden_size": width,
        "num_heads": max(1, width // 80),
        "intermediate_size": round(width * 3420 / 1280),
        "fullatt_block_indexes": [layers - 1],
        "out_hidden_size": 2 * width,
        "window_size": 112,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
    }
    torch.manual_seed(0)
    family = tower_family(vision)
    family.model.eval().to(device)
    return family


def process(image: Image.Image, most: int) -> dict[str, torch.Tensor]:
    """`pixel_values` and `image_grid_thw` of an image, of at most so many pixels, and the ids of its placeholders."""
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": most})
    inputs = dict(processor(images=[image], return_tensors="pt"))
    tokens = int(inputs["image_grid_thw"].prod()) // MERGE**2
    return {**inputs, "input_ids": torch.ones(1, tokens, dtype=torch.long)}


def share_dropped(inputs: dict[str, torch.Tensor], tolerance: float) -> float:
    """Share of the image's tokens that are dropped."""
    windows = windows_of(inputs["pixel_values"], PATCH, MERGE)
    return float(reproduced(windows, window_grids(inputs["image_grid_thw"], MERGE), tolerance).float().mean())


@torch.no_grad()
def time_towers(
    family: Family, inputs: dict[str, torch.Tensor], tolerances: list[float], repeats: int
) -> dict[str, dict[str, Any]]:
    """Seconds of `family.encode` on the whole image and with each tolerance, in turns, and how the features change."""
    device = family.model.device
    inputs = {name: value.to(device) for name, value in inputs.items()}
    ways = {WHOLE: Needs(), **{f"{tolerance:g}": Needs(patch_tolerance=tolerance) for tolerance in tolerances}}
    whole = family.encode(inputs).context.features[0]
    found: dict[str, dict[str, Any]] = {}
    for name, needs in ways.items():  # also the warm-up
        context = family.encode(inputs, needs).context
        kept = context.valid[0] if context.absent is None else ~context.absent[0]
        cosine = torch.nn.functional.cosine_similarity(context.features[0][kept], whole[kept], dim=1)
        found[name] = {"dropped": 1 - float(kept.float().mean()), "cosine": float(cosine.mean()), "seconds": []}
        found[name]["predictor"] = []
    for turn in range(repeats):
        for place in range(len(ways)):
            name = list(ways)[(turn + place) % len(ways)]
            started = own_seconds_on(device)
            family.encode(inputs, ways[name])
            found[name]["seconds"].append(own_seconds_on(device) - started)
            if name != WHOLE:
                started = own_seconds_on(device)
                share_dropped(inputs, ways[name].patch_tolerance)
                found[name]["predictor"].append(own_seconds_on(device) - started)
    return found


def pictures(arguments: argparse.Namespace, width: int, height: int) -> dict[str, list[Image.Image]]:
    """The pictures of each kind, of this size; files have their own."""
    if arguments.images_from is not None:
        files = sorted(path for path in arguments.images_from.iterdir() if path.is_file())[: arguments.images]
        if not files:
            raise SaccadeError(f"--images-from {str(arguments.images_from)!r} has no files: give a folder of images")
        return {OWN: [open_image(file) for file in files]}
    kinds = arguments.kinds or list(KINDS)
    sides = {kind: (width, height) if kind.startswith("page") else (height, width) for kind in kinds}
    return {kind: [KINDS[kind](seed, *sides[kind]) for seed in range(arguments.images)] for kind in kinds}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Shares of all pictures, and times of the first of each kind, as `--json` writes them."""
    check_counts(images=arguments.images, repeats=arguments.repeats, width=arguments.width, height=arguments.height)
    tolerances = list(arguments.tolerances)
    shares: dict[str, dict[str, list[float]]] = {}
    for kind, images in pictures(arguments, arguments.width, arguments.height).items():
        inputs = [process(image, arguments.pixels) for image in images]
        shares[kind] = {f"{value:g}": [share_dropped(given, value) for given in inputs] for value in tolerances}
    times: dict[str, Any] = {}
    if arguments.tower_layers:
        device = torch.device(arguments.device)
        family = build_family(arguments.tower_layers, arguments.tower_width, device)
        for kind, images in pictures(arguments, arguments.timed_width, arguments.timed_height).items():
            inputs = process(images[0], arguments.pixels)
            times[kind] = {
                "tokens": int(inputs["input_ids"].shape[1]),
                "ways": time_towers(family, inputs, tolerances, arguments.repeats),
            }
    return {"shares": shares, "times": times, "environment": environment()}


def report(found: dict[str, Any]) -> list[Table]:
    """The tables that are printed."""
    tolerances = list(next(iter(found["shares"].values())))
    table = Table("dropped, mean (least to most)", *(f"tolerance {value}" for value in tolerances))
    for kind, shares in found["shares"].items():
        cells = (f"{statistics.mean(x):.0%} ({min(x):.0%} to {max(x):.0%})" for x in shares.values())
        table.add_row(kind, *cells)
    tables = [table]
    if found["times"]:
        table = Table("encode", "tokens", "tolerance", "dropped", "seconds", "of whole", "predictor", "cosine")
        for kind, timed in found["times"].items():
            base = statistics.median(timed["ways"][WHOLE]["seconds"])
            for name, way in timed["ways"].items():
                middle = statistics.median(way["seconds"])
                predictor = f"{statistics.median(way['predictor']):.3g}" if way["predictor"] else ""
                cells = (f"{way['dropped']:.0%}", f"{middle:.3g}", f"{middle / base:.2f}", predictor)
                table.add_row(kind, str(timed["tokens"]), name, *cells, f"{way['cosine']:.3f}")
        tables.append(table)
    return tables


def main(flags: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4, help="pictures per kind (default: %(default)s)")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), metavar="KIND", help="of pictures (default: all)")
    parser.add_argument("--images-from", type=Path, metavar="FOLDER", help="your own images instead of drawn ones")
    parser.add_argument("--width", type=int, default=868, help="of pages; screenshots lie on their side")
    parser.add_argument("--height", type=int, default=1228)
    parser.add_argument("--pixels", type=int, default=4 * PIXELS, help="the processor's limit (default: %(default)s)")
    parser.add_argument("--tolerances", type=float, nargs="+", default=TOLERANCES)
    parser.add_argument("--tower-layers", type=int, default=0, help="layers of the tower to time; 0 for no times")
    parser.add_argument("--tower-width", type=int, default=1280)
    parser.add_argument("--timed-width", type=int, default=448, help="of the pages that are timed")
    parser.add_argument("--timed-height", type=int, default=560)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="file to write all figures to")
    arguments = parser.parse_args(flags)
    torch.set_num_threads(arguments.threads)
    found = measure(arguments)
    console = Console(width=None if sys.stdout.isatty() else 140)
    for table in report(found):
        console.print(table)
    if arguments.json is not None:
        write_json_atomically(arguments.json, found)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
