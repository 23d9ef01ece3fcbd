"""The mode of each optimizer step: a pure function of (seed, step), the same on every rank and after a resume."""

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass

from saccade.errors import SaccadeError

SCHEDULES = ("bernoulli", "stratified")
_BLOCK = 20


@dataclass(frozen=True)
class ModeSchedule:
    """The mode of each optimizer step.

    Args:
        seed: the run's seed.
        shares: the share of steps of each mode; they add up to 1. The first mode gets what the others leave.
        kind: "bernoulli" draws each step independently, as published. "stratified" gives every block of 20 steps its
            share of each mode, in random order, so that short runs do not depend on luck.

    Raises:
        SaccadeError: if a share is outside [0, 1], they do not add up to 1, or the kind is unknown.
    """

    seed: int
    shares: Mapping[str, float]
    kind: str = "bernoulli"

    def __post_init__(self) -> None:
        for name, share in self.shares.items():
            if not 0 <= share <= 1:
                raise SaccadeError(f"probability={share!r} of mode {name!r} is outside [0, 1]: it is a share of steps")
        total = sum(self.shares.values())
        if not math.isclose(total, 1, abs_tol=1e-6):
            raise SaccadeError(
                f"probability: those of the modes {', '.join(self.shares)} add up to {total:g}, not to 1"
            )
        if self.kind not in SCHEDULES:
            raise SaccadeError(f"schedule={self.kind!r} is unknown: use one of {', '.join(SCHEDULES)}")

    def mode(self, step: int) -> str:
        """The mode of optimizer step `step`, counted from 0."""
        first, *others = self.shares
        if any(share == 1 for share in self.shares.values()):
            return max(self.shares, key=self.shares.__getitem__)
        if self.kind == "bernoulli":
            draw = self._random(step).random()
            for name in others:
                draw -= self.shares[name]
                if draw < 0:
                    return name
            return first
        block, place = divmod(step, _BLOCK)
        return self._block(block).get(place, first)

    def count(self, steps: int) -> dict[str, int]:
        """How many of the first `steps` steps are in each mode."""
        counts = dict.fromkeys(self.shares, 0)
        for step in range(steps):
            counts[self.mode(step)] += 1
        return counts

    def _block(self, block: int) -> dict[int, str]:
        """The positions in a block of all modes but the first."""
        wanted: list[str] = []
        for number, name in enumerate(list(self.shares)[1:]):
            # Each mode's own offset decides in which blocks its fractional steps are rounded up.
            offset = self._random("offset" if number == 0 else f"offset {name}").random()
            before, after = (math.floor(n * _BLOCK * self.shares[name] + offset) for n in (block, block + 1))
            wanted += [name] * (after - before)
        # If the first mode is rare, rounding may request one step more than a block has.
        wanted = wanted[:_BLOCK]
        places = self._random(f"block {block}").sample(range(_BLOCK), len(wanted))
        return dict(zip(places, wanted, strict=True))

    def _random(self, key: object) -> random.Random:
        # Seeding with a string hashes it whole, so neighbouring steps and seeds do not correlate.
        return random.Random(f"saccade {self.seed} {key}")
