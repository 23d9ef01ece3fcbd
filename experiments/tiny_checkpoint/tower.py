"""Pretraining of the tiny vision tower on digit scenes: what each patch shows, and what the CLS token counts."""

import random
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import CLIPVisionModel, LlavaProcessor

from saccade.data.scenes import AMBIGUOUS, BACKGROUND, DISTRACTOR, patch_labels, render_scene, sample_scene

NUM_CONTENTS = 12
# The CLS token distinguishes none, one, and two or more of a digit.
COUNT_LEVELS = 3
GRID = (12, 12)
# The layer LLaVA reads, and the one whose attention from CLS pruning methods read.
READ_LAYER = -2


def tower_batch(
    rng: random.Random, processor: LlavaProcessor, split: str, batch_size: int, max_digits: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scenes of 1 to `max_digits` digits of `split`.

    Returns:
        pixel_values: float32 (B, 3, 96, 96).
        content: long (B, 144), what a patch shows as `patch_labels` numbers it.
        counts: long (B, 10), how often each digit occurs, at most `COUNT_LEVELS - 1`.
    """
    images, content, counts = [], [], np.zeros((batch_size, 10), dtype=np.int64)
    for row in range(batch_size):
        spec, digits = sample_scene(rng, split, GRID, rng.randint(1, max_digits))
        images.append(render_scene(spec))
        content.append(patch_labels(spec)[0].ravel())
        for digit in digits:
            counts[row, digit.value] += 1
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    return pixels, torch.from_numpy(np.stack(content)), torch.from_numpy(counts.clip(max=COUNT_LEVELS - 1))


class TowerHeads(nn.Module):
    """Linear read-outs that are only used during pretraining."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.content = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, NUM_CONTENTS))
        self.counts = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 10 * COUNT_LEVELS)) for _ in range(2)
        )

    def loss(
        self, hidden_states: tuple[torch.Tensor, ...], content: torch.Tensor, counts: torch.Tensor
    ) -> torch.Tensor:
        """Cross-entropy of patch contents at `READ_LAYER` plus that of the CLS counts there and at the end."""
        patches = self.content(hidden_states[READ_LAYER][:, 1:])
        # Most of a scene is background, which is learned quickly.
        weight = torch.ones(NUM_CONTENTS, device=patches.device)
        weight[BACKGROUND] = 0.2
        total = cross_entropy(patches.flatten(0, 1), content.flatten(), weight, ignore_index=AMBIGUOUS)
        for head, layer in zip(self.counts, (READ_LAYER, -1), strict=True):
            logits = head(hidden_states[layer][:, 0]).unflatten(-1, (10, COUNT_LEVELS))
            total = total + 0.25 * cross_entropy(logits.flatten(0, 1), counts.flatten())
        return total


def train_tower(
    tower: CLIPVisionModel,
    processor: LlavaProcessor,
    steps: int,
    seed: int = 0,
    learning_rate: float = 2e-3,
    batch_size: int = 32,
    log: Callable[[str], None] = print,
) -> None:
    """Train `tower` in place on train scenes of up to nine digits, so that each canvas teaches much."""
    rng = random.Random(f"tower/{seed}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = TowerHeads(tower.config.hidden_size)
    place_positions(tower)
    parameters = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    tower.train()
    for step in range(steps):
        pixels, content, counts = tower_batch(rng, processor, "train", batch_size, max_digits=9)
        loss = heads.loss(tower(pixels, output_hidden_states=True).hidden_states, content, counts)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            log(f"tower step {step} loss {loss.item():.3f}")
    tower.eval()


@torch.no_grad()
def probe_tower(
    tower: CLIPVisionModel, processor: LlavaProcessor, fit_scenes: int = 400, test_scenes: int = 200, seed: int = 0
) -> dict[str, float]:
    """Linear read-outs of the features LLaVA receives: fitted on scenes of train digits, scored on validation ones.

    Returns:
        digit_accuracy: share of digit patches classified correctly by least squares on the 12 contents.
        distractor_accuracy: the same for distractor patches.
        position_r2: share of the variance of patch row and column that a linear map explains, the lower of the two.
        cls_presence: share of (scene, digit) pairs that the last layer's CLS token classifies as present or absent.
    """
    rng = random.Random(f"probe/{seed}")
    parts = []
    for split, scenes in (("train", fit_scenes), ("validation", test_scenes)):
        pixels, content, counts = tower_batch(rng, processor, split, scenes, max_digits=4)
        states = [tower(chunk, output_hidden_states=True).hidden_states for chunk in pixels.split(50)]
        features = torch.cat([state[READ_LAYER][:, 1:] for state in states]).flatten(0, 1)
        place = torch.stack(torch.meshgrid(*map(torch.arange, GRID), indexing="ij"), -1).reshape(1, -1, 2)
        cls = torch.cat([state[-1][:, 0] for state in states])
        parts.append((features, content.flatten(), place.expand(scenes, -1, -1).flatten(0, 1).float(), cls, counts))
    (fit_x, fit_content, fit_place, fit_cls, fit_counts), (x, content, place, cls, counts) = parts

    known = fit_content != AMBIGUOUS
    onehot = nn.functional.one_hot(fit_content[known], NUM_CONTENTS).float()
    guess = _linear_fit(fit_x[known], onehot, x).argmax(-1)
    residual = (_linear_fit(fit_x, fit_place, x) - place).square().mean(0)
    present = _linear_fit(fit_cls, (fit_counts > 0).float(), cls) > 0.5
    digit, distractor = (content >= 0) & (content < DISTRACTOR), content == DISTRACTOR
    return {
        "digit_accuracy": (guess == content)[digit].float().mean().item(),
        "distractor_accuracy": (guess == content)[distractor].float().mean().item(),
        "position_r2": (1 - residual / place.var(0)).min().item(),
        "cls_presence": (present == (counts > 0)).float().mean().item(),
    }


@torch.no_grad()
def place_positions(tower: CLIPVisionModel) -> None:
    """Initialise the position table with sines and cosines of row and column, as strong as the patches' content.

    With CLIP's small random table, patches do not recognise their neighbours for thousands of steps, and a digit
    spans several patches.
    """
    table = next(weight for name, weight in tower.named_parameters() if name.endswith("position_embedding.weight"))
    side = tower.config.image_size // tower.config.patch_size
    bands = table.shape[1] // 4
    frequency = 100.0 ** (-torch.arange(bands) / bands)
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = torch.cat([row.reshape(-1, 1) * frequency, column.reshape(-1, 1) * frequency], -1)
    table[1:] = 0.3 * torch.cat([angles.sin(), angles.cos()], -1)


def _linear_fit(fit_x: torch.Tensor, fit_y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Ridge regression with intercept, in float64: (n, D), (n, K) and (m, D) to (m, K)."""
    mean, scale = fit_x.mean(0), fit_x.std(0) + 1e-6
    fit_x, x = ((fit_x - mean) / scale).double(), ((x - mean) / scale).double()
    offset = fit_y.double().mean(0)
    gram = fit_x.T @ fit_x + 1e-3 * len(fit_x) * torch.eye(fit_x.shape[1], dtype=torch.float64)
    return (x @ torch.linalg.solve(gram, fit_x.T @ (fit_y.double() - offset)) + offset).float()
