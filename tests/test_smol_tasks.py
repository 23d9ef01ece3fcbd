"""The tasks of the testbed smol: samples repeat, splits are disjoint, and answers are those that the pictures give.

The oracles read pictures anew: the text that was drawn, the colours and heights of pixels, the shapes of digits.
Documents and charts use the fonts that matplotlib brings along, so that they run without the testbed's own packages.
"""

import hashlib
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from smol_parts import FONTS_HERE, OWN_FONTS, RGB, parts_of_the_tests

from experiments.smol import fonts
from experiments.smol.fonts import FONTS, Font
from experiments.smol.tasks import TASKS, charts, documents, easy_vqa
from experiments.smol.tasks.base import PATCH, SPLITS, split_of
from saccade.data.digits import digit_samples, split_indices
from saccade.data.questions import COLUMN_WORDS, ROW_WORDS
from saccade.errors import SaccadeError


@pytest.fixture(scope="module", autouse=True)
def parts(tmp_path_factory) -> Iterator[None]:
    with parts_of_the_tests(tmp_path_factory.mktemp("easy_vqa")):
        yield


def samples(name: str, split: str, count: int, grid: int = 12):
    return [TASKS[name].sample(split, number, grid=grid) for number in range(count)]


def fingerprint(image: Image.Image) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()


@pytest.mark.parametrize("name", TASKS)
class TestEveryTask:
    def test_a_sample_repeats_and_others_differ(self, name: str) -> None:
        task = TASKS[name]
        first, again = (task.sample("train", 3, seed=1) for _ in range(2))
        assert fingerprint(first.image) == fingerprint(again.image)
        assert (first.regions, first.questions) == (again.regions, again.questions)
        others = [task.sample("train", 4, seed=1), task.sample("train", 3, seed=2), task.sample("test", 3, seed=1)]
        assert fingerprint(first.image) not in {fingerprint(sample.image) for sample in others}

    @pytest.mark.parametrize("grid", [12, 24])
    def test_samples_are_what_they_say(self, name: str, grid: int) -> None:
        task, kinds = TASKS[name], set()
        for split in SPLITS:
            for sample in samples(name, split, 15, grid):
                assert sample.image.size == (grid * PATCH, grid * PATCH)
                assert sample.image.mode == "RGB"
                assert sample.regions
                assert sample.questions
                assert sample.caption
                for region in sample.regions:
                    left, top, right, bottom = region.box
                    assert 0 <= left < right <= grid * PATCH
                    assert 0 <= top < bottom <= grid * PATCH
                    assert set(region.text.split()) <= set(task.words)
                for question in sample.questions:
                    assert question.answer
                    kinds.add(question.kind)
        assert kinds == set(task.kinds)

    def test_splits_share_no_picture(self, name: str) -> None:
        seen = {split: {fingerprint(one.image) for one in samples(name, split, 40)} for split in SPLITS}
        assert len(set.union(*seen.values())) == sum(len(found) for found in seen.values())

    @pytest.mark.parametrize(("split", "grid"), [("dev", 12), ("train", 13)])
    def test_bad_input_is_told(self, name: str, split: str, grid: int) -> None:
        with pytest.raises(SaccadeError, match=r"split='dev' is unknown|grid=13 is unknown"):
            TASKS[name].sample(split, 0, grid=grid)


def test_hashes_share_names_out_as_they_say() -> None:
    found = [split_of(f"name {number}") for number in range(4000)]
    for split, share in zip(SPLITS, (0.70, 0.15, 0.15), strict=True):
        assert abs(found.count(split) / 4000 - share) < 0.03


def test_a_missing_package_is_named() -> None:
    with pytest.raises(SaccadeError, match=r"no_such_font is not installed: pip install .* requirements-smol\.txt"):
        fonts.load_font(Font("None", "no_such_font", "x.ttf"), 12)


