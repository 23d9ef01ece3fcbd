"""The interface of a model family: one small class per family, on top of stock transformers classes.

Shapes: B samples, L tokens, R feature rows (images, crops, frames) of N visual tokens each, width D.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from saccade.errors import SaccadeError
from saccade.families.encoded import AttentionBlock, Encoded, Patches
from saccade.families.text_relevance import Asked, relevance, row_samples, word_relevance
from saccade.families.tower import unused_layers_passed_over
from saccade.families.vision_attention import (
    FROM_ATTENTION,
    encoder_block,
    first_arguments,
    pool_patches,
    read_attention,
    watching,
)
from saccade.interfaces import changed, check_takes, installed
from saccade.reducers import FROM_WORDS, PROJECTION, Needs
from saccade.tokens import VisualContext

RECURRENT = frozenset({"linear_attention", "conv"})
"""Values of `layer_types` of layers that mix tokens by their order, without positions."""


class Family(ABC):
    """Gets visual features from a stock model and passes shortened ones back to it.

    Args:
        model: the stock model, without PEFT or parallel wrappers.

    Raises:
        SaccadeError: if its forward does not accept encoded features, as before transformers 5.18.
    """

    name: str
    model_types: tuple[str, ...]
    """The values of `config.model_type` that this family covers."""
    towers: tuple[str, ...] = ()
    """The values of `vision_config.model_type` that it covers; empty for all that no other family names."""
    vision_inputs: tuple[str, ...] = ("pixel_values",)
    """Processor outputs that `encode` consumes and that must not be passed again along with encoded features."""
    token_inputs: Mapping[str, int] = {}
    """Per-token processor outputs to carry over when the batch is spliced, with the fill value for new tokens."""
    projects_tokens: bool = False
    """Whether each token depends only on its own encoder features: the projector maps tokens one by one, and nothing
    mixes them afterwards."""
    unpadded: str | None = "reach the model whole and in their own shape"
    """Why images are not padded to a square, phrased as the end of a sentence about them; None if they can be."""
    uses_mrope: bool = False
    """Whether positions have several axes (M-RoPE). They are then always taken from the full sequence, whatever
    `positions` says: renumbered along one axis they would mean something else to the model."""

    bidirectional_image_attention: bool = False
    """Whether the tokens of an image attend to one another in both directions."""

    takes_list: bool = False
    """Whether the stock forward takes encoded features as a list of rows `(n_i, D)`, not as one tensor `(R, n, D)`."""

    joins_pixels: bool = False
    """Whether `pixel_values` of a batch are those of its images one after another along the first dimension, without a
    dimension of samples."""

    text_between_crops: bool = False
    """Whether tokens of the text stand between the crops of an image."""

    text_between_lines: bool = False
    """Whether tokens of the text stand between the lines of an image's tokens."""

    takes_some_patches: bool = False
    """Whether the vision tower can run on some of an image's patches: `_encode_some` is then defined."""

    thumbnail: int | None = None
    """Which row of an image is the thumbnail beside its crops: 0 for the first, -1 for the last, None for none.

    An image without crops is that one row.
    """

    has_scales: bool = False
    """Whether the rows of an image are its scales, coarse to fine."""

    def __init__(self, model: PreTrainedModel) -> None:
        # Without this parameter, a forward that accepts any keyword would silently ignore all images.
        check_takes(type(model).forward, ("mm_encoder_outputs",))
        self.model = model

    @property
    def placeholder_id(self) -> int:
        """The token id that stands for one visual token in `input_ids`."""
        return self.model.config.image_token_id

    def encode(
        self,
        inputs: Mapping[str, Any],
        needs: Needs | None = None,
        *,
        labels: Tensor | None = None,
        seed: int | None = None,
    ) -> Encoded:
        """Run the vision tower and the projector once over the batch's images.

        Args:
            inputs: processor outputs.
            needs: what the context must contain beyond the features; None for nothing.
            labels: long `(B, L)` of a training batch, so that relevance never sees an answer.
            seed: seed of the first feature row, for stochastic reducers; later rows get consecutive seeds.

        Raises:
            SaccadeError: if this family cannot provide what is needed.
        """
        needs = Needs() if needs is None else needs
        block = self._block_for(needs)
        features_too = "encoder_features" in needs.fields or needs.text_tower is not None
        entry = self.projector_entry if features_too else None
        layer = getattr(self.model.config, "vision_feature_layer", None)
        tower = unused_layers_passed_over(self.vision_tower, layer)
        with tower, watching(block) as calls, first_arguments(entry) as given:
            encoded = self._encode(inputs) if needs.patch_tolerance is None else self._encode_some(inputs, needs)
        known: dict[str, Tensor] = {}
        if encoded.context.video is None:
            known["video"] = alone_in_group(encoded.context.group)
        if seed is not None:
            known["seed"] = torch.arange(encoded.context.shape[0], device=encoded.context.features.device) + seed
        if "sample" in needs.fields:
            known["sample"] = row_samples(encoded.context, self.placeholder(inputs["input_ids"]))
        if entry is not None:
            if not given:
                raise changed(f"the projector did not call its {type(entry).__name__}")
            # Not detached: a merge before the projector passes the gradient on to a trainable tower.
            values = self.patches_to_tokens([Patches(value, False) for value in given], encoded, inputs)
            known["encoder_features"] = values
        with torch.no_grad(), torch.autocast(encoded.context.features.device.type, enabled=False):
            if block is not None:
                seen = [read_attention(call, block, needs.fields) for call in calls]
                for name in sorted(needs.fields & FROM_ATTENTION):
                    patches = [Patches(values[name], block.class_token) for values in seen]
                    values = self.patches_to_tokens(patches, encoded, inputs)
                    known[name] = values.squeeze(2) if name == "saliency" else values
            if needs.fields & FROM_WORDS:
                context = encoded.context.replace(**known)
                placeholder = self.placeholder(inputs["input_ids"])
                asked = Asked(self.model, inputs, labels, placeholder, needs.tokenizer)
                if "relevance" in needs.fields:
                    known["relevance"] = relevance(asked, context, needs.text_tower)
                if "word_relevance" in needs.fields:
                    known["word_relevance"], known["words"] = word_relevance(asked, context)
        return replace(encoded, context=encoded.context.replace(**known)) if known else encoded

    @abstractmethod
    def _encode(self, inputs: Mapping[str, Any]) -> Encoded:
        """`encode` without collecting what a reducer needs; hooks around this call do that."""

    def as_encoded(self, features: Tensor | list[Tensor], **known: Any) -> Encoded:
        """The encoding of features as the stock model gave them, one tensor `(R, N, D)` or a list of rows `(n_i, D)`.

        Args:
            known: further fields of the context.
        """
        padded, valid = (features, None) if isinstance(features, Tensor) else pad_rows(features)
        context = VisualContext(padded, valid=valid, **known)
        return Encoded(context, {"image": BaseModelOutputWithPooling(pooler_output=features)})

    def _encode_some(self, inputs: Mapping[str, Any], needs: Needs) -> Encoded:
        """`_encode` of the patches that `needs.patch_tolerance` leaves, or of all with `needs.whole_images`; the
        others' tokens are absent from the context.
        """
        raise SaccadeError(
            f"patch_tolerance={needs.patch_tolerance!r}: the vision tower of "
            f"model_type={self.model.config.model_type!r} takes whole images only; leave it out"
        )

    def check_gives(self, needs: Needs) -> None:
        """Check that the model provides what is needed, as far as can be told without images."""
        self._block_for(needs)

    def _block_for(self, needs: Needs) -> AttentionBlock | None:
        """The attention block of the vision tower to record, or None if nothing from it is needed.

        Raises:
            SaccadeError: if there is no such block, or single tokens need to be projected and the projector cannot.
        """
        if needs.patch_tolerance is not None and not self.takes_some_patches:
            self._encode_some({}, needs)  # raises the error that explains why
        if PROJECTION in needs.fields and not self.projects_tokens:
            self.project(torch.empty(0))  # raises the error that explains why
        wanted = needs.fields & FROM_ATTENTION
        block = self.attention_block() if wanted else None
        if wanted and block is None:
            raise SaccadeError(
                f"model_type={self.model.config.model_type!r} of transformers {installed('transformers')} gives no "
                f"{' and '.join(sorted(wanted))}: use a reducer that `saccade reducers` lists without"
            )
        return block

    def wrap_features(
        self, features: Sequence[Tensor], encoded: Encoded, deepstack_features: Sequence[Sequence[Tensor]] = ()
    ) -> dict[str, ModelOutput]:
        """`mm_encoder_outputs` for shortened features.

        Args:
            features: one `(n_i, D)` tensor per feature row, in placeholder order, including isolator rows.
            encoded: what the features were shortened from.
            deepstack_features: the same for each entry of `encoded.deepstack_features`.
        """
        rows = list(features) if self.takes_list else joined_rows(features)
        return {"image": BaseModelOutputWithPooling(pooler_output=rows)}

    def full_positions(self, inputs: Mapping[str, Any]) -> Tensor:
        """Positions of the full sequence: long `(B, L)`, or `(P, B, L)` for several position axes."""
        return positions_from_mask(inputs["attention_mask"])

    def attention_block(self) -> AttentionBlock | None:
        """The block of the vision tower that saliency and keys are read from: the one that produces the features.

        None if there is none, which the default finds in vision transformers only.
        """
        return encoder_block(self.vision_tower, getattr(self.model.config, "vision_feature_layer", -1))

    def patches_to_tokens(self, patches: list[Patches], encoded: Encoded, inputs: Mapping[str, Any]) -> Tensor:
        """Convert values of patches, one entry per call of the block, to values `(R, N, C)` of visual tokens."""
        return pool_patches(patches, encoded)

    @property
    def vision_feature_layers(self) -> tuple[int, ...] | None:
        """Indices of the hidden states of the tower that the stock model reads; empty for `last_hidden_state`.

        None if the tower is not called with one image, crop or frame per row; its features then cannot be cached.
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
        """The module whose first argument is the encoder's features as the projector receives them."""
        return self.projector

    @property
    def recurrent(self) -> bool:
        """Whether some layers of the language model carry a state from token to token, or convolve neighbours.

        Such layers know no positions: a dropped token leaves no gap in them, while a masked one still ages the state
        and stands between its neighbours. With original positions, a shortened sequence then equals the kept tokens
        alone, not the full sequence with the dropped ones masked.
        """
        return not RECURRENT.isdisjoint(getattr(self.language_model.config, "layer_types", None) or ())

    def project(self, encoder_features: Tensor) -> Tensor:
        """Project the encoder features `(..., Dv)` of tokens to `(..., D)`; differentiable.

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

    @property
    def pad_id(self) -> int:
        """The token id that shortened batches are padded with; it is masked wherever it stands."""
        return max(self.model.config.get_text_config().pad_token_id or 0, 0)

    def has_images(self, inputs: Mapping[str, Any]) -> bool:
        """Whether the batch holds any image."""
        return any(inputs.get(name) is not None for name in self.vision_inputs)

    def placeholder(self, input_ids: Tensor) -> Tensor:
        """bool `(B, L)`, true on the placeholders of visual tokens."""
        return input_ids == self.placeholder_id

    def without_vision(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs without those that `encode` consumed."""
        return {name: value for name, value in inputs.items() if name not in self.vision_inputs}

    def hidden_states(self, **inputs: Any) -> Tensor:
        """Last hidden states `(B, L, D)` of the stock model, without its head."""
        return self.model.base_model(**inputs, use_cache=False).last_hidden_state

    def logits(self, hidden_states: Tensor) -> Tensor:
        """The head as the stock forward applies it: `(..., D)` to `(..., V)`."""
        return self.model.get_output_embeddings()(hidden_states)


