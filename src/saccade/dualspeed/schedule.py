"""Which optimizer steps are slow: a pure function of (seed, step), the same on every rank and after a resume."""

import math
import random
from dataclasses import dataclass
from typing import Literal

from saccade.errors import SaccadeError

Mode = Literal["fast", "slow"]
SCHEDULES = ("bernoulli", "stratified")
_BLOCK = 20


@dataclass(frozen=True)
class ModeSchedule:
    """The mode of each optimizer step.

    Args:
        seed: the run's seed.
        slow_probability: r, the share of slow steps, in [0, 1].
        kind: "bernoulli" draws each step on its own, as published. "stratified" gives every block of 20 steps its
            share of slow ones, in random places, so that short runs do not depend on the luck of the draw.

    Raises:
        SaccadeError: on a probability outside [0, 1] or an unknown kind.
    """

    seed: int
    slow_probability: float
    kind: str = "bernoulli"

    def __post_init__(self) -> None:
        if not 0 <= self.slow_probability <= 1:
            raise SaccadeError(
                f"slow_probability={self.slow_probability!r} is outside [0, 1]: it is the share of steps on all tokens"
            )
        if self.kind not in SCHEDULES:
            raise SaccadeError(f"schedule={self.kind!r} is unknown: use one of {', '.join(SCHEDULES)}")

    def mode(self, step: int) -> Mode:
        """The mode of optimizer step `step`, counted from 0."""
        return "slow" if self._is_slow(step) else "fast"

    def count(self, steps: int) -> dict[Mode, int]:
        """How many of the first `steps` steps are fast and slow."""
        slow = sum(self._is_slow(step) for step in range(steps))
        return {"fast": steps - slow, "slow": slow}

    def _is_slow(self, step: int) -> bool:
        if self.slow_probability in (0, 1):
            return self.slow_probability == 1
        if self.kind == "bernoulli":
            return self._random(step).random() < self.slow_probability
        block, place = divmod(step, _BLOCK)
        offset = self._random("offset").random()

        def slow_before(blocks: int) -> int:
            return math.floor(blocks * _BLOCK * self.slow_probability + offset)

        count = slow_before(block + 1) - slow_before(block)
        return place in self._random(f"block {block}").sample(range(_BLOCK), count)

    def _random(self, key: object) -> random.Random:
        # Seeding with a string hashes it whole, so neighbouring steps and seeds do not correlate.
        return random.Random(f"saccade {self.seed} {key}")
