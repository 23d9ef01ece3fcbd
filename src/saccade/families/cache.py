"""Outputs of a frozen vision tower, cached on disk and reused when the same pixels go through the same tower again.

The tower's `forward` is replaced while a step runs, so that everything that calls it uses the cache: encoding for any
mode, stock steps and evaluation. A row (image, crop, frame) is identified by a hash of its pixels and of the tower's
other per-row arguments, the tower by a hash of its weights. A processor that prepares images differently yields other
pixels, and a tower with other weights has its own folder, so neither ever reads entries of another.

Shapes: R rows of P patches, class token included, width Dv.
"""

import hashlib
import inspect
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from saccade.errors import SaccadeError
from saccade.families.base import Family
from saccade.families.store import DIGEST_BYTES, Store, digest
from saccade.families.vision_attention import FROM_ATTENTION
from saccade.files import write_json_atomically
from saccade.interfaces import changed, check_takes, replaced_forward
from saccade.reducers import Needs, get_reducer, list_reducers

LAST = "last_hidden_state"
TOWER_FILE = "tower.json"
NOT_SEEN_IN_VALUES = {"return_dict", "output_hidden_states"}
"""Arguments of a tower that select which outputs are returned and do not affect their values."""
NOT_OF_THE_TOWER = {"architectures", "dtype", "torch_dtype", "transformers_version"}
"""Fields of a tower's configuration that differ between two copies of the same tower."""


@dataclass
class _Call:
    """A call of the tower that the cache can answer: `pixels` `(R, C, H, W)`, further arguments with one value per
    row, `(R, ...)` each, and those that apply to all rows."""

    pixels: Tensor
    rows: dict[str, Tensor]
    others: dict[str, Any]

    def part(self, numbers: list[int]) -> dict[str, Any]:
        """Keyword arguments for some of the rows."""
        if len(numbers) == len(self.pixels):
            return {"pixel_values": self.pixels, **self.rows, **self.others}
        index = torch.tensor(numbers, device=self.pixels.device)
        rows = {name: value[index.to(value.device)] for name, value in self.rows.items()}
        return {"pixel_values": self.pixels[index], **rows, **self.others}


class FeatureCache:
    """A folder of a frozen tower's outputs, shared by any number of concurrent runs and processes.

    Raises:
        SaccadeError: if the tower's outputs cannot be cached, see [`check_cacheable`], or the folder is not writable.
    """

    def __init__(self, family: Family, folder: str | os.PathLike[str], max_bytes: float) -> None:
        check_cacheable(family, str(folder))
        self.tower = family.vision_tower
        self.states = family.vision_feature_layers
        self._names = [str(state) for state in self.states] or [LAST]
        """Names of the tensors stored per row."""
        self.store = Store(Path(folder), max_bytes)
        self.read_rows = 0
        """Number of rows read so far from disk, or copied from an equal row of the same call."""
        self.encoded_rows = 0
        """Number of rows encoded by the tower so far."""
        self._named: tuple[Any, str] | None = None
        check_takes(type(self.tower).forward, ("pixel_values",))
        self._parameters = list(inspect.signature(type(self.tower).forward).parameters)[1:]  # without `self`
        self._threads = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1), thread_name_prefix="features")
        with suppress(OSError):
            self.store.folder.mkdir(parents=True, exist_ok=True)
        if not os.access(self.store.folder, os.W_OK | os.X_OK):
            raise SaccadeError(f"feature_cache={str(folder)!r} is not a writable folder: give another")

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Answer calls of the tower from the cache inside the block."""
        plain = self.tower.forward
        with replaced_forward(self.tower, lambda *args, **kwargs: self._forward(plain, args, kwargs)):
            yield

    @torch.no_grad()
    def _forward(self, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The parts of the tower's output that the stock model reads."""
        call = self._call(args, kwargs)
        if call is None:
            return plain(*args, **kwargs)
        shelf, keys = self.shelf(), self._keys(call)
        wanted = list(dict.fromkeys(keys))
        found = dict(zip(wanted, self._threads.map(lambda key: self.store.read(shelf, key), wanted), strict=True))
        missing = [key for key in wanted if found[key] is None]
        if missing:
            output = plain(**call.part([keys.index(key) for key in missing]))
            fresh = {name: value.cpu() for name, value in self._used(output).items()}  # (missing, P, Dv)
            for number, key in enumerate(missing):
                found[key] = {name: value[number] for name, value in fresh.items()}
            if not self.store.stopped:
                list(self._threads.map(lambda key: self._keep(shelf, key, found[key]), missing))
        self.read_rows += len(keys) - len(missing)
        self.encoded_rows += len(missing)
        if len(missing) == len(keys):
            return output
        device = call.pixels.device
        return self._output({name: torch.stack([found[key][name] for key in keys]).to(device) for name in self._names})

    def _call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Call | None:
        """The arguments of a call, or None if it asks for outputs that are not cached."""
        given = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        pixels = given.pop("pixel_values", None)
        if not isinstance(pixels, Tensor) or pixels.dim() != 4:
            raise changed(f"{type(self.tower).__name__} is called without 'pixel_values' of four axes")
        if len(pixels) == 0 or given.get("output_attentions"):
            return None
        # Since transformers 5.24 this may be the index of a state, including 0.
        states = given.get("output_hidden_states")
        if given.get("return_dict") is False or (self.states and (states is None or states is False)):
            return None
        given = {name: value for name, value in given.items() if value is not None and value is not False}
        rows = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        others = {name: value for name, value in given.items() if name not in rows}
        if any(value.shape[:1] != pixels.shape[:1] for value in rows.values()):
            return None
        return _Call(pixels, rows, others)

    def _keys(self, call: _Call) -> list[str]:
        """The key of each row: a hash of its values and of everything else that affects the tower's output for it."""
        device = call.pixels.device.type
        autocast = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else "none"
        tensors = {name: value.detach().cpu() for name, value in {"pixels": call.pixels, **call.rows}.items()}
        others = sorted((name, repr(value)) for name, value in call.others.items() if name not in NOT_SEEN_IN_VALUES)
        shapes = [(name, str(value.dtype), list(value.shape[1:])) for name, value in tensors.items()]
        header = json.dumps([autocast, others, shapes]).encode()

        def key(row: int) -> str:
            return digest(header, *(_bytes(value[row]) for value in tensors.values()))

        return list(self._threads.map(key, range(len(call.pixels))))

    def shelf(self) -> str:
        """The subfolder of the tower in its current state: a hash of its configuration and all its weights.

        The hash is recomputed when a weight has been written to, as when a checkpoint is loaded.
        """
        # Buffers are left out: DDP rewrites them on every rank in each step, with unchanged values.
        versions = tuple((weight.data_ptr(), weight._version) for weight in self.tower.parameters())
        if self._named is None or self._named[0] != versions:
            name = tower_fingerprint(self.tower, self.states)
            self._named = (versions, name)
            about = {"class": type(self.tower).__name__, "states": self._names, "config": _tower_config(self.tower)}
            with suppress(OSError):
                write_json_atomically(self.store.folder / name / TOWER_FILE, about)
        return self._named[1]

    def _keep(self, shelf: str, key: str, tensors: Mapping[str, Tensor]) -> None:
        # The result of a transient hardware fault must not be stored and read forever.
        if all(value.isfinite().all() for value in tensors.values()):
            self.store.write(shelf, key, tensors)

    def _used(self, output: Any) -> dict[str, Tensor]:
        if not self.states:
            return {LAST: output.last_hidden_state}
        return {str(state): output.hidden_states[state] for state in self.states}

    def _output(self, tensors: Mapping[str, Tensor]) -> BaseModelOutputWithPooling:
        """The tower's output as its model reads it, with the used hidden states at their indices."""
        if not self.states:
            return BaseModelOutputWithPooling(last_hidden_state=tensors[LAST])
        states: list[Tensor | None] = [None] * (self.tower.config.num_hidden_layers + 1)
        for state in self.states:
            states[state] = tensors[str(state)]
        return BaseModelOutputWithPooling(hidden_states=tuple(states))