class TestFonts:
    def test_splits_share_no_family(self) -> None:
        families = [{font.family for font in OWN_FONTS[split]} for split in SPLITS]
        assert len(set.union(*families)) == sum(map(len, families)) == 8
        every = sum(OWN_FONTS.values(), ())
        assert len(set(every)) == len(every)

    @pytest.mark.parametrize(
        "font",
        [font for split in SPLITS for font in OWN_FONTS[split]],
        ids=lambda font: f"{Path(font.file).stem}-{font.scale}",
    )
    def test_fonts_are_in_their_packages(self, font: Font) -> None:
        pytest.importorskip(font.package)
        assert font.family.split()[0] in fonts.load_font(font, 12).getname()[0]

    @pytest.mark.parametrize("task", ["documents", "charts"])
    @pytest.mark.parametrize("font", OWN_FONTS["train"], ids=lambda font: f"{Path(font.file).stem}-{font.scale}")
    def test_every_font_fits_on_the_sheet(self, font: Font, task: str, monkeypatch) -> None:
        pytest.importorskip(font.package)
        monkeypatch.setitem(FONTS, "train", (font,))
        # A line that is too long for the sheet is refused.
        assert len(samples(task, "train", 30)) == 30

    def test_splits_draw_with_fonts_of_their_own(self, monkeypatch) -> None:
        used = []
        real = ImageDraw.ImageDraw.text
        monkeypatch.setattr(
            ImageDraw.ImageDraw, "text", lambda *args, **kw: (used.append(kw["font"].path), real(*args, **kw))
        )
        for split in SPLITS:
            used.clear()
            samples("documents", split, 3)
            samples("charts", split, 3)
            assert {str(path) for path in used} == {str(font.path) for font in FONTS_HERE[split]}


class TestDigits:
    def test_splits_share_no_digit(self) -> None:
        pools = [{index for indices in split_indices(split) for index in indices} for split in SPLITS]
        assert len(set.union(*pools)) == sum(map(len, pools)) == len(digit_samples()[1])

    def test_answers_follow_from_what_is_there(self) -> None:
        images, classes = digit_samples()
        right = total = 0
        for sample in samples("digits", "test", 60):
            pixels = np.asarray(sample.image, dtype=float)
            pool = [index for indices in split_indices("test") for index in indices]
            values, places = [], []
            # The left half of a digit says its value, the right half its place.
            for half, other in zip(sample.regions[::2], sample.regions[1::2], strict=True):
                (left, top, middle, bottom), (also, *rest, right_edge, below) = half.box, other.box
                assert (also, rest, below) == (middle, [top], bottom)
                x, y = (left + right_edge) / 2, (top + bottom) / 2
                third = sample.image.width / 3
                assert other.text == f"{ROW_WORDS[int(y // third)]} {COLUMN_WORDS[int(x // third)]}"
                values.append(int(half.text))
                places.append(other.text)
                nearest = _nearest(pixels[top:bottom, left:right_edge], images[pool], pool)
                right += classes[nearest] == values[-1]
                total += 1
            for question in sample.questions:
                asked = [int(word) for word in re.findall(r"\d", question.text)]
                assert question.answer == _digit_answer(question, asked, values, places), question
        # The nearest of the split's own digits, without turning it, is mostly one of the same class.
        assert right / total > 0.8


def _digit_answer(question, asked, values, places) -> str:
    rows, columns = zip(*(place.split() for place in places), strict=True)
    order = [COLUMN_WORDS.index(column) for column in columns]
    answers = {
        "has": lambda: "yes" if asked[0] in values else "no",
        "leftmost": lambda: values[order.index(min(order))],
        "rightmost": lambda: values[order.index(max(order))],
        "max": lambda: max(values),
        "min": lambda: min(values),
        "row": lambda: rows[values.index(asked[0])],
        "column": lambda: columns[values.index(asked[0])],
    }
    return str(answers[question.kind]())


def _nearest(crop: np.ndarray, templates: np.ndarray, pool: list[int]) -> int:
    """The digit that a crop is most like, by correlation of the ink."""
    ink = crop - np.median(crop, axis=(0, 1))
    small = np.asarray(Image.fromarray(np.abs(ink).mean(-1).astype(np.uint8)).resize((8, 8), Image.Resampling.BOX))
    flat = templates.reshape(len(templates), -1).astype(float)
    flat, seen = flat - flat.mean(1, keepdims=True), small.ravel() - small.mean()
    return pool[int(np.argmax(flat @ seen / np.linalg.norm(flat, axis=1)))]


