"""Keep what a reducer chooses, with the mode isolator before each image: DualSpeed's fast mode, and its inference.

Shapes: R feature rows of N visual tokens, of which at most K are kept; P placeholders; T visual tokens of the new
batch.
"""

import torch
from torch import Tensor, nn

from saccade.errors import SaccadeError
from saccade.families import Encoded, Family
from saccade.pruning.isolator import ModeIsolator
from saccade.reducers import Needs, PruningConfig, Reducer, no_room, reduce
from saccade.tokens import Places, Reduction, Role, VisualContext, VisualTokens, gather_selected


class Pruner:
    """Drops, or merges, what the reducer of a config does not keep.

    Args:
        config: how tokens are reduced. Its `isolator` is not read here. Between calls it may be replaced by one with
            another ratio.
        isolator: the mode isolator, or its rows `(l, D)`, or None.
        reducer: replaces the config's reducer if given.
    """

    roles_keyword: str | None = None

    def __init__(
        self, config: PruningConfig, isolator: ModeIsolator | Tensor | None = None, reducer: Reducer | None = None
    ) -> None:
        self.config = config
        self.isolator = isolator
        self.reducer = config.make_reducer() if reducer is None else reducer
        self.needs = Needs.of(self.reducer, config)
        self.positions = config.positions
        self.trainable_modules: tuple[nn.Module, ...] = (isolator,) if isinstance(isolator, nn.Module) else ()

    def reduce(self, family: Family, encoded: Encoded, places: Places, text: Tensor) -> VisualTokens:
        """The kept tokens, each at its own place, and the isolator's rows before each image's.

        Raises:
            SaccadeError: if a sample does not fit under `fit_length` with one token for each of its images.
        """
        isolator = self.isolator() if isinstance(self.isolator, nn.Module) else self.isolator
        reduction = self.choose(encoded, places, text, 0 if isolator is None else isolator.shape[0])
        place = places_of(encoded.context, reduction)  # (T,)
        layers = [reduced_features(family, encoded, reduction)]
        layers += [reduction.apply(features) for features in encoded.deepstack_features]
        features, *deepstack_features = (
            layer.flatten(0, 1) if reduction.dense else layer[reduction.valid] for layer in layers
        )
        role = torch.full_like(place, Role.RETAINED)
        rows, width = reduction.index.shape
        counts = [width] * rows if reduction.dense else reduction.counts.tolist()
        lost = reduction.lost
        if lost is not None:
            lost = torch.zeros_like(text).index_add_(0, _sample_of_rows(encoded.context, places), lost)
        kept = VisualTokens(place, role, features, counts, tuple(deepstack_features), lost)
        if isolator is None or isolator.shape[0] == 0:
            return kept
        return with_isolator(kept, isolator, places, encoded.context, spread=not family.uses_mrope)

    def choose(self, encoded: Encoded, places: Places, text: Tensor, isolator_length: int) -> Reduction:
        """Which tokens of each row are kept, and what is merged into them; `isolator_length` counts for `fit_length`.

        Raises:
            SaccadeError: as `reduce`.
        """
        room = None
        if self.config.fit_length is not None:
            room = room_of(places, encoded.context, text, self.config.fit_length, isolator_length)
            room = room[_sample_of_rows(encoded.context, places)]
        return reduce(encoded.context, self.config, self.reducer, room)

    def cost(self, role: Tensor) -> Tensor:
        """Every token runs through every layer."""
        return (role != Role.PADDING).sum()


def _sample_of_rows(context: VisualContext, places: Places) -> Tensor:
    """The sample of each feature row: long `(R,)`."""
    return torch.zeros_like(context.group).scatter_(0, places.feature_row, places.sample)