def check_cacheable(family: Family, folder: str) -> None:
    """Check that a tower always gives the same outputs for the same pixels, row by row."""
    model_type, tower = family.model.config.model_type, family.vision_tower
    if family.vision_feature_layers is None:
        raise SaccadeError(
            f"feature_cache={folder!r}: the vision tower of model_type={model_type!r} does not encode each image by "
            "itself, so that its features cannot be kept; leave feature_cache out"
        )
    if any(parameter.requires_grad for parameter in tower.parameters()):
        raise SaccadeError(
            f"feature_cache={folder!r}: the vision tower trains, so that its features change from step to step; set "
            "freeze_vision_tower to true, give it no adapters, or leave feature_cache out"
        )
    for name, value in tower.config.to_dict().items():
        if "drop" in name and isinstance(value, (int, float)) and value > 0:
            raise SaccadeError(
                f"feature_cache={folder!r}: the vision tower has {name}={value}, so that its features differ from "
                f"step to step; set {name} to 0 in the model's vision_config, or leave feature_cache out"
            )


def check_needs(folder: str, mode: str, needs: Needs) -> None:
    """Check that a mode reads nothing inside the tower, which does not run when its features are cached."""
    inside = sorted(needs.fields & FROM_ATTENTION)
    if inside:
        others = [name for name in list_reducers() if not get_reducer(name).needs & FROM_ATTENTION]
        raise SaccadeError(
            f"feature_cache={folder!r}: mode {mode!r} chooses tokens by {' and '.join(inside)}, which are read inside "
            f"the vision tower while it runs; choose by one of {', '.join(others)}, or leave feature_cache out"
        )


def tower_fingerprint(tower: nn.Module, states: tuple[int, ...]) -> str:
    """A hash of a tower: its class, configuration, used states, and names, dtypes, shapes and bytes of its weights.

    The attention implementation and the device are not part of it: they only affect rounding.
    """
    found = hashlib.blake2b(digest_size=DIGEST_BYTES)
    about = [type(tower).__name__, _tower_config(tower), sorted(states)]
    found.update(json.dumps(about, sort_keys=True, default=str).encode())
    for name, value in sorted(tower.state_dict().items()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(_bytes(value.detach().cpu()))
    return found.hexdigest()


def _tower_config(tower: nn.Module) -> dict[str, Any]:
    config = tower.config.to_dict()
    return {name: value for name, value in config.items() if name[0] != "_" and name not in NOT_OF_THE_TOWER}


def _bytes(value: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU."""
    return memoryview(value.reshape(-1).contiguous().view(torch.uint8).numpy())
