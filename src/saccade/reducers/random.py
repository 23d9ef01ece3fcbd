"""A uniformly random subset: the baseline that several designed methods fail to beat (UniPruneBench)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from saccade.errors import SaccadeError
from saccade.reducers.common import ascending, row_budget, rows_at_once, valid_rank
from saccade.reducers.registry import register_reducer
from saccade.tokens import Reduction, VisualContext

WORD = 0xFFFFFFFF
RANK_BITS = 24
HASHED_WIDTH = 64


@register_reducer("random")
@dataclass(frozen=True)
class RandomSubset:
    """Keeps a uniformly random subset, always the same one for the same row and seed.

    No random generator is involved: the tokens with the smallest hash of (row seed, rank among the valid tokens) are
    kept. The row seed is `context.seed` or, without one, a hash of the first 64 components of the row's valid features
    in float32.

    Args:
        seed: any int; different seeds draw different subsets.
    """

    seed: int = 0
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise SaccadeError(f"reducer 'random': seed={self.seed!r} is not an integer")

    @torch.no_grad()
    def __call__(self, context: VisualContext, keep: int | Tensor) -> Reduction:
        """Index `(B, K)` of a random subset of each row's valid tokens."""
        budget = row_budget(context, keep)
        rank = valid_rank(context)
        seed = _content_hash(context, rank) if context.seed is None else context.seed
        seed = _mix((seed & WORD) ^ _mix(((seed >> 32) & WORD) ^ self._option_hash())).unsqueeze(1)
        # The rank in the low bits makes every key distinct, so no tie rule of `topk` matters.
        key = (_mix(rank ^ seed) << RANK_BITS) + rank
        if not context.dense:
            key = key.masked_fill(~context.valid, torch.iinfo(torch.long).max)
        # The order matters only where a row takes fewer than all of them.
        lowest = key.topk(budget.width, dim=1, largest=False, sorted=not budget.uniform).indices
        return Reduction(ascending(lowest, budget, context.shape[1]), dense=budget.uniform)

    def _option_hash(self) -> int:
        return _mix((self.seed & WORD) ^ _mix((self.seed >> 32) & WORD))


def _mix(word: Tensor | int) -> Tensor | int:
    """A bijection of 32-bit words, held in 64 bits, that spreads each bit over all of them."""
    for _ in range(2):
        word = word ^ (word >> 16)
        word *= 0x045D9F3B
        word &= WORD
    return word ^ (word >> 16)


def _content_hash(context: VisualContext, rank: Tensor) -> Tensor:
    """A 32-bit hash of each row's valid features and their order: long `(B,)`.

    Integer sums do not depend on the order of summation, so the hash does not depend on device or batch.
    """
    # Different images differ in nearly every component, and a collision would only mean that two rows draw alike.
    features = context.features[:, :, :HASHED_WIDTH]
    rows, tokens, width = features.shape
    device = features.device
    factor = ((_mix(torch.arange(width, device=device) + 1) >> 1) | 1).to(torch.int32)
    sums = torch.empty(rows, tokens, dtype=torch.int32, device=device)
    step = rows_at_once(rows, tokens * width, device)
    for start in range(0, rows, step):
        bits = features[start : start + step].float().contiguous().view(torch.int32)
        # Numbers that were bfloat16 have zero low halves; without the fold their bits would overflow out of the
        # product.
        bits = (bits >> 16).bitwise_xor_(bits).mul_(factor)
        # A sum that wraps around at 32 bits hashes just as well with half the memory traffic.
        sums[start : start + step] = bits.sum(dim=-1, dtype=torch.int32)
    token = _mix((_mix(sums.long() & WORD) + rank * 2 + 1) & WORD)
    return token.masked_fill(~context.valid, 0).sum(dim=1) & WORD
