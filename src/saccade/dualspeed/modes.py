"""The modes of a run: what each of them does with the visual tokens, how often, and what it learns from.

The published run has two, fast and slow. `DualSpeedConfig.modes` lists any number of them.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from saccade.errors import SaccadeError, did_you_mean
from saccade.reducers import check_resolution_budget, get_reducer
from saccade.skip_vision import SkipVisionConfig
from saccade.tokens import TokenBudget

ACTIONS = ("keep", "drop", "skip")
NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True)
class Mode:
    """One speed of a run.

    Args:
        name: how the log calls it.
        probability: its share of steps.
        action: what happens to the visual tokens that the reducer does not keep. "drop" removes them (DualSpeed's fast
            mode), "skip" lets them skip the feed-forward networks (Skip-Vision); "keep" asks no reducer and keeps all.
        reducer: method that chooses the kept ones.
        reducer_options: its keyword options.
        budget: how many it keeps.
        isolator: whether the mode isolator stands before each image; in "drop" only, for in "skip" the summary tokens
            mark the difference.
        teacher: the mode that it learns from besides the labels, or None.
        skip_vision: the options of a "skip".

    Raises:
        SaccadeError: on a value outside its range, naming the field and the fix.
    """

    name: str
    probability: float
    action: str = "drop"
    reducer: str = "divprune"
    reducer_options: Mapping[str, Any] = field(default_factory=dict)
    budget: TokenBudget = field(default_factory=TokenBudget)
    isolator: bool = False
    teacher: str | None = None
    skip_vision: SkipVisionConfig | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not NAME.fullmatch(self.name):
            raise SaccadeError(f"modes: name={self.name!r}: use lower-case letters, digits and _, such as 'fast'")
        if isinstance(self.probability, bool) or not isinstance(self.probability, (int, float)):
            raise SaccadeError(f"modes: probability={self.probability!r} of mode {self.name!r} is no number")
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
        if self.action == "drop":
            check_resolution_budget(get_reducer(self.reducer, **self.reducer_options), self.budget)

    @property
    def needs(self) -> frozenset[str]:
        """What an encoding must offer beyond the features for this mode to choose, or to merge, tokens."""
        if self.action == "keep":
            return frozenset()
        if self.action == "drop":
            return frozenset(get_reducer(self.reducer, **self.reducer_options).needs)
        split = self.skip_vision.split_reducer()
        return self.skip_vision.merge_needs | (frozenset() if split is None else frozenset(split.needs))

    @property
    def keeps_all(self) -> bool:
        """Whether the mode is the stock model on its whole sequence."""
        return self.action == "keep" or (self.action == "drop" and self.budget.keeps_all and not self.isolator)


def fast_and_slow(
    *,
    slow_probability: float,
    distill: bool,
    reducer: str,
    reducer_options: Mapping[str, Any],
    budget: TokenBudget,
    isolator: bool,
    skip_vision: SkipVisionConfig | None,
    skip_mode: str,
) -> tuple[Mode, ...]:
    """The modes of the fast-slow recipe: the published two or, with `skip_vision`, one of them with a skip in it."""
    if not 0 <= slow_probability <= 1:
        raise SaccadeError(
            f"slow_probability={slow_probability!r} is outside [0, 1]: it is the share of steps on all tokens"
        )
    common = {"reducer": reducer, "reducer_options": reducer_options, "budget": budget}
    if skip_vision is not None:
        skipping = skip_by_reducer(skip_vision, reducer, reducer_options, budget)
    fast = Mode("fast", 1 - slow_probability, isolator=isolator, **common)
    slow = Mode("slow", slow_probability, "keep", teacher="fast" if distill else None)
    if skip_vision is not None and skip_mode == "fast":
        fast = Mode("fast", 1 - slow_probability, "skip", **common, skip_vision=skipping)
    elif skip_vision is not None:
        slow = replace(slow, action="skip", **common, skip_vision=skipping)
    return fast, slow


def listed(modes: Sequence[Mapping[str, Any]], base: Mode, skip_vision: SkipVisionConfig | None) -> tuple[Mode, ...]:
    """The modes of a configuration that lists them.

    Args:
        modes: one mapping a mode: `name`, `probability`, and perhaps `action`, `reducer`, `reducer_options`,
            `prune_ratio`, `keep_tokens`, `isolator`, `teacher`.
        base: where what a mapping leaves out comes from.
        skip_vision: options of the modes that skip; the defaults when None.

    Raises:
        SaccadeError: on anything that makes no list of modes.
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
                f"modes: teacher={mode.teacher!r} of mode {mode.name!r} is no other mode: use one of {others}"
            )
    return made


def _one(values: Mapping[str, Any], base: Mode, skip_vision: SkipVisionConfig | None) -> Mode:
    if not isinstance(values, Mapping):
        raise SaccadeError(f"modes: {values!r} is no mapping: write name, probability and action of each mode")
    own = {entry.name for entry in fields(Mode)} - {"budget", "skip_vision"}
    known = own | {"prune_ratio", "keep_tokens"}
    for name in values:
        if name not in known:
            hint = did_you_mean(str(name), known, f"use {', '.join(sorted(known))}")
            raise SaccadeError(f"modes: unknown field {name!r}: {hint}")
    for name in ("name", "probability"):
        if name not in values:
            raise SaccadeError(f"modes: {dict(values)!r} has no {name!r}: every mode needs one")
    given = dict(values)
    budget = {name: given.pop(name, None) for name in ("prune_ratio", "keep_tokens")}
    settings = {"reducer": base.reducer, "reducer_options": base.reducer_options, **given}
    if given.get("reducer", base.reducer) != base.reducer and "reducer_options" not in given:
        settings["reducer_options"] = {}
    # A ratio of its own is meant where the run counts in tokens otherwise, and the other way round.
    own_budget = any(value is not None for value in budget.values())
    settings["budget"] = replace(base.budget, **budget) if own_budget else base.budget
    settings.setdefault("isolator", base.isolator and given.get("action", "drop") == "drop")
    mode = Mode(**settings)
    if mode.action != "skip":
        return mode
    options = skip_by_reducer(skip_vision or SkipVisionConfig(), mode.reducer, mode.reducer_options, mode.budget)
    return replace(mode, skip_vision=options)


def skip_by_reducer(
    options: SkipVisionConfig, reducer: str, reducer_options: Mapping[str, Any], budget: TokenBudget
) -> SkipVisionConfig:
    """`options`, with the tokens that `reducer` keeps as the retained ones and all others skipped as they are.

    Raises:
        SaccadeError: for a budget that is no share or number of each image.
    """
    if budget.per != "crop" or budget.adaptive:
        raise SaccadeError(
            f"budget={budget.per!r}, adaptive={budget.adaptive!r}: a mode that skips keeps a share of each image; "
            "leave them at 'crop' and false"
        )
    retained = budget.keep_tokens if budget.keep_tokens is not None else 1 - budget.prune_ratio
    return replace(
        options,
        split=reducer,
        split_options=dict(reducer_options),
        retained=retained,
        skipped=None,
        merge="none",
        summary_pool="all",
    )
