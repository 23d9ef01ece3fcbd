"""What the testbed smol needs of its packages, from what is there anyway: fonts of matplotlib's, and drawn shapes."""

import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageDraw

from experiments.smol import fonts
from experiments.smol.fonts import FONTS, Font
from experiments.smol.tasks import easy_vqa

OWN_FONTS = dict(FONTS)
FONTS_HERE = {
    "train": (Font("DejaVu Sans", "matplotlib", "mpl-data/fonts/ttf/DejaVuSans.ttf"),),
    "validation": (Font("DejaVu Serif", "matplotlib", "mpl-data/fonts/ttf/DejaVuSerif.ttf"),),
    "test": (Font("STIX", "matplotlib", "mpl-data/fonts/ttf/STIXGeneral.ttf"),),
}
RGB = {
    **{"black": (0, 0, 0), "blue": (0, 0, 255), "brown": (165, 42, 42), "gray": (128, 128, 128)},
    **{"green": (0, 128, 0), "red": (255, 0, 0), "teal": (0, 128, 128), "yellow": (255, 255, 0)},
}


@contextmanager
def parts_of_the_tests(folder: Path) -> Iterator[None]:
    """Fonts of matplotlib's in the place of the testbed's own, and in `folder` shapes in that of easy-VQA."""
    _draw_shapes(folder)
    found = importlib.util.find_spec
    spec = SimpleNamespace(submodule_search_locations=[str(folder)])
    with pytest.MonkeyPatch.context() as patch:
        for split, chosen in FONTS_HERE.items():
            patch.setitem(FONTS, split, chosen)
        patch.setattr(fonts, "find_spec", lambda name: spec if name == "easy_vqa" else found(name))
        easy_vqa._questions.cache_clear()
        yield
    easy_vqa._questions.cache_clear()


def _draw_shapes(folder: Path) -> None:
    """60 and 20 images in the form of easy-VQA; of image 9 of the first, the answers do not tell what it shows."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 60), ("test", 20)):
        (folder / "data" / part / "images").mkdir(parents=True)
        asked = []
        for index in range(count):
            shape, colour = easy_vqa.SHAPES[index % 3], str(rng.choice(easy_vqa.COLOURS))
            ground = tuple(int(level) for level in rng.integers(225, 256, 3))
            image = Image.new("RGB", (64, 64), ground)
            draw, (x, y) = ImageDraw.Draw(image), rng.integers(0, 40, 2).tolist()
            if shape == "rectangle":
                draw.rectangle((x, y, x + 20, y + 14), RGB[colour])
            elif shape == "circle":
                draw.ellipse((x, y, x + 20, y + 20), RGB[colour])
            else:
                draw.polygon([(x, y + 20), (x + 20, y + 20), (x + 10, y)], RGB[colour])
            image.save(folder / "data" / part / "images" / f"{index}.png")
            if (part, index) == ("train", 9):
                asked.append(("is there a circle?" if shape != "circle" else "is there a triangle?", "no", index))
                continue
            asked += [
                ("what shape is present?", shape, index),
                (f"what is the color of the {shape}?", colour, index),
                ("is there a red shape?", "yes" if colour == "red" else "no", index),
                ("does the image not contain a circle?", "no" if shape == "circle" else "yes", index),
            ]
        (folder / "data" / part / "questions.json").write_text(json.dumps(asked))
