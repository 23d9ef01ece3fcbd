"""Saliency and keys for reducers, recorded from one attention block of the vision encoder while images are encoded.

Forward hooks on the block's query and key projections record their outputs. The model's own attention (SDPA or
FlashAttention) is unchanged, and attention matrices of the tower are never requested. The hooks live for one call,
store detached tensors and compute nothing during it, so a frozen tower, LoRA on the projections, gradient
checkpointing (whose second forward runs after the hooks are gone) and autocast make no difference.

Shapes: R images (crops, frames) of P patches, including a class token; H heads of width d.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from saccade.families.encoded import AttentionBlock, Call, Encoded, Patches
from saccade.families.tower import block_attention, tower_layers, used_layers
from saccade.interfaces import by_name, changed

FROM_ATTENTION = frozenset({"saliency", "keys"})
CHUNK_ELEMENTS = 2**25
READ = ("position_embeddings", "cu_seqlens", "cu_seq_lens_q", "attention_mask")
"""The arguments of an attention block that are taken into account."""
WITHOUT_EFFECT = frozenset(
    {"hidden_states", "position_ids", "max_seqlen", "cu_seq_lens_k", "max_length_q", "max_length_k"}
)
"""Arguments that need no handling: already reflected in queries, keys and rotary positions, or without effect on
values. Those of keys are those of queries, since the attention is an image's own."""


def encoder_block(tower: nn.Module, feature_layer: int | list[int]) -> AttentionBlock | None:
    """The block of a vision transformer whose output is `hidden_states[feature_layer]`; None for other towers.

    Of several feature layers, the deepest counts.
    """
    used = used_layers(tower, feature_layer)
    if used is None:
        return None
    # No block outputs the embeddings, so use the first one, which reads them.
    block = used[-1] if used else tower_layers(tower)[0]
    attention = block_attention(block)
    given = {"attention_mask"} & signature(type(block).forward).parameters.keys()
    given |= {"position_embeddings"} & signature(type(attention).forward).parameters.keys()
    embeddings = getattr(tower, "embeddings", None)
    has_class = any(getattr(embeddings, name, None) is not None for name in ("class_embedding", "cls_token"))
    heads = tower.config.num_attention_heads
    return AttentionBlock(attention, attention.q_proj, attention.k_proj, heads, has_class, frozenset(given))


@contextmanager
def watching(block: AttentionBlock | None) -> Iterator[list[Call]]:
    """Record the calls of `block` made by this thread; other threads may run the tower at the same time.

    Raises:
        SaccadeError: if the tower runs without calling the modules of the block, or passes them an unknown argument.
    """
    calls: list[Call] = []
    if block is None:
        yield calls
        return

    here = threading.get_ident()

    # Torch registers a hook and its `with_kwargs` flag in two steps, and removes them in two: a call from another
    # thread in between arrives without keywords.
    def start(module: nn.Module, args: tuple, kwargs: dict[str, Any] | None = None) -> None:
        if threading.get_ident() != here:
            return
        given = by_name(module.forward, args, kwargs or {})
        missing = sorted(block.given - given.keys())
        # Plain flags do not affect attention values; tensors, and tuples of tensors such as rotary positions, may.
        unknown = [name for name in given if name not in (*READ, *WITHOUT_EFFECT) and _holds_tensor(given[name])]
        if missing or unknown:
            what = f"without {missing[0]!r}" if missing else f"with {unknown[0]!r}, which is unknown"
            raise changed(f"{type(module).__name__} of the vision tower is called {what}")
        calls.append(Call(None, None, {name: given.get(name) for name in READ}))

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
def first_arguments(module: nn.Module | None) -> Iterator[list[Tensor]]:
    """Record the first argument of each call of `module` made by this thread."""
    taken: list[Tensor] = []
    here = threading.get_ident()
    if module is None:
        yield taken
        return

    def take(module: nn.Module, args: tuple, kwargs: dict[str, Any] | None = None) -> None:
        if threading.get_ident() == here:
            taken.append(next(iter((*args, *(kwargs or {}).values()))))

    handle = module.register_forward_pre_hook(take, with_kwargs=True)
    try:
        yield taken
    finally:
        handle.remove()


