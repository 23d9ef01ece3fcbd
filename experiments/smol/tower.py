"""Pretraining of the testbed's vision tower: what each patch of the tasks' pictures shows, in words."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from experiments.smol.tasks import TASKS, Sample
from experiments.smol.tasks.base import PATCH
from experiments.tiny_checkpoint.tower import READ_LAYER, place_positions
from saccade.errors import SaccadeError
from saccade.files import atomic_path, write_json_atomically
from saccade.report.environment import environment
from saccade.sweeps.worker import process_clock

WIDTH, LAYERS, HEADS = 256, 4, 4
"""3.4 million parameters at 12 x 12 patches."""
BATCH = {"digits": 3, "easy_vqa": 2, "documents": 6, "charts": 5}
"""Pictures of each task in a step: more of those with text to read."""
NOTHING = 0
VOCABULARY = ("", *sorted({word for task in TASKS.values() for word in task.words}))
"""What a patch can show: nothing, or words of the tasks' regions."""
THINNED = 0.75
"""Share of the steps, from the first on, that see few patches of each picture."""
THINNED_PATCHES = 4 / 9
"""Share of the patches that they see: 64 of 144, of which a page of text has about as many that show something."""
STATE_FILE, REPORT_FILE = "training.pt", "tower.json"
SAVE_EVERY = 25

_FREE = ("start", "precision")
"""Settings that a tower which is there may have otherwise: where it began lies elsewhere on another machine."""
_COVERED = 0.4
"""Share of a patch that a region must cover to be what the patch shows."""
_NUMBER = {word: number for number, word in enumerate(VOCABULARY)}