class TestEasyVQA:
    def test_validation_is_taken_out_of_train_and_test_is_its_own(self) -> None:
        train, validation, test = (easy_vqa.image_numbers(split) for split in SPLITS)
        assert not set(train) & set(validation)
        # Image 9 has no caption.
        assert len(train) == 53
        assert len(validation) == 6
        assert test == tuple(range(20))

    @pytest.mark.parametrize("split", SPLITS)
    def test_answers_are_what_the_pixels_show(self, split: str) -> None:
        check_shapes(samples("easy_vqa", split, 30))

    def test_so_they_are_in_the_real_data_set(self, monkeypatch) -> None:
        monkeypatch.undo()
        monkeypatch.setattr(fonts, "find_spec", importlib.util.find_spec)
        easy_vqa._questions.cache_clear()
        try:
            pytest.importorskip("easy_vqa")
            numbers = [easy_vqa.image_numbers(split) for split in SPLITS]
            assert [len(found) for found in numbers] == [3563, 398, 1000]
            task = TASKS["easy_vqa"]
            assert all(task.sample("train", index).caption for index in range(len(numbers[0])))
            for split in SPLITS:
                check_shapes(samples("easy_vqa", split, 100))
        finally:
            easy_vqa._questions.cache_clear()


def check_shapes(found) -> None:
    for sample in found:
        (region,) = sample.regions
        pixels = np.asarray(sample.image, dtype=int)
        # The ground is lighter than every shape.
        shown = np.abs(pixels - pixels.reshape(-1, 3)[pixels.sum(-1).argmax()]).max(-1) > 60
        rows, columns = shown.nonzero()
        box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert np.abs(np.subtract(region.box, box)).max() <= 6
        core = np.median(pixels[shown], axis=0)
        colour = min(RGB, key=lambda name, core=core: np.abs(core - RGB[name]).sum())
        share = shown.sum() / np.subtract(box[2:], box[:2]).prod()
        shape = "triangle" if share < 0.7 else "circle" if share < 0.92 else "rectangle"
        assert set(region.text.split()) <= {colour, shape}
        for question in sample.questions:
            words = set(re.findall(r"\w+", question.text))
            expected = {"shape": shape, "colour": colour}.get(question.kind)
            if expected is None:
                there = bool(words & {shape, colour})
                expected = "yes" if there != bool(words & {"no", "not"}) else "no"
            assert question.answer == expected, (question, colour, shape)


