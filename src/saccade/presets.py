"""Named settings of the fast-slow recipe that differ from the published one."""

from collections.abc import Mapping
from typing import Any

from saccade.errors import SaccadeError
from saccade.values import check_choice

PRESETS: dict[str, dict[str, Any]] = {
    "fast_then_slow": {
        "schedule": "sequential",
        "distill_weight": 0.0,
        "isolator_length": 0,
        # A cosine to zero would leave nothing for the last steps to learn with.
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.3},
    },
}
"""The fields in which each differs: docs/modes.md says what it does, docs/testbed.md what it reaches."""


def with_preset(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields with those of the preset that they name, if they name one, in the place of its name. Other fields win.

    Raises:
        SaccadeError: if there is no such preset, or if another schedule of the learning rate would get its arguments.
    """
    values = dict(values)
    name = values.pop("preset", None)
    if name is None:
        return values
    check_choice("preset", name, list(PRESETS))
    fields = PRESETS[name]
    scheduler = values.get("lr_scheduler_type", fields["lr_scheduler_type"])
    if scheduler != fields["lr_scheduler_type"] and "lr_scheduler_kwargs" not in values:
        raise SaccadeError(
            f"lr_scheduler_type={scheduler!r} is not that of preset={name!r}, {fields['lr_scheduler_type']!r}: leave "
            "it out, or give lr_scheduler_kwargs too (null for none)"
        )
    return {**fields, **values}
