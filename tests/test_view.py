"""`saccade view`: pictures of kept patches of any image, and one clear line on bad input."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from family_models import FAMILIES, RELATIVES
from PIL import Image

from saccade.cli.main import main
from saccade.errors import SaccadeError
from saccade.families import get_family
from saccade.images import open_image
from saccade.pruning import Pruner, prune
from saccade.reducers import Needs, PruningConfig, get_reducer, keep_count, list_reducers
from saccade.report.kept_tokens import GAP, OUTLINE, PANELS_PER_ROW, TITLE_HEIGHT
from saccade.report.view import process_image, seen_part, shown_row, view_reducers
from saccade.testing.families import Case
from saccade.testing.tiny_models import noise_image
from saccade.tiny import load_tiny, save_tiny
from saccade.tokens import Places, Reduction, Role

MODELS = FAMILIES | RELATIVES
CROPS = ("idefics3", "internvl", "llava_next", "llava_onevision", "smolvlm", "ovis2", "lfm2_vl")
SETTINGS = {
    "crop": PruningConfig(keep_tokens=2),
    "image": PruningConfig(prune_ratio=0.6, budget="image"),
    "sample": PruningConfig("uniform", prune_ratio=0.6, budget="sample"),
    "adaptive": PruningConfig("dpp", prune_ratio=0.6, adaptive=True),
    "fit_length": PruningConfig(prune_ratio=0, fit_length=34),
    "newlines": PruningConfig("uniform", prune_ratio=0.5, newlines="drop"),
    "merged": PruningConfig("tome", prune_ratio=0.5),
}
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


@cache
def case_of(name: str) -> Case:
    return Case(name, MODELS[name])


def kept_by_the_model(case: Case, image: Image.Image, pruning: PruningConfig) -> tuple[list[list[int]], int]:
    """The tokens of each row that the pruned prompt has, and how many there were."""
    inputs = process_image(case.processor, image, "how many ?")
    spliced = prune(case.family, inputs, Pruner(pruning), lambda laid: laid.spliced)
    context = case.family.encode(inputs).context
    places = Places.of(case.family.placeholder(inputs["input_ids"]), context)
    columns = spliced.source[0][spliced.role[0] == Role.RETAINED]
    kept: list[list[int]] = [[] for _ in range(context.shape[0])]
    rows = places.feature_row.tolist()
    for number, (row, column) in enumerate(zip(rows, places.column, strict=True)):
        if column in columns:
            kept[row].append(number - rows.index(row))
    return kept, len(places)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_what_is_drawn_shows_all_of_the_picture(name):
    """Change a quarter of the picture, any: the tokens that are drawn change."""
    case, image = case_of(name), noise_image(48, 32, 3)

    def drawn(picture: Image.Image) -> torch.Tensor:
        context = case.family.encode(process_image(case.processor, picture, "how many ?")).context
        assert (context.shape[0] > 1) == (name in (*CROPS, "chain_of_sight"))
        return context.features[shown_row(case.model, case.processor, context).row]

    for left, top in ((0, 0), (24, 0), (0, 16), (24, 16)):
        changed = image.copy()
        changed.paste("white", (left, top, left + 24, top + 16))
        assert not torch.allclose(drawn(changed), drawn(image), atol=1e-3)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", [*CROPS, "chain_of_sight", "llava"])
def test_what_is_drawn_and_counted_is_what_the_model_gets(name, setting, tmp_path):
    case, image, pruning = case_of(name), noise_image(48, 32, 3), SETTINGS[setting]
    kept, tokens = kept_by_the_model(case, image, pruning)
    path = tmp_path / "view.png"
    report = view_reducers(case.model, case.processor, image, [pruning.reducer], "how many ?", path, pruning)
    (panel,) = report["panels"]
    assert (panel["keeps"], report["tokens"]) == (sum(map(len, kept)), tokens)
    assert panel["kept"] == kept[(case.family.thumbnail or 0) % len(kept)]
    assert report["part"] == {"chain_of_sight": "coarsest scale", "llava": ""}.get(name, "thumbnail")


def test_the_line_of_a_reducer_counts_all_crops(tmp_path, monkeypatch, capsys):
    case = case_of("idefics3")
    monkeypatch.setattr("saccade.training.load_model", lambda options: case.built)
    noise_image(48, 32, 3).save(tmp_path / "photo.png")
    flags = ["--reducer", "uniform", "--keep-tokens", "2", "--output", str(tmp_path / "view.png")]
    assert main(["view", str(tmp_path / "photo.png"), *flags]) == 0
    assert "uniform: 10 of 45 tokens, 2 of 9 of the thumbnail, which is drawn\n" in capsys.readouterr().out


def test_crops_without_a_thumbnail_cannot_be_drawn(monkeypatch):
    case = case_of("lfm2_vl")
    context = case.family.encode(process_image(case.processor, noise_image(48, 32, 3), "how many ?")).context
    monkeypatch.setattr(case.processor.image_processor, "use_thumbnail", False)
    with pytest.raises(SaccadeError, match="use_thumbnail=False: none of the 5 crops shows all"):
        shown_row(case.model, case.processor, context)
    assert shown_row(case.model, case.processor, context.select_rows(slice(1))).part == ""


def test_a_thumbnail_of_an_anyres_image_is_not_cropped():
    processor = case_of("llava_next").processor
    assert processor.image_processor.do_center_crop
    assert seen_part(processor, noise_image(48, 32, 3)).size == (48, 32)


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
