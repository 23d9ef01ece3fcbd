"""Shorten a processed batch, for training and for inference: encode, reduce, splice, run."""

from saccade.pruning.apply import Pruning, apply_pruning
from saccade.pruning.isolator import ISOLATOR_FILE, ModeIsolator
from saccade.pruning.prune import Method, ModeInputs, prune
from saccade.pruning.prune_inputs import prune_inputs, pruning_config, reduce_inputs
from saccade.pruning.pruner import Pruner, reduced_features

__all__ = [
    "ISOLATOR_FILE",
    "Method",
    "ModeInputs",
    "ModeIsolator",
    "Pruner",
    "Pruning",
    "apply_pruning",
    "prune",
    "prune_inputs",
    "pruning_config",
    "reduce_inputs",
    "reduced_features",
]
