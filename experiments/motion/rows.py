"""Clips of digits that move as rows of a Parquet file, with their frames as JPEG files."""

import io
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value
from PIL import Image

from experiments.motion.clips import motion_clips
from saccade.files import atomic_path

_FEATURES = Features(
    {
        "videos": List({"frames": List({"bytes": Value("binary"), "path": Value("string")}), "fps": Value("float64")}),
        "messages": List({"role": Value("string"), "content": Value("string")}),
        "kind": Value("string"),
        "answer": Value("string"),
    }
)


def clips_path(folder: Path, split: str, number: int, frames: int) -> Path:
    """The file of `write_clips` with these arguments."""
    return folder / f"{split}-{number}-frames{frames}.parquet"


def write_clips(folder: Path, split: str, number: int, frames: int) -> None:
    """Write clips of a split, if they are not there yet.

    Args:
        number: of clips.
        frames: of each.
    """
    path = clips_path(folder, split, number, frames)
    if not path.is_file():
        rows = Dataset.from_list(list(map(_stored, motion_clips(split, number, frames=frames))), features=_FEATURES)
        with atomic_path(path) as aside:
            rows.to_parquet(str(aside))


def _stored(row: dict[str, Any]) -> dict[str, Any]:
    videos = [{"frames": [_file(frame) for frame in clip.frames], "fps": clip.rate} for clip in row["videos"]]
    return {"videos": videos, **{name: row[name] for name in ("messages", "kind", "answer")}}


def _file(frame: Any) -> dict[str, Any]:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG", quality=90)
    return {"bytes": file.getvalue(), "path": None}
