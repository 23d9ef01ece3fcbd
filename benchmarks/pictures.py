"""Pictures to measure the dropping of patches on: pages and screenshots, drawn from a seed, and photographs."""

import io
import random
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from pydoc_data.topics import topics

import matplotlib
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_sample_images

QUALITY = 85
"""Of the JPEGs that stand for scans."""


@lru_cache(maxsize=64)
def font(size: int, face: str = "DejaVuSans") -> ImageFont.FreeTypeFont:
    """A font that matplotlib brings along."""
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


def page(seed: int, width: int, height: int) -> Image.Image:
    """A printed page: a heading, paragraphs of Python's documentation, a ruled table of numbers, a chart of bars."""
    rng = random.Random(f"page {seed}")
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    margin, size = width // 10, rng.choice((13, 15, 17))
    words = iter(topics[rng.choice(sorted(topics))].split() * 50)
    draw.text((margin, margin // 2), " ".join(next(words) for _ in range(3)), "black", font(2 * size))
    top, blocks = margin // 2 + 4 * size, ["text", "table", "text", "chart", "text"]
    while top < height - margin:
        block = blocks.pop(0) if blocks else "text"
        if block == "table":
            top = _table(draw, rng, margin, top, width - 2 * margin, size)
        elif block == "chart":
            top = _bars(draw, rng, margin, top, width - 2 * margin, size)
        else:
            for _ in range(rng.randint(4, 9)):
                line = next(words)
                while draw.textlength(f"{line} ", font(size)) + 10 * size < width - 2 * margin:
                    line += f" {next(words)}"
                if top < height - margin:
                    draw.text((margin, top), line, "black", font(size))
                top += round(1.5 * size)
        top += 2 * size
    return image


def scan(seed: int, width: int, height: int) -> Image.Image:
    """A page as a JPEG of `QUALITY` shows it."""
    buffer = io.BytesIO()
    page(seed, width, height).save(buffer, "JPEG", quality=QUALITY)
    return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")


def screenshot(seed: int, width: int, height: int) -> Image.Image:
    """A window with a title, a tool bar, a list at the side, and a table, an editor or a picture beside it."""
    rng = random.Random(f"screenshot {seed}")
    dark = rng.random() < 0.4
    ground, panel, ink, line = (
        ("#1e1e1e", "#2b2b2b", "#d8d8d8", "#3c3c3c") if dark else ("#ffffff", "#f0f0f2", "#222222", "#d0d0d4")
    )
    accent = rng.choice(("#2f6fde", "#1f8a5b", "#b3452c", "#7a4fc0"))
    image = Image.new("RGB", (width, height), ground)
    draw = ImageDraw.Draw(image)
    words = iter(topics[rng.choice(sorted(topics))].split() * 50)
    for row in range(32):  # the title's ground is a gradient
        shade = (52 if dark else 222) + row // 2
        draw.line((0, row, width, row), fill=(shade, shade, shade + 4))
    draw.text((width // 2 - 60, 8), " ".join(next(words) for _ in range(2)), ink, font(13))
    for number, colour in enumerate(("#ee5f57", "#f5bd2e", "#27c63f")):
        draw.ellipse((12 + 20 * number, 10, 24 + 20 * number, 22), fill=colour)
    draw.rectangle((0, 32, width, 72), fill=panel)
    for number in range(width // 130):
        left = 12 + 118 * number
        draw.rounded_rectangle((left, 40, left + 104, 64), 5, fill=accent if number == 1 else ground, outline=line)
        draw.text((left + 10, 44), next(words)[:11], "white" if number == 1 else ink, font(12))
    side = min(220, width // 4)
    draw.rectangle((0, 72, side, height), fill=panel)
    draw.line((side, 72, side, height), fill=line)
    for number in range((height - 110) // 26):
        top = 84 + 26 * number
        if number == 3:
            draw.rectangle((0, top - 3, side - 1, top + 20), fill=accent)
        draw.rectangle((14, top + 2, 26, top + 14), fill=rng.choice(("#caa63c", "#5b8fd0", "#8a8a8a")))
        draw.text((36, top), next(words)[:18], "white" if number == 3 else ink, font(12))
    content = rng.choice(("table", "editor", "picture"))
    if content == "table":
        for number in range((height - 100) // 24):
            top = 76 + 24 * number
            if number % 2:
                draw.rectangle((side + 1, top, width, top + 23), fill=panel)
            for column, left in enumerate(range(side + 14, width - 60, 150)):
                text = next(words)[:14] if column % 3 == 0 else f"{rng.randint(0, 99999):,}"
                draw.text((left, top + 5), text, ink, font(12))
    elif content == "editor":
        for number in range((height - 100) // 18):
            top = 80 + 18 * number
            draw.text((side + 10, top), f"{number + 1:3d}", "#888888", font(12, "DejaVuSansMono"))
            if rng.random() < 0.85:
                text = " " * 4 * rng.randint(0, 3) + " ".join(next(words) for _ in range(rng.randint(1, 7)))
                draw.text((side + 50, top), text[:64], rng.choice((ink, ink, accent)), font(12, "DejaVuSansMono"))
    else:
        shown = photograph(seed, max(1, (width - side) * 2 // 3), max(1, (height - 100) * 2 // 3))
        image.paste(shown, (side + (width - side) // 6, 90))
        draw.text(
            (side + (width - side) // 6, height - (height - 100) // 4),
            " ".join(next(words) for _ in range(6)),
            ink,
            font(13),
        )
    draw.rectangle((0, height - 20, width, height), fill=accent)
    draw.text((10, height - 17), " ".join(next(words) for _ in range(4)), "white", font(11))
    return image


def photograph(seed: int, width: int, height: int) -> Image.Image:
    """A part of one of scikit-learn's two photographs, enlarged where they are smaller."""
    rng = random.Random(f"photograph {seed}")
    source = Image.fromarray(load_sample_images().images[seed % 2])
    scale = max(width / source.width, height / source.height, 0.5 + rng.random() / 2)
    source = source.resize((max(width, round(source.width * scale)), max(height, round(source.height * scale))))
    left, top = rng.randint(0, source.width - width), rng.randint(0, source.height - height)
    return source.crop((left, top, left + width, top + height))


def _table(draw: ImageDraw.ImageDraw, rng: random.Random, left: int, top: int, width: int, size: int) -> int:
    rows, columns = rng.randint(4, 9), rng.randint(3, 5)
    high, wide = 2 * size, width // columns
    for row in range(rows + 1):
        draw.line((left, top + row * high, left + columns * wide, top + row * high), fill="#444444")
    for column in range(columns + 1):
        draw.line((left + column * wide, top, left + column * wide, top + rows * high), fill="#444444")
    for row in range(rows):
        for column in range(columns):
            text = f"{rng.randint(1, 9999):,}" if row and column else f"item {rng.randint(1, 99)}"
            draw.text((left + column * wide + size, top + row * high + size // 3), text, "black", font(size))
    return top + rows * high


def _bars(draw: ImageDraw.ImageDraw, rng: random.Random, left: int, top: int, width: int, size: int) -> int:
    high, number = 12 * size, rng.randint(4, 7)
    wide = width // (2 * number)
    for bar in range(number):
        tall = rng.randint(high // 5, high)
        draw.rectangle(
            (left + 2 * bar * wide, top + high - tall, left + (2 * bar + 1) * wide, top + high), fill="#4a78b5"
        )
        draw.text((left + 2 * bar * wide, top + high + 4), f"{rng.randint(1990, 2025)}", "black", font(size))
    draw.line((left, top + high, left + width, top + high), fill="black")
    return top + high + 2 * size


KINDS: dict[str, Callable[[int, int, int], Image.Image]] = {
    "page": page,
    "page, JPEG": scan,
    "screenshot": screenshot,
    "photograph": photograph,
}
"""Pictures by name: `(seed, width, height)` to an image."""
