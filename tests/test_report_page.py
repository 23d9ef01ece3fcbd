"""`saccade report`: its page read as a browser, a phone and a hostile name would, and one clear line on bad input."""

import base64
import json
import os
import re
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from browser import MISSING, Browser
from PIL import Image

from experiments.studies.page import study_page
from experiments.studies.studies import plan_study
from saccade.cli.main import main
from saccade.errors import SaccadeError
from saccade.pages import page as page_module
from saccade.pages import write_report
from saccade.pages.page import Page, blocks, html_table
from saccade.pages.source import read_run
from saccade.sweeps import QUICK

STYLE = (Path(page_module.__file__).parent / "templates" / "style.css").read_text()
PAGE = Path(__file__).parent.parent / "docs" / "report.md"
HOSTILE = "<script>document.title='taken'"


class Reader(HTMLParser):
    """Tags with their attributes, and the text, of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.heading = ""
        self.captions: list[str] = []
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in ("h1", "caption", "figcaption"):
            self.inside = tag
            if tag != "h1":
                self.captions.append("")

    def handle_endtag(self, tag):
        self.inside = "" if tag == self.inside else self.inside

    def handle_data(self, data):
        self.words.append(data)
        if self.inside == "h1":
            self.heading += data
        elif self.inside:
            self.captions[-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def read(folder: Path) -> Reader:
    return Reader((folder / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder that the documentation's commands leave, its report included."""
    folder = tmp_path_factory.mktemp("report")
    before = Path.cwd()
    os.chdir(folder)
    try:
        for line in re.search(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)[1].splitlines():
            program, *arguments = shlex.split(line)
            assert program == "saccade"
            assert main(arguments) == 0
    finally:
        os.chdir(before)
    return folder / "out" / "run"


@pytest.fixture(scope="module")
def sweep(run, tmp_path_factory):
    """A study with made-up results: seven runs have finished and one has failed."""
    folder = tmp_path_factory.mktemp("sweep")
    plan = plan_study("parts", QUICK.shrink(4), 2)
    plan.write(folder)
    log = json.loads((run / "log.json").read_text())
    stage = {
        "seconds": 20.0,
        "samples": 64,
        "tokens": {"full": 6400.0, "trained": 1600.0, "teacher": 100.0},
        "step_seconds": {"fast": [0.1], "slow": [0.2]},
        "step_speedup": 2.0,
        "log_history": log["log_history"],
    }
    for number, spec in enumerate(plan.runs[:8]):
        place = folder / "runs" / spec.name
        place.mkdir(parents=True)
        if number == 7:
            (place / "error.json").write_text(json.dumps({"error": f"it ran {HOSTILE}</script>"}))
            continue
        ways = [
            {
                "inference": fields["name"],
                "reducer": fields.get("reducer"),
                "prune_ratio": fields.get("prune_ratio", 0.0),
                "positions": "compact",
                "accuracy": 0.5 + number / 100,
                "accuracy_by_kind": {},
                "samples": 8,
                "mean_prompt_length": 150.0 if fields["name"] == "full" else 24.0,
                "prefill_flops": 3e8 if fields["name"] == "full" else 1e8,
            }
            for fields in spec.evaluation.inferences
        ]
        result = {"spec": spec.as_json(), "environment": log["environment"], "finished": "2026-01-01"}
        result |= {"model": str(run), "stages": {"pretrain": stage, "sft": stage}, "evaluations": ways}
        (place / "result.json").write_text(json.dumps(result))
    write_report(folder, make=study_page)
    return folder


@pytest.fixture(params=["run", "sweep"])
def reported(request):
    return request.getfixturevalue(request.param) / "report"