def room_of(places: Places, context: VisualContext, text: Tensor, fit_length: int, isolator_length: int) -> Tensor:
    """How many visual tokens each sample can have beside its text and its isolator rows: long `(B,)`.

    Args:
        text: long `(B,)`, tokens of each sample that stand for no image.

    Raises:
        SaccadeError: if a sample has no room for one token of each of its images.
    """
    start, _ = _image_starts(places, context)
    images = torch.zeros_like(text).index_add_(0, places.sample[start], torch.ones_like(start))
    room = fit_length - text - isolator_length * images
    for sample, (count, words) in enumerate(zip(*torch.stack((images, text)).tolist(), strict=True)):
        reason = no_room(words, count, isolator_length, fit_length) if count else None
        if reason is not None:
            raise SaccadeError(f"sample {sample} of the batch: {reason}")
    return room


def reduced_features(family: Family, encoded: Encoded, reduction: Reduction) -> Tensor:
    """The reduced features, `(R, K, D)`; zeros on padding.

    Tokens merged before the projector go through it once more. The others keep their features, so that tokens that are
    not part of the image, such as newlines, never go through it.

    Raises:
        SaccadeError: if tokens are merged before the projector and the family cannot project tokens one by one.
    """
    features = encoded.context.features
    if not reduction.before_projector:
        return reduction.apply(features)
    projected = family.project(reduction.apply(encoded.context.encoder_features))
    own = gather_selected(features, reduction.index, dense=reduction.dense)
    return torch.where(reduction.merged.unsqueeze(-1), projected.to(own.dtype), own)


def places_of(context: VisualContext, reduction: Reduction) -> Tensor:
    """The placeholder of each kept token, in order: long `(T,)`."""
    rows, tokens, _ = context.shape
    if context.dense:
        number = torch.arange(rows * tokens, device=context.features.device).reshape(rows, tokens)
    else:
        number = (context.valid.reshape(-1).cumsum(dim=0) - 1).reshape(rows, tokens)
    place = number.gather(1, reduction.index.clamp(min=0))
    return place.reshape(-1) if reduction.dense else place[reduction.valid]


def with_isolator(
    kept: VisualTokens, isolator: Tensor, places: Places, context: VisualContext, spread: bool
) -> VisualTokens:
    """`kept` with the rows `isolator` `(l, D)` before the tokens of each image.

    Args:
        spread: whether the rows are placed at the image's first l placeholders, or as many as its first block has,
            instead of all at the first one.
    """
    isolator, length = isolator.to(kept.features.device), isolator.shape[0]
    start, rows = _image_starts(places, context)  # (images,)
    number = torch.zeros_like(places.block).scatter_add_(0, places.block, torch.ones_like(places.block))  # of blocks
    last = number[places.block[start]].unsqueeze(1) - 1
    offset = torch.arange(length, device=start.device) if spread else start.new_zeros(length)
    place = (start.unsqueeze(1) + torch.minimum(offset, last)).reshape(-1)
    # Before the first kept token of the image, and after those of the previous image.
    order = torch.cat((2 * start.repeat_interleave(length), 2 * kept.place + 1)).sort(stable=True).indices
    images = start.shape[0]
    counts = list(kept.counts)
    for row in rows:
        counts[row] += length

    def joined(new: Tensor, values: Tensor) -> Tensor:
        return torch.cat((new.to(values.dtype), values)).index_select(0, order)

    return VisualTokens(
        joined(place, kept.place),
        joined(torch.full_like(place, Role.ISOLATOR), kept.role),
        joined(isolator.repeat(images, 1), kept.features),
        counts,
        tuple(joined(torch.zeros_like(isolator).repeat(images, 1), layer) for layer in kept.deepstack_features),
        kept.lost,
    )


def _image_starts(places: Places, context: VisualContext) -> tuple[Tensor, list[int]]:
    """The first placeholder of each image, long `(images,)`, and the feature row that it belongs to."""
    if not context.dense:
        begins = torch.ones_like(places.group, dtype=torch.bool)
        begins[1:] = places.group.diff() != 0
        start = begins.nonzero().squeeze(1)
        return start, places.feature_row[start].tolist()
    # A single copy to the host, of one number per row.
    group = context.group.tolist()
    rows = [row for row in range(len(group)) if row == 0 or group[row] != group[row - 1]]
    return torch.tensor(rows, dtype=torch.long, device=places.group.device) * context.shape[1], rows
