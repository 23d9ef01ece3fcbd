"""Pure tensor code: what a reducer sees, what it returns, and how a batch is spliced. No transformers import."""

from saccade.tokens.budget import TokenBudget, keep_count
from saccade.tokens.context import VisualContext
from saccade.tokens.reduction import Reduction, gather_selected
from saccade.tokens.splice import IGNORE_INDEX, Spliced, splice

__all__ = [
    "IGNORE_INDEX",
    "Reduction",
    "Spliced",
    "TokenBudget",
    "VisualContext",
    "gather_selected",
    "keep_count",
    "splice",
]
