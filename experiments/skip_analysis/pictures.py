"""Pictures and JSON of what skipping changes in a model."""

import os
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from experiments.skip_analysis.measure import GROUPS, ffn_ratio, skip_error
from saccade.errors import SaccadeError
from saccade.files import write_json_atomically
from saccade.report.environment import environment
from saccade.report.plots import FAINT, INK, save_figure, styled_figure
from saccade.report.view import process_image
from saccade.skip_vision import SkipVisionConfig, apply_skip_vision

COLORS = {"text": "#000000", "visual": "#D55E00", "retained": "#E69F00", "skipped": "#D55E00", "summary": "#0072B2"}
MARKERS = {"text": "s", "visual": "o", "retained": "^", "skipped": "o", "summary": "D"}
QUANTILES = (0.2, 0.5, 0.8)
Sample = tuple[Image.Image, str]
"""An image, and the user's prompt about it."""


def check_output(path: str | os.PathLike[str]) -> Path:
    """The path of a picture, whose JSON gets the same name with another suffix.

    Raises:
        SaccadeError: if it does not end with .png.
    """
    if Path(path).suffix.lower() != ".png":
        raise SaccadeError(f"output={str(path)!r}: the picture is a PNG, give a name that ends with .png")
    return Path(path)


def analyze_ffn(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    samples: Sequence[Sample],
    config: SkipVisionConfig,
    path: str | os.PathLike[str],
    seed: int = 0,
) -> dict[str, Any]:
    """Draw what feed-forward networks add to visual, summary and text rows, and write it as JSON beside the picture.

    Args:
        model: a model of a known family; all of its networks run.
        processor: its processor.
        samples: one image each, with a prompt.
        config: how images are laid out.
        path: the PNG to write.
        seed: of the summary head, which has not been trained.

    Returns:
        The content of the JSON: its origin, and `layers`, with `mean`, `p20`, `p50`, `p80` of ||F(u)|| / ||u|| and
        the number of `rows` per layer and group; None for a group without rows.

    Raises:
        SaccadeError: if the model or the images do not fit the options.
    """
    path = check_output(path)
    measured = [ffn_ratio(model, prepared) for prepared in _prepare(model, processor, samples, config, seed)]
    layers = [
        {group: _spread(torch.cat([sample[number][group] for sample in measured])) for group in GROUPS}
        for number in range(len(measured[0]))
    ]
    figure, (axes,) = styled_figure()
    for group in ("text", "visual", "summary"):
        entries = [(number, layer[group]) for number, layer in enumerate(layers) if layer[group] is not None]
        if not entries:
            continue
        numbers = [number for number, _ in entries]
        low, middle, high = ([entry[name] for _, entry in entries] for name in ("p20", "p50", "p80"))
        axes.fill_between(numbers, low, high, color=COLORS[group], alpha=0.15, linewidth=0)
        axes.plot(numbers, middle, color=COLORS[group], marker=MARKERS[group], linewidth=2, label=f"{group} rows")
    axes.set_ylabel("||FFN(u)|| / ||u||")
    axes.set_ylim(bottom=0)
    _finish(axes, len(layers), "median; bands: 20th to 80th percentile")
    save_figure(figure, path)
    report = {**_origin(model, samples, config, seed), "layers": layers}
    write_json_atomically(path.with_suffix(".json"), report)
    return report


