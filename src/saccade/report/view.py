"""Draw what several reducers keep and merge of one image."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from saccade.data.chat import apply_chat_template
from saccade.errors import SaccadeError
from saccade.families import get_family
from saccade.families.padding import padded, pads_to_square
from saccade.files import reading, write_json_atomically
from saccade.pruning import reduce_inputs
from saccade.reducers import PruningConfig
from saccade.report.kept_tokens import Panel, draw_kept_tokens
from saccade.tokens import Reduction, VisualContext


@dataclass(frozen=True)
class Shown:
    """The row of an image's tokens that is drawn, because it shows all of the image.

    Args:
        row: its index among the image's rows.
        grid: rows and columns of its tokens.
        part: what it is beside other rows, "thumbnail" for example; empty if the image has one row.
    """

    row: int
    grid: tuple[int, int]
    part: str


@torch.no_grad()
def view_reducers(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    image: Image.Image,
    reducers: Sequence[str],
    prompt: str,
    path: str | os.PathLike[str],
    pruning: PruningConfig | None = None,
    source: str | None = None,
) -> dict[str, Any]:
    """Draw what each reducer keeps of an image, side by side, and write the same as JSON next to it.

    The image is reduced as `prune_inputs` does. The picture is the part of it that the model sees; for models that
    split images into crops, it has the tokens of the thumbnail.

    Args:
        prompt: the user's words, for reducers that read them.
        path: the PNG to write; the JSON has the same name with another suffix.
        pruning: how many tokens to keep, and options for its own reducer.
        source: the name by which the model was loaded; the picture and the JSON then say whose tokens they are.

    Returns:
        The content of the JSON: `prune_ratio`, `keep_tokens`, `prompt`, `source` (`chosen_by`, or None), `tokens`
            (of the image, with all of its crops), `grid` (rows, columns) and `part` of what is drawn (see [`Shown`]),
            and for each reducer how many tokens it `keeps` of the image, and of what is drawn the `kept` ones, those
            that `patch_tolerance` dropped as `absent`, and, if it merges, `merged_into`, the kept token in which each
            token has the largest weight, -1 if none.

    Raises:
        SaccadeError: on an unknown reducer, a ratio outside [0, 1) or together with a number of tokens, or a model
            that a reducer does not support.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise SaccadeError(f"output={str(path)!r}: the picture is a PNG, give a name that ends with .png")
    base = PruningConfig() if pruning is None else pruning
    # Options apply to one reducer; the others use their defaults.
    chosen = {name: base.replace(reducer=name) for name in reducers}
    inputs = process_image(processor, image, prompt)
    panels, entries = [], []
    shown, tokens = Shown(0, (0, 0), ""), 0
    for name, config in chosen.items():
        context, reduction = reduce_inputs(model, inputs, config)
        shown, tokens = shown_row(model, processor, context), int(context.valid.sum())
        panels.append(panel(name, reduction, shown))
        entries.append({"reducer": name, "keeps": int(reduction.valid.sum()), **_describe(reduction, shown)})
        if context.absent is not None:
            entries[-1]["absent"] = context.absent[shown.row].nonzero().flatten().tolist()
    chosen_on = None if source is None else chosen_by(source, model)
    draw_kept_tokens(seen_part(processor, image), panels, shown.grid, path, caption=chosen_on or "")
    report = {
        "prune_ratio": base.prune_ratio,
        "keep_tokens": base.keep_tokens,
        "prompt": prompt,
        "source": chosen_on,
        "tokens": tokens,
        "grid": list(shown.grid),
        "part": shown.part,
        "panels": entries,
    }
    write_json_atomically(path.with_suffix(".json"), report)
    return report


def chosen_by(source: str, model: PreTrainedModel) -> str:
    """A sentence on the model, loaded by the name `source`, whose features the reducers chose from."""
    if source == "tiny":
        return (
            "Tokens of tiny, the embedded model, which has only learned digit scenes: a stand-in for your own model."
        )
    return f"Tokens of {source}, a model of type {model.config.model_type}."


def shown_row(model: PreTrainedModel, processor: ProcessorMixin, context: VisualContext) -> Shown:
    """Which row of the context of one image shows all of it: the thumbnail, or the first scale or picture.

    Raises:
        SaccadeError: if none does, or its tokens do not form a grid.
    """
    family, count, part = get_family(model), context.shape[0], ""
    row = (family.thumbnail or 0) % count
    if count > 1:
        part = "coarsest scale" if family.has_scales else "thumbnail" if family.thumbnail is not None else "first crop"
        if part == "thumbnail" and getattr(processor.image_processor, "use_thumbnail", True) is False:
            raise SaccadeError(
                f"use_thumbnail=False: none of the {count} crops shows all of the image, so that none can be drawn; "
                "set it to true in the model's processor, or give a smaller image"
            )
    frames, rows, columns = context.grid[row].tolist()
    tokens = int(context.valid[row].sum())
    if frames != 1 or rows * columns != tokens:
        raise SaccadeError(f"model_type={model.config.model_type!r}: its {tokens} tokens per image do not form a grid")
    return Shown(row, (rows, columns), part)


def panel(title: str, reduction: Reduction, shown: Shown) -> Panel:
    """What `draw_kept_tokens` takes to draw a row of a reduction."""
    weight = _weight(reduction, shown)
    return f"{title}, {shown.part}" if shown.part else title, reduction.index[shown.row].cpu(), weight


def _weight(reduction: Reduction, shown: Shown) -> Tensor | None:
    """`(K, rows * columns)`, how much of each token is in each kept one; None if nothing is merged within the row."""
    rows, columns = shown.grid
    return None if reduction.weight is None else reduction.weight[shown.row, :, : rows * columns].cpu()


def _describe(reduction: Reduction, shown: Shown) -> dict[str, Any]:
    index, weight = reduction.index[shown.row].cpu(), _weight(reduction, shown)
    described: dict[str, Any] = {"kept": index[index >= 0].tolist()}
    if weight is not None:
        strongest, output = weight.abs().max(dim=0)
        described["merged_into"] = torch.where(strongest > 0, index[output], -1).tolist()
    return described


def process_image(processor: ProcessorMixin, image: Image.Image, prompt: str) -> Mapping[str, Any]:
    """The processor's outputs for one image and a question.

    Raises:
        SaccadeError: if the processor or its chat template makes none.
    """
    if getattr(processor, "chat_template", None) is None:
        token = getattr(processor, "image_token", "<image>")
        with reading("the processor takes no image and text"):
            return processor(images=image, text=f"{token}\n{prompt}", return_tensors="pt")
    content = [{"type": "image", "image": image}, {"type": "text", "text": prompt}]
    return apply_chat_template(
        processor,
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def seen_part(processor: ProcessorMixin, image: Image.Image) -> Image.Image:
    """The image padded as by the processor, or without what the processor crops from its longer edges."""
    if pads_to_square(processor):
        return padded(image, processor)
    # A processor of anyres images crops their pieces, which have the size of a crop, and stretches the thumbnail.
    anyres = hasattr(processor.image_processor, "image_grid_pinpoints")
    if anyres or not getattr(processor.image_processor, "do_center_crop", False):
        return image
    side = min(image.size)
    left, top = ((edge - side) // 2 for edge in image.size)
    return image.crop((left, top, left + side, top + side))
