"""Apply a budget to a batch's visual tokens: counts for the reducer, budgets shared by rows, newlines.

Shapes: B feature rows of N tokens, of which at most K are kept.
"""

from dataclasses import replace

import torch
from torch import Tensor

from saccade.reducers.adaptive import adaptive_counts
from saccade.reducers.config import PruningConfig
from saccade.reducers.fit import Fit, fit_counts
from saccade.reducers.none import KeepAll
from saccade.reducers.registry import Reducer
from saccade.reducers.shared_budget import Units
from saccade.tokens import Reduction, VisualContext


def reduce(
    context: VisualContext, config: PruningConfig, reducer: Reducer | None = None, room: Tensor | None = None
) -> Reduction:
    """Let a reducer choose the tokens to keep within the budget.

    Where crops or images share a budget, the reducer sees all tokens of a unit as one row and chooses among them
    jointly, as DivPrune was published; a crop, or an image of a sample, may then keep none. Reducers that use the grid
    see crops of the same shape as frames of one grid, and crops of different shapes as one line of tokens.

    With `newlines="keep"` all tokens that are not part of the image, `context.protected`, are kept and count towards
    the budget, of which at least one token is left for the image; with "drop" they are dropped, and the image gets the
    whole budget.

    Tokens in `context.absent` are never kept. The budget is counted on all tokens of a unit, those included, so that a
    ratio costs the same with and without them; a unit that has fewer tokens left keeps these.

    Args:
        reducer: the config's reducer, if the caller has already made it.
        room: long `(B,)`, the maximum number of visual tokens of each row's sample, at least 1; None for no maximum.
            `config.fit_length` is not read here, since the text is not known. Samples within the maximum are reduced
            as usual, the others as `fit_counts` describes.

    Raises:
        SaccadeError: if samples share a budget or have a maximum, and the context does not say which sample each row
            belongs to.
    """
    if config.keeps_fitting and room is None:
        return KeepAll()(context.without_absent(), keep=context.shape[1])
    reducer = config.make_reducer() if reducer is None else reducer
    if config.budget == "crop":
        return _reduce_rows(context, config, reducer, room)
    units = Units.of(context, config.budget)
    reduction = _reduce_rows(units.context(context), config, reducer, None if room is None else room[units.first])
    return units.split(reduction)


def keep_counts(context: VisualContext, config: PruningConfig) -> int | Tensor:
    """Image tokens to keep per row: an int if all rows have the same length, otherwise long `(B,)` on the CPU.

    Kept newlines count towards the budget but are not part of the result.
    """
    if context.dense and context.protected is None and context.absent is None and not config.adaptive:
        return config.count(context.shape[1])
    available = context.valid.sum(dim=1)
    protected = torch.zeros_like(available)
    if context.protected is not None:
        protected = (context.protected & context.valid).sum(dim=1)
    left = context.without_absent()
    numbers = torch.stack((available, protected, left.valid.sum(dim=1))).tolist()
    limits = [tokens - more for tokens, more in zip(numbers[2], numbers[1], strict=True)]
    counts = [config.count(tokens) for tokens in numbers[0]]
    if config.newlines == "keep":
        counts = [max(1, count - more) for count, more in zip(counts, numbers[1], strict=True)]
    counts = [min(count, limit) for count, limit in zip(counts, limits, strict=True)]
    return torch.tensor(adaptive_counts(left, counts, limits) if config.adaptive else counts)


def _reduce_rows(context: VisualContext, config: PruningConfig, reducer: Reducer, room: Tensor | None) -> Reduction:
    """`reduce` with a separate budget for each row."""
    keeps_all = config.keeps_fitting
    keep = keep_counts(context, config)
    context = context.without_absent()
    fit = None
    if room is not None:
        fit = fit_counts(context, keep, room, keeps_newlines=keeps_all or config.newlines == "keep")
    if fit is not None:
        return _fitted(context, config, reducer, fit)
    if keeps_all:
        return KeepAll()(context, keep=context.shape[1])
    if context.protected is None:
        return reducer(context, keep=keep)
    protected = context.protected & context.valid
    reduction = reducer(context.replace(valid=context.valid & ~protected, protected=None), keep=keep)
    return _with_tokens(reduction, protected) if config.newlines == "keep" else reduction


def _fitted(context: VisualContext, config: PruningConfig, reducer: Reducer, fit: Fit) -> Reduction:
    """Reduce rows of which some fit only with fewer tokens than their budget."""
    device = context.features.device
    # A single host-to-device copy.
    keep, newlines, lost = torch.tensor((fit.keep, fit.newlines, fit.lost), device=device)
    stays = torch.zeros_like(context.valid)
    if context.protected is not None and (config.newlines == "keep" or config.keeps_fitting):
        stays = context.protected & (newlines > 0).unsqueeze(1)
    offered = context.valid & (keep > 0).unsqueeze(1)
    if context.protected is not None:
        offered = offered & ~context.protected
    if config.keeps_fitting:
        # Even a method that merges must leave alone what fits.
        whole = (lost == 0).unsqueeze(1)
        stays, offered = stays | whole, offered & ~whole
    reduction = reducer(context.replace(valid=offered, protected=None), keep=torch.tensor(fit.keep))
    if context.protected is not None or config.keeps_fitting:
        reduction = _with_tokens(reduction, stays & context.valid)
    return replace(reduction, lost=lost)


def _with_tokens(reduction: Reduction, more: Tensor) -> Reduction:
    """`reduction` that also keeps the tokens `more` unchanged: bool `(B, N)`, none of which it has kept or merged."""
    rows, tokens = more.shape
    kept = torch.zeros(rows, tokens + 1, dtype=torch.bool, device=more.device)
    kept.scatter_(1, torch.where(reduction.valid, reduction.index, tokens), True)
    kept = kept[:, :tokens] | more
    size = int(kept.sum(dim=1).max())
    columns = torch.arange(tokens, device=more.device)
    index = torch.where(kept, columns, tokens).sort(dim=1).values[:, :size]
    index = index.masked_fill(index == tokens, -1)
    if reduction.weight is None:
        return Reduction(index)
    # Weights are first indexed by their kept token, then by that token's place among all kept tokens.
    by_token = torch.zeros(rows, tokens + 1, tokens, dtype=reduction.weight.dtype, device=more.device)
    stands = torch.where(reduction.valid, reduction.index, tokens).unsqueeze(-1).expand_as(reduction.weight)
    by_token.scatter_(1, stands, reduction.weight)
    by_token[:, :tokens] += torch.diag_embed(more.to(by_token.dtype))
    by_token[:, tokens] = 0
    place = torch.where(index >= 0, index, tokens).unsqueeze(-1).expand(-1, -1, tokens)
    return Reduction(index, by_token.gather(1, place), before_projector=reduction.before_projector)
