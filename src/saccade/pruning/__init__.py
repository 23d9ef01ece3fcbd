"""From a processed batch to its shorter form, for training and for inference."""

from saccade.pruning.adaptive import adaptive_counts, token_need
from saccade.pruning.isolator import ISOLATOR_FILE, ModeIsolator
from saccade.pruning.prune_inputs import prune_inputs
from saccade.pruning.shorten import (
    POSITIONS,
    Shortened,
    check_newlines,
    check_positions,
    keep_budget,
    reduce,
    reduced_features,
    shorten,
)

__all__ = [
    "ISOLATOR_FILE",
    "POSITIONS",
    "ModeIsolator",
    "Shortened",
    "adaptive_counts",
    "check_newlines",
    "check_positions",
    "keep_budget",
    "prune_inputs",
    "reduce",
    "reduced_features",
    "shorten",
    "token_need",
]
