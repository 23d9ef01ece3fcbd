"""How many visual tokens a ratio keeps, and how a number of tokens is shared among several holders."""

import math
from collections.abc import Sequence

from saccade.values import check_prune_ratio


def keep_count(num_tokens: int, prune_ratio: float) -> int:
    """Number of tokens kept out of `num_tokens` at `prune_ratio`: round half up of (1 - p) * N, at least one.

    The product is rounded to nine decimals first, since `1 - 0.9` is slightly less than 0.1, and truncation would then
    keep 57 of 576 tokens instead of 58, and none of ten.

    Raises:
        SaccadeError: if `prune_ratio` is outside [0, 1).
    """
    share = 1 - check_prune_ratio(prune_ratio)
    return min(num_tokens, max(1, math.floor(round(share * num_tokens, 9) + 0.5)))


def share_out(total: int, weights: Sequence[float], limits: Sequence[int]) -> list[int]:
    """Share `total` items among holders in proportion to their weights, by largest remainder.

    Each holder gets at least one and at most its limit; a holder with limit 0 gets none. What a limit cuts off goes to
    the others, again in proportion. Among equal remainders, the first holder's is served first.

    Args:
        total: clamped to at least one per holder and at most the sum of the limits.
        weights: non-negative; treated as equal if their sum is 0.
        limits: non-negative.
    """
    shares = [min(1, limit) for limit in limits]
    left = min(total, sum(limits)) - sum(shares)
    # A share is final once it reaches a bound. That changes the other shares, so each round settles one kind of bound.
    free = {number for number, limit in enumerate(limits) if limit > 1}
    exact: dict[int, float] = {}
    while left > 0 and free:
        pool = left + len(free)
        mass = sum(weights[number] for number in free)
        exact = {n: pool * (weights[n] / mass if mass > 0 else 1 / len(free)) for n in free}
        above = {n for n in free if exact[n] >= limits[n]}
        below = {n for n in free if exact[n] <= 1}
        # The side that binds harder is settled first; settling both at once could overshoot.
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
