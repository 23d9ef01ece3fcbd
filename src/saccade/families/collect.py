"""What reducers ask of the vision encoder, read off one attention block while the images are encoded anyway.

Two forward hooks on the block's query and key projections take what they return; attention itself stays the model's
own, SDPA or FlashAttention, and no attention matrix of the whole tower is ever asked for. The hooks live for one call,
take detached tensors and compute nothing during it, so a frozen tower, LoRA on the projections, gradient checkpointing
(whose second forward runs after they are gone) and autocast make no difference.

Shapes: R images (crops, frames) of P patches, class token included; H heads of width d.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from saccade.errors import SaccadeError
from saccade.families.question import load_reader
from saccade.families.relevance import load_text_tower, row_samples
from saccade.families.tower import used_layers
from saccade.interfaces import by_name, changed, installed
from saccade.reducers import PROJECTION, check_resolution_budget
from saccade.tokens import TokenBudget, VisualContext

if TYPE_CHECKING:
    from saccade.families.base import Encoded, Family
    from saccade.families.question import Reader
    from saccade.families.relevance import TextTower
    from saccade.reducers import Reducer

FROM_ATTENTION = frozenset({"saliency", "keys"})
CHUNK_ELEMENTS = 2**25
READ = ("position_embeddings", "cu_seqlens", "attention_mask")
"""What is taken into account of what an attention block is given."""
WITHOUT_EFFECT = frozenset({"hidden_states", "max_seqlen"})
"""Further arguments, which queries and keys show already or which change no value."""


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


@dataclass
class Patches:
    """One value per patch, as the tower ordered them.

    Args:
        values: `(R, P, C)`, or `(1, S, C)` where the tower packs the patches of all images into one sequence.
        class_token: whether the first of the P is a class token.
    """

    values: Tensor
    class_token: bool


@dataclass
class _Call:
    """What one call of the block was given and computed."""

    queries: Tensor | None = None
    keys: Tensor | None = None
    given: dict[str, Any] = field(default_factory=dict)


def encode_for(
    family: "Family",
    reducer: "Reducer",
    inputs: Mapping[str, Any],
    budget: TokenBudget,
    labels: Tensor | None = None,
    also: frozenset[str] = frozenset(),
) -> "Encoded":
    """Encode the images of `inputs` with what `reducer` and `budget` need to know about them.

    For a reducer that works on smaller images those are encoded, and the full ones are not.

    Args:
        labels: long `(B, L)` of a training batch, so that relevance is computed without the answers.
        also: needs of whoever else uses the encoding.

    Raises:
        SaccadeError: if the family cannot give what is needed.
    """
    check_resolution_budget(reducer, budget)
    encoded = _encode_for(family, reducer, inputs, budget, labels, also)
    if budget.per == "sample":
        encoded.context.sample = row_samples(encoded, family.placeholder(inputs["input_ids"]))
    return encoded


def _encode_for(
    family: "Family",
    reducer: "Reducer",
    inputs: Mapping[str, Any],
    budget: TokenBudget,
    labels: Tensor | None,
    also: frozenset[str],
) -> "Encoded":
    needs = also if budget.keeps_all else also | reducer.needs
    tower, words = None, None
    tokenizer = getattr(reducer, "tokenizer", None)
    if "relevance" in needs and getattr(reducer, "text_tower", None):
        tokenizer = tokenizer or family.model.name_or_path
        if not tokenizer:
            raise SaccadeError(
                "text_tower: the words are read with the language model's tokenizer, and this model came from no "
                "folder; give the tokenizer's folder as the reducer's option 'tokenizer'"
            )
        tower = load_text_tower(str(reducer.text_tower), str(tokenizer))
    elif "relevance" in needs and tokenizer:
        words = load_reader(str(tokenizer))
    return family.encode(inputs, needs, labels=labels, text_tower=tower, reader=words, budget=budget)


def check_tower_gives(family: "Family", needs: frozenset[str]) -> None:
    """Check that the vision tower of a family gives what is needed, as far as that shows without images.

    Raises:
        SaccadeError: naming the model, what it does not give, and a way out.
    """
    if "low_resolution" in needs and not family.lowers_resolution:
        family._encode_low_resolution({}, TokenBudget())  # says why it cannot
    _needed_block(family, needs)


def _needed_block(family: "Family", needs: frozenset[str]) -> AttentionBlock | None:
    """The block to watch, or None where nothing of it is needed.

    Raises:
        SaccadeError: if the family has none, or cannot merge before its projector where that is needed.
    """
    if PROJECTION in needs and not family.projects_tokens:
        family.project(torch.empty(0))  # says why it cannot
    wanted = needs & FROM_ATTENTION
    block = family.attention_block() if wanted else None
    if wanted and block is None:
        raise _cannot(family, " and ".join(sorted(wanted)))
    return block


def encode_collecting(
    family: "Family",
    inputs: Mapping[str, Any],
    needs: frozenset[str],
    labels: Tensor | None,
    text_tower: "TextTower | None",
    reader: "Reader | None",
    budget: TokenBudget | None,
) -> "Encoded":
    """`Family.encode` where something is needed.

    Raises:
        SaccadeError: if the family cannot give what is needed.
    """
    if "low_resolution" in needs:
        if budget is None or needs != {"low_resolution"}:
            raise ValueError(f"needs={sorted(needs)}: a lower resolution takes a budget, and goes with nothing else")
        return family._encode_low_resolution(inputs, budget)
    if text_tower is not None and "relevance" in needs:
        needs = needs | {"encoder_features"}
    block = _needed_block(family, needs)
    entry = family.projector_entry if "encoder_features" in needs else None
    with _watching(block) as calls, _given_first(entry) as given:
        encoded = family._encode(inputs)
    context = encoded.context
    if entry is not None:
        if not given:
            raise changed(f"the projector did not call its {type(entry).__name__}")
        # With their gradient, which a merge before the projector hands on to a tower that trains.
        values = family.patches_to_tokens([Patches(value, False) for value in given], encoded, inputs)
        context.encoder_features = _of_tokens("encoder_features", values, context)
    with torch.no_grad(), torch.autocast(context.features.device.type, enabled=False):
        if block is not None:
            seen = [_read(call, block, needs) for call in calls]
            for name in sorted(needs & FROM_ATTENTION):
                patches = [Patches(values[name], block.class_token) for values in seen]
                values = _of_tokens(name, family.patches_to_tokens(patches, encoded, inputs), context)
                setattr(context, name, values.squeeze(2) if name == "saliency" else values)
        if "relevance" in needs:
            context.relevance = family.text_relevance(encoded, inputs, labels, text_tower, reader)
    return encoded


def _of_tokens(name: str, values: Tensor, context: VisualContext) -> Tensor:
    """`values`, which have to be `(R, N, C)`."""
    if values.shape[:2] != context.shape[:2]:
        raise ValueError(f"{name} has shape {tuple(values.shape)}, features {tuple(context.shape)}")
    return values


def _cannot(family: "Family", what: str) -> SaccadeError:
    model_type = family.model.config.model_type
    return SaccadeError(
        f"model_type={model_type!r} of transformers {installed('transformers')} gives no {what}: use a reducer that "
        "`saccade reducers` lists without"
    )


def encoder_block(tower: nn.Module, feature_layer: int | list[int]) -> AttentionBlock | None:
    """The block of a CLIP or SigLIP tower whose output is `hidden_states[feature_layer]`; None for other towers.

    Of several layers it is the last, the one nearest to the language model.
    """
    used = used_layers(tower, feature_layer)
    if used is None:
        return None
    # No block gives the embeddings: the first one reads them.
    attention = (used[-1] if used else tower.encoder.layers[0]).self_attn
    has_class = hasattr(tower.embeddings, "class_embedding")
    given = frozenset({"attention_mask"})
    return AttentionBlock(attention, attention.q_proj, attention.k_proj, attention.num_heads, has_class, given)


@contextmanager
def _watching(block: AttentionBlock | None) -> Iterator[list[_Call]]:
    """Collects the calls of `block` that this thread makes; others may run the tower at the same time.

    Raises:
        SaccadeError: if the tower runs without calling the modules of the block, or gives them something unknown.
    """
    calls: list[_Call] = []
    if block is None:
        yield calls
        return

    here = threading.get_ident()

    def start(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if threading.get_ident() != here:
            return
        given = by_name(module.forward, args, kwargs)
        missing = sorted(block.given - given.keys())
        # Flags decide about no value of an attention; tensors, and the pairs of them that rotary positions are, do.
        unknown = [name for name in given if name not in (*READ, *WITHOUT_EFFECT) and _holds_tensor(given[name])]
        if missing or unknown:
            what = f"without {missing[0]!r}" if missing else f"with {unknown[0]!r}, which is unknown"
            raise changed(f"{type(module).__name__} of the vision tower is called {what}")
        calls.append(_Call(given={name: given.get(name) for name in READ}))

    def take_queries(module: nn.Module, args: tuple, output: Tensor) -> None:
        if calls and threading.get_ident() == here:
            calls[-1].queries = output.detach()

    def take_keys(module: nn.Module, args: tuple, output: Tensor) -> None:
        if calls and threading.get_ident() == here:
            calls[-1].keys = output.detach()

    handles = [
        block.attention.register_forward_pre_hook(start, with_kwargs=True),
        block.query.register_forward_hook(take_queries),
        block.key.register_forward_hook(take_keys),
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
    if not calls or any(call.queries is None or call.keys is None for call in calls):
        raise changed(f"the vision tower ran without calling {type(block.attention).__name__} and its projections")


def _holds_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, (tuple, list)) and any(map(_holds_tensor, value)))


@contextmanager
def _given_first(module: nn.Module | None) -> Iterator[list[Tensor]]:
    """Collects the first argument of each call of `module` that this thread makes."""
    taken: list[Tensor] = []
    here = threading.get_ident()
    if module is None:
        yield taken
        return

    def take(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if threading.get_ident() == here:
            taken.append(next(iter((*args, *kwargs.values()))))

    handle = module.register_forward_pre_hook(take, with_kwargs=True)
    try:
        yield taken
    finally:
        handle.remove()


def _read(call: _Call, block: AttentionBlock, needs: frozenset[str]) -> dict[str, Tensor]:
    """Saliency `(R, P, 1)` and keys `(R, P, d)` of one call, in float32."""
    queries, keys = call.queries, call.keys
    if block.query is block.key:
        queries, keys = queries.chunk(3, dim=-1)[:2]
    packed = queries.dim() == 2
    if packed:
        queries, keys = queries.unsqueeze(0), keys.unsqueeze(0)
    queries, keys = (value.unflatten(-1, (block.heads, -1)).float() for value in (queries, keys))  # (R, P, H, d)
    if call.given["position_embeddings"] is not None:
        cos, sin = (value.detach().float().unsqueeze(-2) for value in call.given["position_embeddings"])
        queries, keys = (value * cos + _rotate_half(value) * sin for value in (queries, keys))
    values = {}
    if "keys" in needs:
        values["keys"] = keys.mean(dim=2)
    if "saliency" in needs:
        queries, keys = queries.transpose(1, 2), keys.transpose(1, 2)  # (R, H, P, d)
        real = _real_patches(call.given["attention_mask"], keys)
        if block.class_token:
            saliency = class_attention(queries[:, :, 0], keys, real)
        elif call.given["cu_seqlens"] is not None:
            saliency = _packed_attention(queries, keys, call.given["cu_seqlens"])
        else:
            saliency = attention_received(queries, keys, real)
        values["saliency"] = saliency.unsqueeze(2)
    return values


def class_attention(query: Tensor, keys: Tensor, real: Tensor | None = None) -> Tensor:
    """Attention that the class token pays to each patch, itself included, averaged over heads: `(R, P)`.

    Args:
        query: of the class token, `(R, H, d)`.
        keys: `(R, H, P, d)`.
        real: bool `(R, P)`, false on padding, or None.
    """
    score = (keys @ query.unsqueeze(3)).squeeze(3) / query.shape[-1] ** 0.5
    if real is not None:
        score = score.masked_fill(~real.unsqueeze(1), -torch.inf)
    return score.softmax(dim=2).mean(dim=1)


def attention_received(queries: Tensor, keys: Tensor, real: Tensor | None = None) -> Tensor:
    """Attention that each patch receives, averaged over heads and queries: `(R, P)`.

    The attention matrices are computed for a chunk of queries at a time and never stand in memory as a whole.

    Args:
        queries: `(R, H, P, d)`.
        keys: `(R, H, P, d)`.
        real: bool `(R, P)`, false on padding, or None.
    """
    rows, heads, patches, width = queries.shape
    total = torch.zeros(rows, patches, device=queries.device)
    step = max(1, CHUNK_ELEMENTS // max(1, rows * heads * patches))
    for start in range(0, patches, step):
        score = queries[:, :, start : start + step] @ keys.transpose(2, 3) / width**0.5
        if real is not None:
            score = score.masked_fill(~real[:, None, None], -torch.inf)
        attention = score.softmax(dim=3)
        if real is not None:
            attention = attention * real[:, None, start : start + step, None]
        total += attention.sum(dim=(1, 2))
    count = patches if real is None else real.sum(dim=1, keepdim=True).clamp(min=1)
    return total / (heads * count)


def _packed_attention(queries: Tensor, keys: Tensor, borders: Tensor) -> Tensor:
    """`attention_received` within each piece of a packed sequence: `(1, S)` from `(1, H, S, d)`."""
    lengths = borders.diff().tolist()
    if len(set(lengths)) == 1:  # pieces of one length are a batch
        batched = [value.squeeze(0).unflatten(1, (len(lengths), -1)).transpose(0, 1) for value in (queries, keys)]
        return attention_received(*batched).reshape(1, -1)
    pieces = zip(queries.split(lengths, dim=2), keys.split(lengths, dim=2), strict=True)
    return torch.cat([attention_received(*piece) for piece in pieces], dim=1)


def _real_patches(mask: Any, keys: Tensor) -> Tensor | None:
    """bool `(R, P)` from the attention mask that the block was given, or None where all patches are real."""
    if not isinstance(mask, Tensor) or mask.shape[-1] != keys.shape[2]:
        return None
    if mask.dim() == 4:  # (R, 1, P, P): what the patches attend to; padding is attended to by none
        allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        return allowed.any(dim=(1, 2)).expand(keys.shape[0], -1)
    return mask.bool().expand(keys.shape[0], -1) if mask.dim() == 2 else None


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def pool_patches(patches: list[Patches], encoded: "Encoded") -> Tensor:
    """Values of patches as values of visual tokens `(R, N, C)`, where each row is one image of the tower.

    The class token is left out, unless the features have it too. Where a connector merges blocks of m x m patches
    (pixel shuffle, pooling), a token gets their mean.

    Raises:
        ValueError: if the patches of a row do not stand for its tokens in one of these ways.
    """
    context = encoded.context
    values = torch.cat([entry.values for entry in patches])
    rows, tokens = context.shape[:2]
    if patches[0].class_token and values.shape[1] != tokens:
        values = values[:, 1:]
    if values.shape[:2] == (rows, tokens):
        return values
    shape = tuple(values.shape)
    merged, remainder = divmod(values.shape[1], max(tokens, 1))
    factor = round(merged**0.5)
    _, height, width = context.grid[0].tolist() if rows else (1, 1, 1)
    if shape[0] != rows or remainder or factor * factor != merged or height * width != tokens:
        raise ValueError(f"{shape[0]} x {shape[1]} patches do not pool to {rows} rows of {tokens} tokens")
    blocks = values.reshape(rows, height, factor, width, factor, -1)
    return blocks.mean(dim=(2, 4)).reshape(rows, tokens, -1)
