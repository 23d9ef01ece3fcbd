"""Tables, plots, pictures of kept tokens, and the environment, on made-up input."""

import io
import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image, ImageChops, ImageDraw
from rich.console import Console

from saccade.errors import SaccadeError
from saccade.files import to_json
from saccade.report import environment as environment_module
from saccade.report.environment import environment
from saccade.report.kept_tokens import (
    DIMMED,
    GAP,
    LINE_HEIGHT,
    OUTLINE,
    TITLE_HEIGHT,
    _font,
    draw_kept_tokens,
    kept_tokens_sheet,
    patch_size,
)
from saccade.report.plots import free_box, overlap, plot_curves, plot_trade_off
from saccade.report.tables import markdown_table, print_table


def opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return image.convert("RGB")


def patch(sheet: Image.Image, token: int, columns: int, side: int, panel: int = 0) -> Image.Image:
    """The pixels of a patch inside its outline."""
    left = GAP + panel * (columns * side + GAP) + token % columns * side
    top = GAP + TITLE_HEIGHT + token // columns * side
    return sheet.crop((left + 3, top + 3, left + side - 3, top + side - 3))


def mean_color(image: Image.Image) -> tuple[int, ...]:
    return image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))


class TestTables:
    def test_markdown_is_aligned_and_escaped(self) -> None:
        text = markdown_table(["name", "accuracy"], [["a|b", "81.5 %"], ["c\nd", None]])
        assert text == "| name | accuracy |\n| --- | ---: |\n| a\\|b | 81.5 % |\n| c d | - |\n"

    def test_values_are_written_for_people(self) -> None:
        text = markdown_table(["a", "b", "c", "d"], [[True, 0.123456, frozenset({"keys", "grid"}), frozenset()]])
        assert text.splitlines()[2] == "| yes | 0.1235 | grid, keys | - |"

    def test_printed_text_is_never_read_as_markup(self) -> None:
        out = io.StringIO()
        print_table("Title", ["[bold]", "long"], [["[red]x[/red]", "y" * 100]], file=out)
        assert "[bold]" in out.getvalue()
        assert "[red]x[/red]" in out.getvalue()
        assert "y" * 100 in out.getvalue()

    @pytest.mark.parametrize("width", [40, 60, 80, 120])
    def test_no_word_breaks_on_a_terminal(self, monkeypatch, width: int) -> None:
        terminal = partial(Console, width=width, force_terminal=True, color_system=None)
        monkeypatch.setattr("saccade.report.tables.Console", terminal)
        columns = ["training", "accuracy, all tokens", "share of all-token", "training time", "description"]
        rows = [["DualSpeed", "95.8 %", "98.3 %", "181 s", "alternates at random between a fast and a slow mode"]] * 2
        out = io.StringIO()
        print_table("Title", columns, rows, file=out)
        lines = out.getvalue().splitlines()
        assert max(map(len, lines)) <= width
        words = re.findall(r"[^\s─]+", out.getvalue())
        times = len(rows) if width < 60 else 1
        expected = ["Title", *" ".join(columns).split() * times, *" ".join(map(" ".join, rows)).split()]
        assert sorted(words) == sorted(expected)

    @pytest.mark.parametrize("table", [markdown_table, lambda columns, rows: print_table("", columns, rows)])
    def test_a_ragged_row_is_an_error(self, table: Any) -> None:
        with pytest.raises(ValueError, match="1 cells in a table of 2 columns"):
            table(["a", "b"], [["x"]])


def point(training: str, seconds: float, accuracy: float, inference: str = "full") -> dict[str, Any]:
    ends = {"accuracy_low": accuracy - 0.01, "accuracy_high": accuracy + 0.01}
    return {"training": training, "inference": inference, "seconds": seconds, "accuracy": accuracy, **ends}


