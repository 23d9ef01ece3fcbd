"""The page of `saccade play` in a real browser: upload, slide, read the answer; and that it stays on this machine."""

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="gradio is not installed; `make test-play` has it in a separate venv")

import torch
from browser import MISSING, Browser
from PIL import Image

from saccade.play.page import problem
from saccade.reducers import PruningConfig
from saccade.tiny import load_tiny, save_tiny

# make test-play is for these tests: there, a missing browser is an error.
needs_browser = pytest.mark.skipif(MISSING is not None and "SACCADE_TEST_PLAY" not in os.environ, reason=str(MISSING))
VALUE = "return document.querySelector(arguments[0] + ' textarea, ' + arguments[0] + ' input')?.value"
SAYS = "const [place, words] = arguments; return document.querySelector(place)?.innerText.includes(words)"
HOLDS = f"return (function() {{{VALUE}}})(arguments[0])?.includes(arguments[1])"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny(*load_tiny(), tmp_path_factory.mktemp("play") / "model")
    PruningConfig("uniform", prune_ratio=0.75).save_pretrained(folder)
    return folder


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def started(arguments: list[str], temporary: Path) -> subprocess.Popen:
    environment = {**os.environ, "TMPDIR": str(temporary), "HF_HUB_OFFLINE": "1"}
    # Settings of other gradio apps on this machine, none of which may reach the page.
    environment |= {"GRADIO_SERVER_NAME": "0.0.0.0", "GRADIO_SHARE": "True", "GRADIO_ANALYTICS_ENABLED": "True"}
    command = [sys.executable, "-m", "saccade", "play", "--no-browser", *arguments]

    def listen_to_interrupts() -> None:
        # A shell that runs the tests in the background has them ignored, and children inherit that.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        preexec_fn=listen_to_interrupts,
    )  # fmt: skip


@pytest.fixture(scope="module")
def page(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a running page."""
    temporary = tmp_path_factory.mktemp("temporary")
    process = started([str(folder), "tiny", "--port", str(free_port())], temporary)
    said = ""
    for line in process.stdout:
        said += line
        if found := re.search(r"play at (http://127\.0\.0\.1:\d+);", line):
            yield found[1]
            break
    else:
        pytest.fail(said)
    process.kill()
    process.wait(timeout=20)


@pytest.fixture
def browser(page: str) -> Iterator[Browser]:
    with Browser() as window:
        window.open(page, 1280)
        window.wait(HOLDS, "#about", "llava")
        yield window


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    noise = torch.randint(0, 256, (120, 200, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(noise.numpy()).save(path)
    return path


@needs_browser
def test_upload_slide_and_read_the_answer(browser: Browser, page: str, photo: Path) -> None:
    assert browser.run(VALUE, "#ratio") == "0.75"  # as the folder was trained
    assert browser.run(VALUE, "#reducer") == "uniform"
    browser.type("#photo input[type=file]", str(photo))
    browser.wait(HOLDS, "#result", "36 of 144 visual tokens are kept")
    for place in ("#full", "#pruned"):
        assert browser.run(VALUE, place)
    full, pruned = (
        re.search(r"; (\d+) tokens", browser.run(VALUE, place))[1] for place in ("#full_time", "#pruned_time")
    )
    assert int(full) - int(pruned) == 144 - 36
    width, height = browser.wait(
        "const i = document.querySelector('#picture img'); return i?.naturalWidth && [i.naturalWidth, i.naturalHeight]"
    )
    assert width > 1.2 * height  # the photograph's shape, with a title and a legend
    browser.type("#ratio input[type=range]", "\ue012" * 25)  # the left arrow, one hundredth each
    browser.wait(HOLDS, "#result", "72 of 144 visual tokens are kept")
    assert browser.run(VALUE, "#ratio") == "0.5"
    asked = browser.run("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert len(asked) > 5
    assert [url for url in asked if not url.startswith(page)] == []
    labels = browser.run("return [...document.querySelectorAll('button')].map(e => e.ariaLabel || e.innerText)")
    assert "Ask" in labels
    assert [label for label in labels if "share" in label.lower()] == []


@needs_browser
def test_a_scene_brings_its_question_and_its_answer(browser: Browser) -> None:
    browser.click("#scenes button[aria-label^='Thumbnail 2']")
    browser.wait(HOLDS, "#question", "how many digits")
    browser.wait(HOLDS, "#result", "The right answer is: ")


@needs_browser
def test_bad_input_is_a_line_on_the_page(browser: Browser, tmp_path: Path) -> None:
    browser.click("#ask")
    browser.wait(SAYS, "#trouble", "photograph: there is none yet")
    (tmp_path / "notes.png").write_text("<b>no image")
    browser.type("#photo input[type=file]", str(tmp_path / "notes.png"))
    browser.wait(SAYS, "#trouble", "is not an image")
    browser.run("document.querySelector('#model input').select()")
    browser.type("#model input", "no/such/<i>folder\ue007")
    browser.wait(SAYS, "#trouble", "model='no/such/<i>folder' is not a folder")


@needs_browser
@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_is_cut_off(browser: Browser, page: str, photo: Path, width: int) -> None:
    browser.open(page, width)
    browser.wait(HOLDS, "#about", "llava")
    browser.type("#photo input[type=file]", str(photo))
    browser.wait(HOLDS, "#result", "are kept")
    assert browser.run("return document.documentElement.scrollWidth <= window.innerWidth")
    ends = "return [...document.querySelectorAll('#scenes button')].map(one => one.getBoundingClientRect().right)"
    assert len(shown := browser.run(ends)) == 8
    assert max(shown) <= width


def test_an_error_is_one_line_of_text_and_not_of_markup() -> None:
    assert problem(None) == ""
    assert problem(ValueError("a\n<b>")) == '<div class="problem" role="alert">a &lt;b&gt;</div>'


def test_it_is_reached_from_this_machine_alone(page: str) -> None:
    request = urllib.request.Request(page, headers={"Host": "evil.example"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with pytest.raises(urllib.error.HTTPError, match="400"):
        opener.open(request, timeout=20)
    port = int(page.rpartition(":")[2])
    listening = [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    assert [place for place in listening if place.endswith(f":{port:04X}") and place.startswith("00000000")] == []
    with opener.open(f"{page}/config", timeout=20) as answer:
        config = answer.read().decode()
    assert '"analytics_enabled":false' in config


def test_an_interruption_ends_it_and_removes_what_was_uploaded(tmp_path: Path) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        process = started(["tiny", "--port", str(free_port())], tmp_path)
        said = ""
        for line in process.stdout:
            said += line
            if "play at" in line:
                break
        process.send_signal(number)
        rest, _ = process.communicate(timeout=60)
        assert process.returncode == 0, said + rest
        assert "Traceback" not in rest
        assert list(tmp_path.glob("saccade-play-*")) == []
