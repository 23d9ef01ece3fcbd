"""Every option of Skip-Vision (arXiv 2503.21817), and its published budgets by name."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from saccade.companions import read_companion
from saccade.errors import SaccadeError, check_options, one_of
from saccade.reducers import Needs, get_reducer
from saccade.skip_vision.summary import SUMMARY_FILE
from saccade.values import NEWLINES, check_choice

SPLITS = ("cls_attention", "thumbnail", "scale")
MERGE_ORDERS = ("published", "raster")
TEXT_VISIBILITIES = ("all", "prompt_only", "none")


@dataclass
class SkipVisionConfig:
    """
    Which visual tokens a language model skips, and what it does about them.

    Counts are per image, or per crop where text stands between crops. An int is a number of tokens; a float is a share
    of the image's tokens or, under `split="thumbnail"`, of the thumbnail's. The defaults are the published 100 and 156
    of 576, as shares.

    Args:
        retained (`int` or `float`, *optional*, defaults to `100 / 576`):
            Tokens that go through every layer as they are. None where the split itself says which: "thumbnail",
            "scale".
        skipped (`int` or `float`, *optional*, defaults to `156 / 576`):
            Tokens that the others are merged into, and that skip the feed-forward networks. None for all of the
            others.
        split (`str`, *optional*, defaults to `"cls_attention"`):
            `"cls_attention"` retains the tokens that the vision tower's class token attends to most, `"thumbnail"` the
            small picture of an image that comes in crops, `"scale"` all but the finest of the model's own scales
            (Chain-of-Sight) or, where it has none, coarser scales made by average pooling. The name of a reducer
            retains the tokens that it keeps.
        split_options (`dict`, *optional*):
            Keyword options of that reducer.
        scales (`tuple` of `int`, *optional*, defaults to `(8, 2)`):
            For `split="scale"`: sides of the pooling windows, in tokens, coarse to fine. On a grid of 32 x 32 they
            give 4 x 4 and 16 x 16 tokens.
        merge (`str`, *optional*, defaults to `"redundancy"`):
            How the others become `skipped` tokens: `"redundancy"` as published, the name of another reducer, or
            `"none"`, which leaves them as they are.
        merge_order (`str`, *optional*, defaults to `"published"`):
            `"published"` puts merged tokens in the order of falling redundancy, `"raster"` where they stand in the
            image.
        summary (`bool`, *optional*, defaults to `True`):
            Put a summary token behind the retained and one behind the skipped tokens of each image; of several
            retained scales it is pooled over the finest.
        newlines (`str`, *optional*, defaults to `"keep"`):
            `"drop"` leaves out the newline tokens of images in crops (LLaVA-NeXT), which LLaVA-HD does not have;
            `"keep"` skips them with the others.
        layers (`tuple` of two `int`, *optional*):
            First layer that skips and the first one after it that does not any more. All when left out, as published.
        text_visibility (`str`, *optional*, defaults to `"all"`):
            Which text attends to skipped tokens: `"all"` as published; `"prompt_only"`, but no text that the model
            writes, as decoding with `drop_kv` has it; `"none"`.
        drop_kv (`bool`, *optional*, defaults to `True`):
            Take skipped tokens out of the key-value cache once the prompt is read.

    Raises:
        SaccadeError: on a value outside its range, naming the option and the fix.
    """

    retained: int | float | None = 100 / 576
    skipped: int | float | None = 156 / 576
    split: str = "cls_attention"
    split_options: dict[str, Any] = field(default_factory=dict)
    scales: tuple[int, ...] = (8, 2)
    merge: str = "redundancy"
    merge_order: str = "published"
    summary: bool = True
    newlines: str = "keep"
    layers: tuple[int, int] | None = None
    text_visibility: str = "all"
    drop_kv: bool = True

    def __post_init__(self) -> None:
        check_choice("merge_order", self.merge_order, MERGE_ORDERS)
        check_choice("newlines", self.newlines, NEWLINES)
        check_choice("text_visibility", self.text_visibility, TEXT_VISIBILITIES)
        for name in ("summary", "drop_kv"):
            if not isinstance(getattr(self, name), bool):
                raise SaccadeError(f"{name}={getattr(self, name)!r}: use true or false")
        _check_amount("retained", self.retained, least=1)
        _check_amount("skipped", self.skipped, least=0)
        self.split_options = dict(self.split_options or {})
        if self.split in ("thumbnail", "scale"):
            if self.retained not in (None, SkipVisionConfig.retained):
                raise SaccadeError(
                    f"retained={self.retained!r}: split={self.split!r} itself says which tokens stay, leave retained "
                    "out"
                )
            self.retained = None
        elif self.retained is None:
            raise SaccadeError(
                f"retained=None: split={self.split!r} needs a number of tokens, or a share such as 0.17"
            )
        self.split_reducer()
        if self.merge != "none":
            _known_reducer("merge", self.merge)
        elif self.skipped == SkipVisionConfig.skipped:
            self.skipped = None
        self.scales = tuple(self.scales)
        if not self.scales or not all(isinstance(side, int) and side > 0 for side in self.scales):
            raise SaccadeError(f"scales={self.scales!r}: use sides of pooling windows in tokens, such as (8, 2)")
        if list(self.scales) != sorted(set(self.scales), reverse=True):
            raise SaccadeError(f"scales={self.scales!r}: order them from coarse to fine, each once, such as (8, 2)")
        if self.layers is not None:
            self.layers = tuple(self.layers)
            whole = len(self.layers) == 2 and all(isinstance(layer, int) for layer in self.layers)
            if not whole or not 0 <= self.layers[0] < self.layers[1]:
                raise SaccadeError(
                    f"layers={self.layers!r}: use the first layer that skips and the one after the last, such as (0, "
                    "32)"
                )

    def split_reducer(self) -> Any:
        """The reducer whose kept tokens are the retained ones, or None where the split is no choice."""
        if self.split in ("thumbnail", "scale"):
            return None
        return _known_reducer(
            "split", "fastervlm" if self.split == "cls_attention" else self.split, **self.split_options
        )

    @property
    def needs(self) -> Needs:
        """What split and merge ask of an encoding beyond the features."""
        split = self.split_reducer()
        chosen = Needs() if split is None else Needs.of(split)
        return chosen if self.merge == "none" else chosen | Needs.of(get_reducer(self.merge))

    @classmethod
    def preset(cls, name: str, **options: Any) -> "SkipVisionConfig":
        """A published budget, scaled to the model's number of tokens, with `options` on top.

        Args:
            name: retained / skipped as published, at 576 tokens per image or crop and, for 272/256, at 32 x 32.

        Raises:
            SaccadeError: if no budget has this name.
        """
        if name not in PRESETS:
            raise SaccadeError(f"preset={name!r} is unknown: {one_of(name, PRESETS)}")
        return cls(**{**PRESETS[name], **options})

    @classmethod
    def from_options(cls, given: Any) -> "SkipVisionConfig":
        """The options as recipes write them: a mapping, in which `preset` names a published budget, or its name.

        Raises:
            SaccadeError: if it is neither, on an unknown option, and as for a new config.
        """
        options = {"preset": given} if isinstance(given, str) else given
        if not isinstance(options, Mapping):
            raise SaccadeError(f"skip_vision={given!r}: give a mapping of options, or a budget such as '100/156'")
        options = dict(options)
        try:
            return cls.preset(options.pop("preset"), **options) if "preset" in options else cls(**options)
        except TypeError as error:
            unknown = str(error).partition("argument ")[2] or str(error)
            raise SaccadeError(f"skip_vision: unknown option {unknown}: docs/skip-vision.md lists them") from error
        except SaccadeError as error:
            # A recipe has options of the same names, such as `preset`.
            raise SaccadeError(f"skip_vision: {error}") from error

    def replace(self, **changes: Any) -> "SkipVisionConfig":
        """The same with other values. Another `split` starts without the options of the one before.

        Raises:
            SaccadeError: on an unknown name, or as for a new config.
        """
        return SkipVisionConfig(**_replaced(asdict(self), changes))

    @classmethod
    def from_pretrained(cls, folder: str | Path, **changes: Any) -> "SkipVisionConfig":
        """The options of a model that skips, which [`SkipVision.save_pretrained`] wrote beside its weights.

        Args:
            changes: other values for some of them, as for `replace`.

        Raises:
            SaccadeError: if the folder holds no `skip_vision.saccade`, or it does not hold these options, or wrong
                values that are not replaced.
        """
        saved = read_companion(folder, SUMMARY_FILE, "folder")[0]
        try:
            # Before values are checked: one that is replaced need not be known here, such as a reducer of one's own.
            return cls(**_replaced({"split": cls.split, **saved}, changes))
        except TypeError as error:
            raise SaccadeError(
                f"folder={str(folder)!r}: options do not fit this version of saccade: {error}"
            ) from error


def _replaced(given: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a config with some replaced; only names are checked."""
    check_options(changes, [entry.name for entry in fields(SkipVisionConfig)], "Skip-Vision")
    kept = changes.get("split", given["split"]) == given["split"]
    return {**given, **({} if kept else {"split_options": {}}), **changes}


