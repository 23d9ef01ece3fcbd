"""Visual-token reducers, one file a method: which tokens of an image stay, and what the rest is merged into."""

from saccade.reducers.avgpool import AveragePool
from saccade.reducers.divprune import DivPrune
from saccade.reducers.none import KeepAll
from saccade.reducers.random import RandomSubset
from saccade.reducers.registry import Reducer, get_reducer, list_reducers, register_reducer
from saccade.reducers.uniform import UniformGrid

__all__ = [
    "AveragePool",
    "DivPrune",
    "KeepAll",
    "RandomSubset",
    "Reducer",
    "UniformGrid",
    "get_reducer",
    "list_reducers",
    "register_reducer",
]
