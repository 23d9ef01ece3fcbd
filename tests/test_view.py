"""`saccade view`: pictures of kept patches of any image, and one clear line on bad input."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from saccade.cli.main import main
from saccade.families import get_family
from saccade.images import open_image
from saccade.reducers import Needs, PruningConfig, get_reducer, keep_count, list_reducers
from saccade.report.kept_tokens import GAP, OUTLINE, PANELS_PER_ROW, TITLE_HEIGHT
from saccade.report.view import process_image, seen_part
from saccade.tiny import load_tiny, save_tiny
from saccade.tokens import Reduction

WIDTH, HEIGHT = 28, 17  # pixels per patch of 12 x 12 in a panel that shows 200 x 120 pixels 336 wide


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> Path:
    """Noise of 200 x 120 pixels: every patch is different."""
    noise = torch.randint(0, 256, (120, 200, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    path = tmp_path_factory.mktemp("view") / "photo.jpg"
    Image.fromarray(noise.numpy()).save(path, quality=95)
    return path


def outlined(sheet: Image.Image, panel: int) -> list[int]:
    """The patches of a panel that carry an outline on all four edges, read back from the picture."""
    left = GAP + panel % PANELS_PER_ROW * (12 * WIDTH + GAP)
    top = GAP + panel // PANELS_PER_ROW * (12 * HEIGHT + GAP + TITLE_HEIGHT) + TITLE_HEIGHT
    found = []
    for token in range(144):
        x, y = left + token % 12 * WIDTH, top + token // 12 * HEIGHT
        corners = [(x, y), (x + WIDTH - 1, y), (x, y + HEIGHT - 1), (x + WIDTH - 1, y + HEIGHT - 1)]
        if all(sheet.getpixel(corner) == OUTLINE for corner in corners):
            found.append(token)
    return found


def check_smaller_image(panel: dict, reduction: Reduction, outlined: list[int]) -> None:
    """3 x 4 tokens, each representing the block of 4 x 3 patches around it."""
    assert panel["kept"] == reduction.index[0].tolist() == outlined
    assert len(panel["kept"]) == 12
    for token, target in enumerate(panel["merged_into"]):
        assert (token // 12 // 4, token % 12 // 3) == (target // 12 // 4, target % 12 // 3)


def test_every_reducer_on_the_embedded_model(photo, tmp_path, capsys):
    output = tmp_path / "pictures" / "all.png"
    assert main(["view", str(photo), "--reducer", "all", "--output", str(output)]) == 0
    report = json.loads(output.with_suffix(".json").read_text())
    assert [panel["reducer"] for panel in report["panels"]] == list_reducers()
    assert report["grid"] == [12, 12]
    assert "tiny, the embedded model" in report["source"]
    model, processor = load_tiny()
    inputs = process_image(processor, open_image(photo), "Describe the image.")
    printed = capsys.readouterr().out
    assert printed.startswith(report["source"] + "\n")
    with Image.open(output) as sheet:
        sheet = sheet.convert("RGB")
        for number, panel in enumerate(report["panels"]):
            reducer = get_reducer(panel["reducer"])
            context = get_family(model).encode(inputs, Needs.of(reducer, PruningConfig(prune_ratio=0.9))).context
            reduction = reducer(context, keep_count(144, 0.9))
            assert panel["kept"] == reduction.index[0].tolist() == outlined(sheet, number)
            assert f"{panel['reducer']}: {len(panel['kept'])} of 144 tokens" in printed
            assert ("merged_into" in panel) == (reduction.weight is not None)
            for token, target in enumerate(panel.get("merged_into", ())):
                row = -1 if target < 0 else panel["kept"].index(target)
                weights = reduction.weight[0, :, token]
                assert (weights.max() == 0) if row < 0 else (weights[row] == weights.max() > 0)


def test_a_saved_model_a_prompt_and_a_ratio(photo, tmp_path, monkeypatch):
    model, processor = load_tiny()
    folder = save_tiny(model, processor, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    pictures = {}
    for prompt in ("how many digits is there ?", "what is the maximum ?"):
        arguments = ["--reducer", "cdpruner, tome", "--prune-ratio", "0.5", "--prompt", prompt]
        assert main(["view", str(photo), "--model", str(folder), *arguments]) == 0
        pictures[prompt] = json.loads(Path("view.json").read_text())
        assert Path("view.png").stat().st_size > 1000
    first, second = pictures.values()
    assert first["source"] == f"Tokens of {folder}, a model of type llava."
    assert [len(panel["kept"]) for panel in first["panels"]] == [72, 72]
    assert first["panels"][0]["kept"] != second["panels"][0]["kept"]  # cdpruner reads the words
    assert first["panels"][1] == second["panels"][1]  # tome does not


def test_what_the_processor_cuts_off_is_not_drawn():
    image = Image.new("RGB", (200, 120), "red")
    image.paste("blue", (40, 0, 160, 120))
    processor = load_tiny()[1]
    assert seen_part(processor, image).size == (200, 120)
    processor.image_processor.do_center_crop = True
    seen = seen_part(processor, image)
    assert seen.size == (120, 120)
    assert seen.getcolors() == [(120 * 120, (0, 0, 255))]


def test_bad_input_is_one_line(photo, tmp_path, capsys):
    text = tmp_path / "notes.png"
    text.write_text("no image")
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(photo.read_bytes()[:2000])
    for arguments, words in (
        ([str(tmp_path / "none.png")], "does not exist"),
        ([str(text)], "is not an image in a supported format: replace it"),
        ([str(cut)], "cannot be decoded"),
        ([str(tmp_path)], "is not a file"),
        ([str(photo), "--reducer", "divprune,fastv"], "reducer='fastv' is unknown"),
        ([str(photo), "--reducer", "tome,tome"], "given twice"),
        ([str(photo), "--prune-ratio", "1"], "prune_ratio=1.0"),
        ([str(photo), "--output", str(tmp_path / "out.jpg")], "ends with .png"),
        ([str(photo), "--model", str(tmp_path / "nothing")], "is not a folder"),
    ):
        assert main(["view", *arguments]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("saccade: error: ")
        assert words in error
    assert not list(tmp_path.glob("out*"))
