"""The mode isolator: a learnable soft prompt before each image's kept tokens (DualSpeed, arXiv 2602.03815, Sec. 3).

It is saved in a separate file next to the weights, `mode_isolator.saccade`, never in `model.safetensors`, so that a
saved model remains a stock checkpoint.
"""

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from saccade.companions import ENDING, read_companion, save_companion
from saccade.errors import SaccadeError

ISOLATOR_FILE = f"mode_isolator{ENDING}"


class ModeIsolator(nn.Module):
    """A table of `length` rows of width `hidden_size`, initialised U(-1/sqrt(D), 1/sqrt(D)).

    Args:
        length: number of rows before each image, the paper's l (4 by default in the paper).
        hidden_size: width D of the language model.
    """

    def __init__(self, length: int, hidden_size: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        bound = 1 / math.sqrt(hidden_size)
        self.weight = nn.Parameter(torch.empty(length, hidden_size, dtype=dtype).uniform_(-bound, bound))

    @property
    def length(self) -> int:
        """Number of rows before each image."""
        return self.weight.shape[0]

    def forward(self) -> Tensor:
        """The rows, `(length, D)`. A call rather than a read of `.weight`, so that the hooks of ZeRO and FSDP fire."""
        return self.weight * 1

    def idle(self) -> Tensor:
        """A zero that depends on every parameter, for steps without the isolator: engines wait for its gradient."""
        return 0 * self().sum()

    def save_pretrained(self, folder: str | Path, metadata: dict | None = None, weight: Tensor | None = None) -> Path:
        """Write `mode_isolator.saccade` into `folder`, whole or not at all.

        Args:
            metadata: what the isolator was trained with, kept as JSON in the file's header.
            weight: the gathered table, if this process holds only a shard of it.
        """
        return save_companion(
            folder, ISOLATOR_FILE, {"weight": self.weight if weight is None else weight}, metadata or {}
        )

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "ModeIsolator":
        """Read an isolator from its file, or from the folder that contains it.

        Raises:
            SaccadeError: if there is none, or it is not a whole safetensors file with a two-dimensional `weight`.
        """
        weight = read_companion(path, ISOLATOR_FILE, "isolator")[1].get("weight")
        if weight is None:
            raise SaccadeError(f"isolator={str(path)!r} has no `weight`: give the folder of a run with an isolator")
        if weight.dim() != 2:
            raise SaccadeError(
                f"isolator={str(path)!r} holds a weight of shape {tuple(weight.shape)}, expected (l, D)"
            )
        isolator = cls(*weight.shape, dtype=weight.dtype)
        isolator.weight.data.copy_(weight)
        return isolator
