"""LLaVA-PruMerge (Shang et al., ICCV 2025) at a fixed ratio: salient tokens, each merged with similar tokens."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from saccade.errors import SaccadeError
from saccade.reducers.common import (
    add_own,
    best_first,
    check_integer,
    chosen_mask,
    mask_to_index,
    merge_needs,
    row_budget,
)
from saccade.reducers.registry import register_reducer
from saccade.reducers.similarity import cosines_by_rows
from saccade.reducers.visionzip import evenly_spread
from saccade.tokens import Reduction, VisualContext


@register_reducer("prumerge")
@dataclass(frozen=True)
class PruMerge:
    """Keeps the most salient tokens and adds to each its nearest neighbours, weighted by their saliency a.

    A kept token c becomes x_c + sum of a_j x_j over the `neighbours` tokens j != c whose keys have the highest cosine
    with its own, kept ones included; the weights are not normalised, as published. One extra token sums up the pruned
    tokens: sum of a_j x_j over all of them. It counts towards the budget and takes the place of the most salient
    pruned token; there is none if the budget is one token, or all tokens.

    The number of tokens is the budget's. The published adaptive number counts outliers over the whole batch, which
    makes a row depend on the other rows of its batch. Saliency and keys come from the block that produces the
    features, averaged over heads; the published code uses the last block with its heads concatenated. The output is in
    raster order; the published one is in order of attention. The published code merges before the projector, as
    `merge="encoder"` does here.

    Args:
        plus: PruMerge+: half of the kept tokens by saliency, the others evenly spread over the remaining ones.
        neighbours: tokens added to each kept one.
        merge: "projected" merges the features that the language model would receive; "encoder" merges before the
            projector, which is then run on the sums, as published. The latter needs a family that projects tokens one
            by one.
    """

    plus: bool = False
    neighbours: int = 32
    merge: str = "projected"
    needs: ClassVar[frozenset[str]] = frozenset({"saliency", "keys"})

    def __post_init__(self) -> None:
        if not isinstance(self.plus, bool):
            raise SaccadeError(f"reducer 'prumerge': plus={self.plus!r} is neither true nor false")
        check_integer("prumerge", "neighbours", self.neighbours, least=0)
        object.__setattr__(self, "needs", merge_needs("prumerge", self.merge, self.needs))

    @torch.no_grad()
    def __call__(self, context: VisualContext, keep: int | Tensor) -> Reduction:
        """Index `(B, K)` and float32 weight `(B, K, N)`. Time O(K N (Dk + log N)) per row."""
        budget = row_budget(context, keep)
        tokens = context.shape[1]
        saliency = context.saliency.float()
        order = best_first(saliency, context, budget.width)
        rest_token = (budget.counts > 1) & (budget.counts < budget.available)
        centres = budget.counts - rest_token.long()
        by_saliency = centres - centres // 2 if self.plus else centres
        kept = chosen_mask(order, by_saliency, tokens)
        if self.plus:
            kept = kept | evenly_spread(context.valid & ~kept, centres - by_saliency)
        pruned = context.valid & ~kept
        # The most salient pruned token is the place of the extra token.
        pruned_first = best_first(saliency.masked_fill(~pruned, -torch.inf), context, 1)
        extra = chosen_mask(pruned_first, rest_token.long(), tokens)
        index = mask_to_index(kept | extra, budget.width)

        amount = saliency.masked_fill(~context.valid, 0).unsqueeze(1)  # (B, 1, N)
        # Padding has an amount of 0. A token's weight for itself is 1, even where it is among its own nearest.
        weight = add_own(self._nearest_amounts(context, index, amount), index)
        if index.shape[1]:
            # If a row has no extra token, `argmax` points to its first output, which then must not change.
            is_extra = extra.gather(1, index.clamp(min=0)) & (index >= 0)
            slot = is_extra.long().argmax(dim=1).view(-1, 1, 1).expand(-1, 1, tokens)
            there = is_extra.any(dim=1).view(-1, 1, 1)
            weight.scatter_(1, slot, torch.where(there, amount * pruned.unsqueeze(1), weight.gather(1, slot)))
        if not budget.uniform:
            weight.masked_fill_((index < 0).unsqueeze(2), 0)
        return Reduction(index, weight, dense=budget.uniform, before_projector=self.merge == "encoder")

    def _nearest_amounts(self, context: VisualContext, index: Tensor, amount: Tensor) -> Tensor:
        """`amount` `(B, 1, N)` at the tokens whose keys are nearest to each token of `index`, else 0: `(B, K, N)`."""
        tokens = context.shape[1]
        count = min(self.neighbours, max(tokens - 1, 0))
        weight = amount.new_empty(*index.shape, tokens)
        for taken, similarity in cosines_by_rows(context.keys, index, context, ties=2):
            device = similarity.device
            if tokens:
                similarity.scatter_(2, index[taken].clamp(min=0).unsqueeze(2).to(device), -torch.inf)
            if not context.dense:
                similarity.masked_fill_(~context.valid[taken].unsqueeze(1).to(device), -torch.inf)
            nearest = similarity.view(torch.int64).topk(count, dim=2).indices.to(weight.device)
            part = weight[taken].zero_()
            part.scatter_(2, nearest, amount[taken].expand_as(part).gather(2, nearest))
        return weight
