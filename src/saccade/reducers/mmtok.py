"""MMTok (ICLR 2026, arXiv 2508.18264): tokens that together cover the user's words and the image."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from saccade.reducers.common import Budget, by_rows, check_number, row_budget
from saccade.reducers.coverage import greedy_cover
from saccade.reducers.registry import register_reducer
from saccade.reducers.similarity import cosine_similarity
from saccade.tokens import Reduction, VisualContext


@register_reducer("mmtok")
@dataclass(frozen=True)
class MMTok:
    """Keeps tokens that cover the user's words and the image: greedy max of sum_r max(0, C_ri - best_r).

    The rows r of C are the m words t and the N image tokens j, and best_r, initially zero, is the largest C_ri of the
    kept tokens i. Over the image tokens i,

        C_ti = softmax_i(cos(text_t, x_i) / text_temperature) / m
        C_ji = vision_weight * softmax_i(cos(v_j, v_i) / vision_temperature) / N

    where x are the features that the language model would receive and v those of the vision tower before the projector
    (averaged over the patches that a connector merges). The words are the input embeddings of the tokens of the user's
    questions, in all turns; answers, roles and what the chat template adds are left out, as for `cdpruner`. If there
    are no words, only the image is covered. Gains within 2^-34 tie; ties go to the first in raster order, also if no
    remaining token improves the cover.

    Args:
        vision_weight: weight of the image's rows, at least 0; 0.5 as published.
        text_temperature: temperature of a word's softmax, above 0.
        vision_temperature: temperature of an image token's softmax, above 0.
        tokenizer: folder of the language model's tokenizer and chat template, as for `cdpruner`.
    """

    vision_weight: float = 0.5
    text_temperature: float = 0.02
    vision_temperature: float = 0.2
    tokenizer: str | None = None
    needs: ClassVar[frozenset[str]] = frozenset({"word_relevance", "encoder_features"})

    def __post_init__(self) -> None:
        check_number("mmtok", "vision_weight", self.vision_weight, "[0, inf)")
        check_number("mmtok", "text_temperature", self.text_temperature, "(0, inf)")
        check_number("mmtok", "vision_temperature", self.vision_temperature, "(0, inf)")

    @torch.no_grad()
    def __call__(self, context: VisualContext, keep: int | Tensor) -> Reduction:
        """Index `(B, K)` of the selected tokens. Time O(N^2 Dv + K N (N + m)) per row, memory O(N (N + m))."""
        words, tokens = context.word_relevance.shape[2], context.shape[1]
        return by_rows(self._reduce, context, row_budget(context, keep), elements=tokens * (tokens + words))

    def _reduce(self, context: VisualContext, budget: Budget) -> Reduction:
        similarity = cosine_similarity(context.encoder_features, context)
        device = similarity.device
        image = _shares(similarity, self.vision_temperature, context)
        if not context.dense:
            image.masked_fill_(~context.valid.to(device).unsqueeze(1), 0)
        image *= self.vision_weight / budget.available.to(device).clamp(min=1).view(-1, 1, 1)

        relevance = context.word_relevance.to(device).double().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        text = _shares(relevance, self.text_temperature, context)
        if context.words is None:
            text /= max(text.shape[2], 1)
        else:
            words = context.words.to(device).view(-1, 1, 1)
            text = torch.where(torch.arange(text.shape[2], device=device) < words, text / words.clamp(min=1), 0)
        # Scaled by the largest possible sum, so that no cover exceeds 1 whatever the weight.
        return greedy_cover(torch.cat((text, image), dim=2) / (1 + self.vision_weight), context, budget)


def _shares(similarity: Tensor, temperature: float, context: VisualContext) -> Tensor:
    """Softmax of `similarity` `(B, N, R)` over the valid tokens, for each of the R; 0 on padding."""
    scaled = similarity / temperature
    if context.dense:
        return scaled.softmax(dim=1)
    padding = ~context.valid.to(scaled.device).unsqueeze(2)
    # Finite, so that a row without valid tokens does not become NaN.
    return scaled.masked_fill_(padding, torch.finfo(scaled.dtype).min).softmax(dim=1).masked_fill_(padding, 0)