class TestPage:
    def test_it_needs_no_other_file(self, reported) -> None:
        found = read(reported)
        assert not found.all("script")
        links = [value for _, tag in found.tags for name, value in tag.items() if name in ("href", "src")]
        assert all(link.startswith(("#", "data:")) for link in links)
        assert "url(" not in STYLE
        assert "@import" not in STYLE
        (policy,) = (tag["content"] for tag in found.all("meta") if tag.get("http-equiv"))
        assert policy.startswith("default-src 'none';")

    def test_its_pictures_lie_beside_it_and_are_described(self, reported) -> None:
        record = json.loads((reported / "report.json").read_text())
        images = read(reported).all("img")
        assert len(images) == len(record["pictures"]) >= 4
        for image, entry in zip(images, record["pictures"], strict=True):
            data = base64.b64decode(image["src"].removeprefix("data:image/png;base64,"))
            assert data == (reported / entry["file"]).read_bytes()
            with Image.open(reported / entry["file"]) as opened:
                assert (image["width"], image["height"]) == tuple(map(str, opened.size))
            assert image["alt"] == entry["alt"]
            assert len(image["alt"]) > 30

    def test_its_first_line_is_the_finding(self, reported) -> None:
        found, record = read(reported), json.loads((reported / "report.json").read_text())
        assert found.heading == record["finding"]

    def test_every_caption_is_a_sentence(self, reported) -> None:
        captions = read(reported).captions
        assert len(captions) >= 4
        assert [words for words in captions if not re.fullmatch(r"[“A-Z].*[.]", words)] == []

    def test_it_has_one_outline(self, reported) -> None:
        found = read(reported)
        assert len(found.all("h1")) == 1
        anchors = [tag["id"] for tag in found.all("h2")]
        assert len(anchors) == len(set(anchors))
        assert [tag["href"] for tag in found.all("a")] == [f"#{anchor}" for anchor in anchors]
        assert found.all("html") == [{"lang": "en"}]
        assert all("scope" in tag for tag in found.all("th"))


class TestRun:
    def test_it_shows_what_the_files_say(self, run) -> None:
        text, log = read(run / "report").text, json.loads((run / "log.json").read_text())
        evaluation = json.loads((run / "eval.json").read_text())["results"]
        for result in evaluation:
            assert f"{100 * result['accuracy']:.1f} %" in text
        last = [entry for entry in log["log_history"] if "loss_fast" in entry][-1]
        assert f"fast steps {last['loss_fast']:.3f}" in text
        assert f"tokens allow {last['speedup_tokens']:.2f}x" in text
        assert f"torch {log['environment']['packages']['torch']}" in text
        record = json.loads((run / "report" / "report.json").read_text())
        parts = record["seconds"]
        assert parts["teachers"] > 0
        steps = sum(
            entry.get(f"step_seconds_{mode}", 0) * (entry[f"steps_{mode}"] - before[f"steps_{mode}"])
            for mode in ("fast", "slow")
            for before, entry in zip(
                [{f"steps_{mode}": 0}, *log["log_history"]], log["log_history"][:-1], strict=False
            )
        )
        assert parts["fast steps"] + parts["slow steps"] + parts["teachers"] == pytest.approx(steps, rel=1e-3)
        names = {entry["file"] for entry in record["pictures"]}
        assert {"run-loss.png", "run-kl.png", "run-speedup.png", "run-kept-read.png"} <= names

    def test_the_scenes_differ_and_are_answered(self, run) -> None:
        pictures = sorted((run / "report").glob("run-kept-*.png"))
        assert len({path.read_bytes() for path in pictures}) == len(pictures) == 4
        assert (
            len(re.findall(r"Right: “[^”]+”; answered on all tokens “[^”]*”, on kept", read(run / "report").text)) == 4
        )

    def test_a_run_that_goes_on_is_shown_from_its_checkpoint(self, run, tmp_path) -> None:
        checkpoint = tmp_path / "checkpoint-4"
        log = json.loads((run / "log.json").read_text())["log_history"][:2]
        shutil.copytree(run, checkpoint, ignore=shutil.ignore_patterns("report", "checkpoint-*", "*.json"))
        for name in ("dualspeed.json", "config.json"):
            shutil.copy(run / name, checkpoint)
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            torch.save({}, checkpoint / name)
        (checkpoint / "trainer_state.json").write_text(json.dumps({"log_history": log}))
        (tmp_path / "checkpoint-6").mkdir()
        (tmp_path / "checkpoint-6" / "trainer_state.json").write_text('{"log_history": [')
        text = read(write_report(tmp_path).parent).text
        assert "This page shows checkpoint-4: there is no log of a finished run." in text
        assert re.search(r"\b4 (of \d+ )?steps", text)
        assert "No pictures: a checkpoint does not name its data." in text
        assert "Neither machine nor versions of this run were recorded." in text

    def test_losses_that_are_no_numbers_are_said(self, run, tmp_path) -> None:
        log = json.loads((run / "log.json").read_text())
        log["recipe"]["dataset"] = "my.jsonl"
        for entry in log["log_history"][3:5]:
            entry["loss"] = entry["loss_fast"] = None
        log["recipe"]["modes"] = [{"name": "fast"}, {"name": "half"}]
        (tmp_path / "log.json").write_text(json.dumps(log))
        (tmp_path / "eval.json").write_text('{"results": [{"benchmark": "another"}]}')
        text = read(write_report(tmp_path).parent).text
        assert "prune_ratio 0.9, modes fast, half." in text
        assert "Not evaluated on the digit scenes." in text
        steps = [entry["step"] for entry in log["log_history"][3:5]]
        assert f"The loss was not finite at step {steps[0]}, {steps[1]}." in text
        assert "No pictures: the run is not on the digit scenes." in text

    def test_an_evaluation_of_other_weights_is_not_shown(self, run, tmp_path) -> None:
        """Not even in a folder without weights: a run that is trained again, say."""
        for name in ("log.json", "eval.json"):
            shutil.copy(run / name, tmp_path)
        page = write_report(tmp_path)
        text = read(page.parent).text
        assert f"{tmp_path / 'eval.json'} was measured on other weights, and is not shown." in text
        assert "Not evaluated on the digit scenes." in text
        assert "accuracy" not in json.loads((page.parent / "report.json").read_text())
        evaluation = json.loads((run / "eval.json").read_text())
        (tmp_path / "eval.json").write_text(json.dumps(evaluation | {"weights": [evaluation["weights"]]}))
        record = read_run(tmp_path)
        assert record.evaluation is None
        assert "does not say which weights it was measured on" in record.left_out

    def test_names_and_values_are_text(self, run, tmp_path) -> None:
        folder = tmp_path / HOSTILE
        folder.mkdir()
        log = json.loads((run / "log.json").read_text())
        log["recipe"] |= {"dataset": "</style><img src=x onerror=alert(1)>", "run_name": '" onload="alert(1)'}
        (folder / "log.json").write_text(json.dumps(log))
        found = read(write_report(folder).parent)
        assert HOSTILE in found.text
        assert "</style><img src=x onerror=alert(1)>" in found.text
        assert not found.all("script")
        assert len(found.all("style")) == 1
        assert not [tag for _, tag in found.tags if {"onerror", "onload"} & tag.keys()]


