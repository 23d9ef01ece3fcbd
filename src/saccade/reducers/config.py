"""`PruningConfig`: how visual tokens are reduced. These options are defined nowhere else."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from saccade.errors import SaccadeError, check_options, kind_of
from saccade.files import write_json_atomically
from saccade.reducers.budget import keep_count
from saccade.reducers.frames import KNOW_TIME
from saccade.reducers.registry import Needs, Reducer, get_reducer
from saccade.values import check_pruning

PRUNING_FILE = "pruning_config.json"
PRUNE_RATIO = 0.9
BESIDE = "."


@dataclass(frozen=True)
class PruningConfig:
    """How visual tokens are reduced: by which method, to how many, and at which positions.

    Args:
        reducer (`str`, *optional*, defaults to `"divprune"`):
            Method that chooses the tokens; `saccade reducers` lists them.
        reducer_options (`dict`, *optional*):
            Keyword options of the reducer.
        prune_ratio (`float`, *optional*, defaults to `0.9`):
            Share of a unit's tokens to drop, in [0, 1); 0 keeps all.
        keep_tokens (`int`, *optional*):
            Number of tokens to keep per unit, instead of the ratio. A unit with fewer tokens keeps them all.
        budget (`str`, *optional*, defaults to `"crop"`):
            The unit that the budget applies to. `"crop"` is a feature row: an image, or one crop, thumbnail or frame
            of it (a pair of frames on Qwen's models). `"image"`: the crops of an image, or the frames of a video,
            share one budget. `"sample"`: all images and videos of a sample share one.
        adaptive (`bool`, *optional*, defaults to `False`):
            Redistribute the budgets of a batch's units to where tokens vary most, see [`adaptive_counts`]. A sample's
            tokens then depend on the other samples of its batch.
        fit_length (`int`, *optional*):
            Maximum number of tokens of a sample, including its text and the isolator's rows. A longer sample keeps
            only as many visual tokens as fit, shared among its units by how varied they are, see `fit_counts`; a
            sample that fits is reduced as usual. Text is never cut.
        patch_tolerance (`float`, *optional*):
            Drop before the vision tower what a simple predictor reproduces from the image to the left and above, with
            no pixel value off by more than this, see `saccade.reducers.predictor.reproduced`; 0 drops exact copies
            only. In the unit of the processor's `pixel_values`, in which a step of 8-bit colour is 0.015 (Qwen2-VL,
            Qwen2.5-VL, GLM-4V) or 0.008 (Qwen3-VL and later). Needs a vision tower of variable resolution. The reducer
            then chooses among the tokens that are left; its budget is still counted on all tokens of the unit.
        newlines (`str`, *optional*, defaults to `"keep"`):
            `"keep"` keeps the newline tokens of anyres images, counted in the budget; `"drop"` drops them.
        positions (`str`, *optional*, defaults to `"compact"`):
            `"compact"` renumbers the shortened sequence, as published; with `"original"`, tokens keep the position
            that they have in the full sequence. Models with several position axes (Qwen-VL) always use the latter.
        isolator (`str`, *optional*):
            Folder or file of the trained mode isolator to put before each image. None uses no isolator, as published
            for inference.

    Raises:
        SaccadeError: if a value is out of range; the message names it and the fix.
    """

    reducer: str = "divprune"
    reducer_options: Mapping[str, Any] = field(default_factory=dict)
    prune_ratio: float | None = None
    keep_tokens: int | None = None
    budget: str = "crop"
    adaptive: bool = False
    fit_length: int | None = None
    patch_tolerance: float | None = None
    newlines: str = "keep"
    positions: str = "compact"
    isolator: str | None = None

    def __post_init__(self) -> None:
        options = {} if self.reducer_options is None else self.reducer_options
        if not isinstance(options, Mapping):
            raise SaccadeError(f"reducer_options={options!r}: give a mapping of options to values")
        object.__setattr__(self, "reducer_options", dict(options))
        if not isinstance(self.reducer, str):
            raise SaccadeError(f"reducer={self.reducer!r} is {kind_of(self.reducer)}: give a reducer's name")
        check_pruning(vars(self))
        if self.keep_tokens is None:
            ratio = PRUNE_RATIO if self.prune_ratio is None else self.prune_ratio
            object.__setattr__(self, "prune_ratio", float(ratio))
        if not isinstance(self.adaptive, bool):
            raise SaccadeError(f"adaptive={self.adaptive!r} is neither true nor false")
        if self.patch_tolerance is not None:
            if self.reducer in KNOW_TIME:
                raise SaccadeError(
                    f"patch_tolerance={self.patch_tolerance!r} with reducer={self.reducer!r}, which compares the "
                    "tokens at each place of all frames: use another reducer, or omit it"
                )
            object.__setattr__(self, "patch_tolerance", float(self.patch_tolerance))
        if self.isolator is not None:
            if not isinstance(self.isolator, (str, Path)):
                raise SaccadeError(f"isolator={self.isolator!r} is {kind_of(self.isolator)}: give its folder or file")
            object.__setattr__(self, "isolator", str(self.isolator))
        self.make_reducer()

    def make_reducer(self) -> Reducer:
        """The reducer, with its options."""
        return get_reducer(self.reducer, **self.reducer_options)

    @property
    def needs(self) -> Needs:
        """What the encoding has to provide beyond the features."""
        return Needs.of(self.make_reducer(), self)

    @property
    def keeps_all(self) -> bool:
        """Whether no token is ever dropped."""
        return self.keeps_fitting and self.fit_length is None and self.patch_tolerance is None

    @property
    def keeps_fitting(self) -> bool:
        """Whether the reducer drops tokens only where a sample is longer than `fit_length`."""
        return self.prune_ratio == 0

    def count(self, num_tokens: int) -> int:
        """Tokens to keep in a unit of `num_tokens`, before `adaptive` and `fit_length` change the number."""
        if self.keep_tokens is None:
            return keep_count(num_tokens, self.prune_ratio)
        return min(num_tokens, self.keep_tokens)

    def replace(self, **changes: Any) -> "PruningConfig":
        """A copy with some values replaced. A ratio replaces a number of tokens, and vice versa.

        The options of a reducer are dropped when another reducer is chosen.

        Raises:
            SaccadeError: if a name is unknown, and as for a new config.
        """
        return PruningConfig(**_replaced(vars(self), changes))

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write `pruning_config.json` into `folder`, whole or not at all, and return its path.

        Raises:
            SaccadeError: if the isolator is not in that folder, the only place where readers of the config look.
        """
        folder, values = Path(folder), asdict(self)
        if self.isolator is not None:
            path = Path(self.isolator)
            if folder.resolve() not in (path.resolve(), path.resolve().parent):
                raise SaccadeError(
                    f"isolator={self.isolator!r} is not in {str(folder)!r}: save it there first, or leave it out"
                )
            values["isolator"] = BESIDE
        path = folder / PRUNING_FILE
        write_json_atomically(path, {name: value for name, value in values.items() if value is not None})
        return path

    @classmethod
    def from_pretrained(cls, folder: str | Path, **changes: Any) -> "PruningConfig":
        """Read what `save_pretrained` wrote to `folder`, optionally with some values replaced.

        Raises:
            SaccadeError: if the file is missing or damaged, or holds unknown options or wrong values that are not
                replaced.
        """
        path = Path(folder) / PRUNING_FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise SaccadeError(f"{str(folder)!r} has no {PRUNING_FILE}: give the folder of a trained model") from error
        except (OSError, ValueError, RecursionError) as error:
            raise SaccadeError(f"{str(path)!r} is damaged: {error}; write it again, or give the options") from error
        if not isinstance(values, dict):
            raise SaccadeError(f"{str(path)!r} is damaged: it is not a mapping; write it again, or give the options")
        if values.get("isolator") not in (None, BESIDE):
            # An untrusted folder must not choose which file is opened.
            raise SaccadeError(f"{str(path)!r}: isolator={values['isolator']!r} is not {BESIDE!r}: put it there")
        if values.get("isolator") is not None:
            values["isolator"] = str(folder)
        unknown = sorted(values.keys() - {entry.name for entry in fields(cls)})
        if unknown:
            raise SaccadeError(f"{str(path)!r}: {unknown[0]!r} is not an option of this version of saccade")
        try:
            # Before values are checked: one that is replaced need not be known here, such as a reducer of one's own.
            return cls(**_replaced({"reducer": cls.reducer, **values}, changes))
        except SaccadeError as error:
            given = f" with other values of {', '.join(changes)}" if changes else ""
            raise SaccadeError(f"{str(path)!r}{given}: {error}") from error


