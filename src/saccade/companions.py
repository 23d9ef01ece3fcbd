"""Learned tensors that are stored next to a model's weights but are not part of them: mode isolator, summary head.

The files are in the safetensors format and end in `.saccade`. In a folder without an index, inference engines take
every `*.safetensors`, `*.bin` or `*.pt` file for weights of the model, and refuse the folder if they do not know a
name in it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from saccade.errors import SaccadeError
from saccade.files import atomic_path, reading

ENDING = ".saccade"


@torch.no_grad()
def copy_whole(value: Tensor, parameter: nn.Parameter) -> None:
    """Copy a whole tensor into a parameter, which an engine may have sharded."""
    value = value.detach().to(parameter)
    if isinstance(parameter, DTensor):
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
    parameter.copy_(value)


def find_companion(folder: str | Path, name: str) -> Path | None:
    """The file called `name` in `folder`, or None."""
    path = Path(folder) / name
    return path if path.is_file() else None


def save_companion(folder: str | Path, name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Path:
    """Write `tensors` to `folder/name`, whole or not at all.

    Args:
        config: how they were trained, stored as JSON in the file's header.

    Raises:
        OSError: if the file cannot be written.
    """
    path = Path(folder) / name
    tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    with atomic_path(path) as partial:
        save_file(tensors, partial, metadata={"config": json.dumps(dict(config))})
    return path


def read_companion(place: str | Path, name: str, field: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The `config` and the tensors that `save_companion` wrote.

    Args:
        place: the folder that contains `name`, or a file.
        field: the user's name for `place`, for errors.

    Raises:
        SaccadeError: if there is no such file, or it is not a complete safetensors file.
    """
    path = Path(place) if Path(place).is_file() else find_companion(place, name)
    if path is None:
        raise SaccadeError(f"{field}={str(place)!r} has no {name}: give a folder or file written by a training run")
    with (
        reading(f"{field}={str(place)!r}: {path.name} is not a whole safetensors file"),
        safe_open(path, framework="pt") as file,
    ):
        config = json.loads((file.metadata() or {}).get("config", "{}"))
        if not isinstance(config, dict):
            raise TypeError("its config is not a mapping")
        return config, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
