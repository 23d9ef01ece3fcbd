"""Encode, reduce, splice: the one path from a processed batch to its shorter form."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from saccade.errors import SaccadeError
from saccade.families import Encoded, Family
from saccade.pruning.adaptive import adaptive_counts
from saccade.pruning.joint import Units
from saccade.reducers import Reducer, check_resolution_budget, get_reducer
from saccade.tokens import Reduction, Spliced, TokenBudget, VisualContext, gather_selected, splice

POSITIONS = ("compact", "original")
NEWLINES = ("keep", "drop")


@dataclass
class Shortened:
    """A shortened batch.

    Args:
        inputs: what the stock forward takes: ids, mask, positions, per-token extras, `mm_encoder_outputs`.
        labels: long `(B, S)` or None.
        spliced: where each token came from.
        reduction: which visual tokens stayed.
    """

    inputs: dict[str, Any]
    labels: Tensor | None
    spliced: Spliced
    reduction: Reduction


def check_positions(positions: str) -> str:
    """Return `positions` if it is known.

    Raises:
        SaccadeError: otherwise.
    """
    if positions not in POSITIONS:
        raise SaccadeError(f"positions={positions!r} is unknown: use one of {', '.join(POSITIONS)}")
    return positions


def check_newlines(newlines: str) -> str:
    """Return `newlines` if it is known.

    Raises:
        SaccadeError: otherwise.
    """
    if newlines not in NEWLINES:
        raise SaccadeError(f"newlines={newlines!r} is unknown: use one of {', '.join(NEWLINES)}")
    return newlines


def keep_budget(context: VisualContext, budget: TokenBudget, newlines: str = "keep") -> int | Tensor:
    """Tokens of the image to keep of each row: one int where all rows are whole, else long `(B,)` on the CPU.

    Args:
        newlines: see `reduce`. Where they are kept, they are counted in the budget and left out of the result.
    """
    if context.dense and context.protected is None and not budget.adaptive:
        return budget.count(context.shape[1])
    available = context.valid.sum(dim=1)
    protected = torch.zeros_like(available)
    if context.protected is not None:
        protected = (context.protected & context.valid).sum(dim=1)
    numbers = torch.stack((available, protected)).tolist()
    limits = [tokens - more for tokens, more in zip(*numbers, strict=True)]
    counts = [budget.count(tokens) for tokens in numbers[0]]
    if newlines == "keep":
        counts = [max(1, count - more) for count, more in zip(counts, numbers[1], strict=True)]
    counts = [min(count, limit) for count, limit in zip(counts, limits, strict=True)]
    return torch.tensor(adaptive_counts(context, counts, limits) if budget.adaptive else counts)


def reduce(context: VisualContext, reducer: Reducer, budget: TokenBudget, newlines: str = "keep") -> Reduction:
    """Let `reducer` choose the tokens that `budget` leaves.

    Where crops or images share a budget, the reducer sees all tokens of a unit as one row and chooses among them
    jointly, as DivPrune was published; a crop, or an image of a sample, may then keep none. Reducers that go by the
    grid see crops of the same shape as frames of one grid, and crops of different shapes as one line of tokens.

    Args:
        newlines: what happens to tokens that are no part of the image, `context.protected`. "keep" keeps all of them,
            counted in the budget, of which one token at least is left to the image; "drop" drops all of them, and the
            image gets the whole budget.

    Raises:
        SaccadeError: on another value of `newlines`, or a reducer that cannot follow the budget.
    """
    check_newlines(newlines)
    check_resolution_budget(reducer, budget)
    if budget.keeps_all:
        return get_reducer("none")(context, keep=context.shape[1])
    if budget.per == "crop":
        return _reduce_rows(context, reducer, budget, newlines)
    units = Units.of(context, budget.per)
    return units.split(_reduce_rows(units.context(context), reducer, budget, newlines))


def _reduce_rows(context: VisualContext, reducer: Reducer, budget: TokenBudget, newlines: str) -> Reduction:
    """`reduce`, where each row has a budget of its own."""
    keep = keep_budget(context, budget, newlines)
    if context.protected is None:
        return reducer(context, keep=keep)
    protected = context.protected & context.valid
    reduction = reducer(replace(context, valid=context.valid & ~protected, protected=None), keep=keep)
    return _with_tokens(reduction, protected) if newlines == "keep" else reduction


def _with_tokens(reduction: Reduction, more: Tensor) -> Reduction:
    """`reduction` that keeps the tokens `more`, bool `(B, N)`, none of which it has kept or merged, as they are."""
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
    # The weights by the token that stands for them, then by that token's place among all that are kept.
    by_token = torch.zeros(rows, tokens + 1, tokens, dtype=reduction.weight.dtype, device=more.device)
    stands = torch.where(reduction.valid, reduction.index, tokens).unsqueeze(-1).expand_as(reduction.weight)
    by_token.scatter_(1, stands, reduction.weight)
    by_token[:, :tokens] += torch.diag_embed(more.to(by_token.dtype))
    by_token[:, tokens] = 0
    place = torch.where(index >= 0, index, tokens).unsqueeze(-1).expand(-1, -1, tokens)
    return Reduction(index, by_token.gather(1, place), before_projector=reduction.before_projector)


def shorten(
    family: Family,
    encoded: Encoded,
    inputs: Mapping[str, Any],
    reduction: Reduction,
    *,
    isolator: Tensor | None = None,
    positions: str = "compact",
    padding_side: str = "right",
    pad_id: int = 0,
) -> Shortened:
    """Splice a batch down to the tokens that `reduction` kept.

    Args:
        inputs: processor outputs of the full batch: `input_ids`, `attention_mask`, perhaps `labels` and extras.
        isolator: `(l, D)` rows to put before each image, or None.
        positions: "compact" counts the shorter sequence from zero, as published; "original" lets each kept token
            keep its place in the full sequence. Where a family has several position axes both mean the latter.

    Raises:
        ValueError: if placeholders and visual tokens differ in number.
    """
    length = 0 if isolator is None else isolator.shape[0]
    spliced = splice(
        inputs["input_ids"],
        inputs["attention_mask"],
        family.placeholder(inputs["input_ids"]),
        encoded.context,
        reduction,
        isolator_length=length,
        position_ids=family.full_positions(inputs) if positions == "original" or family.several_axes else None,
        labels=inputs.get("labels"),
        pad_id=pad_id,
        padding_side=padding_side,
    )
    new_inputs = {
        name: spliced.gather(inputs[name], fill) for name, fill in family.token_inputs.items() if name in inputs
    }
    new_inputs.update(
        input_ids=spliced.input_ids,
        attention_mask=spliced.attention_mask,
        position_ids=spliced.position_ids,
        mm_encoder_outputs=family.wrap_features(
            _rows(reduced_features(family, encoded, reduction), encoded.context, reduction, isolator),
            encoded,
            [
                _rows(
                    reduction.apply(features),
                    encoded.context,
                    reduction,
                    None if isolator is None else torch.zeros_like(isolator),
                )
                for features in encoded.deeper
            ],
        ),
    )
    return Shortened(new_inputs, spliced.labels, spliced, reduction)


def reduced_features(family: Family, encoded: Encoded, reduction: Reduction) -> Tensor:
    """The features that `reduction` leaves, `(R, K, D)`; zeros on padding.

    Tokens that are merged before the projector go through it once more. The others keep the features that they have,
    so that what is no part of the image, such as a newline, never goes through it.

    Raises:
        SaccadeError: if the family cannot project tokens one by one, and tokens are merged before the projector.
    """
    features = encoded.context.features
    if not reduction.before_projector:
        return reduction.apply(features)
    projected = family.project(reduction.apply(encoded.context.encoder_features))
    own = gather_selected(features, reduction.index, dense=reduction.dense)
    return torch.where(reduction.merged.unsqueeze(-1), projected.to(own.dtype), own)


def _rows(kept: Tensor, context: VisualContext, reduction: Reduction, isolator: Tensor | None) -> list[Tensor]:
    """Reduced values `(R, K, D)` as one `(n_i, D)` tensor a feature row, with the isolator before each image."""
    rows = (
        list(kept.unbind(0))
        if reduction.dense
        else [row[keep] for row, keep in zip(kept, reduction.valid, strict=True)]
    )
    if isolator is None or isolator.shape[0] == 0:
        return rows
    isolator = isolator.to(kept.dtype)
    group = context.group.tolist()
    starts = [index == 0 or group[index] != group[index - 1] for index in range(len(rows))]
    return [torch.cat((isolator, row)) if start else row for row, start in zip(rows, starts, strict=True)]
