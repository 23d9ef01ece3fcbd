"""What `patch_tolerance` costs in accuracy: a small tower learns to read forms, on all patches and on some.

    python -m benchmarks.patches_read [--steps 300] [--train-tolerance 0.05] [--json FILE]

A form is 64 px of flat paper with ruled lines and two handwritten digits of scikit-learn, each of which lies across
up to four of the squares that become a token. A small tower of Qwen2.5-VL's kind, from scratch, and a linear reader
learn to name the digit of every token, or nothing, from `family.encode`: on all patches or, with `--train-tolerance`,
without those that are dropped. It then reads unseen handwriting with each of `TOLERANCES`, and on all patches. `read`
is the share of the tokens of digits that are read right; those that were dropped count as wrong, and are `lost`.
"""

import argparse
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from transformers import Qwen2VLImageProcessorPil

from benchmarks.patches import WHOLE, tower_family
from saccade.cli.main import Parser, guarded
from saccade.data.digits import digit_samples, split_indices
from saccade.families import Family
from saccade.files import write_json_atomically
from saccade.reducers import Needs
from saccade.report.environment import environment
from saccade.values import check_counts

SIDE, SQUARE, PATCH = 64, 16, 8
WIDTH, LAYERS = 64, 2
DIGITS, NOTHING = 2, 10
COVERED = 0.3
"""Share of a square that a digit must cover to be what its token shows."""
BATCH = 16
TOLERANCES = (0.0, 0.05, 0.2)


def form(split: str, number: int) -> tuple[Image.Image, np.ndarray]:
    """A form, and what each of its squares shows: int64 (16,), a digit or `NOTHING`."""
    rng = random.Random(f"form {split} {number}")
    image = Image.new("RGB", (SIDE, SIDE), tuple(rng.randint(215, 255) for _ in range(3)))
    draw = ImageDraw.Draw(image)
    ink = tuple(rng.randint(0, 80) for _ in range(3))
    for line in range(rng.randint(1, 2)):
        draw.line((0, 31 + 32 * line, SIDE, 31 + 32 * line), fill="#9aa4b0")
    shows = np.full((SIDE // SQUARE, SIDE // SQUARE), NOTHING)
    edges = np.arange(SIDE // SQUARE) * SQUARE
    for place in rng.sample(range(4), DIGITS):
        digit = rng.randrange(10)
        drawn = Image.fromarray(digit_samples()[0][rng.choice(split_indices(split)[digit])]).resize((SQUARE, SQUARE))
        left, top = place % 2 * 32 + rng.randint(0, 15), place // 2 * 32 + rng.randint(0, 14)
        image.paste(Image.new("RGB", drawn.size, ink), (left, top), drawn)
        across, down = (
            np.clip(np.minimum(edges + SQUARE, low + SQUARE) - np.maximum(edges, low), 0, None) / SQUARE
            for low in (left, top)
        )
        shows[np.outer(down, across) >= COVERED] = digit
    return image, shows.flatten()


def forms(split: str, first: int, count: int) -> tuple[dict[str, Tensor], Tensor]:
    """Processor outputs of so many forms, and what their squares show: long (count * 16,)."""
    processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": SIDE**2, "longest_edge": SIDE**2}, patch_size=PATCH, merge_size=2
    )
    images, shows = zip(*(form(split, number) for number in range(first, first + count)), strict=True)
    inputs = dict(processor(images=list(images), return_tensors="pt"))
    shown = torch.from_numpy(np.concatenate(shows))
    return {**inputs, "input_ids": torch.ones(1, len(shown), dtype=torch.long)}, shown


def build() -> tuple[Family, nn.Linear]:
    """The tower, in a model whose language part is not run, and the reader."""
    vision = {"depth": LAYERS, "hidden_size": WIDTH, "num_heads": 4, "intermediate_size": 2 * WIDTH}
    vision |= {"out_hidden_size": WIDTH, "patch_size": PATCH, "window_size": 4 * PATCH}
    vision["fullatt_block_indexes"] = [LAYERS - 1]
    return tower_family(vision, key_value_heads=4), nn.Linear(WIDTH, NOTHING + 1)


def train(steps: int, tolerance: float | None, seed: int) -> tuple[Family, nn.Linear]:
    """A tower and its reader after so many steps with a tolerance, or on all patches."""
    torch.manual_seed(seed)
    family, reader = build()
    tower = family.model.model.visual
    parameters = [*tower.parameters(), *reader.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=max(steps, 2), pct_start=0.1)
    weight = torch.ones(NOTHING + 1)
    weight[NOTHING] = 0.1  # most tokens show nothing
    for step in range(steps):
        inputs, shows = forms("train", (seed * steps + step) * BATCH, BATCH)
        features, kept = encode(family, inputs, tolerance)
        loss = nn.functional.cross_entropy(reader(features[kept]), shows[kept], weight)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1} of {steps}, loss {loss.item():.3f}", flush=True)
    family.model.eval()
    return family, reader


def encode(family: Family, inputs: dict[str, Tensor], tolerance: float | None) -> tuple[Tensor, Tensor]:
    """Features (tokens, width), and which tokens were kept, bool (tokens,)."""
    context = family.encode(inputs, Needs(patch_tolerance=tolerance)).context
    kept = context.valid if context.absent is None else context.valid & ~context.absent
    return context.features.flatten(0, 1), kept.flatten()


@torch.no_grad()
def score(family: Family, reader: nn.Linear, tolerance: float | None, count: int) -> dict[str, float]:
    """What is read of so many test forms; shares of tokens."""
    totals = dict.fromkeys(("digits", "read", "lost", "tokens", "dropped"), 0)
    for first in range(0, count, BATCH):
        inputs, shows = forms("test", first, min(BATCH, count - first))
        features, kept = encode(family, inputs, tolerance)
        digits = shows != NOTHING
        right = (reader(features).argmax(dim=1) == shows) & kept
        found = (digits, digits & right, digits & ~kept, torch.ones_like(digits), ~kept)
        for name, values in zip(totals, found, strict=True):
            totals[name] += int(values.sum())
    return {
        "read": totals["read"] / totals["digits"],
        "lost": totals["lost"] / totals["digits"],
        "dropped": totals["dropped"] / totals["tokens"],
    }


def main(flags: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help=f"of {BATCH} forms (default: %(default)s)")
    parser.add_argument("--train-tolerance", type=float, help="in training (default: all patches)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--forms", type=int, default=256, help="to read (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file to write all figures to")
    arguments = parser.parse_args(flags)
    check_counts(steps=arguments.steps, forms=arguments.forms)
    torch.set_num_threads(1)
    family, reader = train(arguments.steps, arguments.train_tolerance, arguments.seed)
    found: dict[str, Any] = {}
    for tolerance in (None, *TOLERANCES):
        name = WHOLE if tolerance is None else f"{tolerance:g}"
        found[name] = score(family, reader, tolerance, arguments.forms)
        shares = ", ".join(f"{key} {value:.1%}" for key, value in found[name].items())
        print(f"read with {name}: {shares}", flush=True)
    if arguments.json is not None:
        settings = {"steps": arguments.steps, "train_tolerance": arguments.train_tolerance, "seed": arguments.seed}
        write_json_atomically(arguments.json, {**settings, "tolerances": found, "environment": environment()})
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