def train_tower(
    output: Path,
    steps: int,
    seed: int = 0,
    grid: int = 12,
    start: Path | None = None,
    learning_rate: float = 1.5e-3,
    precision: str = "float32",
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Pretrain a tower on train pictures, and write it with its report, `tower.json`, as a Hugging Face folder.

    A patch learns, by cross-entropy at the layer that LLaVA reads, all words of the region that it is a part of, or
    that it shows nothing; CLS learns there and at the end all words of the picture, so that what it attends to means
    something. Most steps see those patches of a picture that show something and few others, which takes half the time.
    A call that was interrupted resumes from its last save, and sees the same pictures as an uninterrupted one.

    Args:
        output: folder to make; while training goes on it holds `training.pt`.
        steps: number of steps, of `BATCH` pictures each.
        seed: of weights and pictures.
        grid: patches per side.
        start: the folder of a tower to begin with, of any grid: positions are interpolated.
        learning_rate: the highest.
        precision: of the tower's matrix products, "float32" or "bfloat16"; the weights learn in float32
            and are saved in bfloat16.
        log: is given a line now and then.

    Returns:
        The report: held-out scores as of `score_tower`, the settings, `cpu_seconds` and `seconds`.

    Raises:
        SaccadeError: on a number of steps below 1, or a folder in which a tower of other settings is being made.
    """
    settings = {
        "steps": steps,
        "seed": seed,
        "grid": grid,
        "start": start and str(start),
        "learning_rate": learning_rate,
        "precision": precision,
    }
    report_file = output / REPORT_FILE
    if report_file.is_file():
        report = json.loads(report_file.read_text())
        _check_settings(output, report["settings"], settings)
        return report
    if steps < 1:
        raise SaccadeError(f"tower steps={steps}: give at least 1")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tower, heads = _new_tower(grid, start), Heads(WIDTH)
    parameters = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.05, betas=(0.9, 0.98))
    first, spent = _resume(output / STATE_FILE, settings, tower, heads, optimizer)
    if first:
        log(f"tower: going on after step {first} of {steps}")
    started = np.array(process_clock())
    tower.train()
    for step in range(first, steps):
        pixels, targets = tower_batch("train", step, seed, grid)
        chosen = choose_patches(targets, step if step < THINNED * steps else None)
        mixed = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16")
        with only_patches(tower, chosen), mixed:
            states = tower(pixels, output_hidden_states=True).hidden_states
        loss = heads.loss([layer.float() for layer in states], targets, chosen)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * _rate(step, steps)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            log(f"tower: step {step + 1} of {steps}, loss {loss.item():.3f}")
            total = spent + np.array(process_clock()) - started
            _save_state(output / STATE_FILE, settings, step + 1, total, tower, heads, optimizer)
    # Rounded first, so that the scores are of the weights that are saved.
    tower.eval().to(torch.bfloat16)
    cpu_seconds, seconds = map(float, spent + np.array(process_clock()) - started)
    report = {
        "settings": settings,
        "validation": score_tower(tower.float(), heads, seed, grid),
        "parameters": sum(parameter.numel() for parameter in tower.parameters()),
        "cpu_seconds": cpu_seconds,
        "seconds": seconds,
        "environment": environment(),
    }
    tower.to(torch.bfloat16).save_pretrained(output)
    image_processor(grid).save_pretrained(output)
    # Last: with it the tower is whole.
    write_json_atomically(report_file, report)
    (output / STATE_FILE).unlink()
    return report


def image_processor(grid: int) -> CLIPImageProcessorPil:
    """What makes pixels of pictures, which have the tower's own size."""
    side = {"height": grid * PATCH, "width": grid * PATCH}
    half = [0.5, 0.5, 0.5]
    return CLIPImageProcessorPil(size=side, crop_size=side, image_mean=half, image_std=half)


def tower_batch(split: str, step: int, seed: int, grid: int) -> tuple[Tensor, Tensor]:
    """The pictures of one step.

    Returns:
        pixel_values: float32 (B, 3, side, side).
        targets: float32 (B, patches, len(VOCABULARY)), as `patch_targets` gives them.
    """
    samples = [
        TASKS[name].sample(split, step * count + number, seed, grid)
        for name, count in BATCH.items()
        for number in range(count)
    ]
    return _pixels(samples, grid), torch.from_numpy(np.stack([patch_targets(sample, grid) for sample in samples]))


def patch_targets(sample: Sample, grid: int) -> np.ndarray:
    """What every patch shows: float32 (patches, len(VOCABULARY)), whose rows are distributions.

    The words of the regions that a patch lies in, alike, or nothing. A region without a text is nothing.
    """
    shows = np.zeros((grid, grid, len(VOCABULARY)), dtype=np.float32)
    edges = np.arange(grid) * PATCH
    for region in sample.regions:
        left, top, right, bottom = region.box
        across, down = (
            np.clip(np.minimum(edges + PATCH, high) - np.maximum(edges, low), 0, None) / PATCH
            for low, high in ((left, right), (top, bottom))
        )
        inside = np.outer(down, across) >= _COVERED
        for word in region.text.split():
            shows[inside, _NUMBER[word]] = 1
    shows[shows.sum(-1) == 0, NOTHING] = 1
    return (shows / shows.sum(-1, keepdims=True)).reshape(grid * grid, -1)


def choose_patches(targets: Tensor, seed: int | None) -> Tensor:
    """Long (B, chosen), ascending: patches that show something, and others at random up to `THINNED_PATCHES`.

    Args:
        targets: (B, patches, len(VOCABULARY)).
        seed: of the draw; None chooses all patches.
    """
    rows, patches, _ = targets.shape
    if seed is None:
        return torch.arange(patches).expand(rows, -1)
    order = torch.rand(rows, patches, generator=torch.Generator().manual_seed(seed))
    order = order + (targets[..., NOTHING] == 0)
    return order.topk(round(THINNED_PATCHES * patches)).indices.sort().values


@contextmanager
def only_patches(tower: CLIPVisionModel, chosen: Tensor) -> Iterator[None]:
    """Let a tower see these patches, with their positions, and CLS.

    Args:
        chosen: long (B, chosen).
    """
    (embeddings,) = (module for name, module in tower.named_modules() if name.rpartition(".")[2] == "embeddings")
    index = torch.cat([torch.zeros_like(chosen[:, :1]), chosen + 1], 1)

    def gather(module: nn.Module, arguments: tuple, output: Tensor) -> Tensor:
        return output.gather(1, index[..., None].expand(-1, -1, output.shape[-1]))

    hook = embeddings.register_forward_hook(gather)
    try:
        yield
    finally:
        hook.remove()


class Heads(nn.Module):
    """Read-outs used while pretraining and then thrown away.

    Args:
        width: of the tower.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        heads = [nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(VOCABULARY))) for _ in range(3)]
        self.patches, self.whole = heads[0], nn.ModuleList(heads[1:])

    def loss(self, hidden_states: Sequence[Tensor], targets: Tensor, chosen: Tensor) -> Tensor:
        """Cross-entropy of the patches at `READ_LAYER`, and a quarter of that of CLS there and at the end.

        Args:
            hidden_states: (B, 1 + chosen, width) for each layer, CLS first.
            targets: (B, patches, len(VOCABULARY)), of all patches.
            chosen: long (B, chosen), the patches that the tower saw.
        """
        words = (targets[..., 1:] > 0).any(1).float()
        targets = targets.gather(1, chosen[..., None].expand(-1, -1, targets.shape[-1]))
        logits = self.patches(hidden_states[READ_LAYER][:, 1:])
        entropy = -(targets * logits.log_softmax(-1)).sum(-1)
        # Most patches of most pictures show nothing, which is soon learned.
        weight = 1 - 0.8 * targets[..., NOTHING]
        total = (entropy * weight).sum() / weight.sum()
        words = words / words.sum(-1, keepdim=True).clamp(min=1)
        for head, layer in zip(self.whole, (READ_LAYER, -1), strict=True):
            told = head(hidden_states[layer][:, 0])[..., 1:].log_softmax(-1)
            total = total - 0.25 * (words * told).sum(-1).mean()
        return total


@torch.no_grad()
def score_tower(
    tower: CLIPVisionModel, heads: Heads, seed: int, grid: int, number: int = 60, split: str = "validation"
) -> dict[str, float]:
    """For each task, the share of the words of regions that its patches name: those of a region of three words are
    right which are among the three likeliest, nothing aside, in the mean over its patches."""
    scores = {}
    for name, task in TASKS.items():
        right = total = 0
        for first in range(0, number, 20):
            samples = [task.sample(split, one, seed, grid) for one in range(first, min(first + 20, number))]
            states = tower(_pixels(samples, grid), output_hidden_states=True).hidden_states[READ_LAYER]
            told = heads.patches(states[:, 1:]).softmax(-1)
            for sample, patches in zip(samples, told, strict=True):
                for region in sample.regions:
                    words = {_NUMBER[word] for word in region.text.split()}
                    alone = patch_targets(Sample(sample.image, (region,), ()), grid)[:, NOTHING] == 0
                    if words and alone.any():
                        mean = patches[torch.from_numpy(alone)].mean(0)
                        mean[NOTHING] = -1
                        right += len(words & set(mean.topk(len(words)).indices.tolist()))
                        total += len(words)
        scores[name] = right / total
    return scores


def _pixels(samples: Sequence[Sample], grid: int) -> Tensor:
    return image_processor(grid)([sample.image for sample in samples], return_tensors="pt")["pixel_values"]


def _new_tower(grid: int, start: Path | None) -> CLIPVisionModel:
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        image_size=grid * PATCH,
        patch_size=PATCH,
        projection_dim=WIDTH,
    )
    tower = CLIPVisionModel(config)
    place_positions(tower)
    if start is not None:
        weights = CLIPVisionModel.from_pretrained(start, dtype=torch.float32).state_dict()
        (name,) = (name for name in weights if name.endswith("position_embedding.weight"))
        old = int((len(weights[name]) - 1) ** 0.5)
        if old != grid:
            # What was learned beside the sines and cosines is stretched; these keep the distance of patches.
            before = CLIPVisionModel(CLIPVisionConfig(**{**config.to_dict(), "image_size": old * PATCH}))
            place_positions(before)
            learned = weights[name] - before.state_dict()[name]
            patches = learned[1:].T.reshape(1, WIDTH, old, old)
            patches = nn.functional.interpolate(patches, size=(grid, grid), mode="bilinear")
            table = tower.state_dict()[name]
            weights[name] = torch.cat([weights[name][:1], table[1:] + patches.flatten(2)[0].T])
        tower.load_state_dict(weights)
    return tower


def _rate(step: int, steps: int) -> float:
    """The share of the highest learning rate: up over a twentieth of the steps, then down along a cosine."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + float(np.cos(np.pi * (step - warm) / max(1, steps - warm))))


def _resume(file: Path, settings: dict, tower: nn.Module, heads: nn.Module, optimizer) -> tuple[int, np.ndarray]:
    """Load what an interrupted call left; the number of steps done, and CPU seconds and seconds spent."""
    if not file.is_file():
        return 0, np.zeros(2)
    state = torch.load(file, weights_only=True)
    _check_settings(file.parent, state["settings"], settings)
    tower.load_state_dict(state["tower"])
    heads.load_state_dict(state["heads"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], np.array(state["spent"])


def _save_state(file: Path, settings: dict, step: int, spent, tower, heads, optimizer) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    state = {"settings": settings, "step": step, "spent": [float(value) for value in spent]}
    parts = {"tower": tower, "heads": heads, "optimizer": optimizer}
    with atomic_path(file) as aside:
        torch.save({**state, **{name: part.state_dict() for name, part in parts.items()}}, aside)


def _check_settings(folder: Path, found: dict, wanted: dict) -> None:
    differing = [
        f"{name}={wanted[name]!r} (there: {found.get(name)!r})"
        for name in wanted
        if name not in _FREE and found.get(name) != wanted[name]
    ]
    if differing:
        raise SaccadeError(f"{folder} holds a tower of other settings: {', '.join(differing)}; name another folder")
