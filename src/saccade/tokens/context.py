"""What a reducer sees: the visual tokens of a batch of images, one row per image, crop or frame."""

import math
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

PER_ROW = frozenset({"grid", "group", "sample", "video", "seed", "words"})
"""The fields of a context that have one value per row, not per token."""


@dataclass(frozen=True)
class VisualContext:
    """The visual tokens of B rows (images, crops or frames), and what a reducer may ask to know about them.

    Args:
        features: `(B, N, D)` what the language model would receive, after the projector.
        encoder_features: `(B, N, Dv)` the vision tower's output, before the projector.
        valid: bool `(B, N)`, false on padding. If omitted, all tokens are valid.
        grid: long `(B, 3)`, frames, rows and columns of tokens after any patch merging. If omitted, one frame: a
            square if N is a square number, a single row otherwise.
        group: long `(B,)`, the image or video that a row belongs to, for budgets shared by crops or frames.
        sample: long `(B,)`, the sample that a row belongs to, for budgets shared by its images.
        video: bool `(B,)`, whether a row is of a video, or may be: its frames, and rows that share a budget with it,
            then follow one another in time, as the crops of an image do not. If omitted, all may be.
        seed: long `(B,)`, the row's seed for stochastic reducers. If omitted, they derive one from the features.
        saliency: `(B, N)`, how much attention the encoder pays to each token.
        keys: `(B, N, Dk)`, the encoder's attention keys.
        relevance: `(B, N)`, how relevant each token is to the user's words.
        word_relevance: `(B, N, W)`, similarity of each token to each of the user's words.
        words: long `(B,)`, how many words the row has in `word_relevance`; the columns after them are padding. By
            default, all columns are words.
        protected: bool `(B, N)`, tokens that are not part of the image, such as the newlines of anyres images. The
            other tokens fill the grid. Reducers never see protected tokens: `saccade.reducers.reduce` handles them.
        absent: bool `(B, N)`, tokens of the image that were dropped before the vision tower: they have a place in the
            grid and in the full sequence, but no features, or none that may be used. Reducers never see them either.

    `encoder_features`, `saliency`, `keys`, `relevance` and `word_relevance`, with `words`, are set only when the
    reducer's `needs` names them. A context is never modified after it is made: `replace` returns a new one.

    Raises:
        ValueError: if a tensor's leading shape does not match `features`, or `valid` is not bool.
    """

    features: Tensor
    encoder_features: Tensor | None = None
    valid: Tensor | None = None
    grid: Tensor | None = None
    group: Tensor | None = None
    sample: Tensor | None = None
    video: Tensor | None = None
    seed: Tensor | None = None
    saliency: Tensor | None = None
    keys: Tensor | None = None
    relevance: Tensor | None = None
    word_relevance: Tensor | None = None
    words: Tensor | None = None
    protected: Tensor | None = None
    absent: Tensor | None = None
    dense: bool = field(init=False)
    """Whether every token is valid; known without reading device memory."""
    single_frame: bool = field(init=False)
    """Whether no grid was given, so that every row is one frame; known without reading device memory."""

    def __post_init__(self) -> None:
        if self.features.dim() != 3:
            raise ValueError(f"features has shape {tuple(self.features.shape)}, expected (rows, tokens, width)")
        rows, tokens, _ = self.features.shape
        device = self.features.device
        # The dataclass is frozen, so defaults that depend on `features` are set below, bypassing `__setattr__`.
        known = {"dense": self.valid is None, "single_frame": self.grid is None}
        if self.valid is None:
            known["valid"] = torch.ones(rows, tokens, dtype=torch.bool, device=device)
        elif self.valid.dtype != torch.bool:
            raise ValueError(f"valid is {self.valid.dtype}, expected torch.bool")
        if self.grid is None:
            side = math.isqrt(tokens)
            shape = (1, side, side) if side * side == tokens else (1, 1, tokens)
            known["grid"] = torch.tensor(shape, dtype=torch.long, device=device).expand(rows, 3)
        if self.group is None:
            known["group"] = torch.arange(rows, device=device)
        for name, value in known.items():
            object.__setattr__(self, name, value)
        for name in (entry.name for entry in fields(self) if entry.init):
            value = getattr(self, name)
            shape = (rows, tokens) if name not in PER_ROW else (rows, 3) if name == "grid" else (rows,)
            if value is not None and tuple(value.shape[: len(shape)]) != shape:
                raise ValueError(f"{name} has shape {tuple(value.shape)}, expected it to start with {shape}")

    @property
    def shape(self) -> torch.Size:
        """`(B, N, D)`."""
        return self.features.shape

    def replace(self, **changes: Any) -> "VisualContext":
        """A copy with some fields replaced; a dense context stays dense unless `valid` is given."""
        return VisualContext(**{**self._given(), **changes})

    def without_absent(self) -> "VisualContext":
        """The context that a reducer sees: absent tokens are padding.

        The other tokens of such a row no longer fill its grid, so they are taken as one line, in raster order.
        """
        if self.absent is None:
            return self
        left = self.valid & ~self.absent
        line = torch.ones_like(self.grid)
        line[:, 2] = left.sum(dim=1)
        lacks = (self.valid & self.absent).any(dim=1, keepdim=True)
        return self.replace(valid=left, grid=torch.where(lacks, line, self.grid), absent=None)

    def select_rows(self, rows: Tensor | slice) -> "VisualContext":
        """The context of the given rows only; `rows` is a long or bool index over B, or a slice (no copy)."""
        return VisualContext(**{name: value[rows] for name, value in self._given().items() if value is not None})

    def _given(self) -> dict[str, Tensor | None]:
        """The constructor arguments that reproduce this context."""
        left_out = {"valid"} if self.dense else set()
        left_out |= {"grid"} if self.single_frame else set()
        names = [entry.name for entry in fields(self) if entry.init and entry.name not in left_out]
        return {name: getattr(self, name) for name in names}