def pad_rows(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Pad rows `(n_i, D)` with zeros to `(R, N, D)`, with a validity mask, bool `(R, N)`; None if no row is padded."""
    lengths = [row.shape[0] for row in rows]
    if len(set(lengths)) == 1:
        return torch.stack(tuple(rows)), None
    padded = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    count = torch.tensor(lengths, device=padded.device).unsqueeze(1)
    return padded, torch.arange(padded.shape[1], device=padded.device) < count


def block_means(values: Tensor, edge: int) -> Tensor:
    """Values `(height, width, C)` of patches as their means `(tokens, C)` over blocks of `edge` squared, by line."""
    height, width, channels = values.shape
    blocks = values.reshape(height // edge, edge, width // edge, edge, channels)
    return blocks.mean(dim=(1, 3)).flatten(0, 1)


def joined_rows(features: Sequence[Tensor]) -> Tensor:
    """Features `(n_i, D)` as one tensor `(R, n, D)`, for models that do not accept a list.

    Rows of several lengths become `(total, 1, D)`: the model only counts and concatenates, and `generate` can cut it
    between samples, as it does to repeat each sample's images for its beams.
    """
    if len({row.shape[0] for row in features}) == 1:
        return torch.stack(tuple(features))
    return torch.cat(tuple(features)).unsqueeze(1)


def alone_in_group(group: Tensor) -> Tensor:
    """Which rows may be frames of a clip, where a processor gives these as images: bool `(R,)`, from long `(R,)`.

    Several rows of a group, which are next to one another, are the crops of an image.
    """
    border = torch.nn.functional.pad(group.diff() != 0, (1, 1), value=True)
    return (border[:-1] & border[1:])[: len(group)]


def run_numbers(placeholder: Tensor) -> Tensor:
    """For each placeholder of a batch, in order, the index of the unbroken run that it belongs to: long `(P,)`."""
    first = placeholder & ~torch.nn.functional.pad(placeholder[:, :-1], (1, 0))
    return first.reshape(-1).cumsum(dim=0)[placeholder.reshape(-1)] - 1


def images_of_crops(placeholder: Tensor, lengths: Sequence[int]) -> Tensor | None:
    """For each feature row, the index of its image: long `(R,)`. Rows are of one image if at most a marker is between.

    None (one image per row) if placeholders and visual tokens differ in number; the splice reports that clearly.

    Args:
        placeholder: bool `(B, L)`, true on the placeholders of visual tokens.
        lengths: the number of tokens of each of the R rows, in the order of the placeholders.
    """
    places = placeholder.reshape(-1).nonzero().squeeze(1)
    if len(places) != sum(lengths) or not lengths:
        return None
    ends = torch.tensor(lengths, device=places.device).cumsum(dim=0)
    first = places[torch.nn.functional.pad(ends[:-1], (1, 0))]
    last = places[ends - 1]
    samples = first // placeholder.shape[1]
    new = (first[1:] - last[:-1] > 2) | (samples[1:] != samples[:-1])
    return torch.nn.functional.pad(new.long().cumsum(dim=0), (1, 0))


def positions_from_mask(attention_mask: Tensor) -> Tensor:
    """One-dimensional positions as `generate` counts them: long `(B, L)`, zero on left padding."""
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)


def square_grid(rows: int, side_rows: int, side_columns: int, device: torch.device) -> Tensor:
    """`VisualContext.grid` of `rows` single frames of the same shape: long `(rows, 3)`."""
    return torch.tensor([[1, side_rows, side_columns]], device=device).expand(rows, 3)
