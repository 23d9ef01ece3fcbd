"""`saccade VERB`: find the verb's module, parse its arguments, and turn the user's errors into one line.

A verb's module has `add_arguments(parser)`, `run(args) -> int` and the text `EXAMPLES`. With `PASS_UNKNOWN = True`,
undeclared flags are passed in `args.overrides` as they were typed; otherwise they are an error. Whether `--output` can
be written is tried out before the verb runs: a file, or a folder with `OUTPUT_IS_FOLDER = True`. A verb that writes
elsewhere too has `outputs(args)`, all of its paths.
"""

import argparse
import errno
import os
import re
import shutil
import sys
import textwrap
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import NoReturn

from saccade.errors import SaccadeError, did_you_mean, needing_extras
from saccade.files import check_writable

VERBS: dict[str, tuple[str, str]] = {
    "train": ("saccade.cli.train", "train or fine-tune a model from a recipe"),
    "assemble": ("saccade.cli.assemble", "assemble a LLaVA from a vision tower and a language model"),
    "grow": ("saccade.cli.grow", "grow a Chain-of-Sight model to larger images and a finer scale"),
    "data": ("saccade.cli.data", "read a whole dataset and report every bad record"),
    "demo": ("saccade.cli.demo", "train the tiny model three ways on this machine and compare"),
    "sweep": ("saccade.cli.sweep", "many runs and one table: a grid over a recipe and seeds"),
    "eval": ("saccade.cli.evaluate", "accuracy of a model on all of its visual tokens and on a few"),
    "report": ("saccade.cli.report", "one page of a run, a sweep or a demo, with pictures"),
    "export": ("saccade.cli.export", "write a trained model as a plain Hugging Face checkpoint, adapters merged"),
    "serve": ("saccade.cli.serve", "serve a trained model, pruned as it was trained, with vLLM or transformers"),
    "play": ("saccade.cli.play", "ask a model about pictures in a browser, on all tokens and on kept ones"),
    "view": ("saccade.cli.view", "draw what token reducers keep of an image"),
    "reducers": ("saccade.cli.reducers", "list the token reducers and their options"),
    "env": ("saccade.cli.env", "versions, machine and known problems, for a bug report"),
}

DISK_FAULTS: dict[int, str] = {
    errno.ENOSPC: "no space left on the disk: free some, or give another folder",
    errno.EDQUOT: "the disk quota is used up: free some, or give another folder",
    errno.EROFS: "the file system is read-only: give another folder",
    errno.ENAMETOOLONG: "this name is too long for the file system: give a shorter one",
    errno.EACCES: "permission denied: give a path that you may read and write",
    errno.EISDIR: "this is a folder: give the path of a file",
    errno.ENOTDIR: "a part of this path is a file, not a folder: give another path",
    errno.EEXIST: "a part of this path is a file, not a folder: give another path",
}

VERBOSE, VERBOSE_TOO = "--verbose", "SACCADE_VERBOSE"
OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


