"""`PruningConfig`: how visual tokens are reduced. No other place lists these options."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from saccade.errors import SaccadeError, check_options
from saccade.files import write_json_atomically
from saccade.reducers.budget import check_prune_ratio, keep_count
from saccade.reducers.registry import Needs, Reducer, get_reducer

PRUNING_FILE = "pruning_config.json"
PRUNE_RATIO = 0.9
BUDGETS = ("crop", "image", "sample")
NEWLINES = ("keep", "drop")
POSITIONS = ("compact", "original")
BESIDE = "."


@dataclass(frozen=True)
class PruningConfig:
    """
    How visual tokens are reduced: by what method, to how many, and what becomes of their places.

    Args:
        reducer (`str`, *optional*, defaults to `"divprune"`):
            Method that chooses the tokens; `saccade reducers` lists them.
        reducer_options (`dict`, *optional*):
            Keyword options of the reducer.
        prune_ratio (`float`, *optional*, defaults to `0.9`):
            Share of a unit's tokens to drop, in [0, 1); 0 keeps all.
        keep_tokens (`int`, *optional*):
            Number of tokens to keep of a unit, in place of the ratio. A unit that has fewer keeps them all.
        budget (`str`, *optional*, defaults to `"crop"`):
            The unit. `"crop"` is a feature row: an image, or the crop, frame or picture that the model makes of it; a
            whole video, where the model has no row per frame (Qwen2-VL, Qwen2.5-VL). `"image"`: the crops of an image,
            or the frames of a video, compete for the same tokens. `"sample"`: so do all images of a sample.
        adaptive (`bool`, *optional*, defaults to `False`):
            Spend what the units of a batch have together where it is needed, see [`adaptive_counts`]. A sample's
            tokens then depend on the samples beside it.
        fit_length (`int`, *optional*):
            Most tokens of a sample, its text and the isolator's rows counted. A sample that would be longer keeps as
            many visual tokens as fit, shared among its units by how varied they are, see `fit_counts`; one that fits
            is reduced as without it. Text is never cut.
        newlines (`str`, *optional*, defaults to `"keep"`):
            `"keep"` keeps the newline tokens of anyres images, counted in the budget; `"drop"` drops them.
        positions (`str`, *optional*, defaults to `"compact"`):
            `"compact"` renumbers the shortened sequence, as published; `"original"` lets kept tokens keep the position
            that they have in the full sequence. Models with several position axes (Qwen-VL) always do the latter.
        isolator (`str`, *optional*):
            The folder or file of the trained mode isolator that stands before each image. None for none, as published
            for inference.

    Raises:
        SaccadeError: on a value out of range, naming it and the fix.
    """

    reducer: str = "divprune"
    reducer_options: Mapping[str, Any] = field(default_factory=dict)
    prune_ratio: float | None = None
    keep_tokens: int | None = None
    budget: str = "crop"
    adaptive: bool = False
    fit_length: int | None = None
    newlines: str = "keep"
    positions: str = "compact"
    isolator: str | None = None

    def __post_init__(self) -> None:
        options = {} if self.reducer_options is None else self.reducer_options
        if not isinstance(options, Mapping):
            raise SaccadeError(f"reducer_options={options!r}: give a mapping of options to values")
        object.__setattr__(self, "reducer_options", dict(options))
        if self.prune_ratio is not None and self.keep_tokens is not None:
            raise SaccadeError(
                f"prune_ratio={self.prune_ratio!r} and keep_tokens={self.keep_tokens!r} both say how many visual "
                "tokens to keep: leave one of them out"
            )
        if self.keep_tokens is None:
            ratio = PRUNE_RATIO if self.prune_ratio is None else self.prune_ratio
            object.__setattr__(self, "prune_ratio", check_prune_ratio(ratio))
        elif not isinstance(self.keep_tokens, int) or isinstance(self.keep_tokens, bool) or self.keep_tokens < 1:
            raise SaccadeError(
                f"keep_tokens={self.keep_tokens!r}: give a whole number from 1 on, or leave it out for prune_ratio"
            )
        for name, known in (("budget", BUDGETS), ("newlines", NEWLINES), ("positions", POSITIONS)):
            check_choice(name, getattr(self, name), known)
        if not isinstance(self.adaptive, bool):
            raise SaccadeError(f"adaptive={self.adaptive!r} is neither true nor false")
        if self.fit_length is not None:
            if not isinstance(self.fit_length, int) or isinstance(self.fit_length, bool) or self.fit_length < 1:
                raise SaccadeError(
                    f"fit_length={self.fit_length!r}: give a whole number of tokens from 1 on, or leave it out"
                )
            if self.reducer == "none":
                raise SaccadeError(
                    f"fit_length={self.fit_length} with reducer='none', which drops no token: use another reducer; "
                    "prune_ratio=0 keeps all tokens of samples that fit"
                )
        if self.isolator is not None:
            object.__setattr__(self, "isolator", str(self.isolator))
        self.make_reducer()

    def make_reducer(self) -> Reducer:
        """The reducer, with its options."""
        return get_reducer(self.reducer, **self.reducer_options)

    @property
    def needs(self) -> Needs:
        """What an encoding has to offer beyond the features."""
        return Needs.of(self.make_reducer(), self)

    @property
    def keeps_all(self) -> bool:
        """Whether no token is dropped, whatever a unit has."""
        return self.prune_ratio == 0 and self.fit_length is None

    def count(self, num_tokens: int) -> int:
        """Tokens to keep of a unit of `num_tokens`, before `adaptive` moves and `fit_length` takes any."""
        if self.keep_tokens is None:
            return keep_count(num_tokens, self.prune_ratio)
        return min(num_tokens, self.keep_tokens)

    def replace(self, **changes: Any) -> "PruningConfig":
        """The same with other values; a ratio replaces a number of tokens, and the other way round.

        Options of the reducer stay with their reducer.

        Raises:
            SaccadeError: on an unknown name, or as for a new config.
        """
        names = [entry.name for entry in fields(self)]
        check_options(changes, names, "pruning")
        given = {name: getattr(self, name) for name in names}
        # Left out is what None means for a budget, and it is known already.
        counts = ("prune_ratio", "keep_tokens")
        changes = {name: value for name, value in changes.items() if value is not None or name not in counts}
        if changes.get("prune_ratio") is not None:
            given["keep_tokens"] = None
        if changes.get("keep_tokens") is not None:
            given["prune_ratio"] = None
        if changes.get("reducer", self.reducer) != self.reducer:
            given["reducer_options"] = {}
        return PruningConfig(**{**given, **changes})

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write `pruning_config.json` into `folder`, whole or not at all, and return its path.

        Raises:
            SaccadeError: if the isolator is not in that folder: who reads the config looks nowhere else.
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
        """Read what `save_pretrained` wrote to `folder`, with other values for some options.

        Raises:
            SaccadeError: if there is no such file, or it does not hold these options.
        """
        path = Path(folder) / PRUNING_FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise SaccadeError(f"{str(folder)!r} holds no {PRUNING_FILE}: name a folder of a trained model") from error
        except (OSError, ValueError) as error:
            raise SaccadeError(f"{str(path)!r} is damaged: {error}; write it again, or give the options") from error
        if not isinstance(values, dict):
            raise SaccadeError(f"{str(path)!r} is damaged: it holds no mapping; write it again, or give the options")
        if values.get("isolator") not in (None, BESIDE):
            # A folder of a stranger names no file for us to open.
            raise SaccadeError(f"{str(path)!r}: isolator={values['isolator']!r} is not {BESIDE!r}: put it beside it")
        if "isolator" in values:
            values["isolator"] = str(folder)
        unknown = sorted(values.keys() - {entry.name for entry in fields(cls)})
        if unknown:
            raise SaccadeError(f"{str(path)!r}: {unknown[0]!r} is not an option of this version of saccade")
        try:
            return cls(**values).replace(**changes)
        except SaccadeError as error:
            raise SaccadeError(f"{str(path)!r}: {error}") from error


def check_choice(name: str, value: Any, known: tuple[str, ...]) -> None:
    """Refuse a value that is not one of the known ones.

    Raises:
        SaccadeError: naming the option, its value and the known ones.
    """
    if value not in known:
        raise SaccadeError(f"{name}={value!r} is unknown: use one of {', '.join(known)}")
