"""A small LLaVA-style data set of real sentences, written for these tests: talk about digit scenes, and general talk.

The pictures are the embedded digit scenes on a wider ground, 4:3, so that a crop of the centre would cut some off.
"""

import json
from pathlib import Path

from PIL import Image

from saccade.data import digit_scenes

GENERAL = [
    ("What is the capital of France?", "The capital of France is Paris."),
    ("Who wrote Hamlet?", "Hamlet was written by William Shakespeare."),
    ("How many days are there in a leap year?", "A leap year has 366 days."),
    ("Why is the sky blue?", "Air scatters blue light more than red light, so the sky looks blue."),
    ("What do bees make?", "Bees make honey and wax."),
    ("Can you tell me what water is made of?", "Water is made of hydrogen and oxygen."),
    ("Which planet is closest to the sun?", "Mercury is the planet closest to the sun."),
    ("What is the opposite of hot?", "The opposite of hot is cold."),
    ("How do you say thank you in Spanish?", "In Spanish, thank you is gracias."),
    ("Which is larger, an ant or an elephant?", "An elephant is much larger than an ant."),
    ("What should I take with me when it rains?", "Take an umbrella, or a coat that keeps the rain off."),
    ("What is two plus two?", "Two plus two is four."),
]
ASKING = (
    "What digits do you see in this picture?",
    "Can you read the numbers in the image for me?",
    "Please tell me which digits are shown here.",
)
SECOND = "How many digits are there?"
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def listed(digits: list[str]) -> str:
    return digits[0] if len(digits) == 1 else f"{', '.join(digits[:-1])} and {digits[-1]}"


def wide(scene: Image.Image) -> Image.Image:
    """The scene on the left or the right of a ground of 4:3, by what it shows."""
    ground = Image.new("RGB", (scene.width * 4 // 3, scene.height), scene.getpixel((0, 0)))
    ground.paste(scene, ((ground.width - scene.width) * (scene.getpixel((40, 40))[0] % 2), 0))
    return ground


def scenes(split: str, rows: int, seed: int) -> list[tuple[Image.Image, list[str]]]:
    """Pictures, and the digits in them in reading order."""
    made = digit_scenes("sft", split, rows, seed=seed, kinds=["read"])
    return [(wide(row["images"][0]), row["answer"].split()) for row in made]


def write_rows(folder: Path) -> dict[str, Path]:
    """`captions` and `instructions`, JSON files in LLaVA's format, with their images in `folder/images`."""
    (folder / "images").mkdir(parents=True)
    captions, instructions = [], []
    for number, (image, digits) in enumerate(scenes("train", 24, seed=11)):
        name = f"{number}.png"
        image.save(folder / "images" / name)
        caption = f"a picture of the digits {listed(digits)}"
        captions.append(row(name, ["Describe the image.", caption]))
        turns = [ASKING[number % 3], f"The picture shows {listed(digits)}."]
        if number % 2:
            turns += [SECOND, f"There {'is' if len(digits) == 1 else 'are'} {NUMBERS[len(digits)]}."]
        instructions.append(row(name, turns))
    instructions += [row(None, list(pair)) for pair in GENERAL]
    files = {"captions": captions, "instructions": instructions}
    for name, rows in files.items():
        (folder / f"{name}.json").write_text(json.dumps(rows, indent=1))
    return {name: folder / f"{name}.json" for name in files}


def row(image: str | None, words: list[str]) -> dict:
    spoken = [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(words)]
    if image is None:
        return {"conversations": spoken}
    spoken[0]["value"] = f"<image>\n{spoken[0]['value']}"
    return {"image": image, "conversations": spoken}
