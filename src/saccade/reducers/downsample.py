"""A lower input resolution: the baseline that users have without any method, at the cost of a pruned sequence."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from saccade.errors import SaccadeError
from saccade.reducers.registry import Reducer, register_reducer
from saccade.tokens import Reduction, TokenBudget, VisualContext


@register_reducer("downsample")
@dataclass(frozen=True)
class Downsample:
    """Encodes smaller images: no token of the full image is kept, and the vision tower never sees it.

    The family shrinks the pixels (bicubic, antialiased) until the tower gives h' x w' tokens, the grid that
    `lower_grid` names for the budget, and lays each of them at the place of the full grid that its centre falls on.
    This reducer then keeps those places. h' x w' may stay a few tokens below the budget; it never exceeds it, but for
    the least of one token (a frame of a video).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"low_resolution"})

    @torch.no_grad()
    def __call__(self, context: VisualContext, keep: int | Tensor) -> Reduction:
        """Index `(B, K)` of the tokens that the smaller images gave; `keep` decided about their size before.

        Raises:
            SaccadeError: if the features are those of full images.
        """
        if context.low_resolution is None:
            raise SaccadeError(
                "reducer 'downsample' chooses no tokens of full images: encode smaller ones with "
                "`saccade.families.collect.encode_for`, or call `saccade.prune_inputs`"
            )
        return Reduction(context.low_resolution)


def is_low_resolution(reducer: Reducer) -> bool:
    """Whether a reducer works on smaller images, and not on the tokens of the full ones."""
    return "low_resolution" in reducer.needs


def check_resolution_budget(reducer: Reducer, budget: TokenBudget) -> None:
    """Refuse a budget that a resolution cannot follow.

    Raises:
        SaccadeError: if `reducer` works on smaller images and images are to share tokens.
    """
    if is_low_resolution(reducer) and (budget.per != "crop" or budget.adaptive):
        name = "adaptive=true" if budget.adaptive else f"budget={budget.per!r}"
        raise SaccadeError(
            f"{name}: reducer 'downsample' gives each image its size before any token is seen; "
            "use budget='crop' and adaptive=false with it"
        )


def lower_grid(height: int, width: int, keep: int, square: bool = False) -> tuple[int, int]:
    """Rows and columns of the largest grid of at most `keep` tokens (at least one) for a full one of `height x width`.

    One edge is the longest that keeps the aspect ratio, floor(sqrt(keep height / width)) or its counterpart, and the
    other is then the longest within the budget; of the two ways the one with more tokens is taken, and of equals the
    one with more columns. 24 x 24 tokens and a budget of 58 become 7 x 8: 56 tokens.

    Args:
        square: both edges the same, for models that take nothing else: 7 x 7 in the example.
    """
    keep = max(keep, 1)
    if square:
        edge = min(height, width, math.isqrt(keep))
        return edge, edge
    rows = min(height, keep, max(1, math.isqrt(keep * height // width)))
    columns = min(width, keep, max(1, math.isqrt(keep * width // height)))
    wide, tall = (rows, min(width, keep // rows)), (min(height, keep // columns), columns)
    return max(wide, tall, key=lambda grid: (grid[0] * grid[1], grid[1]))


def grid_places(full: tuple[int, int], lower: tuple[int, int]) -> list[int]:
    """For each token of a lower grid, in raster order, the place in the full one that its centre falls on: ascending.

    They are distinct, since centres lie at least one token of the full grid apart.
    """
    rows, columns = (
        [(2 * number + 1) * edge // (2 * count) for number in range(count)]
        for edge, count in zip(full, lower, strict=True)
    )
    return [row * full[1] + column for row in rows for column in columns]
