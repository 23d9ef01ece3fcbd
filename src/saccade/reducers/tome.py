"""ToMe (Bolya et al., ICLR 2023), applied after the vision tower: pairs of similar tokens are averaged."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from saccade.reducers.common import Budget, by_rows, chosen_mask, float64_home, row_budget, valid_rank
from saccade.reducers.registry import register_reducer
from saccade.reducers.similarity import tie_terms
from saccade.tokens import Reduction, VisualContext


@register_reducer("tome")
@dataclass(frozen=True)
class TokenMerging:
    """Averages similar tokens, at most half of them per round, until the budget is met.

    A round splits the tokens, in raster order, into those at even and at odd places and matches each even token with
    the odd token of highest cosine. The r most similar even tokens are merged into their matches by a mean weighted by
    size, so that every output is the plain mean of its input tokens. r is half of the tokens, or fewer in the last
    round: 576 tokens become 288, 144, 72 and then 58. An output takes the place of the odd token that the others were
    merged into.

    The published method works inside the tower, on the keys of each block, with attention weighted by size. When a
    vision-language model is trained, the tower is often frozen and run at full length, so here all rounds run after
    the tower, on the features themselves. The published output has no order; here each round keeps raster order.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    @torch.no_grad()
    def __call__(self, context: VisualContext, keep: int | Tensor) -> Reduction:
        """Index `(B, K)` and float32 weight `(B, K, N)`, 1 / size within a group. Time O(N^2 D) per row."""
        tokens, width = context.shape[1:]
        return by_rows(self._reduce, context, row_budget(context, keep), elements=tokens * max(tokens, width))

    def _reduce(self, context: VisualContext, budget: Budget) -> Reduction:
        rows, tokens, _ = context.shape
        # The sum of each group's members, (B, W, D).
        sums = float64_home(context.features).double()
        device = sums.device
        width, counts = tokens, budget.counts.to(device)
        alive = budget.available.to(device)
        label = valid_rank(context).to(device)  # the group of each token; `width` on padding
        place = torch.arange(tokens, device=device).expand(rows, tokens)
        if not context.dense:
            valid = context.valid.to(device)
            label = label.masked_fill(~valid, tokens)
            place = torch.where(valid, place, tokens).sort(dim=1).values
            packed = place.clamp(max=max(tokens - 1, 0)).unsqueeze(2).expand(sums.shape)
            sums = sums.masked_fill(~valid.unsqueeze(2), 0).gather(1, packed)
            sums.masked_fill_((place == tokens).unsqueeze(2), 0)
        # Rows with fewer tokens or a smaller budget than the widest may need up to the most rounds that halving can
        # take.
        rounds = None if budget.uniform and context.dense else tokens.bit_length()
        while width > budget.width if rounds is None else rounds > 0:
            narrower = max(width - width // 2, budget.width)
            move, survives = _round(sums, alive, counts, narrower)
            label = torch.cat((move, torch.full_like(move[:, :1], narrower)), dim=1).gather(1, label)
            place = torch.where(survives, place, tokens).sort(dim=1).values[:, :narrower]
            sums = _merge(sums, move, narrower)
            alive = torch.minimum(alive, torch.maximum(alive - alive // 2, counts))
            width = narrower
            rounds = None if rounds is None else rounds - 1
        size = torch.zeros(rows, budget.width + 1, device=device)
        size.scatter_add_(1, label, torch.ones(rows, tokens, device=device))
        share = torch.where(label < budget.width, 1 / size.gather(1, label), 0)
        weight = torch.zeros(rows, budget.width, tokens, device=device)
        weight.scatter_(1, label.clamp(max=budget.width - 1).unsqueeze(1), share.unsqueeze(1))
        place = place[:, : budget.width]
        place = place if budget.uniform and context.dense else place.masked_fill(place == tokens, -1)
        home = context.features.device
        return Reduction(place.contiguous().to(home), weight.to(home), dense=budget.uniform)


def _round(sums: Tensor, alive: Tensor, counts: Tensor, narrower: int) -> tuple[Tensor, Tensor]:
    """The new slot of each of W groups, long `(B, W)` in [0, narrower], and which groups survive, bool `(B, W)`."""
    rows, width, _ = sums.shape
    device = sums.device
    slot = torch.arange(width, device=device)
    real = slot < alive.unsqueeze(1)
    target = slot.expand(rows, width)
    if width > 1:
        ties = tie_terms(width, device)
        even, odd = sums[:, 0::2], sums[:, 1::2]
        # With `out=`, autocast does not change the dtype of the product.
        cosine = sums.new_empty(rows, even.shape[1], odd.shape[1])
        torch.bmm(even, odd.transpose(1, 2), out=cosine)
        length = torch.linalg.vector_norm(sums, dim=2).clamp_(min=torch.finfo(torch.float64).tiny)
        cosine.div_(length[:, 0::2].unsqueeze(2)).div_(length[:, 1::2].unsqueeze(1)).sub_(ties[: odd.shape[1]])
        cosine.masked_fill_(~real[:, 1::2].unsqueeze(1), -torch.inf)
        best, partner = cosine.max(dim=2)
        # Between pairs, the even token's place breaks ties, no longer its partner's.
        best = (best + ties[partner] - ties[: best.shape[1]]).masked_fill(~real[:, 0::2], -torch.inf)
        merges = torch.minimum(alive // 2, (alive - counts).clamp(min=0))
        order = best.sort(dim=1, descending=True, stable=True).indices
        merged = chosen_mask(order, merges, best.shape[1])
        target = target.clone()
        target[:, 0::2] = torch.where(merged, 2 * partner + 1, target[:, 0::2])
    survives = real & (target == slot)
    rank = survives.cumsum(dim=1) - 1
    move = rank.gather(1, target)
    return torch.where(real, move, narrower), survives


def _merge(sums: Tensor, move: Tensor, narrower: int) -> Tensor:
    """The sums `(B, narrower, D)` of groups that move to the same slot; padding is zero and may go anywhere."""
    rows, _, width = sums.shape
    first = torch.arange(rows, device=sums.device).unsqueeze(1) * narrower
    slot = move.clamp(max=narrower - 1) + first
    merged = sums.new_zeros(rows * narrower, width).index_add_(0, slot.flatten(), sums.flatten(0, 1))
    return merged.view(rows, narrower, width)
