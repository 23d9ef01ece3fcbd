"""Draw what several reducers keep and merge of one image."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from saccade.data.chat import apply_chat_template
from saccade.errors import SaccadeError
from saccade.families import get_family
from saccade.families.padding import padded, pads_to_square
from saccade.files import reading, write_json_atomically
from saccade.reducers import PruningConfig, reduce
from saccade.report.kept_tokens import Panel, draw_kept_tokens
from saccade.tokens import Reduction, VisualContext


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

    The picture is the part of the image that the model sees; for models that split images into crops, the thumbnail.

    Args:
        prompt: the user's words, for reducers that read them.
        path: the PNG to write; the JSON has the same name with another suffix.
        pruning: how many tokens to keep, and options for its own reducer.
        source: the name by which the model was loaded; the picture and the JSON then say whose tokens they are.

    Returns:
        The content of the JSON: `prune_ratio`, `keep_tokens`, `prompt`, `source` (`chosen_by`, or None), `grid` (rows,
            columns), and for each reducer its `kept` tokens, those that `patch_tolerance` dropped as `absent`, and, if
            it merges, `merged_into`, the kept token in which each token has the largest weight, -1 if none.

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
    family = get_family(model)
    inputs = process_image(processor, image, prompt)
    panels, entries, grid = [], [], (0, 0)
    for name, config in chosen.items():
        context = family.encode(inputs, config.needs).context
        grid = token_grid(model, context)
        reduction = reduce(context.select_rows(slice(1)), config)
        panels.append(panel(name, reduction, grid))
        entries.append({"reducer": name, **_describe(reduction, grid[0] * grid[1])})
        if context.absent is not None:
            entries[-1]["absent"] = context.absent[0].nonzero().flatten().tolist()
    chosen_on = None if source is None else chosen_by(source, model)
    draw_kept_tokens(seen_part(processor, image), panels, grid, path, caption=chosen_on or "")
    report = {
        "prune_ratio": base.prune_ratio,
        "keep_tokens": base.keep_tokens,
        "prompt": prompt,
        "source": chosen_on,
        "grid": list(grid),
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


def token_grid(model: PreTrainedModel, context: VisualContext) -> tuple[int, int]:
    """Rows and columns of the tokens of a context's first row.

    Raises:
        SaccadeError: if they do not form a grid.
    """
    frames, rows, columns = context.grid[0].tolist()
    tokens = int(context.valid[0].sum())
    if frames != 1 or rows * columns != tokens:
        raise SaccadeError(f"model_type={model.config.model_type!r}: its {tokens} tokens per image do not form a grid")
    return rows, columns


def panel(title: str, reduction: Reduction, grid: tuple[int, int]) -> Panel:
    """What `draw_kept_tokens` takes to draw the first row of a reduction."""
    weight = None if reduction.weight is None else reduction.weight[0, :, : grid[0] * grid[1]].cpu()
    return title, reduction.index[0].cpu(), weight


def _describe(reduction: Reduction, tokens: int) -> dict[str, Any]:
    index = reduction.index[0].cpu()
    described: dict[str, Any] = {"kept": index[index >= 0].tolist()}
    if reduction.weight is not None:
        strongest, output = reduction.weight[0, :, :tokens].abs().cpu().max(dim=0)
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
    if not getattr(processor.image_processor, "do_center_crop", False):
        return image
    side = min(image.size)
    left, top = ((edge - side) // 2 for edge in image.size)
    return image.crop((left, top, left + side, top + side))
