"""Visual-token reducers, one file a method: which tokens of an image stay, and what the rest is merged into."""

from saccade.reducers.avgpool import AveragePool
from saccade.reducers.cdpruner import CDPruner
from saccade.reducers.divprune import DivPrune
from saccade.reducers.downsample import Downsample, check_resolution_budget, is_low_resolution
from saccade.reducers.dpp import Determinantal
from saccade.reducers.fastervlm import FasterVLM
from saccade.reducers.none import KeepAll
from saccade.reducers.prumerge import PruMerge
from saccade.reducers.random import RandomSubset
from saccade.reducers.redundancy import RedundancyMerge
from saccade.reducers.registry import PROJECTION, Reducer, get_reducer, list_reducers, register_reducer
from saccade.reducers.tome import TokenMerging
from saccade.reducers.uniform import UniformGrid
from saccade.reducers.visionzip import VisionZip
from saccade.reducers.vispruner import VisPruner

__all__ = [
    "PROJECTION",
    "AveragePool",
    "CDPruner",
    "Determinantal",
    "DivPrune",
    "Downsample",
    "FasterVLM",
    "KeepAll",
    "PruMerge",
    "RandomSubset",
    "Reducer",
    "RedundancyMerge",
    "TokenMerging",
    "UniformGrid",
    "VisPruner",
    "VisionZip",
    "check_resolution_budget",
    "get_reducer",
    "is_low_resolution",
    "list_reducers",
    "register_reducer",
]
