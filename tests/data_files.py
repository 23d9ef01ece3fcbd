"""Data files with every kind of fault, made for real."""

import json
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image


def turn(question: str, answer: str) -> list[dict[str, str]]:
    """One question and its answer, as LLaVA writes them."""
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def good_records(folder: Path, count: int, stem: str = "good") -> list[dict[str, Any]]:
    """LLaVA records, each with its own JPEG in `folder`."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    records = []
    for number in range(count):
        name = f"images/{stem}{number}.jpg"
        Image.effect_noise((96, 96), 60).save(folder / name)
        records.append({"id": f"{stem}{number}", "image": name, "conversations": turn("<image>\nhow many ?", "3")})
    return records


def jpeg() -> bytes:
    stream = BytesIO()
    Image.effect_noise((200, 200), 80).save(stream, "JPEG")
    return stream.getvalue()


def bad_records(folder: Path) -> dict[str, dict[str, Any]]:
    """One record per kind of fault, by the name of the kind, with the files that the records refer to."""
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    (images / "cut.jpg").write_bytes(jpeg()[:2000])
    (images / "empty.jpg").write_bytes(b"")
    (images / "text.jpg").write_bytes(b"not an image at all")
    # 400 million pixels in a file of 50 kB.
    Image.new("1", (20_000, 20_000)).save(images / "bomb.png")
    Image.new("RGB", (96, 96)).save(images / "fine.jpg")
    Image.new("RGB", (96, 96)).save(folder.parent / "secret.png")
    ask = "<image>\nhow many ?"
    return {
        "missing_image": {"image": "images/none.jpg", "conversations": turn(ask, "3")},
        "truncated_image": {"image": "images/cut.jpg", "conversations": turn(ask, "3")},
        "zero_byte_image": {"image": "images/empty.jpg", "conversations": turn(ask, "3")},
        "not_an_image": {"image": "images/text.jpg", "conversations": turn(ask, "3")},
        "decompression_bomb": {"image": "images/bomb.png", "conversations": turn(ask, "3")},
        "placeholder_count": {"image": "images/fine.jpg", "conversations": turn("<image> <image> what ?", "3")},
        "empty_answer": {"image": "images/fine.jpg", "conversations": turn(ask, " \n")},
        "unknown_role": {
            "image": "images/fine.jpg",
            "conversations": [{"from": "robot", "value": "a"}, *turn("b", "c")],
        },
        "no_answer": {"image": "images/fine.jpg", "conversations": turn(ask, "3")[:1]},
        "outside_image_folders": {"image": "../secret.png", "conversations": turn(ask, "3")},
        "malformed": {"image": "images/fine.jpg", "text": "hello"},
    }


def write_json(path: Path, records: list[Any]) -> Path:
    """A list in one `.json` file, or JSON lines in a `.jsonl`."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        path.write_text(json.dumps(records))
    return path
