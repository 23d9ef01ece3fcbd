"""Batches without padding: sequences packed into one; attention stays within each.

Shapes: B rows, S tokens in the padded batch, T tokens of all rows without padding.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_flash_attention_utils import _flash_attention_forward

from saccade.errors import SaccadeError
from saccade.families import Family
from saccade.interfaces import changed, check_takes
from saccade.pruning import ModeInputs
from saccade.tokens import IGNORE_INDEX

PACKED = "saccade_packed"
"""Name of the attention implementation that `allow_packing` sets. Without packed rows it is SDPA."""
KEYWORD = "packed_rows"
FLASH = ("flash_attention_2", "flash_attention_3", "flash_attention_4")
"""Stock implementations that support packed rows."""
FLASH_KEYWORDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""The keyword arguments by which they receive them."""
SHORT, BLOCK = 1024, 256
"""Tokens of a row up to which plain products take the place of SDPA on a CPU in bfloat16, and queries of one product.
Longer rows would keep too many weights for the backward pass."""


@dataclass
class PackedRows:
    """The boundaries of the rows of a packed batch.

    Args:
        lengths: number of tokens of each row.
        ends: int32 `(B + 1,)`, 0 followed by the cumulative sum of the lengths.
        attended: how many calls of `packed_attention` have used them.
    """

    lengths: list[int]
    ends: Tensor
    attended: int = 0


def allow_packing(family: Family) -> None:
    """Make the language model accept packed rows. Padded batches and generation run as before."""
    config = family.language_model.config
    kind = config._attn_implementation
    if kind not in (PACKED, "sdpa", *FLASH):
        raise SaccadeError(f"padding_free=True with attn_implementation={kind!r}: use 'sdpa' or 'flash_attention_2'")
    check_packing(family)
    if kind in FLASH:
        check_takes(_flash_attention_forward, FLASH_KEYWORDS)
    if kind == "sdpa":
        config._attn_implementation = PACKED


def check_packing(family: Family) -> None:
    """Check that all layers use full causal attention. Weights are not needed."""
    if not _simply_causal(family):
        raise SaccadeError(
            f"padding_free=True: model_type={family.model.config.model_type!r} with a language model of "
            f"{family.language_model.config.model_type!r} has layers whose attention is not simply causal, which "
            "packed rows do not cover; set it to false, group_by='shortened' saves padding too"
        )


def packing_pays(family: Family, device: torch.device) -> bool:
    """Whether rows can be packed, on a device where that was measured to be faster: a CPU."""
    kind = family.language_model.config._attn_implementation
    return device.type == "cpu" and kind in (PACKED, "sdpa") and _simply_causal(family)


def _simply_causal(family: Family) -> bool:
    config = family.language_model.config
    types = set(getattr(config, "layer_types", None) or ())
    # Models like Mistral have no layer types, and a sliding window in every layer.
    windowed = not types and getattr(config, "sliding_window", None) is not None
    return not (types - {"full_attention"} or windowed or family.bidirectional_image_attention)


def pack(laid: ModeInputs, family: Family) -> ModeInputs:
    """Pack the rows into one without padding: `(1, T)` from `(B, S)`.

    Each row keeps its positions, and the first token of a row is not a label for the previous row.
    """
    inputs = dict(laid.inputs)
    mask = inputs["attention_mask"].bool()
    positions = inputs.get("position_ids")
    if positions is None:
        positions = family.full_positions(inputs)
    lengths = mask.sum(dim=1)
    ends = torch.nn.functional.pad(lengths.cumsum(dim=0), (1, 0))
    for name in {"input_ids", *family.token_inputs} & inputs.keys():
        inputs[name] = _behind_one_another(inputs[name], mask)
    inputs["position_ids"] = _behind_one_another(positions, mask)
    labels = _behind_one_another(laid.labels, mask).index_fill(1, ends[:-1], IGNORE_INDEX)
    rows = PackedRows(lengths.tolist(), ends.to(torch.int32))
    return ModeInputs({**inputs, **_attention_inputs(rows, family, labels.device)}, labels, laid.tokens)


def _behind_one_another(values: Tensor, mask: Tensor) -> Tensor:
    """Per-token values `(..., B, S)` as `(..., 1, T)`."""
    return values[..., mask].unsqueeze(-2)


