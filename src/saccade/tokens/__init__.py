"""Pure tensor code: what a reducer sees, what it returns, and how a batch is spliced. No transformers import."""

from saccade.tokens.context import PER_ROW, VisualContext
from saccade.tokens.reduction import Reduction, gather_selected
from saccade.tokens.splice import IGNORE_INDEX, Places, Role, Spliced, VisualTokens, splice

__all__ = [
    "IGNORE_INDEX",
    "PER_ROW",
    "Places",
    "Reduction",
    "Role",
    "Spliced",
    "VisualContext",
    "VisualTokens",
    "gather_selected",
    "splice",
]
