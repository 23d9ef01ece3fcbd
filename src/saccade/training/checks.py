"""`saccade data check`: read the sources of a file or a recipe as training would."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import ProcessorMixin

from saccade.data.check import check_sources
from saccade.data.lengths import TokenCounter
from saccade.dualspeed.checks import read_template
from saccade.dualspeed.collator import DualSpeedCollator
from saccade.dualspeed.labels import check_turns
from saccade.errors import SaccadeError
from saccade.families.padding import pads_to_square
from saccade.recipes import is_recipe, put_over
from saccade.training.models import load_processor
from saccade.training.recipe import Recipe, load_recipe, make_recipe
from saccade.training.sources import check_split, dataset_sources, open_source

ANY_MACHINE = {"bf16": False, "fp16": False, "tf32": None, "use_cpu": True}
"""Training options that a machine may not support, and that a check does not need."""


def check_data(
    path: str,
    given: Mapping[str, Any] | None = None,
    jobs: int = 1,
    start: Callable[[int], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Read every row and every image that training on a data file, or a recipe, would use.

    Args:
        path: a data file, a folder, a hub id, or a recipe: its YAML, or the name of a shipped one.
        given: fields of a recipe that override those of the recipe. With a `model`, tokens are counted.
        jobs: number of processes that read in parallel.
        start, progress: called with the number of rows before the first is read, and with that of rows just read.

    Returns:
        The result of `saccade.data.check.check_sources`, plus `sources`, the path and the number of rows of each.

    Raises:
        SaccadeError: on bad input, or a chat template from which answers and their end tokens cannot be learned.
    """
    recipe = _recipe(path, dict(given or {}))
    options, args = recipe.options, recipe.trainer
    check_split(options)
    names, opened, counts = [], [], []
    for source in dataset_sources(options):
        rows = open_source(replace(source, rows=None) if source.path != "digits" else source, options)
        limits = [limit for limit in (source.rows, options.dataset_rows) if limit is not None]
        names.append(source.path)
        opened.append(rows)
        counts.append(min([len(rows), *limits]))
    counter, padded = None, args.image_aspect_ratio is not None
    if "model" in recipe.given:
        processor, placeholder_id, stops = load_processor(options, args.trust_remote_code)
        check_chat(recipe, processor, placeholder_id, stops)
        counter = TokenCounter(
            processor, placeholder_id, args.pruning, args.isolator_length, stops, args.conversation, args.sampling
        )
        padded = padded or pads_to_square(processor)
    max_length = args.max_length if args.fit_length is None else None
    report = check_sources(
        opened, counter, args.max_image_pixels, jobs, max_length, padded, args.sampling, start, progress, counts=counts
    )
    named = [{"path": name, "records": count} for name, count in zip(names, counts, strict=True)]
    return {"sources": named, **report}


def check_chat_here(recipe: Recipe) -> bool:
    """`check_chat` offline. False if the processor of the recipe's model is not available locally."""
    try:
        loaded = load_processor(recipe.options, recipe.trainer.trust_remote_code, local_files_only=True)
    except SaccadeError:
        return False
    check_chat(recipe, *loaded)
    return True


def check_chat(recipe: Recipe, processor: ProcessorMixin, placeholder_id: int, stops: tuple[int, ...]) -> None:
    """Set the recipe's own chat template, if it has one, and check which part of an answer would be learned."""
    use_own_template(recipe, processor)
    if recipe.trainer.conversation == "chat":
        check_turns(DualSpeedCollator(processor, placeholder_id=placeholder_id, stop_ids=stops))


def use_own_template(recipe: Recipe, processor: ProcessorMixin) -> None:
    """Set the processor's chat template to the recipe's own, if that is a file."""
    path = recipe.trainer.chat_template_path
    if path is not None and Path(path).is_file():
        processor.chat_template = read_template(Path(path))


def _recipe(path: str, given: dict[str, Any]) -> Recipe:
    if is_recipe(path):
        recipe = load_recipe(path, [f"--{name}={json.dumps(value)}" for name, value in ANY_MACHINE.items()])
        return make_recipe(put_over(recipe.given, given), source=path)
    return make_recipe({**ANY_MACHINE, **given, "dataset": path}, source="saccade data check")
