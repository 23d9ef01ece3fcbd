"""`saccade play`: a page on this machine that asks a model with all visual tokens and with kept ones."""

import argparse

EXAMPLES = """
saccade play                        what `train`, `demo` and `smol` wrote to out/, and the embedded model
saccade play out/sft out/export     models to choose from, each pruned as it was trained
saccade play out/smol               a model for each run of a demo or a sweep
saccade play --port 8001 --no-browser
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models", nargs="*", metavar="FOLDER", help="models to choose from, or `tiny` for the embedded one"
    )
    parser.add_argument("--port", type=int, default=7860, help="port to listen at (default: %(default)s)")
    parser.add_argument("--no-browser", action="store_true", help="do not open the page in a browser")


def run(args: argparse.Namespace) -> int:
    import importlib.util

    from saccade.errors import needs_package
    from saccade.play import HOST, check_folder
    from saccade.values import check_port

    # The one that only this verb needs, so that its extra is named and not that of another package.
    if importlib.util.find_spec("gradio") is None:
        raise needs_package("saccade play", "gradio")
    check_port(HOST, args.port)
    for model in args.models:
        check_folder(model)
    from saccade.play.ask import find_models

    models = find_models(args.models)
    from saccade.play.page import serve

    serve(models, args.port, browser=not args.no_browser)
    return 0
