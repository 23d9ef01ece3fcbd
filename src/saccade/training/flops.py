"""Floating-point operations of training in closed form.

A multiplication and an addition are two operations. Only matrix products and convolutions are counted; the rest, well
below one percent in a real model, is not, nor is selecting and merging tokens. `attention="full"` counts scores
between all pairs of tokens, like `torch.utils.flop_counter`; "causal" counts those that a causal kernel has to
compute. Only shapes are read, so counting needs neither time nor memory.

Letters: d width, q width of all queries, k width of all keys, f width of the feed-forward network, L rows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedConfig

from saccade.errors import SaccadeError, one_of
from saccade.skip_vision import SkipVisionConfig
from saccade.skip_vision.config import amount_of

ATTENTIONS = ("full", "causal")
TRAINED = ("language", "projector")


@dataclass(frozen=True)
class VisualRows:
    """What an image becomes in the language model.

    Args:
        retained: tokens that go through every layer like text: all tokens, or those that a reducer keeps.
        summary: summary tokens, which also go through every layer.
        skipped: tokens that skip the feed-forward networks and leave the cache after the prompt.
    """

    retained: int
    summary: int = 0
    skipped: int = 0

    def __post_init__(self) -> None:
        for name, count in vars(self).items():
            if not isinstance(count, int) or isinstance(count, bool) or count < 0:
                raise SaccadeError(f"{name}={count!r}: give a number of rows, 0 or more")

    @property
    def total(self) -> int:
        """Number of tokens of the image in the prompt."""
        return self.retained + self.summary + self.skipped

    @property
    def kept(self) -> int:
        """Number of tokens of the image in the cache after the prompt."""
        return self.retained + self.summary


def skip_rows(config: SkipVisionConfig, tokens: int, sides: Sequence[int] = ()) -> VisualRows:
    """The tokens that Skip-Vision makes of one image.

    Args:
        tokens: visual tokens of the image; with `split="thumbnail"`, of one crop.
        sides: tokens along an edge of each scale, if the model has its own scales.
    """
    if config.split == "thumbnail":
        if config.skipped is None:
            raise SaccadeError("skipped=None: the number of crops next to a thumbnail varies, give a number of tokens")
        retained, rest = tokens, None
    elif config.split == "scale" and sides:
        retained, rest = tokens - sides[-1] ** 2, sides[-1] ** 2
        tokens = rest  # what a share refers to
    elif config.split == "scale":
        side = math.isqrt(tokens)
        if side * side != tokens:
            raise SaccadeError(f"tokens={tokens!r}: split='scale' pools a square grid, give a square number")
        retained, rest = sum(math.ceil(side / window) ** 2 for window in config.scales), tokens
    else:
        retained = min(max(1, amount_of(config.retained, tokens)), tokens)
        rest = tokens - retained
    skipped = rest if config.skipped is None else amount_of(config.skipped, tokens)
    skipped = skipped if rest is None else min(skipped, rest)
    summary = (1 + (skipped > 0)) * config.summary
    return VisualRows(retained, int(summary), skipped)


@dataclass(frozen=True)
class TextShape:
    """The dimensions that the cost of a decoder depends on."""

    layers: int
    width: int
    query_width: int
    key_width: int
    feed_forward: int
    vocabulary: int

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "TextShape":
        """The shape of a decoder with gated feed-forward networks: Llama, Mistral, Qwen, Gemma."""
        text = config.get_text_config()
        head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return cls(
            text.num_hidden_layers,
            text.hidden_size,
            head * text.num_attention_heads,
            head * text.num_key_value_heads,
            text.intermediate_size,
            text.vocab_size,
        )

    @property
    def attention_row(self) -> int:
        """Weights of a layer's attention: 2 d q + 2 d k."""
        return 2 * self.width * (self.query_width + self.key_width)

    @property
    def feed_forward_row(self) -> int:
        """Weights of a layer's gated feed-forward network: 3 d f."""
        return 3 * self.width * self.feed_forward

    @property
    def skipped_share(self) -> float:
        """The cost of weight products for a skipped token, as a share of that for any other token."""
        return self.attention_row / (self.attention_row + self.feed_forward_row)


def linear_flops(text: TextShape, rows: VisualRows, text_tokens: int = 0) -> int:
    """Products with the layers' weights for a prompt, treating the last layer like the others."""
    full = text_tokens + rows.kept
    return 2 * text.layers * ((full + rows.skipped) * text.attention_row + full * text.feed_forward_row)


def score_flops(text: TextShape, length: int, attention: str = "full") -> int:
    """Attention scores and weighted sums of all layers over `length` tokens."""
    if attention not in ATTENTIONS:
        raise SaccadeError(f"attention={attention!r} is unknown: {one_of(attention, ATTENTIONS)}")
    pairs = length**2 if attention == "full" else length * (length + 1) // 2
    return 2 * text.layers * 2 * pairs * text.query_width