class TestSweep:
    def test_it_shows_the_table_and_what_failed(self, sweep) -> None:
        text = read(sweep / "report").text
        assert "runs done, 1 failed: " in text
        assert f"A run failed: it ran {HOSTILE}</script>" in text
        assert "accuracy, all tokens" in text
        record = json.loads((sweep / "report" / "report.json").read_text())
        files = {entry["file"] for entry in record["pictures"]}
        names = ("trade-off", "loss", "kept-tokens", "study-1")
        assert {f"{sweep.name}-{name}.png" for name in names} <= files
        results = [json.loads(path.read_text()) for path in sweep.glob("runs/*/result.json")]
        dualspeed = [one for one in results if one["spec"]["labels"]["method"] == "dualspeed"]
        full = [one["evaluations"][0]["accuracy"] for one in dualspeed]
        (point,) = (
            entry
            for entry in record["trade_off"]
            if entry["training"].startswith("DualSpeed") and entry["inference"] == "full"
        )
        assert point["accuracy"] == pytest.approx(sum(full) / len(full))
        assert (point["seconds"], point["tokens"], point["flops"]) == (40, 150, 3e8)

    def test_the_plain_page_of_a_sweep(self, sweep, tmp_path) -> None:
        """Without what a study adds: the table, what failed, the losses and the settings."""
        reader = read(write_report(sweep, tmp_path / "plain").parent)
        assert f"A run failed: it ran {HOSTILE}</script>" in reader.text
        assert not reader.all("script")
        assert "accuracy, all tokens" in reader.text
        assert "Options of pretraining" in reader.text
        record = json.loads((tmp_path / "plain" / "report.json").read_text())
        names = [entry["file"] for entry in record["pictures"]]
        assert names == [f"{sweep.name}-trade-off.png", f"{sweep.name}-loss.png"]

    def test_a_model_that_is_gone_leaves_the_rest(self, sweep, tmp_path) -> None:
        folder = tmp_path / "moved"
        shutil.copytree(sweep, folder, ignore=shutil.ignore_patterns("report"))
        for path in folder.glob("runs/*/result.json"):
            path.write_text(json.dumps(json.loads(path.read_text()) | {"model": "/gone"}))
        assert (
            "No picture: model='/gone' is not a local folder"
            in read(write_report(folder, make=study_page).parent).text
        )