def texts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The labels that a plot writes beside its points, filled in as it draws."""
    written: list[str] = []
    annotate = Axes.annotate
    monkeypatch.setattr(Axes, "annotate", lambda *args, **how: written.append(args[1]) or annotate(*args, **how))
    return written


class TestPlots:
    def test_the_trade_off_names_each_training_beside_its_point(self, tmp_path: Path, monkeypatch) -> None:
        written = texts(monkeypatch)
        points = [point("all tokens", 300, 0.94), point("DualSpeed", 100, 0.92), point("DualSpeed", 100, 0.9, "skip")]
        plot_trade_off(points, tmp_path / "new" / "trade_off.png", title="out/$1$")
        assert sorted(written) == ["DualSpeed  92.0 %", "all tokens  94.0 %", "skipping"]
        assert opened(tmp_path / "new" / "trade_off.png").size == (900, 750)

    def test_many_trainings_have_numbers(self, tmp_path: Path, monkeypatch) -> None:
        written = texts(monkeypatch)
        plot_trade_off([point(f"t{number}", 0, 0) for number in range(9)], tmp_path / "trade_off.png")
        assert sorted(written) == [str(number) for number in range(1, 10)]

    def test_labels_of_points_in_one_place_do_not_overlap(self) -> None:
        boxes = [(0.49, 0.48, 0.51, 0.52)]
        for _ in range(8):
            (box, side), far = free_box(0.5, 0.5, 0.2, 0.08, boxes)
            assert side in (1, 0, -1)
            assert far < 1
            assert not any(overlap(box, other) for other in boxes)
            boxes.append(box)

    def test_a_label_with_no_free_place_stays_at_its_point(self) -> None:
        (box, side), far = free_box(0.5, 0.5, 0.2, 0.08, [(0, 0, 1, 1)])
        assert side == 1
        assert far > 1
        assert (box[1] + box[3]) / 2 == pytest.approx(0.5)

    def test_curves_are_drawn_each_and_with_a_title(self, tmp_path: Path) -> None:
        curves = {
            name: [(step, 3.0 - step / 50) for step in range(start, 100)] for name, start in (("a", 0), ("b", 9))
        }
        pictures = []
        for number, (shown, title) in enumerate(((curves, ""), (curves, "out/run"), ({"a": curves["a"]}, ""))):
            plot_curves(shown, "step", "loss", tmp_path / f"{number}.png", title, smooth=True)
            pictures.append(opened(tmp_path / f"{number}.png"))
        assert all(ImageChops.difference(pictures[0], other).getbbox() for other in pictures[1:])

    def test_nothing_to_draw_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="no points"):
            plot_trade_off([], tmp_path / "a.png")
        with pytest.raises(ValueError, match="no curves"):
            plot_curves({"a": []}, "step", "loss", tmp_path / "b.png")
        assert list(tmp_path.iterdir()) == []


class TestKeptTokens:
    def test_kept_patches_are_clear_and_dropped_ones_dimmed(self, tmp_path: Path) -> None:
        image = Image.new("RGB", (40, 30), (200, 120, 80))
        index = torch.tensor([1, 6, -1])
        panels = [("first", index, None), ("second", torch.tensor([11]), None)]
        draw_kept_tokens(image, panels, (3, 4), tmp_path / "kept.png", panel_size=80)
        sheet = opened(tmp_path / "kept.png")
        assert sheet.size == (GAP + 2 * (80 + GAP), GAP + TITLE_HEIGHT + 60 + GAP + 2 * LINE_HEIGHT + GAP)
        dimmed = tuple(int(DIMMED * value) for value in (200, 120, 80))
        for panel, kept in enumerate(({1, 6}, {11})):
            for token in range(12):
                expected = (200, 120, 80) if token in kept else dimmed
                assert mean_color(patch(sheet, token, 4, 20, panel)) == pytest.approx(expected, abs=2)
        assert sheet.getpixel((GAP + 20, GAP + TITLE_HEIGHT)) == OUTLINE

    def test_a_merge_colours_regions_and_dims_what_flows_nowhere(self, tmp_path: Path) -> None:
        image = Image.new("RGB", (40, 40), (128, 128, 128))
        weight = torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 1.0, 0]])
        draw_kept_tokens(image, [("merge", torch.tensor([0, 2]), weight)], (2, 2), tmp_path / "m.png", panel_size=80)
        sheet = opened(tmp_path / "m.png")
        colors = [mean_color(patch(sheet, token, 2, 40)) for token in range(4)]
        assert colors[0] == colors[1]
        assert colors[0] != colors[2]
        assert colors[3] == pytest.approx([int(DIMMED * 128)] * 3, abs=2)

    @pytest.mark.parametrize(("size", "cell"), [((400, 200), (24, 24)), ((200, 400), (12, 49)), ((10, 1000), (4, 49))])
    def test_a_panel_has_the_aspect_ratio_of_the_picture(self, size: tuple[int, int], cell: tuple[int, int]) -> None:
        assert patch_size(size, (7, 14), 343) == cell
        sheet = kept_tokens_sheet(Image.new("RGB", size), [("x", torch.tensor([0]), None)], (7, 14), panel_size=343)
        height = GAP + TITLE_HEIGHT + 7 * cell[1] + GAP
        assert sheet.width == 14 * cell[0] + 2 * GAP
        assert sheet.height > height
        assert sheet.crop((GAP, GAP + TITLE_HEIGHT, sheet.width - GAP, height - GAP)).getcolors()[0][1] != (255,) * 3

    def test_titles_count_and_a_legend_and_a_caption_stand_below(self, monkeypatch: pytest.MonkeyPatch) -> None:
        written: list[str] = []
        monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda pen, place, text, **how: written.append(text))
        panels = [("a name far too long for its panel", torch.tensor([3, 1, -1]), None)]
        sheet = kept_tokens_sheet(Image.new("RGB", (9, 9)), panels, (3, 4), caption="one two " * 9, panel_size=160)
        kept, dropped, title, *caption = written
        assert (kept, dropped) == ("kept token", "dropped")
        assert title.endswith("…: 2 of 12")
        assert " ".join(caption).split() == ["one", "two"] * 9
        assert all(_font(14).getlength(line) <= sheet.width - 2 * GAP for line in caption)
        kept_tokens_sheet(Image.new("RGB", (9, 9)), [("m", torch.tensor([3]), torch.ones(1, 12))], (3, 4))
        assert "merged into the outlined token of its colour" in written

    @pytest.mark.parametrize(
        ("panels", "message"),
        [
            ([], "panels="),
            ([("x", torch.tensor([4]), None)], "panel 'x': index contains 4, but the grid has 4 tokens"),
            ([("x", torch.tensor([[0]]), None)], r"panel 'x': index has shape \(1, 1\)"),
            ([("x", torch.tensor([0]), torch.ones(1, 5))], r"weight has shape \(1, 5\), expected \(1, 4\)"),
        ],
    )
    def test_what_does_not_fit_is_an_error(self, tmp_path: Path, panels: Any, message: str) -> None:
        with pytest.raises(SaccadeError, match=message):
            draw_kept_tokens(Image.new("RGB", (8, 8)), panels, (2, 2), tmp_path / "kept.png")


class TestEnvironment:
    def test_it_names_versions_and_machine(self) -> None:
        found = json.loads(to_json(environment()))
        assert found["packages"]["torch"] == torch.__version__
        assert found["packages"]["saccade"]
        assert found["python"] == ".".join(map(str, sys.version_info[:3]))
        assert found["threads"] == torch.get_num_threads()
        assert found["cores"] >= 1
        assert found["memory_gib"] > 0
        assert isinstance(found["gpus"], list)

    def test_a_broken_torchvision_is_a_warning(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "torchvision").mkdir()
        broken = "raise RuntimeError('operator torchvision::nms does not exist')\n"
        (tmp_path / "torchvision" / "__init__.py").write_text(broken)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "torchvision", raising=False)
        (warning,) = environment()["warnings"]
        assert "torchvision is installed but broken (RuntimeError: operator torchvision::nms" in warning
        assert "pip uninstall torchvision" in warning

    def test_the_commit_of_a_foreign_checkout_is_not_ours(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        package = tmp_path / "venv" / "saccade"
        (package / "report").mkdir(parents=True)
        subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        commit = ["commit", "-q", "--allow-empty", "-m", "theirs"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *commit], check=True)
        monkeypatch.setattr(environment_module, "__file__", str(package / "report" / "environment.py"))
        assert environment()["commit"] is None
