"""What stands for each image in the sequence: [retained][s1][skipped][s2] (arXiv 2503.21817, Fig. 2).

Shapes: G images (blocks of placeholders) of M visual tokens, which become E rows of width D.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from saccade.errors import SaccadeError
from saccade.families import Encoded, Family
from saccade.reducers import get_reducer
from saccade.reducers.common import mask_to_index
from saccade.reducers.redundancy import RedundancyMerge
from saccade.skip_vision.config import SkipVisionConfig, amount_of
from saccade.skip_vision.split import Split, block_context, split_tokens
from saccade.skip_vision.summary import SummaryHead, pool
from saccade.tokens import Blocks, Reduction, Role, VisualContext
from saccade.tokens.layout import pack_left


@dataclass
class Composed:
    """The rows that stand for each image.

    Args:
        role: long `(G, E)`, `Role.PADDING` behind the last one.
        source: long `(G, E)`, the column of the full batch that each row stands at. A summary stands at the last token
            of its group.
        features: `(G, E, D)`.
        deeper: the same for features that enter at further layers; summaries pool them with the same weights.
    """

    role: Tensor
    source: Tensor
    features: Tensor
    deeper: tuple[Tensor, ...]

    def rows(self, values: Tensor) -> list[Tensor]:
        """`values` `(G, E, D)` as one `(e_g, D)` a block."""
        return [row[: int(count)] for row, count in zip(values, (self.role != Role.PADDING).sum(dim=1), strict=True)]


def compose(
    family: Family, config: SkipVisionConfig, head: SummaryHead | None, encoded: Encoded, blocks: Blocks
) -> Composed:
    """Split, merge and summarise the tokens of each image.

    Raises:
        SaccadeError: if the images do not fit the split, or more tokens are left than `merge="none"` may skip.
    """
    context = block_context(encoded, blocks)
    if config.newlines == "drop" and context.protected is not None:
        context = replace(context, valid=context.valid & ~context.protected, protected=None)
    split = split_tokens(family, config, encoded, blocks, context)
    skipped = merge_rest(config, context, split)
    layers = [context.features, *(blocks.gather(layer, encoded.context) for layer in encoded.deeper)]
    groups = ((split.retained, split.pooled, Role.RETAINED), (skipped, skipped.valid, Role.SKIPPED))
    parts: list[list[Tensor]] = [[] for _ in layers]
    roles, sources = [], []
    for reduction, pooled, role in groups:
        taken = [_apply(reduction, layer) for layer in layers]  # (G, K, D) each
        group_role = torch.where(reduction.valid, int(role), int(Role.PADDING))
        source = blocks.column.gather(1, reduction.index.clamp(min=0)).masked_fill(~reduction.valid, -1)
        last = reduction.counts - 1  # (G,)
        if config.keep_last_skipped and role == Role.SKIPPED and group_role.shape[1]:
            kept = (torch.arange(group_role.shape[1], device=last.device) == last.unsqueeze(1)) & reduction.valid
            group_role = group_role.masked_fill(kept, int(Role.RETAINED))
        roles.append(group_role)
        sources.append(source)
        for part, values in zip(parts, taken, strict=True):
            part.append(values)
        if head is not None and group_role.shape[1]:
            weight = head(taken[0], pooled)  # (G, K)
            # A group without tokens has no summary.
            there = (last >= 0).unsqueeze(1)
            roles.append(torch.where(there, int(Role.SUMMARY), int(Role.PADDING)))
            sources.append(source.gather(1, last.clamp(min=0).unsqueeze(1)))
            for part, values in zip(parts, taken, strict=True):
                part.append(pool(weight, values))
    role = torch.cat(roles, dim=1)
    joined = [torch.cat(part, dim=1) for part in parts]
    _, role, source, *joined = pack_left(role != Role.PADDING, role, torch.cat(sources, dim=1), *joined)
    return Composed(role, source, joined[0], tuple(joined[1:]))


def merge_rest(config: SkipVisionConfig, context: VisualContext, split: Split) -> Reduction:
    """Merge the tokens `split.rest` of each image to the skipped ones, in the order that they are to stand in.

    Raises:
        SaccadeError: if more tokens are left than `merge="none"` may skip.
    """
    rest = split.rest
    left = rest.sum(dim=1).tolist()
    budgets = [amount_of(config.skipped, base) for base in split.base]
    budgets = [min(budget, count) for budget, count in zip(budgets, left, strict=True)]
    device = rest.device
    if budgets == left or not any(budgets):
        # As many as there are: they stay as they are, in raster order.
        counts = torch.tensor(budgets, dtype=torch.long, device=device).unsqueeze(1)
        width = max(budgets, default=0)
        return Reduction(mask_to_index(rest & (counts > 0), width))
    if config.merge == "none":
        number = next(number for number in range(len(left)) if budgets[number] < left[number])
        raise SaccadeError(
            f"skipped={config.skipped!r}: merge='none' leaves {left[number]} tokens of an image beside the retained "
            f"ones, and {budgets[number]} may be skipped; leave skipped out, or merge by 'redundancy'"
        )
    options = {entry.name: getattr(context, entry.name) for entry in fields(context) if entry.init}
    offered = VisualContext(**{**options, "valid": rest, "protected": None})
    keep = torch.tensor([max(1, budget) for budget in budgets], device=device)
    reducer = get_reducer(config.merge)
    if isinstance(reducer, RedundancyMerge) and config.merge_order == "published":
        reduction, order = reducer.ranked(offered, keep)
        merges = torch.tensor([b < count for b, count in zip(budgets, left, strict=True)], device=device)
        raster = torch.arange(order.shape[1], device=device).expand_as(order)
        reduction = _reorder(reduction, torch.where(merges.unsqueeze(1), order, raster))
    else:
        reduction = reducer(offered, keep)
    if 0 in budgets:
        none = torch.tensor([budget == 0 for budget in budgets], device=device)
        weight = reduction.weight
        reduction = Reduction(
            reduction.index.masked_fill(none.unsqueeze(1), -1),
            None if weight is None else weight.masked_fill(none.reshape(-1, 1, 1), 0),
        )
    return reduction


def _reorder(reduction: Reduction, order: Tensor) -> Reduction:
    """The outputs of `reduction` in the order `(G, K)`, padding last."""
    weight = reduction.weight.gather(1, order.unsqueeze(2).expand_as(reduction.weight))
    return Reduction(reduction.index.gather(1, order), weight, reduction.dense)


def _apply(reduction: Reduction, x: Tensor) -> Tensor:
    """`reduction.apply(x)`, weighted sums in float32."""
    if reduction.weight is None:
        return reduction.apply(x)
    with torch.autocast(x.device.type, enabled=False):
        return reduction.apply(x.float()).to(x.dtype)


def rows_per_feature_row(rows: Sequence[Tensor], blocks: Blocks, feature_rows: int) -> list[Tensor]:
    """What families are handed: one tensor a feature row, those of a block on its first, and none on its others."""
    first = blocks.feature_row[:, 0].tolist()
    given = dict(zip(first, rows, strict=True))
    empty = rows[0][:0]
    return [given.get(number, empty) for number in range(feature_rows)]
