"""The layout of each image in the sequence: [retained][s1][skipped][s2] (arXiv 2503.21817, Fig. 2).

Shapes: G images (blocks of placeholders) of M visual tokens, which become E rows of width D.
"""

import torch
from torch import Tensor, nn

from saccade.errors import SaccadeError
from saccade.families import Encoded, Family
from saccade.reducers import get_reducer
from saccade.reducers.common import mask_to_index
from saccade.reducers.redundancy import RedundancyMerge
from saccade.reducers.shared_budget import Units
from saccade.skip_vision.config import SkipVisionConfig, amount_of
from saccade.skip_vision.language import ROLES_KEYWORD
from saccade.skip_vision.split import Split, split_tokens
from saccade.skip_vision.summary import head_of, pool
from saccade.tokens import Places, Reduction, Role, VisualContext, VisualTokens


class Skipper:
    """Makes the merged tokens of each image skip the feed-forward networks, next to retained and summary tokens."""

    positions = "compact"
    roles_keyword: str | None = ROLES_KEYWORD

    def __init__(self, family: Family, config: SkipVisionConfig) -> None:
        self.family = family
        self.config = config
        self.needs = config.needs
        self.share = skipped_share(family, config)

    @property
    def trainable_modules(self) -> tuple[nn.Module, ...]:
        head = head_of(self.family.model)
        return () if head is None else (head,)

    def reduce(self, family: Family, encoded: Encoded, places: Places, text: Tensor) -> VisualTokens:
        """Split, merge and summarise the tokens of each image. A summary takes the place of its group's last token.

        Raises:
            SaccadeError: if the images do not suit the split, or `merge="none"` leaves more tokens than may be
                skipped.
        """
        given = encoded.context
        blocks = Units.of_tokens(given, places.block)
        same = torch.equal(blocks.place >= 0, given.valid)  # each block is a row, padded at its end
        context = given if same else blocks.context(given)
        if self.config.newlines == "drop" and context.protected is not None:
            context = context.replace(valid=context.valid & ~context.protected, protected=None)
        split = split_tokens(family, self.config, encoded, blocks, context)
        skipped = merge_rest(self.config, context, split)
        layers = [context.features, *map(blocks.join, encoded.deepstack_features)]
        parts = self._group(split.retained, split.pooled, Role.RETAINED, layers)
        parts += self._group(skipped, skipped.valid, Role.SKIPPED, layers)
        roles, tokens = (torch.cat([part[name] for part in parts], dim=1) for name in (0, 1))  # (G, E) each
        there = roles != Role.PADDING
        features, *deepstack_features = (
            torch.cat([part[2][number] for part in parts], dim=1)[there] for number in range(len(layers))
        )
        number = given.valid.flatten().cumsum(dim=0) - 1  # of each token among the placeholders
        place = number[blocks.place.gather(1, tokens)[there]]
        # All tokens of a block count towards its first crop, since they are placed there.
        first = blocks.first.unsqueeze(1).expand_as(roles)[there]
        counts = torch.bincount(first, minlength=given.shape[0]).tolist()
        return VisualTokens(place, roles[there], features, counts, tuple(deepstack_features))

    def cost(self, role: Tensor) -> Tensor:
        """A skipped token counts as the share of the layers' weights that it runs through."""
        return (role != Role.PADDING).sum() - (1 - self.share) * (role == Role.SKIPPED).sum()

    def _group(
        self, group: Reduction, pooled: Tensor, role: Role, layers: list[Tensor]
    ) -> list[tuple[Tensor, Tensor, list[Tensor]]]:
        """The tokens of a group, and the summary of those that are `pooled`.

        Returns:
            Roles `(G, K)`, tokens of the block `(G, K)`, and features `(G, K, D)` layer by layer, for each of the two.
        """
        taken = [_apply(group, layer) for layer in layers]  # (G, K, D) each
        own = torch.where(group.valid, int(role), int(Role.PADDING))
        token = group.index.clamp(min=0)
        parts = [(own, token, taken)]
        head = head_of(self.family.model)
        if head is not None and own.shape[1]:
            last = group.counts - 1  # (G,)
            weight = head(taken[0], pooled)  # (G, K)
            # A group without tokens has no summary.
            there = torch.where((last >= 0).unsqueeze(1), int(Role.SUMMARY), int(Role.PADDING))
            at = token.gather(1, last.clamp(min=0).unsqueeze(1))
            parts.append((there, at, [pool(weight, values) for values in taken]))
        return parts


def skipped_share(family: Family, config: SkipVisionConfig) -> float:
    """The share of the decoder layers' weights that a skipped token runs through."""
    skipping = range(len(family.language_layers))
    skipping = skipping if config.layers is None else range(*config.layers)
    run = total = 0
    for number, layer in enumerate(family.language_layers):
        weights = sum(parameter.numel() for parameter in layer.parameters())
        total += weights
        spared = sum(parameter.numel() for parameter in layer.mlp.parameters())
        run += weights - (spared if number in skipping else 0)
    return run / total


def merge_rest(config: SkipVisionConfig, context: VisualContext, split: Split) -> Reduction:
    """Merge the tokens `split.rest` of each image into the skipped ones, in their final order."""
    rest = split.rest
    left = rest.sum(dim=1).tolist()
    budgets = [amount_of(config.skipped, base) for base in split.base]
    budgets = [min(budget, count) for budget, count in zip(budgets, left, strict=True)]
    device = rest.device
    if budgets == left or not any(budgets):
        # The budget is the number of tokens: they stay unmerged, in raster order.
        counts = torch.tensor(budgets, dtype=torch.long, device=device).unsqueeze(1)
        width = max(budgets, default=0)
        return Reduction(mask_to_index(rest & (counts > 0), width))
    if config.merge == "none":
        number = next(number for number in range(len(left)) if budgets[number] < left[number])
        raise SaccadeError(
            f"skipped={config.skipped!r}: merge='none' leaves {left[number]} tokens of an image besides the retained "
            f"ones, but {budgets[number]} may be skipped; leave skipped out, or merge by 'redundancy'"
        )
    offered = context.replace(valid=rest, protected=None)
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
    """`reduction.apply(x)`, with weighted sums in float32."""
    if reduction.weight is None:
        return reduction.apply(x)
    with torch.autocast(x.device.type, enabled=False):
        return reduction.apply(x.float()).to(x.dtype)
