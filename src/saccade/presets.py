"""Named settings of the fast-slow recipe that differ from the published one."""

from collections.abc import Mapping
from typing import Any

from saccade.values import check_choice

_FAST_THEN_SLOW: dict[str, Any] = {
    "schedule": "sequential",
    "distill_weight": 0.0,
    "isolator_length": 0,
    # A cosine to zero would leave nothing for the last steps to learn with.
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr_rate": 0.3},
}
PRESETS: dict[str, dict[str, Any]] = {
    "fast_then_slow": _FAST_THEN_SLOW,
    "fast_then_few_slow": {**_FAST_THEN_SLOW, "positions": "original", "slow_probability": 0.03},
}
"""The fields in which each differs: docs/modes.md says what it does, docs/testbed-results.md what it reaches."""


def with_preset(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields with those of the preset that they name, if they name one, in the place of its name. Other fields win.

    Raises:
        SaccadeError: if there is no such preset.
    """
    values = dict(values)
    name = values.pop("preset", None)
    if name is None:
        return values
    check_choice("preset", name, list(PRESETS))
    return {**PRESETS[name], **values}
