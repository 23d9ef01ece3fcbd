"""Gives a projector that was assembled anew a start: patches as the language model's own embeddings of their words."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoTokenizer, PreTrainedModel

from experiments.smol.tower import NOTHING, VOCABULARY, score_tower, tower_batch
from experiments.tiny_checkpoint.tower import READ_LAYER
from saccade.sweeps.worker import process_clock

SEED = 1000
"""Of its pictures, which the tower was not trained on."""
RIDGE = 1e-4
"""Of the regression, as a share of the mean variance of a hidden unit."""


@torch.no_grad()
def align_projector(
    folder: Path, batches: int, grid: int, seed: int = 0, log: Callable[[str], None] = print
) -> dict[str, Any]:
    """Fit the projector of a LLaVA, so that a patch becomes about the mean embedding of the words that it shows.

    The towers of stock models were trained to agree with texts; the testbed's was trained on words as classes, and
    this is what makes up for it before stage one. The first layer is random, at a scale at which its units bend; the
    second is the ridge regression of its units on the words of a patch, times the language model's input embeddings
    of these words (of a line break, where a patch shows nothing).

    Args:
        folder: of the model, whose weights are replaced.
        batches: how many of the tower's batches of train pictures to fit to.
        grid: patches per side.
        seed: of the first layer.
        log: is given a line now and then.

    Returns:
        `validation`: for each task, the share of the words of regions that the projected patches tell, as the tower's
        report has it for the tower; `cpu_seconds`, `seconds`.
    """
    started = process_clock()
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector

    def states(batch: int) -> tuple[Tensor, Tensor]:
        pixels, shown = tower_batch("train", batch, SEED, grid)
        found = tower(pixels, output_hidden_states=True).hidden_states[READ_LAYER][:, 1:]
        return found.flatten(0, 1), shown.flatten(0, 1)

    _spread(projector.linear_1, states(0)[0], seed)
    sums = None
    for batch in range(batches):
        features, shown = states(batch)
        # As in the tower's training: most patches of most pictures show nothing.
        weight = (1 - 0.8 * shown[:, NOTHING:1]).sqrt()
        units = _with_one(projector.act(projector.linear_1(features)))
        both = (weight * torch.cat([units, shown], 1)).double()
        products = both[:, : units.shape[1]].T @ both
        sums = products if sums is None else sums + products
        if (batch + 1) % 25 == 0 or batch + 1 == batches:
            log(f"projector: {batch + 1} of {batches} batches")
    size = len(sums)
    ridge = RIDGE * sums[:, :size].diagonal().mean() * torch.eye(size, dtype=sums.dtype)
    told = torch.linalg.solve(sums[:, :size] + ridge, sums[:, size:]).float()  # (units + 1, words)
    second = told @ word_embeddings(model, AutoTokenizer.from_pretrained(folder))
    projector.linear_2.weight.copy_(second[:-1].T)
    projector.linear_2.bias.copy_(second[-1])
    spent = [float(now - before) for now, before in zip(process_clock(), started, strict=True)]
    model.save_pretrained(folder)
    reader = SimpleNamespace(patches=lambda found: _with_one(projector.act(projector.linear_1(found))) @ told)
    validation = score_tower(tower, reader, SEED, grid)
    return {"validation": validation, "cpu_seconds": spent[0], "seconds": spent[1]}


@torch.no_grad()
def word_embeddings(model: PreTrainedModel, tokenizer: Any) -> Tensor:
    """For each entry of the tower's `VOCABULARY`, the mean input embedding of its tokens: (words, D)."""
    table = model.get_input_embeddings().weight
    # A space before a digit would be a separate token.
    texts = [
        "\n" if number == NOTHING else word if word.isdigit() else f" {word}" for number, word in enumerate(VOCABULARY)
    ]
    return torch.stack([table[tokenizer(text, add_special_tokens=False)["input_ids"]].mean(0) for text in texts])


def _spread(layer: nn.Linear, features: Tensor, seed: int) -> None:
    """Weights of a layer whose outputs have mean 0 and variance 1 on these features, up to a bias in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(layer.weight.shape, generator=generator) / features.std(0).clamp(min=1e-6)
    weight /= (features @ weight.T).std(0)[:, None]
    shift = 2 * torch.rand(len(weight), generator=generator) - 1
    layer.weight.copy_(weight)
    layer.bias.copy_(shift - weight @ features.mean(0))


def _with_one(units: Tensor) -> Tensor:
    return torch.cat([units, torch.ones_like(units[..., :1])], -1)
