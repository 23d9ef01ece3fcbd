"""CDPruner (Zhang et al., NeurIPS 2025, arXiv 2506.10967): diverse tokens that fit the user's words."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from saccade.reducers.common import check_number, row_budget, scale_per_row
from saccade.reducers.determinantal import greedy_map
from saccade.reducers.registry import register_reducer
from saccade.reducers.similarity import check_precision
from saccade.tokens import Reduction, VisualContext


@register_reducer("cdpruner")
@dataclass(frozen=True)
class CDPruner:
    """Keeps diverse tokens that are relevant to the user's words: greedy max of det(diag(q) S diag(q)) over the kept.

    S is the matrix of cosine similarities of the features and q the relevance, scaled to [0, 1] by its minimum and
    maximum **over the valid tokens of each row**; over the batch, as in the published code, a row's choice would
    depend on its batch mates. Where relevance is the same everywhere, as with an empty text, q = 1 and this is `dpp`.

    `context.relevance` is larger for what is more relevant; the sign belongs to whoever computes it. From a CLIP text
    tower it is **minus** the cosine of patch and text, whose sign is inverted in CLIP models; from the language
    model's input embeddings it is **plus** the cosine. `saccade.families.text_relevance` does both, from the user's
    bare words: without roles, system prompt, answers or "Answer the question using a single word or phrase."

    Args:
        theta: in [0, 1), the weight of relevance: q becomes exp(alpha q) with alpha = theta / (2 (1 - theta)), so 0 is
            `dpp`. None takes q as it is, as published.
        text_tower: folder of a `CLIPModel` whose vision tower is the model's, with its tokenizer. None takes the
            language model's input embeddings.
        tokenizer: folder of the language model's tokenizer and chat template, to find the user's words in the prompt.
            None takes the folder that the model was loaded from; where it has none either, all text of the prompt
            counts, and a warning says so.
        precision: "float32" or "float64", as in `dpp`.
    """

    theta: float | None = None
    text_tower: str | None = None
    tokenizer: str | None = None
    precision: str = "float32"
    needs: ClassVar[frozenset[str]] = frozenset({"relevance"})

    def __post_init__(self) -> None:
        if self.theta is not None:
            check_number("cdpruner", "theta", self.theta, "[0, 1)")
        check_precision("cdpruner", self.precision)

    @torch.no_grad()
    def __call__(self, context: VisualContext, keep: int | Tensor) -> Reduction:
        """Index `(B, K)` of the selected tokens. Time O(N^2 D + K^2 N) a row."""
        quality = scale_per_row(context.relevance.float().double(), context)
        if self.theta is not None:
            # exp(alpha q) over its largest value: a common factor of the kernel changes no choice.
            quality = torch.exp((quality - 1) * (self.theta / (2 * (1 - self.theta))))
        return greedy_map(context, row_budget(context, keep), quality, self.precision)
