"""How many visual tokens a budget leaves, and who shares it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from saccade.errors import SaccadeError

UNITS = ("crop", "image", "sample")
PRUNE_RATIO = 0.9
"""The share of visual tokens to drop where neither a share nor a number is given."""


@dataclass(frozen=True)
class TokenBudget:
    """How many visual tokens to keep, and of what.

    Args:
        prune_ratio: share of a unit's tokens to drop, in [0, 1); 0 keeps all. `PRUNE_RATIO` where it and `keep_tokens`
            are None; None where the other is given.
        keep_tokens: number of tokens to keep of a unit, in place of the ratio. A unit that has fewer keeps them all.
        per: the unit. "crop" is a feature row: an image, or the crop, frame or picture that the model makes of it; a
            whole video, where the model has no row a frame (Qwen2-VL, Qwen2.5-VL).
            "image" is a `VisualContext.group`: the crops of an image, or the frames of a video, compete for the same
            tokens. "sample" is a `VisualContext.sample`: so do all images of a sample.
        adaptive: spend what the units of a batch have together where it is needed, see
            `saccade.pruning.adaptive_counts`.

    Raises:
        SaccadeError: on a value out of range, or a ratio and a number at once, naming them and the fix.
    """

    prune_ratio: float | None = None
    keep_tokens: int | None = None
    per: str = "crop"
    adaptive: bool = False

    def __post_init__(self) -> None:
        if self.prune_ratio is not None and self.keep_tokens is not None:
            raise SaccadeError(
                f"prune_ratio={self.prune_ratio!r} and keep_tokens={self.keep_tokens!r} both say how many visual "
                "tokens to keep: leave one of them out"
            )
        if self.keep_tokens is None:
            object.__setattr__(self, "prune_ratio", PRUNE_RATIO if self.prune_ratio is None else self.prune_ratio)
            check_prune_ratio(self.prune_ratio)
        whole = isinstance(self.keep_tokens, int) and not isinstance(self.keep_tokens, bool)
        if self.keep_tokens is not None and not (whole and self.keep_tokens >= 1):
            raise SaccadeError(
                f"keep_tokens={self.keep_tokens!r}: give a whole number from 1 on, or leave it out for prune_ratio"
            )
        if self.per not in UNITS:
            raise SaccadeError(f"budget={self.per!r} is unknown: use one of {', '.join(UNITS)}")
        if not isinstance(self.adaptive, bool):
            raise SaccadeError(f"adaptive={self.adaptive!r} is neither true nor false")

    @property
    def keeps_all(self) -> bool:
        """Whether nothing is dropped, whatever the unit has."""
        return self.prune_ratio == 0

    def count(self, num_tokens: int) -> int:
        """Tokens to keep of a unit of `num_tokens`, before `adaptive` moves any."""
        if self.keep_tokens is None:
            return keep_count(num_tokens, self.prune_ratio)
        return min(num_tokens, self.keep_tokens)


def check_prune_ratio(prune_ratio: float) -> float:
    """Return `prune_ratio` if it lies in [0, 1).

    Raises:
        SaccadeError: for any other value, NaN included.
    """
    if not isinstance(prune_ratio, (int, float)) or isinstance(prune_ratio, bool) or not 0 <= prune_ratio < 1:
        raise SaccadeError(
            f"prune_ratio={prune_ratio!r} is outside [0, 1): it is the share of visual tokens to drop, "
            "0.9 keeps a tenth, 0 keeps all"
        )
    return float(prune_ratio)


def keep_count(num_tokens: int, prune_ratio: float) -> int:
    """Number of tokens kept out of `num_tokens` at `prune_ratio`: round half up of (1 - p) * N, at least one.

    The product is rounded to nine decimals first, since `1 - 0.9` is slightly less than 0.1 and truncation would then
    keep 57 of 576 tokens instead of 58, and none at all of ten.

    Raises:
        SaccadeError: if `prune_ratio` is outside [0, 1).
    """
    share = 1 - check_prune_ratio(prune_ratio)
    return min(num_tokens, max(1, math.floor(round(share * num_tokens, 9) + 0.5)))


def share_out(total: int, weights: Sequence[float], limits: Sequence[int]) -> list[int]:
    """Share `total` things among holders in proportion to their weights, by largest remainder.

    Each holder gets at least one and at most its limit; one of limit 0 gets none. What a limit cuts off goes to the
    others, again in proportion. Of equal remainders, the first holder's is served first.

    Args:
        total: cut to what the limits hold, and raised to one a holder.
        weights: from 0 on; all are taken as equal where their sum is 0.
        limits: from 0 on.
    """
    shares = [min(1, limit) for limit in limits]
    left = min(total, sum(limits)) - sum(shares)
    # Shares are final once they reach a bound; what the others get then changes, so that one bound is settled a round.
    free = {number for number, limit in enumerate(limits) if limit > 1}
    exact: dict[int, float] = {}
    while left > 0 and free:
        pool = left + len(free)
        mass = sum(weights[number] for number in free)
        exact = {n: pool * (weights[n] / mass if mass > 0 else 1 / len(free)) for n in free}
        above = {n for n in free if exact[n] >= limits[n]}
        below = {n for n in free if exact[n] <= 1}
        # Whichever side binds harder is settled; settling both at once could overshoot.
        excess = sum(exact[n] - limits[n] for n in above)
        lack = sum(1 - exact[n] for n in below)
        settled = above if above and excess >= lack else below
        if not settled:
            break
        for number in settled:
            if settled is above:
                left -= limits[number] - 1
                shares[number] = limits[number]
        free -= settled
    if left <= 0 or not free:
        return shares
    for number in free:
        shares[number] = min(math.floor(exact[number]), limits[number])
    left -= sum(shares[number] - 1 for number in free)
    for number in sorted(free, key=lambda n: (math.floor(exact[n]) - exact[n], n)):
        if left > 0 and shares[number] < limits[number]:
            shares[number] += 1
            left -= 1
    return shares
