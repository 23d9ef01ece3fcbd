"""What a reducer returns: which tokens are kept and, for merging methods, what is merged into them."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Reduction:
    """The tokens kept of each row, in raster order, and how to compute them.

    Args:
        index: long `(B, K)`, ascending; -1 pads the end of a row that keeps fewer than K tokens.
        weight: None for selection, or `(B, K, N)` for merging: output token k is `weight[k] @ x`. The rows of padding
            are zero.
        dense: whether no entry of `index` is -1. Reducers that know this set it, which saves a device-to-host copy.
        before_projector: whether the weights apply to the encoder's features and the projector is run on the weighted
            sums, see `saccade.pruning.reduced_features`. If the projector is not linear, the result differs from
            merging after it.
        lost: long `(B,)`, how many tokens fewer than its budget each row keeps so that its sample fits; for a unit of
            several rows, the count is on its first row. None if every sample fits.
    """

    index: Tensor
    weight: Tensor | None = None
    dense: bool = False
    before_projector: bool = False
    lost: Tensor | None = None

    @property
    def valid(self) -> Tensor:
        """bool `(B, K)`, false on padding."""
        return self.index >= 0

    @property
    def counts(self) -> Tensor:
        """long `(B,)`, the number of tokens kept in each row."""
        return self.valid.sum(dim=1)

    @property
    def merged(self) -> Tensor:
        """bool `(B, K)`, true for an output token that is not exactly its own input token."""
        if self.weight is None or self.weight.shape[2] == 0:
            return torch.zeros_like(self.index, dtype=torch.bool)
        own = self.weight.gather(2, self.index.clamp(min=0).unsqueeze(2)).squeeze(2)
        return self.valid & ((own != 1) | (self.weight.count_nonzero(dim=2) > 1))

    def apply(self, x: Tensor) -> Tensor:
        """Reduce `x` `(B, N, D)` to `(B, K, D)`; differentiable in `x`. Padding becomes zeros."""
        if self.weight is not None:
            return torch.bmm(self.weight.to(x.dtype), x)
        return gather_selected(x, self.index, dense=self.dense)


def gather_selected(x: Tensor, index: Tensor, dense: bool = False) -> Tensor:
    """Rows `index` `(B, K)` of `x` `(B, N, D)` as `(B, K, D)`, zeros where the index is -1."""
    picked = x.gather(1, index.clamp(min=0).unsqueeze(-1).expand(-1, -1, x.shape[-1]))
    return picked if dense else picked.masked_fill((index < 0).unsqueeze(-1), 0)