def _attention_inputs(rows: PackedRows, family: Family, device: torch.device) -> Mapping[str, Any]:
    if family.language_model.config._attn_implementation == PACKED:
        # A four-dimensional mask is passed through unchanged, so that no T x T mask is made.
        return {"attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device), KEYWORD: rows}
    longest = max(rows.lengths)
    return {"attention_mask": None, **dict(zip(FLASH_KEYWORDS, (rows.ends, rows.ends, longest, longest), strict=True))}


def packed_states(laid: ModeInputs, family: Family) -> Tensor:
    """Last hidden states `(1, T, D)` of a batch made by `pack`."""
    states = family.hidden_states(**laid.inputs)
    rows, layers = laid.inputs.get(KEYWORD), len(family.language_layers)
    if rows is not None and rows.attended < layers:
        raise changed(f"only {rows.attended} of {layers} decoder layers passed {KEYWORD!r} on to their attention")
    return states


# It loops over rows, whose number and lengths change from batch to batch.
@torch.compiler.disable
def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packed_rows: PackedRows | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each row, or SDPA without `packed_rows`.

    Args:
        query: `(1, H, T, Dh)`; key and value `(1, Hk, T, Dh)`, where Hk divides H.

    Returns:
        `(1, T, H, Dh)`.
    """
    if packed_rows is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    packed_rows.attended += 1
    if torch.is_autocast_enabled(query.device.type):
        # Rotary embeddings return float32, which autocast would cast for SDPA.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (x.to(dtype) for x in (query, key, value))
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and not dropout:
        # Torch implements variable-length attention for CUDA only.
        return _variable_length_attention(query, key, value, scaling, packed_rows), None
    rows = zip(*(x.split(packed_rows.lengths, dim=2) for x in (query, key, value)), strict=True)
    plain = query.device.type == "cpu" and query.dtype == torch.bfloat16 and not dropout
    outputs = [
        _short_attention(*row, scaling)
        if plain and length <= SHORT
        else sdpa_attention_forward(module, *row, None, dropout=dropout, scaling=scaling, is_causal=True)[0]
        for length, row in zip(packed_rows.lengths, rows, strict=True)
    ]
    return torch.cat(outputs, dim=1), None


def _variable_length_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, rows: PackedRows
) -> Tensor:
    """Causal attention `(1, T, H, Dh)` within each row, by one kernel."""
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # (T, heads, Dh)
    shared, options = query.shape[1] // key.shape[1], {}
    if shared > 1 and "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options["enable_gqa"] = True
    elif shared > 1:
        # Torch 2.11 takes as many keys as queries only.
        key, value = (x.repeat_interleave(shared, dim=1) for x in (key, value))
    ends, longest = rows.ends, max(rows.lengths)
    output = varlen_attn(
        query, key, value, ends, ends, longest, longest, scale=scaling, window_size=(-1, 0), **options
    )
    return output.unsqueeze(0)


def _short_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """Causal attention `(1, L, H, Dh)` of a short row, by products of a block of queries and the keys up to its end:
    faster than SDPA on a CPU in bfloat16."""
    _, heads, length, width = query.shape
    shared = heads // key.shape[1]
    # The heads that share a key become more queries of it.
    grouped, turned = query.unflatten(1, (-1, shared))[0], key[0].transpose(1, 2)  # (Hk, G, L, Dh), (Hk, Dh, L)
    outputs = []
    for start in range(0, length, BLOCK):
        end = min(start + BLOCK, length)
        block = grouped[:, :, start:end].flatten(1, 2)  # (Hk, G * B, Dh)
        later = query.new_full((end - start, end), -torch.inf).triu(start + 1).repeat(shared, 1)
        scores = torch.baddbmm(later, block, turned[..., :end], alpha=width**-0.5 if scaling is None else scaling)
        weighted = scores.softmax(dim=-1) @ value[0, :, :end]
        outputs.append(weighted.unflatten(1, (shared, -1)).flatten(0, 1))  # (H, B, Dh)
    return torch.cat(outputs, dim=1).unsqueeze(0).transpose(1, 2)


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
