"""Exceptions for problems that the user can fix."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


class SaccadeError(ValueError):
    """Bad input: the message is one line that names the field, its value and the fix.

    The command line prints the message without a traceback and exits with status 2.
    """

    def __init__(self, message: str) -> None:
        # A data-loader worker passes on its errors with the whole traceback as the message.
        if message.startswith("Caught ") and "in DataLoader worker" in message.partition("\n")[0]:
            message = message.rpartition("Error: ")[2].strip()
        super().__init__(message)


class RecordError(SaccadeError):
    """A record of a data file cannot be trained on.

    Args:
        message: one line, without the record's location in the file.
        kind: what is wrong with it, one of `KINDS`.
    """

    KINDS = (
        "not_json",
        "malformed",
        "unknown_role",
        "no_answer",
        "empty_answer",
        "end_token",
        "placeholder_count",
        "content_part",
        "field",
        "control_token",
        "missing_image",
        "outside_image_folders",
        "zero_byte_image",
        "truncated_image",
        "not_an_image",
        "decompression_bomb",
        "aspect_ratio",
        "value_range",
        "missing_video",
        "not_a_video",
        "truncated_video",
        "no_frames",
        "no_video",
        "too_long",
    )

    def __init__(self, message: str, kind: str = "malformed") -> None:
        super().__init__(message)
        self.kind = kind


EXTRAS = {
    "trl": "train",
    "peft": "train",
    "accelerate": "train",
    "datasets": "train",
    "jinja2": "train",
    "matplotlib": "demo",
    "scikit-learn": "demo",
    "lmms_eval": "eval",
    "deepspeed": "deepspeed",
    "bitsandbytes": "quant",
    "tensorboard": "track",
    "wandb": "track",
    "trackio": "track",
    "vllm": "vllm",
    "av": "video",
    "gradio": "play",
}
"""Optional packages and the extra that installs them, as in `pip install "saccade[EXTRA]"`."""

_MODULES = {"sklearn": "scikit-learn"}
"""Packages whose import name differs from their name in pip."""


class MissingPackageError(SaccadeError, ImportError):
    """A name or a command needs an optional package that is not installed."""


def needs_package(what: str, package: str) -> MissingPackageError:
    """The error for something that needs a package that is not installed.

    Args:
        what: an option and its value, a name of this package or a command.
        package: the package's name in pip.
    """
    wanted = f"saccade[{EXTRAS[package]}]" if package in EXTRAS else package
    return MissingPackageError(f'{what} needs {package}, which is not installed: pip install "{wanted}"')


@contextmanager
def needing_extras(what: str) -> Iterator[None]:
    """Name the extra to install if the block imports an optional package that is not installed.

    Raises:
        MissingPackageError: instead of the ModuleNotFoundError, for a package in `EXTRAS`.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        package = _MODULES.get(module, module)
        if package not in EXTRAS:
            raise
        raise needs_package(what, package) from error


def check_options(given: Iterable[str], known: Iterable[str], of: str) -> None:
    """Refuse the name of an option that there is not."""
    known = list(known)
    for name in given:
        if name not in known:
            raise SaccadeError(f"{name!r} is not an option of {of}: {one_of(name, known)}")


def reason_of(error: Exception) -> str:
    """What an error says, in one line; the name of its type if it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def kind_of(value: Any) -> str:
    """The type of a value with its article, such as "an int"."""
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def counted(number: Any, noun: str) -> str:
    """A number of things, such as "1 step" or "1,000 steps"; what stands for a number that is not known, as it is."""
    shown = f"{number:,}" if isinstance(number, (int, float)) else number
    return f"{shown} {noun}{'' if number == 1 else 's'}"


def one_of(name: Any, known: Iterable[str]) -> str:
    """The hint for an unknown value of an option: the most similar known one, or else all of them."""
    known = list(known)
    return did_you_mean(str(name), known, f"use one of {', '.join(known)}")


def did_you_mean(name: str, known: Iterable[str], otherwise: str) -> str:
    """The hint for an unknown name: the most similar known one, or else `otherwise`."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else otherwise