class Parser(argparse.ArgumentParser):
    """A parser that raises on bad input, so that all errors are handled in one place."""

    def error(self, message: str) -> NoReturn:
        """Raise a `SaccadeError` with the message and the command that shows the usage."""
        raise SaccadeError(f"{message} (see `{self.prog} --help`)")

    def flags(self) -> set[str]:
        """The flags that were declared."""
        return {name for action in self._actions for name in action.option_strings}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status, see `guarded`."""
    words = list(sys.argv[1:] if argv is None else argv)
    if VERBOSE in words:
        os.environ[VERBOSE_TOO] = "1"  # for the processes that a verb starts
    if argv is None and VERBOSE_TOO not in os.environ:
        _quieten()
    return guarded(lambda: _dispatch([word for word in words if word != VERBOSE]))


def guarded(work: Callable[[], int]) -> int:
    """Run a command, print the user's errors as one line, and return the exit status.

    0 is success; 1 a full disk, an unwritable path or a closed pipe; 2 bad input; 130 an interruption. Any other
    exception is a bug in Saccade and keeps its traceback.

    Args:
        work: the command, which returns its exit status.
    """
    try:
        status = work()
        # Python would only flush after this function returns, too late to handle a closed pipe or a full disk.
        sys.stdout.flush()
        return status
    except SystemExit as stop:  # raised by argparse after --help and --version
        return stop.code if isinstance(stop.code, int) else OK
    except SaccadeError as error:
        return _complain(f"error: {error}", BAD_INPUT)
    except KeyboardInterrupt as interruption:
        said = f": {interruption}" if str(interruption) else ""
        return _complain(f"interrupted{said}", INTERRUPTED)
    except BrokenPipeError:
        # The reader, such as `head`, has closed the pipe. Python would complain again when it closes the output
        # itself.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        if error.errno not in DISK_FAULTS:
            raise
        # A rename has two paths; the second is the one that the user gave.
        place = error.filename2 or error.filename
        where = f" ({place})" if place else ""
        return _complain(f"error: {DISK_FAULTS[error.errno]}{where}", FAILED)


def _quieten() -> None:
    """Hide dependencies' developer warnings and loading bars from the user's terminal.

    The trainer's own progress bar stays. `python -W` or PYTHONWARNINGS show the warnings again.
    """
    # These are read when the packages are imported, which happens later.
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")
    if not sys.warnoptions:
        for category in (FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", category=category)


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0].startswith("-"):
        top = _top_parser()
        top.parse_args(argv)
        top.print_help(sys.stderr)
        return BAD_INPUT
    verb, *rest = argv
    if verb not in VERBS:
        hint = did_you_mean(verb, VERBS, f"expected one of {', '.join(VERBS)}")
        raise SaccadeError(f"unknown verb {verb!r}: {hint}")
    with needing_extras(f"saccade {verb}"):
        return _run(verb, rest)


def _run(verb: str, argv: list[str]) -> int:
    home, text = VERBS[verb]
    module = import_module(home)
    parser = Parser(
        prog=f"saccade {verb}",
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=f"examples:\n{_examples(module.EXAMPLES)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # An override whose name is a prefix of one of the verb's flags would otherwise be taken for that flag.
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    args = _parse(parser, module, argv)
    given = [] if getattr(args, "output", None) is None else [args.output]
    for path in module.outputs(args) if hasattr(module, "outputs") else given:
        _check_not_read(path, args)
        check_writable(path, "output", getattr(module, "OUTPUT_IS_FOLDER", False))
    return module.run(args)


def _check_not_read(output: str, args: argparse.Namespace) -> None:
    """Refuse to write over a file that the same command reads, also where the output is a default."""
    if not os.path.isfile(output):
        return
    values = [value for name, value in vars(args).items() if name != "output"]
    for given in (each for value in values for each in (value if isinstance(value, list) else [value])):
        if isinstance(given, str) and os.path.isfile(given) and os.path.samefile(given, output):
            raise SaccadeError(f"output={output!r} is the file that the command reads: give another --output")


def _parse(parser: Parser, module: ModuleType, argv: list[str]) -> argparse.Namespace:
    flags = parser.flags()
    # Fields of a recipe have an underscore where flags have a dash, and nobody should have to remember which is which.
    words = [_dashed(word) if _dashed(word).partition("=")[0] in flags else word for word in argv]
    passes = getattr(module, "PASS_UNKNOWN", False)
    # Before argparse misses a required flag, which may only be mistyped.
    for word in () if passes else words[: words.index("--") if "--" in words else None]:
        if word.startswith("--") and word.partition("=")[0] not in flags:
            _refuse_flag(parser, word)
    args, unknown = parser.parse_known_args(words)
    if unknown and not (passes and unknown[0].startswith("-")):
        if not unknown[0].startswith("-"):
            parser.error(f"unknown argument {unknown[0]!r}")
        _refuse_flag(parser, unknown[0])
    if passes:
        args.overrides = unknown
    return args


def _refuse_flag(parser: Parser, word: str) -> NoReturn:
    near = did_you_mean(_dashed(word).partition("=")[0], parser.flags(), "")
    parser.error(f"unknown flag {word!r}" + (f": {near}" if near else ""))


def _dashed(word: str) -> str:
    """A flag with dashes for underscores; its value, behind an equals sign, as it is."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def _fill(text: str, first: str, indent: int) -> str:
    """`text` in lines as wide as the terminal, the first after `first`, without breaking a word."""
    return textwrap.fill(
        text,
        shutil.get_terminal_size().columns - 1,
        initial_indent=first,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _examples(text: str) -> str:
    """Commands with what they do beside them, or below where the terminal is too narrow for both."""
    width = shutil.get_terminal_size().columns - 1
    lines = []
    for line in re.sub(r" *\\\n *", " ", text.strip()).splitlines():
        if len(line) + 2 <= width:
            lines.append(f"  {line}".rstrip())
            continue
        command, _, about = line.partition("  ")
        # A command that goes on in the next line ends with a backslash, as the shell wants it.
        parts = textwrap.wrap(command, width - 6, break_long_words=False, break_on_hyphens=False)
        lines.append("  " + " \\\n      ".join(parts))
        if about:
            lines.append(_fill(about.strip(), " " * 6, 6))
    return "\n".join(lines)


def _top_parser() -> Parser:
    width = max(map(len, VERBS))
    listing = "\n".join(_fill(text, f"  {verb:<{width}}  ", width + 4) for verb, (_, text) in VERBS.items())
    hints = f"`saccade VERB --help` shows a verb's arguments, with examples. With {VERBOSE} a verb shows what "
    hints += "dependencies say: their warnings, and their bars of loading."
    parser = Parser(
        prog="saccade",
        usage="saccade VERB ...",
        description="Train and serve vision-language models on a fraction of their visual tokens.",
        epilog=f"verbs:\n{listing}\n\n{_fill(hints, '', 0)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"saccade {_version()}")
    return parser


def _version() -> str:
    try:
        return version("saccade")
    except PackageNotFoundError:  # run from a source folder that was never installed
        return "unknown"


def _complain(message: str, status: int) -> int:
    print("saccade: " + " ".join(message.split()), file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
