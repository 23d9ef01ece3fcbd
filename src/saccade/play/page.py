"""The page of `saccade play`: what is on it, and what happens on a click. Served to this machine only."""

import os
import signal
import tempfile
import threading
from collections.abc import Callable, Mapping
from html import escape
from typing import Any

# Read when gradio is imported: no use is reported, and pictures that are uploaded end with the page.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from saccade.errors import SaccadeError
from saccade.play import HOST
from saccade.play.ask import HIGHEST_RATIO, Answer, Comparison, OpenModel, Scene, compare, open_model, scenes
from saccade.reducers import list_reducers
from saccade.values import check_port

CSS = """
.problem {color: #b00020; font-weight: 600}
@media (max-width: 480px) {
  #scenes .grid-container {grid-template-columns: repeat(4, minmax(0, 1fr)) !important; min-width: 0}
  #scenes .caption-label {display: none}
}
"""
"""The second rule is for a phone: the gallery's own columns do not fit, and a question of two words says nothing."""
LARGEST_UPLOAD = "64mb"


class Table:
    """The one model that is loaded, and what the page asks of it."""

    def __init__(self, load: Callable[[str], OpenModel] = open_model) -> None:
        self._load = load
        self._opened: OpenModel | None = None

    def open(self, name: str | None) -> OpenModel:
        """The model of this name; the one before it is let go first.

        Raises:
            SaccadeError: if it cannot be loaded.
        """
        name = (name or "").strip()
        if self._opened is None or self._opened.name != name:
            self._opened = None
            self._opened = self._load(name)
        return self._opened


def times(answer: Answer) -> str:
    """What an answer took, in a line."""
    return (
        f"First token after {answer.first:.2f} s, all {answer.tokens} after {answer.seconds:.2f} s; "
        f"{answer.prompt} tokens in the prompt."
    )


def summary(found: Comparison, right: str | None) -> str:
    """How many tokens are kept and, if it is known, the right answer, in a line."""
    line = f"{found.kept} of {found.total} visual tokens are kept."
    return line if right is None else f"{line} The right answer is: {right}"


def problem(error: SaccadeError | None) -> str:
    """An error as a line of HTML, nothing if there is none."""
    return "" if error is None else f'<div class="problem" role="alert">{escape(" ".join(str(error).split()))}</div>'


