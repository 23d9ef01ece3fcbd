"""How many visual tokens a prune ratio leaves."""

import math

from saccade.errors import SaccadeError


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
