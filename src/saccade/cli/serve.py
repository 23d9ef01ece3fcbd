"""`saccade serve`: a trained model behind an OpenAI-compatible server, pruned as it was trained."""

import argparse

from saccade.cli.pruning_flags import add_pruning_flags, given_pruning
from saccade.files import check_exists
from saccade.values import ENGINES, check_choice

PASS_UNKNOWN = True

EXAMPLES = """
saccade serve out/export                                  pruned as the folder says, on http://127.0.0.1:8000/v1
saccade serve out/export --prune-ratio 0.5 --port 9000    half of the visual tokens
saccade serve out/export --all-tokens                     all of them, with the engine's own code
saccade serve out/export --engine transformers            without vLLM: `transformers serve`, on a model that prunes
saccade serve out/export --max-model-len 4096             flags that are not listed here go to the engine
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder of a trained model: an export, or a run without LoRA")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen at (default: %(default)s)")
    parser.add_argument(
        "--name",
        default=None,
        help="what clients call the model (default: the folder's name; with transformers, always its path)",
    )
    parser.add_argument("--engine", default=None, help="vllm or transformers (default: vllm where it is installed)")
    parser.add_argument("--all-tokens", action="store_true", help="prune nothing, whatever the folder says")
    add_pruning_flags(parser, "as the folder says")
    parser.add_argument("--no-isolator", action="store_true", help="leave the folder's isolator out")


def run(args: argparse.Namespace) -> int:
    from saccade.errors import SaccadeError

    check_exists(args.model, "model", "name the folder of an export or of a run", folder=True)
    if args.engine is not None:
        check_choice("engine", args.engine, ENGINES)
    options = given_pruning(args)
    if args.no_isolator:
        options["isolator"] = None
    if args.all_tokens and options:
        name, value = next(iter(options.items()))
        flag = f"--{'no-' if value is None or value is False else ''}{name.replace('_', '-')}"
        raise SaccadeError(f"--all-tokens and {flag}: leave one of them out")
    setting = False if args.all_tokens else options or None
    from saccade.serving.start import serve_folder

    where = {"host": args.host, "port": args.port, "name": args.name, "engine": args.engine}
    return serve_folder(args.model, setting, args.overrides, **where)