def head_flops(text: TextShape, rows: int) -> int:
    """Logits of `rows` rows."""
    return 2 * rows * text.width * text.vocabulary


def training_flops(
    text: TextShape,
    rows: VisualRows,
    text_tokens: int,
    label_rows: int,
    trained: str = "language",
    attention: str = "full",
) -> int:
    """Forward and backward of the language model on one sample with one image.

    Every product y = W x costs the same again for the gradient of x, and once more for that of W if W is trained; the
    backward pass of scores and weighted sums costs twice their forward. Gradient checkpointing would add one forward.

    Args:
        label_rows: rows whose logits are computed.
        trained: "language", or "projector" with a frozen language model that gradients pass through.
    """
    if trained not in TRAINED:
        raise SaccadeError(f"trained={trained!r} is unknown: {one_of(trained, TRAINED)}")
    weights = 3 if trained == "language" else 2
    elided = 2 * rows.skipped * 2 * text.width * text.query_width
    length = rows.total + text_tokens
    linear = linear_flops(text, rows, text_tokens) - elided + head_flops(text, label_rows)
    return weights * linear + 3 * score_flops(text, length, attention)


def tower_flops(config: PreTrainedConfig, crops: int, grid: tuple[int, int]) -> int:
    """The vision tower on crops of `grid` patches (rows, columns): CLIP, SigLIP, Qwen3-VL, Qwen2.5-VL with windows.

    Every layer is counted, even if its output is not used, since stock models run it.
    """
    vision = config.vision_config
    width, patches = vision.hidden_size, grid[0] * grid[1]
    if hasattr(vision, "fullatt_block_indexes"):
        volume = 3 * vision.temporal_patch_size * vision.patch_size**2
        row = 4 * width**2 + 3 * width * vision.intermediate_size
        whole = sum(layer < vision.depth for layer in set(vision.fullatt_block_indexes))
        pairs = whole * patches**2 + (vision.depth - whole) * _window_pairs(vision, grid)
        return 2 * crops * (patches * (volume * width + vision.depth * row) + 2 * pairs * width)
    if hasattr(vision, "deepstack_visual_indexes"):
        volume = 3 * vision.temporal_patch_size * vision.patch_size**2
        row = 4 * width**2 + 2 * width * vision.intermediate_size
        return 2 * crops * (patches * (volume * width + vision.depth * row) + 2 * vision.depth * patches**2 * width)
    rows = patches + (vision.model_type == "clip_vision_model")  # and its class token
    row = 4 * width**2 + 2 * width * vision.intermediate_size
    embedding = patches * 3 * vision.patch_size**2 * width
    return 2 * crops * (embedding + vision.num_hidden_layers * (rows * row + 2 * rows**2 * width))


def projector_flops(config: PreTrainedConfig, crops: int, grid: tuple[int, int]) -> int:
    """The projector: LLaVA's two layers per patch, Qwen's mergers of square blocks of patches, or Chain-of-Sight's
    resampler."""
    vision, width = config.vision_config, config.get_text_config().hidden_size
    patches = crops * grid[0] * grid[1]
    if scales := getattr(config, "scales", None):
        return _resampler_flops(config, patches, scales)
    if hasattr(vision, "out_hidden_size") and hasattr(vision, "spatial_merge_size"):
        merged = vision.hidden_size * vision.spatial_merge_size**2
        mergers = 1 + len(getattr(vision, "deepstack_visual_indexes", ()))
        return 2 * mergers * (patches // vision.spatial_merge_size**2) * (merged**2 + merged * vision.out_hidden_size)
    return 2 * patches * (vision.hidden_size * width + width**2)


def _resampler_flops(config: PreTrainedConfig, patches: int, scales: Sequence[tuple[int, int]]) -> int:
    """Keys and values of each scale, queries once for each scale, attention, its output, and LLaVA's two layers."""
    width, text = config.vision_config.hidden_size, config.get_text_config().hidden_size
    row = tokens = pairs = 0
    for windows, queries in scales:
        row += 2 * patches + queries**2
        tokens += (windows * queries) ** 2
        pairs += patches * queries**2
    return 2 * (row * width**2 + 2 * pairs * width + tokens * (width**2 + width * text + text**2))


def _window_pairs(vision: PreTrainedConfig, grid: tuple[int, int]) -> int:
    """Pairs of patches within windows; windows at the right and the bottom edge may be smaller."""
    side = vision.window_size // vision.patch_size
    sizes = [[min(side, extent - start) for start in range(0, extent, side)] for extent in grid]
    return sum((height * width) ** 2 for height in sizes[0] for width in sizes[1])
