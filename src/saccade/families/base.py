"""What a model family has to say about itself: one small class a family, on stock transformers classes.

Shapes: B samples, L tokens, R feature rows (images, crops, frames) of N visual tokens each, width D.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from saccade.errors import SaccadeError
from saccade.families.collect import AttentionBlock, Patches, encode_collecting, pool_patches
from saccade.families.question import Reader
from saccade.families.relevance import TextTower, relevance
from saccade.families.tower import unused_layers_passed_over
from saccade.interfaces import check_takes
from saccade.tokens import TokenBudget, VisualContext


@dataclass
class Encoded:
    """One encoding of a batch's images, used by every pass over that batch.

    Args:
        context: the visual tokens as a reducer sees them; `context.features` carries the gradient of the projector.
        outputs: what the stock forward takes as `mm_encoder_outputs` for the full sequence; empty where the images
            were encoded at a lower resolution.
        deeper: features `(R, N, D)` that enter at further layers of the language model, layer by layer. They are
            reduced as the context's features are, and are zero on isolator rows.
        videos: bool a row, true where it comes from a video; empty where there is none.
    """

    context: VisualContext
    outputs: dict[str, ModelOutput]
    deeper: tuple[Tensor, ...] = ()
    videos: tuple[bool, ...] = ()


class Family(ABC):
    """Reads visual features out of a stock model, and hands shortened ones back to it.

    Args:
        model: the stock model, without PEFT or parallel wrappers.

    Raises:
        SaccadeError: if its forward takes no encoded features, as before transformers 5.18.
    """

    name: str
    model_types: tuple[str, ...]
    """The values of `config.model_type` that this family covers."""
    vision_inputs: tuple[str, ...] = ("pixel_values",)
    """Processor outputs that `encode` consumes and that a pass over encoded features must not get again."""
    token_inputs: Mapping[str, int] = {}
    """Per-token processor outputs to carry over when the batch is spliced, with the value for new tokens."""
    fixed_resolution: str = "its family does not say how"
    """Why `_encode_low_resolution` is missing, where it is."""
    projects_tokens: bool = False
    """Whether the projector takes tokens one by one: a token is what it makes of the token's encoder features alone,
    and nothing happens to it behind the projector."""
    unpadded: str | None = "reach the model whole and in their own shape"
    """Why images are not padded to a square, as the end of a sentence about them; None where they can be."""
    several_axes: bool = False
    """Whether positions have several axes (M-RoPE). They are then always gathered from the full sequence's, whatever
    `positions` says: counted anew along one axis they would mean something else to the model."""

    attends_both_ways: bool = False
    """Whether the tokens of an image attend to one another in both directions."""

    thumbnail: int | None = None
    """Which row of an image is a small picture of all of it, next to its crops: 0 for the first, -1 for the last."""

    def __init__(self, model: PreTrainedModel) -> None:
        # Without the parameter, a forward that takes any keyword would leave all images out.
        check_takes(type(model).forward, ("mm_encoder_outputs",))
        self.model = model

    @property
    @abstractmethod
    def placeholder_id(self) -> int:
        """The token id that stands for one visual token in `input_ids`."""

    def encode(
        self,
        inputs: Mapping[str, Any],
        needs: frozenset[str] = frozenset(),
        *,
        labels: Tensor | None = None,
        text_tower: TextTower | None = None,
        reader: Reader | None = None,
        budget: TokenBudget | None = None,
    ) -> Encoded:
        """Run the vision tower and the projector once over the batch's images.

        Args:
            inputs: processor outputs.
            needs: the fields of `VisualContext` that a reducer asks for beyond the features.
            labels: long `(B, L)` of a training batch, so that relevance never sees an answer.
            text_tower: what to take relevance from, in place of the language model's input embeddings.
            reader: what finds the user's words without a text tower; None takes the model's own.
            budget: what decides about the size of the images where `needs` asks for a lower resolution.

        Raises:
            SaccadeError: if this family cannot give what is needed.
        """
        with unused_layers_passed_over(self.vision_tower, getattr(self.model.config, "vision_feature_layer", None)):
            if needs:
                return encode_collecting(self, inputs, needs, labels, text_tower, reader, budget)
            return self._encode(inputs)

    @abstractmethod
    def _encode(self, inputs: Mapping[str, Any]) -> Encoded:
        """What `encode` does, less collecting what a reducer needs: that is done by hooks around this."""

    def _encode_low_resolution(self, inputs: Mapping[str, Any], budget: TokenBudget) -> Encoded:
        """What `encode` gives at the resolution that `budget` leaves: `context.low_resolution` is filled.

        Raises:
            SaccadeError: if the family cannot do it.
        """
        raise SaccadeError(
            f"model_type={self.model.config.model_type!r}: its images cannot be encoded at a lower resolution "
            f"({self.fixed_resolution}); use another reducer than 'downsample'"
        )

    @property
    def lowers_resolution(self) -> bool:
        """Whether `_encode_low_resolution` is there."""
        return type(self)._encode_low_resolution is not Family._encode_low_resolution

    @abstractmethod
    def wrap_features(
        self, features: Sequence[Tensor], encoded: Encoded, deeper: Sequence[Sequence[Tensor]] = ()
    ) -> dict[str, ModelOutput]:
        """`mm_encoder_outputs` for shortened features.

        Args:
            features: one `(n_i, D)` tensor a feature row, in placeholder order, isolator rows included.
            encoded: what the features were shortened from.
            deeper: the same for each entry of `encoded.deeper`.
        """

    @abstractmethod
    def full_positions(self, inputs: Mapping[str, Any]) -> Tensor:
        """Positions of the full sequence: long `(B, L)`, or `(P, B, L)` for several position axes."""

    def attention_block(self) -> AttentionBlock | None:
        """The block of the vision tower that saliency and keys are read from: the one that gives the features.

        None where a family offers neither.
        """
        return None

    def patches_to_tokens(self, patches: list[Patches], encoded: Encoded, inputs: Mapping[str, Any]) -> Tensor:
        """Values of patches, one entry a call of the block, as values `(R, N, C)` of the context's tokens."""
        return pool_patches(patches, encoded)

    def text_relevance(
        self,
        encoded: Encoded,
        inputs: Mapping[str, Any],
        labels: Tensor | None,
        text_tower: TextTower | None,
        reader: Reader | None,
    ) -> Tensor:
        """How relevant each visual token is to the user's words, larger for more: float32 `(R, N)`."""
        return relevance(self, encoded, inputs, labels, text_tower, reader)

    @property
    def tower_states(self) -> tuple[int, ...] | None:
        """What the stock model reads of its tower's output: numbers of hidden states; none for `last_hidden_state`.

        None where the tower is not called with one image, crop or frame a row. Its features then cannot be kept.
        """
        return None

    @property
    def language_layers(self) -> nn.ModuleList:
        """The decoder layers of the language model."""
        return self.model.base_model.language_model.layers

    @property
    def projector(self) -> nn.Module:
        """The module between vision tower and language model."""
        return self.model.base_model.multi_modal_projector

    @property
    def projector_entry(self) -> nn.Module:
        """The module whose first argument are the encoder's features as the projector gets them."""
        return self.projector

    def project(self, encoder_features: Tensor) -> Tensor:
        """What the projector makes of the encoder features `(..., Dv)` of tokens: `(..., D)`, differentiable.

        Raises:
            SaccadeError: if the family's projector does not take tokens one by one.
        """
        if not self.projects_tokens:
            raise SaccadeError(
                f"model_type={self.model.config.model_type!r}: its projector does not take tokens one by one, so that "
                "none can be merged before it; set the reducer's option merge to 'projected'"
            )
        return self.projector(encoder_features)

    @property
    def vision_tower(self) -> nn.Module:
        """The vision encoder."""
        return self.model.base_model.vision_tower

    @property
    def language_model(self) -> nn.Module:
        """The language model, without its head."""
        return self.model.base_model.language_model

    def has_images(self, inputs: Mapping[str, Any]) -> bool:
        """Whether the batch holds any image."""
        return any(inputs.get(name) is not None for name in self.vision_inputs)

    def placeholder(self, input_ids: Tensor) -> Tensor:
        """bool `(B, L)`, true on the placeholders of visual tokens."""
        return input_ids == self.placeholder_id

    def without_vision(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs less what `encode` consumed."""
        return {name: value for name, value in inputs.items() if name not in self.vision_inputs}

    def hidden_states(self, **inputs: Any) -> Tensor:
        """Last hidden states `(B, L, D)` of the stock model, without its head."""
        return self.model.base_model(**inputs, use_cache=False).last_hidden_state

    def logits(self, hidden_states: Tensor) -> Tensor:
        """The head as the stock forward applies it: `(..., D)` to `(..., V)`."""
        return self.model.get_output_embeddings()(hidden_states)


def pad_rows(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Stack rows `(n_i, D)` to `(R, N, D)`, zeros at the end of shorter ones, and bool `(R, N)`, None if none is."""
    lengths = [row.shape[0] for row in rows]
    if len(set(lengths)) == 1:
        return torch.stack(tuple(rows)), None
    padded = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    count = torch.tensor(lengths, device=padded.device).unsqueeze(1)
    return padded, torch.arange(padded.shape[1], device=padded.device) < count


def joined_rows(features: Sequence[Tensor]) -> Tensor:
    """Features `(n_i, D)` as the one tensor `(R, n, D)` that a model wants which cannot take a list.

    Rows of several lengths become `(total, 1, D)`: the model only counts and concatenates, and `generate` can cut it
    between samples, as it does to repeat each sample's images for its beams.
    """
    if len({row.shape[0] for row in features}) == 1:
        return torch.stack(tuple(features))
    return torch.cat(tuple(features)).unsqueeze(1)


def run_numbers(placeholder: Tensor) -> Tensor:
    """For each placeholder of a batch, in order, the number of the unbroken run that it stands in: long `(P,)`."""
    first = placeholder & ~torch.nn.functional.pad(placeholder[:, :-1], (1, 0))
    return first.reshape(-1).cumsum(dim=0)[placeholder.reshape(-1)] - 1


def positions_from_mask(attention_mask: Tensor) -> Tensor:
    """One-dimensional positions as `generate` counts them: long `(B, L)`, zero on left padding."""
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)


def square_grid(rows: int, side_rows: int, side_columns: int, device: torch.device) -> Tensor:
    """`VisualContext.grid` of `rows` single frames of the same shape: long `(rows, 3)`."""
    return torch.tensor([[1, side_rows, side_columns]], device=device).expand(rows, 3)
