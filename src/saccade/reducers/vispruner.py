"""VisPruner (Zhang et al., ICCV 2025): half of the tokens by saliency, half by removing near duplicates."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from saccade.reducers.common import (
    Budget,
    best_first,
    by_rows,
    check_number,
    chosen_mask,
    mask_to_index,
    row_budget,
)
from saccade.reducers.registry import register_reducer
from saccade.reducers.similarity import cosine_similarity
from saccade.tokens import Reduction, VisualContext

DROPPED_A_ROUND = 8
ROUNDING = 1e-9
"""How far a product of a share and a count may fall short: 0.29 * 100 is 28.999999999999996."""


@register_reducer("vispruner")
@dataclass(frozen=True)
class VisPruner:
    """Keeps the most salient tokens and, of the others, what remains after near duplicates are repeatedly dropped.

    The first part, half of the budget rounded down, is chosen as by `fastervlm`. For the second part, the others are
    ordered by descending saliency, and each round splits them into group A, at odd places (first, third, ...), and
    group B, at even places. The eight tokens of A with the highest cosine to any token of B are dropped, or fewer
    where fewer exist or are in excess. In the next round the remaining A come first, by descending cosine, followed by
    B in its old order. Cosines are those of the encoder's features, before the projector; where a connector merges
    patches, of their mean.

    The published code cannot split an odd number of tokens; here A then has one token more than B.

    Args:
        important: share of the kept tokens chosen by saliency, in [0, 1]; one half, as published.
    """

    important: float = 0.5
    needs: ClassVar[frozenset[str]] = frozenset({"saliency", "encoder_features"})

    def __post_init__(self) -> None:
        check_number("vispruner", "important", self.important, "[0, 1]")

    @torch.no_grad()
    def __call__(self, context: VisualContext, keep: int | Tensor) -> Reduction:
        """Index `(B, K)` of the selected tokens. Time O(N^2 Dv + N^3 / 100) per row: a round drops eight tokens."""
        tokens = context.shape[1]
        return by_rows(self._reduce, context, row_budget(context, keep), elements=tokens * tokens // 2)

    def _reduce(self, context: VisualContext, budget: Budget) -> Reduction:
        tokens = context.shape[1]
        salient = (budget.counts.double() * self.important + ROUNDING).long()
        order = best_first(context.saliency.float(), context, tokens)
        important = chosen_mask(order, salient, tokens)

        distance = _distances(context)
        device = distance.device
        wanted = (budget.counts - salient).to(device).unsqueeze(1)
        left = (budget.available - salient).to(device).unsqueeze(1)
        # If all rows are alike, the host knows how many tokens remain; otherwise it runs as many rounds as any row may
        # need.
        alike = budget.uniform and context.dense
        chosen = int(budget.width * self.important + ROUNDING) if alike else 0
        width, target = tokens - chosen, budget.width - chosen
        rounds = tokens // DROPPED_A_ROUND + 1 + DROPPED_A_ROUND.bit_length()
        place = torch.arange(tokens, device=device)
        # The others by saliency, padded with `tokens`.
        behind = place[:width] + salient.to(device).unsqueeze(1)
        slots = order.to(device).gather(1, behind.clamp(max=tokens - 1)).masked_fill(place[:width] >= left, tokens)
        names = place.expand(slots.shape[0], -1)  # the tokens that the rows of `distance` stand for
        while width > target if alike else rounds > 0:
            if alike and 4 * width < 3 * distance.shape[1]:
                # Dropped tokens are removed from the matrix too, which cuts the rounds to a third of the time.
                distance = distance.gather(1, slots.unsqueeze(2).expand(-1, -1, distance.shape[2]))
                distance = distance.gather(2, slots.unsqueeze(1).expand(-1, width, -1))
                names, slots = names.gather(1, slots), place[:width].expand(slots.shape[0], -1)
            offered, others = slots[:, 0::2], slots[:, 1::2]
            nearest = _nearest(distance, offered, others, padded=not alike)
            # A finished row is still reordered, which no longer matters, but drops nothing.
            rank = nearest.masked_fill(offered == tokens, torch.inf).sort(dim=1, stable=True).indices
            offered = offered.gather(1, rank)
            if alike:
                dropped = min(DROPPED_A_ROUND, width - target, offered.shape[1])
                slots, width = torch.cat((offered[:, dropped:], others), dim=1), width - dropped
                continue
            drops = torch.minimum((left - wanted).clamp(min=0, max=DROPPED_A_ROUND), (left + 1) // 2)
            offered = offered.masked_fill(place[: offered.shape[1]] < drops, tokens)
            slots = torch.cat((offered, others), dim=1)
            slots = slots.gather(1, (slots == tokens).to(torch.uint8).sort(dim=1, stable=True).indices)
            left = left - drops
            rounds -= 1
        if alike:
            slots = names.gather(1, slots)
        diverse = torch.zeros(slots.shape[0], tokens + 1, dtype=torch.bool, device=device).scatter_(1, slots, True)
        mask = important | diverse[:, :tokens].to(important.device)
        return Reduction(mask_to_index(mask, budget.width), dense=budget.uniform)


def _distances(context: VisualContext) -> Tensor:
    """1 + 2^-6 minus the cosine of each pair of tokens: float32 `(B, N, N)`, half as much to read as float64.

    In float64, equal cosines differ by at most 1e-15, also across the diagonal, whatever the device's order of
    summation. Rounded to float32 they are equal (the offset ensures it near zero), and near duplicates are still
    resolved to 2e-9.
    """
    return cosine_similarity(context.encoder_features, context).neg_().add_(1 + 2**-6).float()


def _nearest(distance: Tensor, offered: Tensor, others: Tensor, padded: bool) -> Tensor:
    """The lowest distance `(B, E)` of each of `offered` to any of `others`; 4, above any distance, if there are none.

    Args:
        padded: whether either may hold padding, which is the index N.
    """
    if others.shape[1] == 0:
        return torch.full(offered.shape, 4.0, device=distance.device)
    rows, tokens, _ = distance.shape
    # Whole rows are read many times faster than single entries, and the matrix is symmetric.
    first = torch.arange(rows, device=distance.device).unsqueeze(1) * tokens
    block = distance.view(-1, tokens).index_select(0, (others.clamp(max=tokens - 1) + first).reshape(-1))
    block = block.view(rows, -1, tokens)  # (B, O, N); the matrix is symmetric, see `_distances`
    if padded:
        block.masked_fill_((others == tokens).unsqueeze(2), 4.0)
    return block.amin(dim=1).gather(1, offered.clamp(max=tokens - 1))
