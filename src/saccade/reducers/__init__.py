"""Visual-token reducers, one file per method: which tokens are kept, and what the rest are merged into."""

from saccade.reducers.adaptive import adaptive_counts, token_need
from saccade.reducers.avgpool import AveragePool
from saccade.reducers.budget import keep_count
from saccade.reducers.cdpruner import CDPruner
from saccade.reducers.changes import Changes
from saccade.reducers.config import PRUNING_FILE, PruningConfig
from saccade.reducers.distinct_frames import DistinctFrames
from saccade.reducers.divprune import DivPrune
from saccade.reducers.dpp import Determinantal
from saccade.reducers.fastervlm import FasterVLM
from saccade.reducers.fit import no_room
from saccade.reducers.holov import HoloV
from saccade.reducers.mmtok import MMTok
from saccade.reducers.none import KeepAll
from saccade.reducers.predictor import reproduced
from saccade.reducers.prumerge import PruMerge
from saccade.reducers.random import RandomSubset
from saccade.reducers.reduce import keep_counts, reduce
from saccade.reducers.redundancy import RedundancyMerge
from saccade.reducers.registry import (
    FROM_WORDS,
    PROJECTION,
    Needs,
    Reducer,
    get_reducer,
    list_reducers,
    register_reducer,
)
from saccade.reducers.scope import Scope
from saccade.reducers.tome import TokenMerging
from saccade.reducers.uniform import UniformGrid
from saccade.reducers.visionzip import VisionZip
from saccade.reducers.vispruner import VisPruner

__all__ = [
    "FROM_WORDS",
    "PROJECTION",
    "PRUNING_FILE",
    "AveragePool",
    "CDPruner",
    "Changes",
    "Determinantal",
    "DistinctFrames",
    "DivPrune",
    "FasterVLM",
    "HoloV",
    "KeepAll",
    "MMTok",
    "Needs",
    "PruMerge",
    "PruningConfig",
    "RandomSubset",
    "Reducer",
    "RedundancyMerge",
    "Scope",
    "TokenMerging",
    "UniformGrid",
    "VisPruner",
    "VisionZip",
    "adaptive_counts",
    "get_reducer",
    "keep_count",
    "keep_counts",
    "list_reducers",
    "no_room",
    "reduce",
    "register_reducer",
    "reproduced",
    "token_need",
]
