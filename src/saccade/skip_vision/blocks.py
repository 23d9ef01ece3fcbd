"""The visual tokens of each image as one row, regardless of the number of crops.

Shapes: G images (blocks of placeholders) of M visual tokens, R feature rows of N; P placeholders.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.families import Encoded
from saccade.tokens import Places, VisualContext

PER_TOKEN = ("encoder_features", "saliency", "keys", "relevance", "word_relevance", "protected")


@dataclass(frozen=True)
class Blocks:
    """The visual tokens of each block, see [`Places`].

    Args:
        token: long `(G, M)`, indices of the block's tokens among all valid tokens of the context; -1 at the end.
        feature_row: long `(G, M)`, the context's row that each token belongs to; -1 at the end.
    """

    token: Tensor
    feature_row: Tensor

    @classmethod
    def of(cls, places: Places) -> "Blocks":
        """The blocks of a batch."""
        count = torch.bincount(places.block) if len(places) else places.block
        number = torch.arange(len(places), device=places.block.device)
        shape = (count.numel(), int(count.max()) if count.numel() else 1)

        def spread(values: Tensor) -> Tensor:
            empty = torch.full(shape, -1, dtype=torch.long, device=values.device)
            return empty.index_put((places.block, number - places.start), values)

        return cls(spread(number), spread(places.feature_row))

    @property
    def valid(self) -> Tensor:
        """bool `(G, M)`, false on padding."""
        return self.token >= 0

    def gather(self, values: Tensor, context: VisualContext) -> Tensor:
        """Values `(R, N, ...)` of the context's tokens as `(G, M, ...)`, zero or false on padding; differentiable."""
        flat = values.flatten(0, 1) if context.dense else values[context.valid]
        if flat.shape[0] == 0:
            return flat.new_zeros(*self.token.shape, *values.shape[2:])
        picked = flat[self.token.clamp(min=0)]
        return picked.masked_fill(~self.valid.reshape(*self.token.shape, *[1] * (values.dim() - 2)), 0)


def block_context(encoded: Encoded, blocks: Blocks) -> VisualContext:
    """A context with one row per block, `(G, M, ...)`, regardless of the number of crops."""
    context = encoded.context
    if blocks.token.shape == context.shape[:2] and torch.equal(blocks.valid, context.valid):
        return context
    extras = {
        name: blocks.gather(getattr(context, name), context)
        for name in PER_TOKEN
        if getattr(context, name) is not None
    }
    first = blocks.feature_row[:, 0]
    return VisualContext(
        features=blocks.gather(context.features, context),
        valid=blocks.valid,
        grid=torch.tensor(_grids(context, blocks), device=context.grid.device).reshape(-1, 3),
        seed=None if context.seed is None else context.seed[first],
        words=None if context.words is None else context.words[first],
        **extras,
    )


def _grids(context: VisualContext, blocks: Blocks) -> list[tuple[int, int, int]]:
    """Frames, rows and columns of each block: crops of equal shape count as frames, others form one line."""
    grids = [tuple(grid) for grid in context.grid.tolist()]
    found = []
    for rows in blocks.feature_row.tolist():
        shapes = [grids[row] for row in dict.fromkeys(rows) if row >= 0]
        if len(set(shapes)) == 1:
            frames, height, width = shapes[0]
            found.append((frames * len(shapes), height, width))
        else:
            found.append((1, 1, sum(math.prod(shape) for shape in shapes)))
    return found