class TestBadInput:
    def test_the_command_says_one_line(self, tmp_path, capsys) -> None:
        assert main(["report", str(tmp_path / "nothing")]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "does not exist: give the folder of a run" in error

    def test_folders_without_a_run(self, sweep, tmp_path) -> None:
        with pytest.raises(SaccadeError, match=r"contains no run: there is neither log.json nor a whole checkpoint"):
            write_report(tmp_path)
        (tmp_path / "a.txt").touch()
        with pytest.raises(SaccadeError, match=r"a.txt' is a file: give the folder"):
            write_report(tmp_path / "a.txt")
        # Other tests' folders may lie beside it.
        with pytest.raises(SaccadeError, match=f"contains several sweeps: give one of them, .*{sweep.name}"):
            write_report(sweep.parent, tmp_path / "out")
        with pytest.raises(SaccadeError, match=r"is one run of a sweep: give the sweep, or its model /"):
            write_report(next(sweep.glob("runs/*/result.json")).parent)
        shutil.copytree(sweep / "runs", tmp_path / "demo" / "runs")
        with pytest.raises(SaccadeError, match=r"contains runs without sweep\.json"):
            write_report(tmp_path / "demo")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("file", "text", "message"),
        [
            ("log.json", '{"log_history": [{"st', r"log.json is half-written or damaged"),
            ("log.json", "{}", r"log.json is not what Saccade writes, it lacks log_history"),
            ("log.json", '{"log_history": 3}', r"is not a list of entries"),
            ("log.json", '{"log_history": []}', r"has no loss: train with logging_steps below max_steps"),
            ("eval.json", '{"results": [', r"eval.json is half-written or damaged"),
            ("dualspeed.json", "[]", r"dualspeed.json is not what Saccade writes, it lacks config"),
        ],
    )
    def test_half_written_files_of_a_run(self, run, tmp_path, file, text, message) -> None:
        shutil.copy(run / "log.json", tmp_path)
        (tmp_path / file).write_text(text)
        with pytest.raises(SaccadeError, match=message):
            write_report(tmp_path)
        assert not (tmp_path / "report").exists()

    def test_a_half_written_result_of_a_sweep(self, sweep, tmp_path) -> None:
        folder = tmp_path / "sweep"
        shutil.copytree(sweep, folder)
        result = next(folder.glob("runs/*/result.json"))
        result.write_text(result.read_text()[:100])
        with pytest.raises(SaccadeError, match=r"result.json is half-written or damaged"):
            write_report(folder, overwrite=True)
        shutil.rmtree(folder / "runs")
        with pytest.raises(SaccadeError, match="contains a sweep with no finished run"):
            write_report(folder, overwrite=True)

    def test_outputs_that_cannot_be(self, run, tmp_path) -> None:
        with pytest.raises(SaccadeError, match="contains a report: give another --output, or --overwrite"):
            write_report(run)
        (tmp_path / "file").touch()
        with pytest.raises(SaccadeError, match=r"cannot be written \(.+\): give another path"):
            write_report(run, tmp_path / "file" / "report")
        with pytest.raises(SaccadeError, match="is a folder with other files: give a new one"):
            write_report(run, tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["file"]

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_no_permission(self, run, tmp_path) -> None:
        tmp_path.chmod(0o500)
        with pytest.raises(SaccadeError, match=r"cannot be written \(Permission denied\)"):
            write_report(run, tmp_path / "report")

    def test_overwriting_leaves_no_old_picture(self, run, tmp_path) -> None:
        shutil.copy(run / "log.json", tmp_path)
        output = write_report(tmp_path).parent
        (kl,) = output.glob("*-kl.png")
        kl.rename(output / "old.png")
        record = (output / "report.json").read_text().replace(f'"{kl.name}"', '"old.png"')
        (output / "report.json").write_text(record)
        (output / "mine.png").touch()
        write_report(tmp_path, overwrite=True)
        assert not (output / "old.png").exists()
        assert kl.exists()
        assert (output / "mine.png").exists()


class TestStyle:
    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_text_can_be_read(self, scheme) -> None:
        light, dark = STYLE.split("@media (prefers-color-scheme: dark)")
        colors = dict(re.findall(r"--(\w+): (#\w+)", light if scheme == "light" else dark))
        assert {"paper", "ink", "faint", "card", "link"} <= colors.keys()
        for ink in ("ink", "faint", "link"):
            for paper in ("paper", "card"):
                assert contrast(colors[ink], colors[paper]) >= 4.5

    def test_a_table_is_escaped_and_aligned(self) -> None:
        table = html_table(["a<b", "n"], [["<i>", 1.0], ["x", None]], 'say "x"')
        assert '<th scope="col">a&lt;b</th><th scope="col" class="number">n</th>' in table
        assert '<th scope="row">&lt;i&gt;</th><td data-column="n" class="number">1</td>' in table
        assert "<caption>say &#34;x&#34;</caption>" in table
        assert '<th scope="row">a_<wbr>&lt;b</th>' in html_table(["n"], [["a_<b"]], "c")

    def test_empty_sections_are_left_out(self, tmp_path) -> None:
        page = Page(tmp_path, "run", tmp_path, "found", "lead")
        page.add("one", blocks.paragraph("1"))
        page.add("two")
        found = Reader(page.html("end"))
        assert [tag["id"] for tag in found.all("h2")] == ["one"]


def contrast(one: str, other: str) -> float:
    """The contrast ratio of WCAG 2.2, from 1 to 21."""

    def luminance(color: str) -> float:
        digits = color[1:] if len(color) == 7 else "".join(2 * digit for digit in color[1:])
        shares = [int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4)]
        linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
        return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.fixture(scope="module")
