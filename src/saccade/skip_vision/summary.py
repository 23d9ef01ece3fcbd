"""The summary head: a tiny attention pooling of a group of tokens into one (arXiv 2503.21817, Sec. 4)."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear

from saccade.companions import ENDING
from saccade.errors import SaccadeError

SUMMARY_FILE = f"skip_vision{ENDING}"
SUMMARY_NAME = "skip_summary"
"""The head's name among the modules of the stock model."""


class _Norm(nn.LayerNorm):
    """In float32, whatever the dtype of its weights."""

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)


class _Score(nn.Linear):
    """In float32, whatever the dtype of its weights."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x.float(), self.weight.float())


class SummaryHead(nn.Module):
    """Pools a group of tokens x to s = sum_i w_i x_i with w = softmax_i(W LN(x_i)).

    One head serves both groups of every image. The raw tokens are pooled, not the normalised ones. The published
    linear layer has a bias, which cancels out in the softmax; it is left out here.

    Args:
        hidden_size: width D of the language model.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.norm = _Norm(hidden_size, eps=1e-5, dtype=torch.float32)
        self.score = _Score(hidden_size, 1, bias=False, dtype=torch.float32)
        nn.init.normal_(self.score.weight, std=0.02)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """The weights w for pooling the `valid` `(G, N)` tokens of `x` `(G, N, D)`: float32 `(G, N)`."""
        with torch.autocast(x.device.type, enabled=False):
            score = self.score(self.norm(x)).squeeze(2).float()  # (G, N)
            # A group without tokens gets weights of zero rather than NaN.
            score = score.masked_fill(~valid, torch.finfo(score.dtype).min)
            return score.softmax(dim=1) * valid

    def idle(self) -> Tensor:
        """A zero that depends on every parameter, for batches without images: engines wait for its gradient."""
        return sum(parameter.sum() for parameter in self.parameters()) * 0


def head_of(model: nn.Module) -> SummaryHead | None:
    """The summary head of a skipping stock model, or what was put in its place since, as by PEFT; None without one."""
    return getattr(model, SUMMARY_NAME, None)


def check_names(names: Iterable[str]) -> None:
    """Check that tensors of a head have the names that a file of it has.

    Raises:
        SaccadeError: if not.
    """
    other = sorted(set(names) - {"norm.weight", "norm.bias", "score.weight"})
    if other:
        raise SaccadeError(
            f"the summary head has a {other[0]!r}, since PEFT wrapped it after `apply_skip_vision`: call "
            "`merge_and_unload()` before the head is saved or loaded by itself"
        )


def pool(weight: Tensor, x: Tensor) -> Tensor:
    """`weight` `(G, N)` float32 times `x` `(G, N, D)`, summed in float32: `(G, 1, D)` in the dtype of `x`."""
    with torch.autocast(x.device.type, enabled=False):
        return torch.bmm(weight.unsqueeze(1), x.float()).to(x.dtype)
