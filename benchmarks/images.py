"""One row with 1, 8 or 32 images or a clip: its tokens, time and memory, on all visual tokens and on kept ones.

    python -m benchmarks.images [--repeats 5] [--prune-ratio 0.9] [--quick] [--output FILE]

The first table is measured on a small Qwen2.5-VL with random weights, forward and backward of the language model,
projector and tower frozen; both kinds of step take turns on the same rows, and times are CPU time, medians of
several. The second is the dry run of Qwen2.5-VL-7B with LoRA, whose memory is what the backward pass needs beside
the weights. A clip of 64 frames is 32 pairs of frames, and a pair costs what an image costs: the dry run counts the
clip as 32 images, without the isolator before each, of which a clip has one.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from benchmarks.counting import count_saved_bytes
from saccade.cli.main import Parser, guarded
from saccade.dualspeed.step import DualSpeedStep, ModePlan
from saccade.families import get_family
from saccade.files import write_json_atomically
from saccade.pruning import Pruner
from saccade.reducers import PruningConfig
from saccade.report.environment import environment
from saccade.report.tables import print_table
from saccade.tokens import IGNORE_INDEX
from saccade.training.plan import plan_recipe
from saccade.values import check_counts

ROWS = {"1 image": (1, 0), "8 images": (8, 0), "32 images": (32, 0), "a clip of 64 frames": (0, 64)}
"""Images, and frames of a clip."""
PATCHES, TEXT, ANSWER = 16, 32, 16
"""Patches per side of a picture, tokens of text, and how many of these are learned."""
RECIPE = "qwen2.5-vl-7b/sft_lora"


def main(argv: list[str] | None = None) -> int:
    """Measure, plan, and print both tables.

    Raises:
        SaccadeError: on bad input, before anything is measured.
    """
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser("benchmarks.images", description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="timed steps of each kind (%(default)s)")
    parser.add_argument("--prune-ratio", type=float, default=0.9, metavar="P", help="of kept tokens (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="one image and two frames only, to see that it runs")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write JSON to FILE")
    args = parser.parse_args(argv)
    check_counts(repeats=args.repeats)
    pruning = PruningConfig("divprune", prune_ratio=args.prune_ratio)
    chosen = {"1 image": (1, 0), "a clip of 2 frames": (0, 2)} if args.quick else ROWS
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        measured = measure(chosen, pruning, args.repeats)
    finally:
        torch.set_num_threads(threads)
    columns = ["row", "tokens, all", "kept", "ms, all", "kept", "times", "MiB, all", "kept"]
    cells = [
        [
            name,
            *(str(row[kind]["tokens"]) for kind in ("all", "kept")),
            *(f"{1000 * row[kind]['seconds']:.0f}" for kind in ("all", "kept")),
            f"{row['speedup']:.1f}x",
            *(f"{row[kind]['saved_bytes'] / 2**20:.0f}" for kind in ("all", "kept")),
        ]
        for name, row in measured.items()
    ]
    print_table("a step of a small Qwen2.5-VL", columns, cells)
    planned = plan(chosen, pruning)
    columns = ["row", "tokens, all", "kept", "TFLOP, all", "kept", "times", "GiB, all", "kept"]
    cells = [
        [
            name,
            *(f"{row[kind]['tokens']:.0f}" for kind in ("all", "kept")),
            *(f"{row[kind]['flops'] / 1e12:.0f}" for kind in ("all", "kept")),
            f"{row['all']['flops'] / row['kept']['flops']:.1f}x",
            *(f"{row[kind]['bytes'] / 2**30:.1f}" for kind in ("all", "kept")),
        ]
        for name, row in planned.items()
    ]
    print_table(f"the dry run of {RECIPE}, images of 672 x 672 pixels", columns, cells)
    if args.output is not None:
        write_json_atomically(args.output, {"measured": measured, "planned": planned, "environment": environment()})
    return 0


def measure(rows: dict[str, tuple[int, int]], pruning: PruningConfig, repeats: int) -> dict[str, Any]:
    """Tokens, median CPU seconds and bytes kept for the backward pass of a step on each row, by kind of step."""
    model = small_model()
    family = get_family(model)
    step = DualSpeedStep(
        family=family,
        modes={"all": ModePlan(), "kept": ModePlan(Pruner(pruning))},
        distill_weight=0.0,
        distill_temperature=1.0,
    )
    found = {}
    for name, (images, frames) in rows.items():
        batch = make_row(model, images, frames)
        kinds: dict[str, dict[str, Any]] = {kind: {"seconds": []} for kind in step.modes}
        for kind, entry in kinds.items():
            with count_saved_bytes(model.parameters()) as saved:
                output = step(kind, batch, ANSWER)
                output.loss.backward()
            entry |= {"tokens": int(output.tokens_in), "saved_bytes": saved.peak}
        for _ in range(repeats):
            for kind, entry in kinds.items():
                started = time.process_time()
                step(kind, batch, ANSWER).loss.backward()
                entry["seconds"].append(time.process_time() - started)
        ratios = [one / other for one, other in zip(*(entry["seconds"] for entry in kinds.values()), strict=True)]
        for entry in kinds.values():
            entry["seconds"] = statistics.median(entry["seconds"])
        found[name] = {**kinds, "speedup": statistics.median(ratios)}
    return found


def plan(rows: dict[str, tuple[int, int]], pruning: PruningConfig) -> dict[str, Any]:
    """Tokens, operations and bytes for the backward pass of each row on Qwen2.5-VL-7B, by kind of step."""
    found: dict[str, Any] = {}
    for name, (images, frames) in rows.items():
        count = images or frames // 2
        flags = ["--slow_probability", "0", "--prune_ratio", str(pruning.prune_ratio), "--reducer", pruning.reducer]
        flags += ["--per_device_train_batch_size", "1", "--max_length", str(1000 * (count + 1))]
        flags += [] if images else ["--isolator_length", "0"]
        kept = plan_recipe(RECIPE, flags, text_tokens=128, images=count)
        ordinary = ["--slow_probability", "1", "--prune_ratio", "0", "--distill_weight", "0"]
        full = plan_recipe(RECIPE, [*flags, *ordinary], text_tokens=128, images=count)
        found[name] = {
            kind: {
                "tokens": one["expected"]["length"],
                "flops": one["expected"]["flops"],
                "bytes": one["memory"]["activations"],
            }
            for kind, one in (("all", full), ("kept", kept))
        }
    return found


def small_model() -> PreTrainedModel:
    """A Qwen2.5-VL of about four million parameters with random weights, of which the language model trains."""
    text = {
        **{"vocab_size": 1024, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6},
        **{"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 8192},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
        **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    }
    vision = {
        **{"depth": 4, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4, "out_hidden_size": 192},
        **{"patch_size": 14, "window_size": 112, "fullatt_block_indexes": [3]},
    }
    tokens = {"image_token_id": 3, "video_token_id": 4, "vision_start_token_id": 5, "vision_end_token_id": 6}
    config = AutoConfig.for_model("qwen2_5_vl", text_config=text, vision_config=vision, **tokens)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa").train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("visual" not in name)
    return model


def make_row(model: PreTrainedModel, images: int, frames: int) -> dict[str, Any]:
    """What processor and collator would give for a row of random pictures, or a clip, and random words."""
    config, vision = model.config, model.config.vision_config
    generator = torch.Generator().manual_seed(images + frames)
    side = PATCHES // vision.spatial_merge_size
    width = 3 * vision.temporal_patch_size * vision.patch_size**2
    pairs = frames // vision.temporal_patch_size
    pixels = torch.randn((images or pairs) * PATCHES**2, width, generator=generator)
    pad = config.image_token_id if images else config.video_token_id
    tokens = side**2 * (1 if images else pairs)
    media = [config.vision_start_token_id, *[pad] * tokens, config.vision_end_token_id]
    words = torch.randint(7, 1024, (TEXT,), generator=generator)
    ids = torch.cat([torch.tensor(media * (images or 1)), words])[None]
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[:, -ANSWER:] = ids[:, -ANSWER:]
    kind = (ids == config.image_token_id) + 2 * (ids == config.video_token_id)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "mm_token_type_ids": kind}
    if images:
        grid = torch.tensor([[1, PATCHES, PATCHES]] * images)
        return {**batch, "pixel_values": pixels, "image_grid_thw": grid}
    grid = torch.tensor([[pairs, PATCHES, PATCHES]])
    return {**batch, "pixel_values_videos": pixels, "video_grid_thw": grid, "second_per_grid_ts": torch.ones(1)}


if __name__ == "__main__":
    sys.exit(guarded(main))