@pytest.fixture
def drawn(monkeypatch) -> list[tuple[float, float, str]]:
    """Every text that is drawn, with its place: (top, left, text)."""
    found: list[tuple[float, float, str]] = []
    real = ImageDraw.ImageDraw.text

    def text(self, place, words, *args, **options):
        found.append((place[1], place[0], words))
        return real(self, place, words, *args, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return found


class TestDocuments:
    @pytest.mark.parametrize("grid", [12, 24])
    def test_answers_are_what_the_page_says(self, drawn, grid: int) -> None:
        for number in range(40):
            drawn.clear()
            sample = TASKS["documents"].sample(SPLITS[number % 3], number, grid=grid)
            texts = [text for _, _, text in sorted(drawn)]
            lines: dict[float, list[str]] = {}
            for top, _, text in sorted(drawn):
                lines.setdefault(top, []).append(text)
            pairs = [line for line in lines.values() if len(line) == 2]
            fields = {name.rstrip(":"): value for name, value in pairs if name.endswith(":")}
            table = {name: value for name, value in pairs if not name.endswith(":")}
            for question in sample.questions:
                assert question.answer == _document_answer(question, texts, fields, table), (question, texts)

    def test_regions_frame_their_ink(self, drawn) -> None:
        sample = TASKS["documents"].sample("train", 1)
        pixels = np.asarray(sample.image, dtype=int)
        for left, top, right, bottom in (region.box for region in sample.regions):
            ink = np.abs(pixels[top:bottom, left:right] - pixels[-1, -1]).max(-1) > 60
            assert ink[:, :8].any()
            assert ink[:, -8:].any()

    def test_splits_share_no_running_text(self) -> None:
        found = [set(documents.running_text(split)) for split in SPLITS]
        assert all(len(texts) >= 5 for texts in found)
        assert not any(
            one & other for one, other in ((found[0], found[1]), (found[0], found[2]), (found[1], found[2]))
        )


def _document_answer(question, texts, fields, table) -> str:
    name = re.findall(r"\w+", question.text)[-1]
    if question.kind == "says":
        words = {word.strip(".,;:()").lower() for text in texts for word in text.split()}
        return "yes" if name.lower() in words else "no"
    answers = {
        "heading": lambda: texts[0],
        "field": lambda: fields[name.capitalize()],
        "number": lambda: table[name],
    }
    return answers[question.kind]()


class TestCharts:
    @pytest.mark.parametrize("grid", [12, 24])
    def test_answers_are_what_the_chart_shows(self, drawn, grid: int) -> None:
        kinds = set()
        for number in range(60):
            drawn.clear()
            sample = TASKS["charts"].sample(SPLITS[number % 3], number, grid=grid)
            pixels = np.asarray(sample.image, dtype=int)
            values = [one for one in drawn if one[2].isdigit()]
            read = self._read_bars(pixels, drawn, values, grid) if values else self._read_lines(pixels, drawn)
            for question in sample.questions:
                kinds.add(question.kind)
                assert question.answer == _chart_answer(question, read), (question, read)
        assert kinds == set(TASKS["charts"].kinds)

    @staticmethod
    def _read_bars(pixels, drawn, values, grid: int) -> dict[str, dict]:
        read = {}
        names = [one for one in drawn if not one[2].isdigit()]
        for (name_top, name_x, name), (top, x, value) in zip(sorted(names), sorted(values), strict=True):
            assert abs(top - name_top) < PATCH / 2
            assert name_x < x
            row = pixels[round(top / PATCH) * PATCH + PATCH // 2, 4 * PATCH : x]
            colours = [_colour(pixel) for pixel in row]
            length = sum(colour is not None for colour in colours)
            unit = (grid - 5) * PATCH / 9
            assert round(length / unit) == int(value)
            # The number stands in the patch after the one in which the bar ends.
            assert 0 < x - 4 * PATCH - length < PATCH + 4
            read[name] = {"value": int(value), "colour": colours[PATCH // 2]}
        return read

    @staticmethod
    def _read_lines(pixels, drawn) -> dict[str, dict]:
        read = {}
        for _, x, name in drawn:
            swatch = pixels[8, round(x) - 10]
            colour = _colour(swatch)
            below = pixels[PATCH:]
            of_line = np.abs(below - swatch).max(-1) < 8
            rows, columns = of_line.nonzero()
            first, last = (rows[np.abs(columns - edge) <= 2].mean() for edge in (columns.min() + 2, columns.max() - 2))
            change = first - last
            read[name] = {"colour": colour, "trend": "up" if change > 0 else "down"}
        return read

    @pytest.mark.parametrize("grid", [12, 24])
    def test_every_patch_that_shows_something_is_in_a_region(self, grid: int) -> None:
        for number in range(60):
            sample = TASKS["charts"].sample(SPLITS[number % 3], number, grid=grid)
            pixels = np.asarray(sample.image, dtype=int)
            # The paper is lighter than all that is drawn; a corner may be drawn on.
            paper = pixels.reshape(-1, 3)[pixels.sum(-1).argmax()]
            ink = np.abs(pixels - paper).max(-1) > 40
            shown = ink.reshape(grid, PATCH, grid, PATCH).mean((1, 3))
            named = np.zeros((grid * PATCH, grid * PATCH), dtype=bool)
            for left, top, right, bottom in (region.box for region in sample.regions):
                named[top:bottom, left:right] = True
                assert ink[top:bottom, left:right].any()
            named = named.reshape(grid, PATCH, grid, PATCH).mean((1, 3))
            # A line of four pixels that crosses a patch covers a quarter of it; along its edge or corner, less.
            assert (named[shown > 0.2] > 0).all(), number

    def test_splits_share_no_series(self, monkeypatch) -> None:
        used: dict[str, set] = {split: set() for split in SPLITS}
        real = charts.draw_series

        def watched(rng, split, make):
            series = real(rng, split, make)
            used[split].add(series)
            return series

        monkeypatch.setattr(charts, "draw_series", watched)
        for split in SPLITS:
            samples("charts", split, 150)
        assert all(len(series) > 50 for series in used.values())
        assert (
            not used["train"] & used["validation"] | used["train"] & used["test"] | used["validation"] & used["test"]
        )


def _chart_answer(question, read) -> str:
    names = [name for name in re.findall(r"[A-Z]\w+", question.text) if name in read]
    named = [read[name] for name in names]
    answers = {
        "value": lambda: str(named[0]["value"]),
        "largest": lambda: max(read, key=lambda name: read[name]["value"]),
        "smaller": lambda: min(names, key=lambda name: read[name]["value"]),
        "colour": lambda: named[0]["colour"],
        "legend": lambda: named[0]["colour"],
        "trend": lambda: named[0]["trend"],
    }
    return answers[question.kind]()


def _colour(pixel) -> str | None:
    """The name of the colour of a bar or a line, None for paper and for what is written."""
    name = min(charts.COLOURS, key=lambda name: np.abs(pixel - np.array(charts.COLOURS[name])).max())
    return name if np.abs(pixel - np.array(charts.COLOURS[name])).max() <= 12 else None