def build(models: Mapping[str, str], embedded: list[Scene], table: Table) -> gr.Blocks:
    """The page.

    Args:
        models: the folder of each model by its name on the page, the one to begin with first.
        embedded: scenes to choose from.
    """
    # Of a demo's models, the one that both answers are meant for.
    first = next((folder for name, folder in models.items() if "dualspeed" in name), next(iter(models.values())))
    with gr.Blocks(title="Saccade: play", analytics_enabled=False) as page:
        gr.Markdown("# Ask with all visual tokens, and with a few")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                model = gr.Dropdown(
                    list(models.items()), value=first, label="Model", allow_custom_value=True, elem_id="model",
                    info="Any folder of a model on this machine can be typed in.",
                )  # fmt: skip
                about = gr.Textbox(show_label=False, container=False, interactive=False, lines=2, elem_id="about")
                photo = gr.File(label="Photograph", elem_id="photo", height=120)
                gr.Markdown("Or one of these scenes, with its question:")
                gallery = gr.Gallery(
                    [(scene.image, scene.question) for scene in embedded], show_label=False, columns=4, height=240,
                    allow_preview=False, interactive=False, elem_id="scenes", buttons=[],
                )  # fmt: skip
                question = gr.Textbox(label="Question", value="how many digits are there ?", elem_id="question")
                ask = gr.Button("Ask", variant="primary", elem_id="ask")
                reducer = gr.Dropdown(list_reducers(), label="Reducer", elem_id="reducer")
                ratio = gr.Slider(0, HIGHEST_RATIO, step=0.01, label="Share of visual tokens to drop", elem_id="ratio")
            with gr.Column(scale=3, min_width=300):
                trouble = gr.HTML(elem_id="trouble")
                picture = gr.Image(
                    label="Kept tokens", show_label=False, interactive=False, format="png", elem_id="picture",
                    buttons=["download", "fullscreen"],
                )  # fmt: skip
                result = gr.Textbox(label="Result", interactive=False, elem_id="result")
                with gr.Row():
                    with gr.Column(min_width=200):
                        full = gr.Textbox(label="Answer from all tokens", interactive=False, lines=2, elem_id="full")
                        full_time = gr.Textbox(label="Time", interactive=False, lines=2, elem_id="full_time")
                    with gr.Column(min_width=200):
                        pruned = gr.Textbox(
                            label="Answer from kept tokens", interactive=False, lines=2, elem_id="pruned"
                        )
                        pruned_time = gr.Textbox(label="Time", interactive=False, lines=2, elem_id="pruned_time")
        # A scene's image, while the photograph is none.
        chosen = gr.State(None)
        shown = [trouble, picture, result, full, pruned, full_time, pruned_time]

        def choose(name: str) -> list[Any]:
            try:
                opened = table.open(name)
            except SaccadeError as error:
                return [problem(error), "", gr.skip(), gr.skip()]
            return ["", opened.describe(), opened.pruning.reducer, opened.ratio]

        def answer(name: str, path: str | None, scene: int | None, asked: str, method: str, share: float) -> list[Any]:
            subject, right = path, None
            if path is None and scene is not None:
                subject = embedded[scene].image
                right = embedded[scene].answer if asked == embedded[scene].question else None
            try:
                opened = table.open(name)
                found = compare(opened, subject, asked, opened.setting(method, share))
            except SaccadeError as error:
                return [problem(error), None, "", "", "", "", ""]
            texts = [found.full.text, found.pruned.text, times(found.full), times(found.pruned)]
            return ["", found.picture, summary(found, right), *texts]

        def answer_again(*given: Any) -> list[Any]:
            """As `answer`, but quiet as long as there is no picture."""
            return answer(*given) if given[1] is not None or given[2] is not None else [gr.skip() for _ in shown]

        def choose_scene(event: gr.SelectData) -> list[Any]:
            return [None, event.index, embedded[event.index].question]

        # One at a time: the model is shared, and times are only comparable alone.
        alone = {"concurrency_limit": 1, "concurrency_id": "model", "api_visibility": "private"}
        given = [model, photo, chosen, question, reducer, ratio]
        opening = {"fn": choose, "inputs": model, "outputs": [trouble, about, reducer, ratio], **alone}
        again = {"fn": answer_again, "inputs": given, "outputs": shown, **alone}
        page.load(**opening)
        model.input(**opening).success(**again)
        photo.upload(lambda: None, None, chosen, api_visibility="private").then(**again)
        gallery.select(choose_scene, None, [photo, chosen, question], api_visibility="private").then(**again)
        for trigger in (ask.click, question.submit):
            trigger(answer, given, shown, **alone)
        for trigger in (ratio.input, reducer.input):
            trigger(**again, trigger_mode="always_last")
    return page


def serve(models: Mapping[str, str], port: int, browser: bool = True) -> None:
    """Show the page at `HOST` until Ctrl-C.

    Args:
        browser: open it in the default browser.

    Raises:
        SaccadeError: if the port is taken.
    """
    check_port(HOST, port)
    with tempfile.TemporaryDirectory(prefix="saccade-play-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        page = build(models, scenes(), Table())
        # Other sites cannot reach the page under another name that leads to this machine.
        hosts = Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
        page.launch(
            server_name=HOST, server_port=port, share=False, inbrowser=browser, quiet=True, prevent_thread_lock=True,
            ssr_mode=False, pwa=False, mcp_server=False, enable_monitoring=False, max_file_size=LARGEST_UPLOAD,
            footer_links=[], css=CSS, app_kwargs={"middleware": [hosts]},
        )  # fmt: skip
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            print(f"saccade: play at http://{HOST}:{port}; Ctrl-C ends it", flush=True)
            threading.Event().wait()
        except KeyboardInterrupt:
            pass
        finally:
            page.close(verbose=False)