def read_attention(call: Call, block: AttentionBlock, fields: frozenset[str]) -> dict[str, Tensor]:
    """Saliency `(R, P, 1)` and keys `(R, P, d)` of one call, in float32."""
    queries, keys = call.queries, call.keys
    if block.query is block.key:
        queries, keys = queries.chunk(3, dim=-1)[:2]
    packed = queries.dim() == 2
    if packed:
        queries, keys = queries.unsqueeze(0), keys.unsqueeze(0)
    if queries.dim() == 3:
        queries, keys = (value.unflatten(-1, (block.heads, -1)) for value in (queries, keys))
    queries, keys = queries.float(), keys.float()  # (R, P, H, d)
    if call.given["position_embeddings"] is not None:
        cos, sin = (value.detach().float() for value in call.given["position_embeddings"])
        # DINOv3 rotates patches only: the class token and the registers before them have an angle of zero.
        before = (0, 0, queries.shape[1] - cos.shape[-2], 0)
        cos = torch.nn.functional.pad(cos, before, value=1.0).unsqueeze(-2)
        sin = torch.nn.functional.pad(sin, before).unsqueeze(-2)
        queries, keys = (value * cos + _rotate_half(value, block.axes) * sin for value in (queries, keys))
    values = {}
    if "keys" in fields:
        values["keys"] = keys.mean(dim=2)
    if "saliency" in fields:
        queries, keys = queries.transpose(1, 2), keys.transpose(1, 2)  # (R, H, P, d)
        if block.scale is not None:
            queries = queries * (block.scale * queries.shape[-1] ** 0.5)
        real = _real_patches(call.given["attention_mask"], keys)
        if block.class_token:
            saliency = class_attention(queries[:, :, 0], keys, real)
        elif (borders := _borders(call.given)) is not None:
            saliency = _packed_attention(queries, keys, borders)
        else:
            saliency = attention_received(queries, keys, real)
        values["saliency"] = saliency.unsqueeze(2)
    return values


def class_attention(query: Tensor, keys: Tensor, real: Tensor | None = None) -> Tensor:
    """Attention from the class token to each patch, including itself, averaged over heads: `(R, P)`.

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

    The attention matrices are computed for a chunk of queries at a time and are never in memory as a whole.

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


def _borders(given: dict[str, Any]) -> Tensor | None:
    """Where the images of a packed sequence begin and end; None if it is not packed.

    They are passed as such, under one name or the other, or as a mask `(1, 1, P, P)` of blocks on the diagonal.
    """
    for name in ("cu_seqlens", "cu_seq_lens_q"):
        if given[name] is not None:
            return given[name]
    mask = given["attention_mask"]
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[-2] != mask.shape[-1] or len(mask) != 1:
        return None
    allowed = mask[0, 0] if mask.dtype == torch.bool else mask[0, 0] > torch.finfo(mask.dtype).min / 2
    # Patches of one image have the same first patch, the image's own.
    _, lengths = allowed.int().argmax(dim=1).unique_consecutive(return_counts=True)
    blocks = torch.block_diag(*(torch.ones(n, n, dtype=torch.bool) for n in lengths.tolist())).to(allowed.device)
    return torch.nn.functional.pad(lengths.cumsum(dim=0), (1, 0)) if torch.equal(blocks, allowed) else None


def _packed_attention(queries: Tensor, keys: Tensor, borders: Tensor) -> Tensor:
    """`attention_received` within each piece of a packed sequence: `(1, S)` from `(1, H, S, d)`."""
    lengths = borders.diff().tolist()
    if len(set(lengths)) == 1:  # pieces of equal length form a batch
        batched = [value.squeeze(0).unflatten(1, (len(lengths), -1)).transpose(0, 1) for value in (queries, keys)]
        return attention_received(*batched).reshape(1, -1)
    pieces = zip(queries.split(lengths, dim=2), keys.split(lengths, dim=2), strict=True)
    return torch.cat([attention_received(*piece) for piece in pieces], dim=1)


def _real_patches(mask: Any, keys: Tensor) -> Tensor | None:
    """bool `(R, P)` from the attention mask passed to the block, or None if all patches are real."""
    if not isinstance(mask, Tensor) or mask.shape[-1] != keys.shape[2]:
        return None
    if mask.dim() == 4:  # (R, 1, P, P): what each patch attends to; no patch attends to padding
        allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        return allowed.any(dim=(1, 2)).expand(keys.shape[0], -1)
    return mask.bool().expand(keys.shape[0], -1) if mask.dim() == 2 else None


def _rotate_half(x: Tensor, axes: int) -> Tensor:
    first, second = x.unflatten(-1, (axes, 2, -1)).unbind(dim=-2)
    return torch.stack((-second, first), dim=-2).flatten(-3)


def pool_patches(patches: list[Patches], encoded: Encoded) -> Tensor:
    """Convert values of patches to values of visual tokens `(R, N, C)`, where each row is one image of the tower.

    The class token is left out unless the features include it. Where a connector merges blocks of m x m patches (pixel
    shuffle, pooling), a token gets their mean.

    Raises:
        ValueError: if the patches of a row do not correspond to its tokens in one of these ways.
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
