"""CDPruner (Zhang et al., NeurIPS 2025, arXiv 2506.10967): diverse tokens that are relevant to the user's words."""

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
    """Keeps diverse tokens that are relevant to the user's words: greedily maximises det(diag(q) S diag(q)) over them.

    S is the matrix of cosine similarities of the features and q the relevance, min-max scaled to [0, 1] **over the
    valid tokens of each row**; scaled over the batch, as in the published code, a row's choice would depend on the
    other rows of its batch. If relevance is the same everywhere, as with an empty text, q = 1 and this is `dpp`.

    `context.relevance` must be larger for more relevant tokens; whoever computes it chooses the sign. With a CLIP text
    tower it is **minus** the cosine of patch and text, whose sign is inverted in CLIP models; with the language
    model's input embeddings it is **plus** the cosine. `saccade.families.text_relevance` computes both from the user's
    own words only: without roles, system prompt, answers or "Answer the question using a single word or phrase."

    Args:
        theta: in [0, 1), the weight of relevance: q becomes exp(alpha q) with alpha = theta / (2 (1 - theta)), so 0
            gives `dpp`. None uses q unchanged, as published.
        text_tower: folder of the `CLIPModel` that the model's vision tower comes from, with its tokenizer. None uses
            the language model's input embeddings.
        tokenizer: folder of the language model's tokenizer and chat template, to find the user's words in the prompt.
            None uses the folder that the model was loaded from; if that has no tokenizer either, all text of the
            prompt counts, and a warning says so.
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
        """Index `(B, K)` of the selected tokens. Time O(N^2 D + K^2 N) per row."""
        quality = scale_per_row(context.relevance.float().double(), context)
        if self.theta is not None:
            # exp(alpha q) divided by its largest possible value: a common factor of the kernel changes no choice.
            quality = torch.exp((quality - 1) * (self.theta / (2 * (1 - self.theta))))
        return greedy_map(context, row_budget(context, keep), quality, self.precision)
