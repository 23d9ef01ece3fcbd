"""Reducers by name: the built-in ones, and those that other packages provide through an entry point."""

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from torch import Tensor

from saccade.errors import SaccadeError, one_of
from saccade.tokens import Reduction, VisualContext
from saccade.values import ENTRY_POINT_GROUP

if TYPE_CHECKING:
    from saccade.reducers.config import PruningConfig

PROJECTION = "projection"
"""Needed by reducers that merge before the projector: a family that can project tokens one by one."""
FROM_WORDS = frozenset({"relevance", "word_relevance"})
"""The fields of `VisualContext` that depend on the user's words."""
NEEDS = frozenset({"encoder_features", "saliency", "keys", PROJECTION}) | FROM_WORDS
"""What a reducer may name in `needs`: fields of `VisualContext` that are set only on demand, and `PROJECTION`."""


class Reducer(Protocol):
    """Picks, and may merge, the visual tokens of each row.

    An implementation is a class whose constructor takes the options by keyword, most easily a frozen dataclass. The
    result for a row must not depend on the other rows, on where its padding is or on whether the features come in a
    narrower dtype. With an int `keep` and a dense context, nothing may be copied from the device to the host.
    `saccade.testing.reducers` checks this for every registered reducer.
    """

    needs: ClassVar[frozenset[str]]
    """What the reducer needs beyond the features: a subset of `NEEDS`."""

    def __call__(self, context: VisualContext, keep: int | Tensor) -> Reduction:
        """Reduce each of the B rows of `context` to `keep` tokens.

        Args:
            context: B rows of N tokens.
            keep: tokens to keep in every row, or long `(B,)` with one number per row. Clamped to at least one token
                and at most the row's number of valid tokens.
        """
        ...


@dataclass(frozen=True)
class Needs:
    """What the encoding of images has to provide beyond the features.

    Args:
        fields: members of `NEEDS`, and "sample" if the images of a sample share a budget or have to fit together.
        text_tower: folder of the CLIP model to compute relevance with, instead of the language model's embeddings.
        tokenizer: folder of the tokenizer that finds the user's words; None for the model's own.
        patch_tolerance: tokens whose pixels a predictor reproduces within it are to be absent, see [`PruningConfig`];
            None for none.
        whole_images: whether the vision tower sees their pixels nevertheless, for another pass on the same encoding.
    """

    fields: frozenset[str] = frozenset()
    text_tower: str | None = None
    tokenizer: str | None = None
    patch_tolerance: float | None = None
    whole_images: bool = False

    @classmethod
    def of(cls, reducer: Reducer, config: "PruningConfig | None" = None) -> "Needs":
        """What `reducer` needs, under the budget of a config if given."""
        tolerance = None if config is None else config.patch_tolerance
        if config is not None and config.keeps_fitting and config.fit_length is None:
            return cls(patch_tolerance=tolerance)
        own = frozenset(reducer.needs)
        by_sample = config is not None and (config.budget == "sample" or config.fit_length is not None)
        shared = frozenset({"sample"}) if by_sample else frozenset()
        words = (getattr(reducer, "text_tower", None), getattr(reducer, "tokenizer", None))
        return cls(own | shared, *(words if own & FROM_WORDS else (None, None)), tolerance)

    def __or__(self, other: "Needs") -> "Needs":
        """The union of both; of two text towers, the first.

        Raises:
            SaccadeError: if both drop patches, by different tolerances.
        """
        tolerances = {self.patch_tolerance, other.patch_tolerance}
        if len(tolerances - {None}) > 1:
            raise SaccadeError(
                f"patch_tolerance={self.patch_tolerance!r} and {other.patch_tolerance!r}: two passes on one encoding "
                "drop the same patches; give both the same tolerance, or one of them none"
            )
        asks, beside = (self, other) if self.text_tower or not other.text_tower else (other, self)
        return Needs(
            self.fields | other.fields,
            asks.text_tower,
            asks.tokenizer or beside.tokenizer,
            self.patch_tolerance if other.patch_tolerance is None else other.patch_tolerance,
            self.whole_images or other.whole_images or len(tolerances) > 1,
        )


Class = TypeVar("Class", bound=type)
_classes: dict[str, type[Reducer]] = {}
_plugins_loaded = False


def register_reducer(name: str) -> Callable[[Class], Class]:
    """Class decorator that registers a `Reducer` under `name`.

    Raises:
        SaccadeError: if the name belongs to another class, or `needs` is not a subset of `NEEDS`.
        TypeError: if the decorated object is not a class with `needs` and `__call__`.
    """

    def register(cls: Class) -> Class:
        if not inspect.isclass(cls) or not {"needs", "__call__"} <= set(dir(cls)):
            raise TypeError(f"reducer {name!r}: {cls!r} is not a class with `needs` and `__call__`")
        if isinstance(cls.needs, str):
            raise SaccadeError(
                f"reducer {name!r}: needs is the string {cls.needs!r}: write frozenset({{{cls.needs!r}}})"
            )
        unknown = frozenset(cls.needs) - NEEDS
        if unknown:
            raise SaccadeError(f"reducer {name!r}: needs names {sorted(unknown)}, known are {sorted(NEEDS)}")
        holder = _classes.get(name)
        if holder is not None and _path(holder) != _path(cls):
            raise SaccadeError(f"reducer {name!r}: the name already belongs to {_path(holder)}, choose another")
        _classes[name] = cls
        return cls

    return register


def get_reducer(name: str, **options: Any) -> Reducer:
    """Build the reducer called `name` with `options`.

    Raises:
        SaccadeError: if no reducer has this name, or it does not accept one of the options.
    """
    _load_plugins()
    if name not in _classes:
        raise SaccadeError(f"reducer={name!r} is unknown: {one_of(name, list_reducers())}")
    cls = _classes[name]
    accepted = inspect.signature(cls).parameters
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in accepted.values())
    unknown = [option for option in options if option not in accepted]
    if unknown and not takes_any:
        offered = f"its options are {', '.join(accepted)}" if accepted else "it has no options"
        raise SaccadeError(f"reducer {name!r} does not take the option {unknown[0]!r}: {offered}")
    return cls(**options)


def list_reducers() -> list[str]:
    """The names that `get_reducer` knows, in alphabetical order."""
    _load_plugins()
    return sorted(_classes)


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _load_plugins() -> None:
    """Import once what other packages provide in the entry-point group, with a warning for each that fails to load.

    An entry point is either a reducer class, registered under the entry point's name unless its module registers it
    under another, or a module that registers its own reducers.
    """
    global _plugins_loaded
    if _plugins_loaded:
        return
    # Set first: a plug-in may itself call `get_reducer` while it is imported.
    _plugins_loaded = True
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        try:
            loaded = entry.load()
            if inspect.isclass(loaded) and loaded not in _classes.values():
                register_reducer(entry.name)(loaded)
        except Exception as error:
            warnings.warn(
                f"reducer plug-in {entry.name!r} ({entry.value}) was left out: {type(error).__name__}: {error}",
                RuntimeWarning,
                stacklevel=3,
            )
