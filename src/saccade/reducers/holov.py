"""HoloV (arXiv 2510.02912): a budget for each part of the image, spent on what the vision tower attends to most."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from saccade.reducers.common import (
    Budget,
    best_first,
    check_integer,
    check_number,
    mask_to_index,
    nothing_kept,
    row_budget,
    valid_rank,
)
from saccade.reducers.partition import path_places
from saccade.reducers.registry import register_reducer
from saccade.reducers.similarity import TIE, cosine_similarity
from saccade.tokens import Reduction, VisualContext
from saccade.values import check_choice

WINDOWS = ("runs", "square")
ATTENTION_SCALE = 1000.0
ROUNDING = 1e-9
"""What a product of a share and a count may lack: 0.29 * 100 is 28.999999999999996."""


@register_reducer("holov")
@dataclass(frozen=True)
class HoloV:
    """Divides the image into 16 runs of tokens, gives each a share of the budget, and keeps its most salient tokens.

    The N tokens in raster order are cut into P runs of N / P consecutive tokens; the first N mod P runs have one more.
    In a run of n tokens, with S the cosine similarities of the features, zero on the diagonal, and a the saliency,

        mu_i = sum_j S_ij / (n - 1)      v_i = sum_j (S_ij - mu_i)^2 / (n - 1)
        s_i = 1000 a_i + alpha c v_i     c = mean|1000 a| / (mean|v| + 1e-6), over the run

    where v includes the zeros of the diagonal, as in the published code, and is 0 in a run of one token. A run has the
    weight w_p = mean s / the sum of the runs' mean s, and gets floor(K w_p) of K tokens; the remaining tokens go to
    the runs with the largest w, one each. Within a run, the tokens with the largest **a** are kept; ties go to the
    first in raster order. Since c is computed per run, the mean of alpha c v is almost alpha times that of 1000 a, so
    attention decides how the budget is shared, except in runs of near duplicates, whose v is as small as 1e-6.

    A run cannot keep more tokens than it has. The published code pads with copies; here the excess is shared out in
    the same way among the runs that have room, repeatedly if necessary.

    Args:
        alpha: weight of the variance v, at least 0; 0.09 as published.
        runs: P, at least 1; 16 as published.
        windows: "runs" as published, or "square", our own variant: the runs follow a path through bands of rows, up
            and down their columns, that makes each run as nearly square as the grid allows (6 x 6 of 24 x 24 tokens).
    """

    alpha: float = 0.09
    runs: int = 16
    windows: str = "runs"
    needs: ClassVar[frozenset[str]] = frozenset({"saliency"})

    def __post_init__(self) -> None:
        check_number("holov", "alpha", self.alpha, "[0, inf)")
        check_integer("holov", "runs", self.runs, least=1)
        check_choice("reducer 'holov': windows", self.windows, WINDOWS)

    @torch.no_grad()
    def __call__(self, context: VisualContext, keep: int | Tensor) -> Reduction:
        """Index `(B, K)` of the selected tokens. Time O(N^2 D / P) per row, memory O(N D)."""
        budget = row_budget(context, keep)
        rows, tokens, _ = context.shape
        if budget.width == 0 or rows == 0:
            return nothing_kept(context, budget)
        members, sizes = self._members(context, budget)
        real = members < tokens
        score = self._scores(context, members, sizes)
        share = score / score.sum(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        counts = share_budget(budget.counts, share, sizes)

        # The rank of every token by saliency, then the best few of each run.
        order = best_first(context.saliency.float(), context, tokens)
        rank = torch.empty_like(order).scatter_(1, order, torch.arange(tokens, device=order.device).expand_as(order))
        rank = rank.gather(1, members.clamp(max=tokens - 1).flatten(1)).view_as(members).masked_fill(~real, tokens)
        rank = rank.sort(dim=2).values
        taken = torch.arange(rank.shape[2], device=rank.device) < counts.unsqueeze(2)
        chosen = torch.where(taken, rank, tokens).flatten(1)
        mask = torch.zeros(rows, tokens + 1, dtype=torch.bool, device=rank.device).scatter_(1, chosen, True)
        mask = torch.zeros_like(mask[:, :tokens]).scatter_(1, order, mask[:, :tokens])
        return Reduction(mask_to_index(mask, budget.width), dense=budget.uniform)

    def _members(self, context: VisualContext, budget: Budget) -> tuple[Tensor, Tensor]:
        """The tokens of each run, long `(B, P, n)`, padded with N, and their numbers, long `(B, P)`.

        n is the length of the longest run that N tokens can have.
        """
        rows, tokens, _ = context.shape
        place = valid_rank(context) if self.windows == "runs" else path_places(context, budget, self.runs)
        line = torch.full((rows, tokens + 1), tokens, dtype=torch.long, device=place.device)
        place = place if context.dense else place.masked_fill(~context.valid, tokens)
        numbers = torch.arange(tokens, device=place.device).expand(rows, tokens)
        line.scatter_(1, place, numbers)
        line[:, tokens] = tokens

        run = torch.arange(self.runs, device=place.device)
        available = budget.available.unsqueeze(1)
        base, longer = available // self.runs, available % self.runs
        sizes = base + (run < longer)
        first = run * base + torch.minimum(run, longer)
        step = torch.arange(-(-tokens // self.runs), device=place.device)
        members = line.gather(1, (first.unsqueeze(2) + step).clamp(max=tokens).flatten(1)).view(rows, self.runs, -1)
        return members.masked_fill(step >= sizes.unsqueeze(2), tokens), sizes

    def _scores(self, context: VisualContext, members: Tensor, sizes: Tensor) -> Tensor:
        """The mean of s over each run, float64 `(B, P)`, 0 for a run without tokens."""
        rows, tokens, width = context.shape
        real, size = members < tokens, sizes.clamp(min=1)
        others = (size - 1).clamp(min=1)
        at = members.clamp(max=tokens - 1).flatten(1)
        features = context.features.gather(1, at.unsqueeze(2).expand(-1, -1, width))
        # If all runs are equally long, none is padded, and the host knows this without reading from the device.
        whole = context.dense and tokens % self.runs == 0
        run_shape = (rows * self.runs, members.shape[2])
        runs = VisualContext(features.view(*run_shape, width), valid=None if whole else real.view(run_shape))
        similarity = cosine_similarity(runs.features, runs)
        similarity.diagonal(dim1=1, dim2=2).zero_()
        similarity = similarity.view(rows, self.runs, *similarity.shape[1:]).to(sizes.device)
        mean = similarity.sum(dim=3) / others.unsqueeze(2)
        away = (similarity - mean.unsqueeze(3)).square_()
        if not whole:
            away.masked_fill_(~real.unsqueeze(2), 0)
        variance = away.sum(dim=3) / others.unsqueeze(2)
        variance = variance.masked_fill(~real | (sizes == 1).unsqueeze(2), 0)
        salient = context.saliency.double().nan_to_num(nan=0.0, posinf=0.0).clamp(min=0)
        attention = ATTENTION_SCALE * salient.gather(1, at).view_as(members).masked_fill(~real, 0)
        attention, variance = attention.sum(dim=2) / size, variance.sum(dim=2) / size
        return attention + self.alpha * attention / (variance + 1e-6) * variance


def share_budget(counts: Tensor, share: Tensor, room: Tensor) -> Tensor:
    """How many of `counts` each run gets: long `(B, P)`, at most its `room`, adding up to `counts`.

    Each gets its share, rounded down; the remainder goes to the runs with the largest shares, one each. What a run has
    no room for is shared out in the same way among the others.

    Args:
        counts: long `(B,)`, at most the sum of `room`.
        share: float64 `(B, P)`, at least 0.
        room: long `(B, P)`.
    """
    runs = share.shape[1]
    # Ties go to the first; sums of shares are off by far less.
    order = (share - TIE * torch.arange(runs, device=share.device)).sort(dim=1, descending=True, stable=True).indices
    share, room = share.gather(1, order), room.gather(1, order)
    given, left = torch.zeros_like(room), counts.unsqueeze(1)
    # Each round fills at least one more run, or leaves nothing to share.
    for _ in range(runs):
        opened = given < room
        part = share.masked_fill(~opened, 0)
        total = part.sum(dim=1, keepdim=True)
        alike = opened / opened.sum(dim=1, keepdim=True).clamp(min=1)
        part = torch.where(total > 0, part / torch.where(total > 0, total, 1), alike.to(part.dtype))
        more = (left * part + ROUNDING).long()
        over = left - more.sum(dim=1, keepdim=True)
        more += opened & (opened.cumsum(dim=1) <= over)
        given = torch.minimum(given + more, room)
        left = counts.unsqueeze(1) - given.sum(dim=1, keepdim=True)
    return torch.zeros_like(given).scatter_(1, order, given)
