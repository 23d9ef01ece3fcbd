"""Skip-Vision's merge (arXiv 2503.21817): the most redundant tokens are merged into the most distinctive ones."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from saccade.reducers.common import ascending, best_first, chosen_mask, row_budget
from saccade.reducers.registry import register_reducer
from saccade.reducers.similarity import mean_cosine, nearest_kept, tie_terms
from saccade.tokens import Reduction, VisualContext


@register_reducer("redundancy")
@dataclass(frozen=True)
class RedundancyMerge:
    """Averages the most redundant tokens into the most distinctive ones.

    With u_i the unit vector of token i, its redundancy is r_i = sum_{j != i} u_i . u_j. The K tokens with the smallest
    r are kept; each other token is merged into the kept token with which it has the highest cosine. An output is the
    plain mean of its group, y_k = (x_k + sum of its sources) / (1 + their number). Of tokens that tie, the first in
    raster order counts as the more redundant one and, among kept tokens, as the nearer one.

    The published output is in order of descending r; as everywhere here, `index` is in raster order, and `ranked` also
    returns the published order. Similarities are float64: r sums hundreds of cosines, in bfloat16 nearly all ties.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    @torch.no_grad()
    def __call__(self, context: VisualContext, keep: int | Tensor) -> Reduction:
        """Index `(B, K)` and float32 weight `(B, K, N)`, 1 / size within a group. Time O(K N D) per row."""
        return self.ranked(context, keep)[0]

    @torch.no_grad()
    def ranked(self, context: VisualContext, keep: int | Tensor) -> tuple[Reduction, Tensor]:
        """The reduction, and its outputs by descending redundancy: long `(B, K)` places in `index`, padding last."""
        budget = row_budget(context, keep)
        tokens = context.shape[1]
        home = context.features.device
        redundancy = mean_cosine(context.features, context)  # (B, N)
        device = redundancy.device
        redundancy = redundancy - tie_terms(tokens, device)
        on_device = context.valid.to(device)
        scored = VisualContext(features=redundancy.unsqueeze(2), valid=on_device)
        order = best_first(-redundancy, scored, budget.width)
        counts = budget.counts.to(device)
        stays = chosen_mask(order, counts, tokens)
        index = ascending(order.to(home), budget, tokens).to(device)
        if index.shape[1] == 0:
            return Reduction(index.to(home), dense=True), index.to(home)
        joined = nearest_kept(context.features, index, context)  # (B, N)
        slots = torch.arange(index.shape[1], device=device)
        member = (joined.unsqueeze(1) == slots.unsqueeze(1)) & (on_device & ~stays).unsqueeze(1)
        member |= index.unsqueeze(2) == torch.arange(tokens, device=device)
        weight = member.float()
        weight /= weight.sum(dim=2, keepdim=True).clamp(min=1)
        falling = redundancy.gather(1, index.clamp(min=0)).masked_fill(index < 0, -torch.inf)
        ranks = falling.sort(dim=1, descending=True, stable=True).indices
        return Reduction(index.to(home), weight.to(home), dense=budget.uniform), ranks.to(home)