PRESETS: dict[str, dict[str, Any]] = {
    "100/156": {"retained": 100 / 576, "skipped": 156 / 576},
    "64/156": {"retained": 64 / 576, "skipped": 156 / 576},
    "256/320": {"retained": 256 / 576, "skipped": None, "merge": "none"},
    "576/576": {"retained": None, "skipped": 1.0, "split": "thumbnail"},
    "272/256": {"retained": None, "skipped": 0.25, "split": "scale"},
}
"""The options of each published budget."""


def amount_of(value: int | float | None, tokens: int) -> int:
    """A count as it is, a share of `tokens` rounded half up, all of them for None."""
    if value is None:
        return tokens
    # Rounded to nine decimals first: 156 / 576 * 144 is slightly less than 39.
    return value if isinstance(value, int) else math.floor(round(value * tokens, 9) + 0.5)


def _check_amount(name: str, value: Any, least: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise SaccadeError(f"{name}={value!r}: use a number of tokens, or a share such as 0.25")
    if isinstance(value, int) and value < least:
        raise SaccadeError(f"{name}={value!r}: use {least} or more tokens per image, or a share such as 0.25")
    if isinstance(value, float) and not (0 < value <= 1 or value == 0 == least):
        raise SaccadeError(f"{name}={value!r}: a float is a share, from 0 to 1; use an int for a number of tokens")


def _known_reducer(option: str, name: str, **options: Any) -> Any:
    try:
        return get_reducer(name, **options)
    except SaccadeError as error:
        special = SPLITS if option == "split" else ("none",)
        raise SaccadeError(f"{option}={name!r}: {error}; or one of {', '.join(special)}") from error
