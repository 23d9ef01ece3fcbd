"""Types shared by families, vision attention and text relevance: one encoding of a batch's images."""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from transformers.utils import ModelOutput

from saccade.errors import SaccadeError
from saccade.tokens import VisualContext


@dataclass(frozen=True)
class Encoded:
    """One encoding of a batch's images, used by every pass over that batch.

    Args:
        context: the visual tokens as a reducer sees them; `context.features` carries the gradient of the projector.
        outputs: what the stock forward takes as `mm_encoder_outputs` for the full sequence; empty if some patches were
            dropped before the tower, so that there is no full sequence.
        deepstack_features: features `(R, N, D)` added at deeper layers of the language model, one tensor per layer.
            They are reduced like the context's features, and are zero on isolator rows.
        videos: one bool per row, true if it comes from a video; empty if there are no videos.
        markers: features `(M, D)` of tokens that stand around the crops of every image, which the model learns; None
            if it has none.
    """

    context: VisualContext
    outputs: dict[str, ModelOutput]
    deepstack_features: tuple[Tensor, ...] = ()
    videos: tuple[bool, ...] = ()
    markers: Tensor | None = None

    def with_all(self) -> "Encoded":
        """The encoding for a pass that takes every token.

        Raises:
            SaccadeError: if the tower has not seen every patch.
        """
        if self.context.absent is None:
            return self
        if not self.outputs:
            raise SaccadeError(
                "encoded: patches were dropped before the tower, and this pass needs them all: encode again"
            )
        return replace(self, context=self.context.replace(absent=None))


@dataclass(frozen=True)
class AttentionBlock:
    """The attention block of a vision tower that saliency and keys are read from.

    Args:
        attention: the attention module. Its arguments `position_embeddings` (rotary), `cu_seqlens` or `cu_seq_lens_q`
            (packed images) and `attention_mask` (padded patches, or packed images) are taken into account.
        query: the module whose output is the queries `(..., H * d)`: a projection, or the norm after it.
        key: the same for the keys. If one projection yields queries, keys and values, the same module as `query`.
        heads: H.
        class_token: whether the first token of each image is a class token.
        scale: factor of the products of queries and keys; None for one over the root of d.
        axes: number of equal parts of a head, each of which is rotated by itself.
        given: arguments that the model passes in every call of `attention`. A call without one of them is an error,
            since its effect would be missed.
    """

    attention: nn.Module
    query: nn.Module
    key: nn.Module
    heads: int
    class_token: bool
    given: frozenset[str] = frozenset()
    scale: float | None = None
    axes: int = 1


@dataclass(frozen=True)
class Patches:
    """One value per patch, as the tower ordered them.

    Args:
        values: `(R, P, C)`, or `(1, S, C)` where the tower packs the patches of all images into one sequence.
        class_token: whether the first of the P is a class token.
    """

    values: Tensor
    class_token: bool


@dataclass
class Call:
    """What one call of an attention block was given and computed."""

    queries: Tensor | None
    keys: Tensor | None
    given: dict[str, Any]
