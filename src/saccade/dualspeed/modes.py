"""The modes of a run: what each does with the visual tokens, how often and when it occurs, and what it learns from.

The published method has two, fast and slow. `DualSpeedConfig.modes` lists any number of them.
"""

import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import accumulate
from typing import Any

from saccade.errors import SaccadeError, did_you_mean, one_of
from saccade.reducers import Needs, PruningConfig
from saccade.reducers.config import PRUNING_OPTIONS
from saccade.skip_vision import SkipVisionConfig
from saccade.values import check_choice

ACTIONS = ("keep", "drop", "skip")
NAME = re.compile(r"[a-z][a-z0-9_]*")
SCHEDULES = ("bernoulli", "stratified", "sequential")
RATIO_SCHEDULES = ("constant", "linear", "random")
_BLOCK = 20


@dataclass(frozen=True)
class ModeConfig:
    """One speed of a run.

    Args:
        name (`str`):
            Its name in the log: lower-case letters, digits and _.
        probability (`float`):
            Its share of the steps; the shares of a run add up to 1.
        action (`str`, *optional*, defaults to `"drop"`):
            What happens to the visual tokens that the reducer does not keep. `"drop"` removes them, as in DualSpeed's
            fast steps; `"skip"` lets them skip the feed-forward networks, as in Skip-Vision. `"keep"` keeps them all.
        pruning ([`PruningConfig`], *optional*):
            How the kept tokens are chosen, and how many; the run's own by default. Without `isolator`, since the run
            trains its own. Not with `"keep"`.
        isolator (`bool`, *optional*):
            Whether the mode isolator is put before each image; only for `"drop"`, where it is by default, unless the
            run has none.
        teacher (`str`, *optional*):
            Name of the mode that it learns from in addition to the labels, weighted by `distill_weight`.
        skip_vision ([`SkipVisionConfig`], *optional*):
            The options of a `"skip"`, instead of `pruning`. By default those of the run, with the tokens that
            `pruning` keeps as the retained ones.
        ratio_schedule (`str`, *optional*):
            How the ratio of a mode that drops changes between steps: `"constant"`, `"linear"` or `"random"`, see
            [`DualSpeedConfig`]; the run's own by default.
        prune_ratio_start (`float`, *optional*):
            Where such a ratio starts, or the other end of its range; the run's own by default.

    Raises:
        SaccadeError: if a value is out of range, or two do not go together; the message names the field and the fix.
    """

    name: str
    probability: float
    action: str = "drop"
    pruning: PruningConfig | None = None
    isolator: bool | None = None
    teacher: str | None = None
    skip_vision: SkipVisionConfig | None = None
    ratio_schedule: str | None = None
    prune_ratio_start: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not NAME.fullmatch(self.name):
            raise SaccadeError(f"modes: name={self.name!r}: use lower-case letters, digits and _, such as 'fast'")
        of = f"of mode {self.name!r}"
        if isinstance(self.probability, bool) or not isinstance(self.probability, (int, float)):
            raise SaccadeError(f"modes: probability={self.probability!r} {of} is not a number")
        if self.action not in ACTIONS:
            raise SaccadeError(f"modes: action={self.action!r} {of} is unknown: {one_of(self.action, ACTIONS)}")
        for name, kind in (("pruning", PruningConfig), ("skip_vision", SkipVisionConfig)):
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise SaccadeError(f"modes: {name}={value!r} {of} is not a {kind.__name__}")
        if self.isolator is not None and not isinstance(self.isolator, bool):
            raise SaccadeError(f"modes: isolator={self.isolator!r} {of}: use true or false")
        if self.isolator and self.action != "drop":
            raise SaccadeError(
                f"modes: isolator=True {of}, whose action is {self.action!r}: only a mode that drops tokens has one"
            )
        if self.pruning is not None and self.action == "keep":
            raise SaccadeError(
                f"modes: {of[3:]} keeps all tokens, so options of pruning change nothing: leave them out"
            )
        if self.pruning is not None and self.pruning.isolator is not None:
            raise SaccadeError(
                f"modes: pruning.isolator={self.pruning.isolator!r} {of}: a run trains its own isolator, leave it out"
            )
        if self.skip_vision is not None and self.action != "skip":
            raise SaccadeError(f"modes: skip_vision {of}, whose action is {self.action!r}: only 'skip' takes it")
        if self.skip_vision is not None and self.pruning is not None:
            raise SaccadeError(
                f"modes: skip_vision and pruning {of} both say which tokens stay: leave one of them out"
            )
        if self.action != "drop" and (self.ratio_schedule or "constant", self.prune_ratio_start) != ("constant", None):
            raise SaccadeError(
                f"modes: ratio_schedule and prune_ratio_start {of}, whose action is {self.action!r}: only a mode that "
                "drops tokens has a ratio that changes"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], pruning: PruningConfig) -> "ModeConfig":
        """A mode as recipes write it: the fields of this class, but `pruning` by its options, such as `prune_ratio`.

        Args:
            pruning: provides the options that are left out.

        Raises:
            SaccadeError: on an unknown field, one that is missing, or a value out of range.
        """
        if not isinstance(values, Mapping):
            raise SaccadeError(f"modes: {values!r} is not a mapping: write name, probability and action of each mode")
        known = {entry.name for entry in fields(cls)} - {"pruning"} | {*PRUNING_OPTIONS}
        for name in values:
            if name not in known:
                hint = did_you_mean(str(name), known, f"use {', '.join(sorted(known))}")
                raise SaccadeError(f"modes: unknown field {name!r}: {hint}")
        for name in ("name", "probability"):
            if name not in values:
                raise SaccadeError(f"modes: {dict(values)!r} has no {name!r}: every mode needs one")
        given = {name: value for name, value in values.items() if name not in PRUNING_OPTIONS}
        if given.get("skip_vision") is not None:
            given["skip_vision"] = SkipVisionConfig.from_options(given["skip_vision"])
        changes = {name: value for name, value in values.items() if name in PRUNING_OPTIONS}
        return cls(**given, pruning=pruning.replace(**changes) if changes else None)

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` reads as this mode, as plain values."""
        values = asdict(self)
        options = values.pop("pruning") or {}
        options.pop("isolator", None)
        return {**{name: value for name, value in values.items() if value is not None}, **options}

    def with_defaults(
        self,
        pruning: PruningConfig,
        isolator: bool,
        skip_vision: SkipVisionConfig | None,
        ratio_schedule: str,
        prune_ratio_start: float | None,
    ) -> "ModeConfig":
        """The mode with what it leaves out taken from the run: one that drops then has `pruning` and `ratio_schedule`,
        and one that skips has `skip_vision` instead.
        """
        if self.action == "keep":
            return replace(self, isolator=False)
        own = self.pruning or pruning
        if self.action == "drop":
            kind = self.ratio_schedule or ratio_schedule
            start = self.prune_ratio_start
            if start is None and self.ratio_schedule != "constant":
                start = prune_ratio_start
            _check_ratios(self.name, kind, start, own)
            isolator = isolator if self.isolator is None else self.isolator
            return replace(self, pruning=own, isolator=isolator, ratio_schedule=kind, prune_ratio_start=start)
        options = self.skip_vision or skip_by_reducer(skip_vision or SkipVisionConfig(), own)
        return replace(self, pruning=None, isolator=False, skip_vision=options)

    @property
    def ratio_changes(self) -> bool:
        """Whether the ratio of the mode differs between steps."""
        return self.ratio_schedule not in (None, "constant")

    def pruning_at(self, seed: int, step: int, steps: int) -> PruningConfig:
        """How the mode reduces in optimizer step `step` of `steps`: a pure function, the same on every rank."""
        if self.ratio_schedule == "linear":
            return self._between(step / max(1, steps - 1))
        if self.ratio_schedule == "random":
            return self._between(_random(seed, f"ratio {self.name} {step}").random())
        return self.pruning

    @property
    def mean_pruning(self) -> PruningConfig:
        """How the mode reduces in the mean over the steps of a run."""
        return self._between(0.5) if self.ratio_changes else self.pruning

    @property
    def mildest_pruning(self) -> PruningConfig:
        """How the mode reduces in the step in which it keeps most."""
        milder = self.ratio_changes and self.prune_ratio_start < self.pruning.prune_ratio
        return self._between(0) if milder else self.pruning

    def _between(self, share: float) -> PruningConfig:
        start, end = self.prune_ratio_start, self.pruning.prune_ratio
        return self.pruning.replace(prune_ratio=start + share * (end - start))

    @property
    def needs(self) -> Needs:
        """What the encoding must provide beyond the features for this mode to select or merge tokens."""
        if self.action == "keep":
            return Needs()
        return self.pruning.needs if self.action == "drop" else self.skip_vision.needs

    @property
    def patch_tolerance(self) -> float | None:
        """What the mode drops before the vision tower, see [`PruningConfig`]."""
        return self.pruning.patch_tolerance if self.action == "drop" else None

    @property
    def keeps_all(self) -> bool:
        """Whether the mode runs the stock model on the full sequence, or on as much of it as fits."""
        if self.action != "drop":
            return self.action == "keep"
        return self.pruning.keeps_fitting and not self.isolator and self.patch_tolerance is None


def _check_ratios(name: str, kind: str, start: float | None, pruning: PruningConfig) -> None:
    """Check how the ratio of a mode changes."""
    check_choice("ratio_schedule", kind, RATIO_SCHEDULES)
    of = f"prune_ratio_start={start!r} of mode {name!r}"
    if kind == "constant":
        if start is not None:
            raise SaccadeError(f"{of}, whose ratio is constant: set ratio_schedule to 'linear' or 'random'")
        return
    if start is None:
        raise SaccadeError(f"ratio_schedule={kind!r} of mode {name!r} has no other end: set prune_ratio_start")
    if isinstance(start, bool) or not isinstance(start, (int, float)) or not 0 <= start < 1:
        raise SaccadeError(f"{of} is outside [0, 1): it is the share of visual tokens to drop")
    if not pruning.prune_ratio:
        raise SaccadeError(f"{of} has no ratio to lead to: set prune_ratio above 0, and leave out keep_tokens")


def fast_and_slow(slow_probability: float, distill: bool, skips: str | None) -> list[ModeConfig]:
    """The modes of fast-slow training: the published two or, if one `skips`, with skipping in that one."""
    if not 0 <= slow_probability <= 1:
        raise SaccadeError(
            f"slow_probability={slow_probability!r} is outside [0, 1]: it is the share of steps on all tokens"
        )
    fast = ModeConfig("fast", 1 - slow_probability, "skip" if skips == "fast" else "drop")
    slow = ModeConfig(
        "slow", slow_probability, "skip" if skips == "slow" else "keep", teacher="fast" if distill else None
    )
    return [fast, slow]


def listed(modes: Sequence[ModeConfig | Mapping[str, Any]], pruning: PruningConfig) -> list[ModeConfig]:
    """The modes of a run that lists them."""
    if not modes:
        raise SaccadeError(f"modes={modes!r}: give a list of modes, such as {{name: fast, probability: 0.9}}")
    given = [mode if isinstance(mode, ModeConfig) else ModeConfig.from_dict(mode, pruning) for mode in modes]
    names = [mode.name for mode in given]
    for name in names:
        if names.count(name) > 1:
            raise SaccadeError(f"modes: two of them have name={name!r}: give each its own")
    for mode in given:
        if mode.teacher is not None and (mode.teacher not in names or mode.teacher == mode.name):
            others = ", ".join(name for name in names if name != mode.name) or "none: add another mode"
            raise SaccadeError(
                f"modes: teacher={mode.teacher!r} of mode {mode.name!r} is not another mode: use one of {others}"
            )
    return given


def skip_by_reducer(options: SkipVisionConfig, pruning: PruningConfig) -> SkipVisionConfig:
    """`options`, with the tokens that a reducer keeps as retained tokens and all others skipped unmerged."""
    for name in ("fit_length", "patch_tolerance", "budget", "adaptive"):
        value = getattr(pruning, name)
        if value != getattr(PruningConfig, name):
            raise SaccadeError(
                f"{name}={value!r}: a mode that skips runs on all visual tokens, and retains a share of each image; "
                "leave it out there"
            )
    return replace(
        options,
        split=pruning.reducer,
        split_options=dict(pruning.reducer_options),
        retained=1 - pruning.prune_ratio if pruning.keep_tokens is None else pruning.keep_tokens,
        skipped=None,
        merge="none",
    )


@dataclass(frozen=True)
class ModeSchedule:
    """The mode of each optimizer step: a pure function of (seed, step), the same on every rank and after a resume.

    Args:
        seed: the run's seed.
        shares: the share of steps of each mode; they add up to 1. The first mode gets what the others leave.
        kind: "bernoulli" draws each step independently, as published. "stratified" gives every block of 20 steps its
            share of each mode, in random order, so that short runs do not depend on luck. "sequential" has the modes
            one after the other, in their order: slow steps at the end.

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
        check_choice("schedule", self.kind, SCHEDULES)

    def mode(self, step: int, steps: int | None = None) -> str:
        """The mode of optimizer step `step`, counted from 0, of a run of so many `steps`.

        Raises:
            ValueError: for "sequential" modes, if the number of steps is not given.
        """
        first, *others = self.shares
        if any(share == 1 for share in self.shares.values()):
            return max(self.shares, key=self.shares.__getitem__)
        if self.kind == "bernoulli":
            draw = _random(self.seed, step).random()
            for name in others:
                draw -= self.shares[name]
                if draw < 0:
                    return name
            return first
        if self.kind == "sequential":
            if steps is None:
                raise ValueError("sequential modes depend on the number of steps")
            passed = accumulate(self.shares.values())
            # The rounding keeps sums of decimal shares from ending a step early.
            ends = {name: round(end * steps, 6) for name, end in zip(self.shares, passed, strict=True)}
            last = [name for name, share in self.shares.items() if share][-1]
            return next((name for name, end in ends.items() if step < end), last)
        block, place = divmod(step, _BLOCK)
        return self._block(block).get(place, first)

    def count(self, done: int, steps: int | None = None) -> dict[str, int]:
        """How many of the first steps, `done` of a run of `steps`, are in each mode; by default of all."""
        counts = dict.fromkeys(self.shares, 0)
        for step in range(done):
            counts[self.mode(step, done if steps is None else steps)] += 1
        return counts

    def _block(self, block: int) -> dict[int, str]:
        """The positions in a block of all modes but the first."""
        wanted: list[str] = []
        for number, name in enumerate(list(self.shares)[1:]):
            # Each mode's own offset decides in which blocks its fractional steps are rounded up.
            offset = _random(self.seed, "offset" if number == 0 else f"offset {name}").random()
            before, after = (math.floor(n * _BLOCK * self.shares[name] + offset) for n in (block, block + 1))
            wanted += [name] * (after - before)
        # If the first mode is rare, rounding may request one step more than a block has.
        wanted = wanted[:_BLOCK]
        places = _random(self.seed, f"block {block}").sample(range(_BLOCK), len(wanted))
        return dict(zip(places, wanted, strict=True))


def _random(seed: int, key: object) -> random.Random:
    # Seeding with a string hashes it whole, so neighbouring steps and seeds do not correlate.
    return random.Random(f"saccade {seed} {key}")
