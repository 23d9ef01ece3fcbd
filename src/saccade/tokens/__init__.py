"""Pure tensor code: what a reducer sees, what it returns, and how a batch is spliced. No transformers import."""

from saccade.tokens.budget import TokenBudget, keep_count
from saccade.tokens.context import VisualContext
from saccade.tokens.layout import Blocks, Layout, Role, find_blocks, lay_out
from saccade.tokens.reduction import Reduction, gather_selected
from saccade.tokens.splice import IGNORE_INDEX, Spliced, splice

__all__ = [
    "IGNORE_INDEX",
    "Blocks",
    "Layout",
    "Reduction",
    "Role",
    "Spliced",
    "TokenBudget",
    "VisualContext",
    "find_blocks",
    "gather_selected",
    "keep_count",
    "lay_out",
    "splice",
]
