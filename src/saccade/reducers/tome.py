"""ToMe (Bolya et al., ICLR 2023), applied after the vision tower: pairs of similar tokens are averaged."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from saccade.reducers.common import Budget, by_rows, chosen_mask, row_budget, valid_rank
from saccade.reducers.registry import register_reducer
from saccade.reducers.similarity import inner_products, tie_terms
from saccade.tokens import Reduction, VisualContext


@register_reducer("tome")
@dataclass(frozen=True)
class TokenMerging:
    """Averages similar tokens, at most half of them a round, until the budget is met.

    In a round the tokens, in raster order, are split into those at even and at odd places; each even one finds the odd
    one with the highest cosine, and the r most similar even ones are merged into theirs by the mean weighted with
    size, so that every output is the plain mean of the input tokens in it. r is half of the tokens, or fewer in the
    last round: 576 tokens become 288, 144, 72 and then 58. An output stands at the place of the odd token that the
    others were merged into.

    Published inside the tower, on the keys of each block, with attention weighted by size. In training a
    vision-language model the tower is often frozen and run at its full length, so here the rounds follow one another
    after the tower, on the features themselves. The published output has no order; here each round keeps raster order.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    @torch.no_grad()
    def __call__(self, context: VisualContext, keep: int | Tensor) -> Reduction:
        """Index `(B, K)` and float32 weight `(B, K, N)`, 1 / size within a group. Time O(N^2 D) a row."""
        tokens, width = context.shape[1:]
        return by_rows(self._reduce, context, row_budget(context, keep), elements=tokens * max(tokens, width))

    def _reduce(self, context: VisualContext, budget: Budget) -> Reduction:
        rows, tokens, _ = context.shape
        products = inner_products(context.features, context)  # (B, W, W), of the sums over each group's members
        device = products.device
        width, counts = tokens, budget.counts.to(device)
        alive = budget.available.to(device)
        label = valid_rank(context).to(device)  # the group of each token; `width` on padding
        place = torch.arange(tokens, device=device).expand(rows, tokens)
        if not context.dense:
            valid = context.valid.to(device)
            label = label.masked_fill(~valid, tokens)
            place = torch.where(valid, place, tokens).sort(dim=1).values
            packed = place.clamp(max=max(tokens - 1, 0))
            products = products.gather(1, packed.unsqueeze(2).expand(-1, -1, tokens))
            products = products.gather(2, packed.unsqueeze(1).expand(-1, tokens, -1))
        # Rows with fewer tokens or a smaller budget than the widest may take the most rounds that halving can.
        rounds = None if budget.uniform and context.dense else tokens.bit_length()
        while width > budget.width if rounds is None else rounds > 0:
            narrower = max(width - width // 2, budget.width)
            move, survives = _round(products, alive, counts, narrower)
            label = torch.cat((move, torch.full_like(move[:, :1], narrower)), dim=1).gather(1, label)
            place = torch.where(survives, place, tokens).sort(dim=1).values[:, :narrower]
            products = _merge(products, move, narrower)
            alive = torch.minimum(alive, torch.maximum(alive - alive // 2, counts))
            width = narrower
            rounds = None if rounds is None else rounds - 1
        member = label.unsqueeze(1) == torch.arange(budget.width, device=device).unsqueeze(1)
        weight = member.float() / member.sum(dim=2, keepdim=True).clamp(min=1)
        place = place[:, : budget.width]
        place = place if budget.uniform and context.dense else place.masked_fill(place == tokens, -1)
        home = context.features.device
        return Reduction(place.contiguous().to(home), weight.to(home), dense=budget.uniform)


def _round(products: Tensor, alive: Tensor, counts: Tensor, narrower: int) -> tuple[Tensor, Tensor]:
    """Where each of W groups goes, long `(B, W)` in [0, narrower], and which keep their place, bool `(B, W)`."""
    rows, width, _ = products.shape
    device = products.device
    slot = torch.arange(width, device=device)
    real = slot < alive.unsqueeze(1)
    length = products.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    cosine = products[:, 0::2, 1::2] / length[:, 0::2].unsqueeze(2) / length[:, 1::2].unsqueeze(1)
    ties = tie_terms(width, device)
    target = slot.expand(rows, width)
    if cosine.shape[2]:
        cosine = (cosine - ties[: cosine.shape[2]]).masked_fill(~real[:, 1::2].unsqueeze(1), -torch.inf)
        best, partner = cosine.max(dim=2)
        # The tie term of the partner's place is no part of the similarity, but far too small to matter between pairs.
        best = (best - ties[: best.shape[1]]).masked_fill(~real[:, 0::2], -torch.inf)
        merges = torch.minimum(alive // 2, (alive - counts).clamp(min=0))
        order = best.sort(dim=1, descending=True, stable=True).indices
        merged = chosen_mask(order, merges, best.shape[1])
        target = target.clone()
        target[:, 0::2] = torch.where(merged, 2 * partner + 1, target[:, 0::2])
    survives = real & (target == slot)
    rank = survives.cumsum(dim=1) - 1
    move = rank.gather(1, target)
    return torch.where(real, move, narrower), survives


def _merge(products: Tensor, move: Tensor, narrower: int) -> Tensor:
    """Inner products `(B, narrower, narrower)` of the sums of what moves together."""
    rows, width, _ = products.shape
    once = products.new_zeros(rows, narrower + 1, width)
    once.scatter_add_(1, move.unsqueeze(2).expand(-1, -1, width), products)
    twice = products.new_zeros(rows, narrower, narrower + 1)
    twice.scatter_add_(2, move.unsqueeze(1).expand(-1, narrower, -1), once[:, :narrower])
    return twice[:, :, :narrower]