def analyze_skip_error(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    samples: Sequence[Sample],
    config: SkipVisionConfig,
    path: str | os.PathLike[str],
    seed: int = 0,
) -> dict[str, Any]:
    """Draw what skipping changes in each layer together with its bound, and write both as JSON beside the picture.

    Args:
        model: a model of a known family that does not skip.
        processor: its processor.
        samples: one image each, with a prompt.
        config: how images are laid out; its `layers` must be all.
        path: the PNG to write.
        seed: of the summary head, which has not been trained.

    Returns:
        The content of the JSON: its origin; `layers` and `logits` as returned by `skip_error`, as means over samples
        for the names in `MEANS` and as maxima for all others; and `samples`, the values of each sample.

    Raises:
        SaccadeError: if the model or the images do not fit the options, or nothing is skipped.
    """
    path = check_output(path)
    if config.layers is not None:
        raise SaccadeError(f"layers={config.layers!r}: the error is that of skipping in all layers, leave layers out")
    measured = [skip_error(model, prepared) for prepared in _prepare(model, processor, samples, config, seed)]
    together = _together(measured)
    figure, (left, right) = styled_figure(2)
    layers = together["layers"]
    numbers = range(len(layers))
    for group in ("skipped", "text", "summary"):
        values = [layer["deviation"][group] for layer in layers]
        # A change of zero cannot be drawn on a logarithmic axis.
        drawn = [(number, value) for number, value in zip(numbers, values, strict=True) if value]
        if drawn:
            left.plot(*zip(*drawn, strict=True), color=COLORS[group], marker=MARKERS[group], label=f"{group} rows")
    left.plot(numbers, [layer["bound"] for layer in layers], color=INK, linestyle="--", label="bound, measured gains")
    if all(layer["spectral"] is not None for layer in layers):
        spectral = [layer["spectral"] for layer in layers]
        left.plot(numbers, spectral, color=FAINT, linestyle=":", label="||FFN||, from weights")
    left.set_yscale("log")
    left.set_ylabel("largest change of a row")
    _finish(left, len(layers))
    for name, label, color, marker in (
        ("attention_mass_max", "mass on skipped, largest", "#56B4E9", "v"),
        ("attention_mass", "mass on skipped, mean", "#0072B2", "o"),
        ("kv_drop", "change without their keys", "#D55E00", "^"),
    ):
        values = [float("nan") if layer[name] is None else layer[name] for layer in layers]
        right.plot(numbers, values, color=color, marker=marker, label=label)
    right.set_ylabel("attention of text (share)")
    right.set_ylim(bottom=0)
    _finish(right, len(layers))
    save_figure(figure, path)
    report = {**_origin(model, samples, config, seed), **together, "samples": measured}
    write_json_atomically(path.with_suffix(".json"), report)
    return report


def _prepare(
    model: PreTrainedModel, processor: ProcessorMixin, samples: Sequence[Sample], config: SkipVisionConfig, seed: int
) -> list[dict[str, Any]]:
    """Each sample laid out for skipping; the model is left unchanged."""
    if not samples:
        raise SaccadeError("images: none given, give at least one")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        skip = apply_skip_vision(model, config)
    try:
        with torch.no_grad():
            # One prompt at a time, so that there is no padding, which would have to be excluded everywhere.
            return [skip.prepare(_inputs(model, processor, sample)) for sample in samples]
    finally:
        skip.remove()


def _inputs(model: PreTrainedModel, processor: ProcessorMixin, sample: Sample) -> dict[str, Any]:
    image, prompt = sample
    inputs = process_image(processor, image, prompt)
    return {name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in inputs.items()}


def _origin(model: PreTrainedModel, samples: Sequence[Sample], config: SkipVisionConfig, seed: int) -> dict[str, Any]:
    return {
        "command": shlex.join(["python", "-m", "experiments.skip_analysis", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(),
        "model": {"model_type": model.config.model_type, "dtype": str(model.dtype).removeprefix("torch.")},
        "prompts": [prompt for _, prompt in samples],
        "skip_vision": vars(config),
        "seed": seed,
    }


def _spread(ratio: Tensor) -> dict[str, float] | None:
    if not ratio.numel():
        return None
    low, middle, high = ratio.float().quantile(torch.tensor(QUANTILES, device=ratio.device)).tolist()
    return {"mean": ratio.mean().item(), "p20": low, "p50": middle, "p80": high, "rows": ratio.numel()}


MEANS = ("relative", "attention_mass", "kv_drop", "kl", "same_choice", "rms_change", "rms")


def _together(values: Sequence[Any], name: str = "") -> Any:
    """Combine reports of the same form: means for the names in `MEANS`, maxima for all others."""
    first = values[0]
    if isinstance(first, dict):
        inner = (lambda key: name) if name in MEANS else (lambda key: key)
        return {key: _together([value[key] for value in values], inner(key)) for key in first}
    if isinstance(first, list):
        return [_together(list(entries), name) for entries in zip(*values, strict=True)]
    there = [value for value in values if value is not None]
    if not there:
        return None
    return sum(there) / len(there) if name in MEANS else max(there)


def _finish(axes: Axes, layers: int, title: str = "") -> None:
    axes.set_xlabel("layer")
    axes.set_xticks(range(0, layers, max(1, layers // 8)))
    axes.legend(
        loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3 if title else 2, frameon=False, fontsize=9,
        labelcolor=INK, title=title or None, title_fontsize=9, columnspacing=1, handlelength=1.6,
    )  # fmt: skip
