"""The modes of a run: what each does with the visual tokens, how often it occurs, and what it learns from.

The published method has two, fast and slow. `DualSpeedConfig.modes` lists any number of them.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from saccade.errors import SaccadeError, did_you_mean
from saccade.reducers import Needs, PruningConfig
from saccade.skip_vision import SkipVisionConfig

ACTIONS = ("keep", "drop", "skip")
NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True)
class Mode:
    """One speed of a run.

    Args:
        name: its name in the log.
        probability: its share of steps.
        action: what happens to the visual tokens that the reducer does not keep. "drop" removes them (DualSpeed's fast
            mode), "skip" lets them skip the feed-forward networks (Skip-Vision); "keep" uses no reducer and keeps all
            tokens.
        pruning: how the kept tokens are chosen, and how many.
        isolator: whether the mode isolator is put before each image; only for "drop", since with "skip" the summary
            tokens mark the mode.
        teacher: the mode that it learns from besides the labels, or None.
        skip_vision: the options of a "skip".

    Raises:
        SaccadeError: if a value is out of range; the message names the field and the fix.
    """

    name: str
    probability: float
    action: str = "drop"
    pruning: PruningConfig = field(default_factory=PruningConfig)
    isolator: bool = False
    teacher: str | None = None
    skip_vision: SkipVisionConfig | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not NAME.fullmatch(self.name):
            raise SaccadeError(f"modes: name={self.name!r}: use lower-case letters, digits and _, such as 'fast'")
        if isinstance(self.probability, bool) or not isinstance(self.probability, (int, float)):
            raise SaccadeError(f"modes: probability={self.probability!r} of mode {self.name!r} is not a number")
        if self.action not in ACTIONS:
            raise SaccadeError(
                f"modes: action={self.action!r} of mode {self.name!r} is unknown: use one of {', '.join(ACTIONS)}"
            )
        if not isinstance(self.isolator, bool):
            raise SaccadeError(f"modes: isolator={self.isolator!r} of mode {self.name!r}: use true or false")
        if self.isolator and self.action != "drop":
            raise SaccadeError(
                f"modes: isolator=True of mode {self.name!r}, whose action is {self.action!r}: only a mode that drops "
                "tokens has one"
            )

    @property
    def needs(self) -> Needs:
        """What the encoding must provide beyond the features for this mode to select or merge tokens."""
        if self.action == "keep":
            return Needs()
        return self.pruning.needs if self.action == "drop" else self.skip_vision.needs

    @property
    def keeps_all(self) -> bool:
        """Whether the mode runs the stock model on the full sequence, or on as much of it as fits."""
        return self.action == "keep" or (self.action == "drop" and self.pruning.prune_ratio == 0 and not self.isolator)


def fast_and_slow(
    *,
    slow_probability: float,
    distill: bool,
    pruning: PruningConfig,
    isolator: bool,
    skip_vision: SkipVisionConfig | None,
    skip_mode: str,
) -> tuple[Mode, ...]:
    """The modes of fast-slow training: the published two or, with `skip_vision`, one of them with skipping."""
    if not 0 <= slow_probability <= 1:
        raise SaccadeError(
            f"slow_probability={slow_probability!r} is outside [0, 1]: it is the share of steps on all tokens"
        )
    skipping = None if skip_vision is None else skip_by_reducer(skip_vision, pruning)
    fast = Mode("fast", 1 - slow_probability, pruning=pruning, isolator=isolator)
    slow = Mode("slow", slow_probability, "keep", teacher="fast" if distill else None)
    if skip_vision is not None and skip_mode == "fast":
        fast = replace(fast, action="skip", isolator=False, skip_vision=skipping)
    elif skip_vision is not None:
        slow = replace(slow, action="skip", pruning=pruning, skip_vision=skipping)
    return fast, slow


def listed(modes: Sequence[Mapping[str, Any]], base: Mode, skip_vision: SkipVisionConfig | None) -> tuple[Mode, ...]:
    """The modes of a configuration that lists them.

    Args:
        modes: one mapping per mode: `name`, `probability`, and optionally `action`, `isolator`, `teacher` and options
            of [`PruningConfig`].
        base: provides the values that a mapping omits.
        skip_vision: options of the modes that skip; the defaults if None.

    Raises:
        SaccadeError: if this is not a valid list of modes.
    """
    if isinstance(modes, (str, Mapping)) or not isinstance(modes, Sequence) or not modes:
        raise SaccadeError(f"modes={modes!r}: give a list of mappings, such as {{name: fast, probability: 0.9}}")
    made = tuple(_one(values, base, skip_vision) for values in modes)
    names = [mode.name for mode in made]
    for name in names:
        if names.count(name) > 1:
            raise SaccadeError(f"modes: two of them have name={name!r}: give each its own")
    for mode in made:
        if mode.teacher is not None and (mode.teacher not in names or mode.teacher == mode.name):
            others = ", ".join(name for name in names if name != mode.name) or "none: add another mode"
            raise SaccadeError(
                f"modes: teacher={mode.teacher!r} of mode {mode.name!r} is not another mode: use one of {others}"
            )
    return made


def _one(values: Mapping[str, Any], base: Mode, skip_vision: SkipVisionConfig | None) -> Mode:
    if not isinstance(values, Mapping):
        raise SaccadeError(f"modes: {values!r} is not a mapping: write name, probability and action of each mode")
    options = {entry.name for entry in fields(PruningConfig)} - {"isolator"}
    known = {entry.name for entry in fields(Mode)} - {"pruning", "skip_vision"} | options
    for name in values:
        if name not in known:
            hint = did_you_mean(str(name), known, f"use {', '.join(sorted(known))}")
            raise SaccadeError(f"modes: unknown field {name!r}: {hint}")
    for name in ("name", "probability"):
        if name not in values:
            raise SaccadeError(f"modes: {dict(values)!r} has no {name!r}: every mode needs one")
    given = {name: value for name, value in values.items() if name not in options}
    pruning = base.pruning.replace(**{name: value for name, value in values.items() if name in options})
    isolator = given.pop("isolator", base.isolator and given.get("action", "drop") == "drop")
    mode = Mode(**given, pruning=pruning, isolator=isolator)
    if mode.action != "skip":
        return mode
    return replace(mode, skip_vision=skip_by_reducer(skip_vision or SkipVisionConfig(), pruning))


def skip_by_reducer(options: SkipVisionConfig, pruning: PruningConfig) -> SkipVisionConfig:
    """`options`, with the tokens that a reducer keeps as retained tokens and all others skipped unmerged.

    Raises:
        SaccadeError: if the budget is not a share or number per image, or if the length of samples is limited.
    """
    if pruning.fit_length is not None:
        raise SaccadeError(
            f"fit_length={pruning.fit_length}: a mode that skips runs on all visual tokens; leave it out there"
        )
    if pruning.budget != "crop" or pruning.adaptive:
        raise SaccadeError(
            f"budget={pruning.budget!r}, adaptive={pruning.adaptive!r}: a mode that skips keeps a share of each "
            "image; leave them at 'crop' and false"
        )
    return replace(
        options,
        split=pruning.reducer,
        split_options=dict(pruning.reducer_options),
        retained=1 - pruning.prune_ratio if pruning.keep_tokens is None else pruning.keep_tokens,
        skipped=None,
        merge="none",
    )