def _replaced(given: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a config with some replaced, see `PruningConfig.replace`; only names are checked."""
    check_options(changes, [entry.name for entry in fields(PruningConfig)], "pruning")
    given = dict(given)
    # For these two, None means "not given": the current value stays.
    counts = ("prune_ratio", "keep_tokens")
    changes = {name: value for name, value in changes.items() if value is not None or name not in counts}
    if changes.get("prune_ratio") is not None:
        given["keep_tokens"] = None
    if changes.get("keep_tokens") is not None:
        given["prune_ratio"] = None
    if changes.get("reducer", given["reducer"]) != given["reducer"]:
        given["reducer_options"] = {}
    return {**given, **changes}


PRUNING_OPTIONS = tuple(entry.name for entry in fields(PruningConfig) if entry.name != "isolator")
"""The options that training, its modes and evaluation take; the isolator is trained."""


def trained_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """The pruning options among those of a training run that also hold for its model's pruned inference.

    A model trained on all tokens was trained at ratio 0, which would prune nothing: that one is left out.
    """
    given = {name: values[name] for name in PRUNING_OPTIONS if values.get(name)}
    # Here 0 is a value: only exact copies are dropped.
    return given if values.get("patch_tolerance") is None else {**given, "patch_tolerance": values["patch_tolerance"]}


def pruned_how(entry: Mapping[str, Any]) -> str | None:
    """How an evaluation pruned, in words, from its entry in `eval.json`: the reducer, how many tokens, and what
    differs from the defaults. None if it did not prune, or does not say."""
    if not isinstance(entry.get("reducer"), str):
        return None
    kept, ratio = entry.get("keep_tokens"), entry.get("prune_ratio")
    defaults = PruningConfig()
    others = [name for name in PRUNING_OPTIONS if name not in ("reducer", "prune_ratio", "keep_tokens")]
    changed = [name for name in others if name in entry and entry[name] != getattr(defaults, name)]
    amount = f"{kept} tokens" if kept else f"ratio {ratio}"
    return ", ".join([entry["reducer"], amount, *(f"{name}={entry[name]}" for name in changed)])
