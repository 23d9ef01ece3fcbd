"""What families, the attention of the vision tower and the user's words exchange about one encoding of images."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.utils import ModelOutput

from saccade.tokens import VisualContext


@dataclass(frozen=True)
class Encoded:
    """One encoding of a batch's images, used by every pass over that batch.

    Args:
        context: the visual tokens as a reducer sees them; `context.features` carries the gradient of the projector.
        outputs: what the stock forward takes as `mm_encoder_outputs` for the full sequence.
        deepstack_features: features `(R, N, D)` that enter at further layers of the language model, layer by layer.
            They are reduced as the context's features are, and are zero on isolator rows.
        videos: one bool per row, true where it comes from a video; empty where there is none.
    """

    context: VisualContext
    outputs: dict[str, ModelOutput]
    deepstack_features: tuple[Tensor, ...] = ()
    videos: tuple[bool, ...] = ()


@dataclass(frozen=True)
class AttentionBlock:
    """The attention block of a vision tower that saliency and keys are read from.

    Args:
        attention: the attention module. What its call is given as `position_embeddings` (rotary), `cu_seqlens`
            (images packed behind one another) and `attention_mask` (padded patches) is taken into account.
        query: the module whose output is the queries `(..., H * d)`: a projection, or the norm behind it.
        key: the same for the keys. The module of `query` again where one projection gives queries, keys and values.
        heads: H.
        class_token: whether the first token of each image is a class token.
        given: arguments that the model hands to each call of `attention`, whatever their value. A call without one of
            them is an error: what it stands for would be left out of account.
    """

    attention: nn.Module
    query: nn.Module
    key: nn.Module
    heads: int
    class_token: bool
    given: frozenset[str] = frozenset()


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