def browser():
    with Browser() as browser:
        yield browser


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
class TestInABrowser:
    @pytest.mark.parametrize("width", [360, 1280])
    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_it_fits_and_shows_every_picture(self, browser, reported, tmp_path, width, scheme) -> None:
        browser.open(reported / "report.html", width, scheme)
        # Also with everything unfolded, where the widest tables are.
        for unfold in (False, True):
            browser.run("document.querySelectorAll('details').forEach(one => { one.open = arguments[0] })", unfold)
            across, room = browser.run("const e = document.documentElement; return [e.scrollWidth, e.clientWidth]")
            assert 0 < across <= room <= width
        images = browser.run("return [...document.images].map(image => [image.complete, image.naturalWidth])")
        assert images
        assert all(complete and natural > 0 for complete, natural in images)
        outside = browser.run(
            "return [...document.querySelectorAll('body *')].filter(one => !one.closest('pre, .wide thead')"
            " && one.getBoundingClientRect().right > document.documentElement.clientWidth + 1).length"
        )
        assert outside == 0
        # The page itself, below whatever the style says of its parts.
        browser.screenshot(tmp_path / "page.png")
        with Image.open(tmp_path / "page.png") as shot:
            brightness = shot.convert("L").getpixel((2, 2))
            assert shot.width == room
        assert brightness > 200 if scheme == "light" else brightness < 60

    def test_a_hostile_name_does_nothing(self, browser, run, tmp_path) -> None:
        folder = tmp_path / HOSTILE
        folder.mkdir()
        shutil.copy(run / "log.json", folder)
        browser.open(write_report(folder).parent / "report.html", 360)
        title, lead = browser.run("return [document.title, document.querySelector('.lead').textContent]")
        assert title.startswith(f"{HOSTILE}: Loss ")
        assert HOSTILE in lead
