"""Lengths of a recipe's samples: from its own data if available, else from a shipped table of estimates."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from saccade.data.conversation import checked_message, images_of, text_of, used_columns, videos_of
from saccade.data.lengths import TokenCounter, row_text
from saccade.errors import RecordError, SaccadeError
from saccade.reducers import PruningConfig
from saccade.training.checks import use_own_template
from saccade.training.length_table import LLAVA_558K, LLAVA_665K, SHAREGPT, SYSTEM_PROMPT, draw_lengths
from saccade.training.models import ModelOptions, load_processor
from saccade.training.recipe import Recipe
from saccade.training.sources import DIGIT_ROWS, DIGITS, dataset_sources, open_source

SAMPLES, DIGIT_SAMPLES = 256, 64
"""Number of samples that represent all of them; digit scenes are alike, so fewer suffice."""
CHARACTERS, FORMAT = 4, 8
"""Without a tokenizer: characters per token, and tokens of chat format per message. Rough guesses."""


@dataclass(frozen=True)
class SampleLength:
    """One sample. Its videos count as one image each among `images`."""

    text: int
    learned: int
    images: int = 1
    videos: int = 0

    def cut(self, limit: int | None, visual: int) -> "SampleLength":
        """The sample truncated to a `max_length` of `limit`, with `visual` tokens per image."""
        room = self.text if limit is None else max(1, min(self.text, limit - self.images * visual))
        return SampleLength(room, max(1, min(self.learned, room)), self.images)


@dataclass(frozen=True)
class Lengths:
    """Samples that represent an epoch."""

    samples: tuple[SampleLength, ...]
    records: int
    source: str

    def means(self) -> dict[str, float]:
        """Mean tokens of text, learned tokens and images of a sample."""
        return {
            "text_tokens": fmean(sample.text for sample in self.samples),
            "label_rows": fmean(sample.learned for sample in self.samples),
            "images": fmean(sample.images for sample in self.samples),
        }


def recipe_lengths(recipe: Recipe, model: str, samples: int = SAMPLES) -> Lengths:
    """The lengths of a recipe's samples.

    They are counted on evenly spaced rows of its own data, if that can be read here offline. Otherwise they come from
    a shipped table: captions if the language model is frozen, as in stage one, else the instruction mixture of
    LLaVA-1.5.

    Args:
        model: the model whose tokenizer counts: "tiny", a folder or a hub id. If it is unavailable, characters are
            counted.
        samples: number of rows of its own data to count.
    """
    options = replace(recipe.options, model=model)
    try:
        sources = dataset_sources(options)
        missing = [source.path for source in sources if source.path != DIGITS and not Path(source.path).exists()]
        if not missing:
            return _own(options, _counter(recipe, options), samples)
        reason = f"{missing[0]} is not here"
    except SaccadeError as error:
        reason = str(error)
    plain = recipe.trainer.conversation == "plain"
    if plain or recipe.trainer.freeze_language_model:
        table, prompt = LLAVA_558K, 0
        name = "shipped table of captions (LLaVA-Pretrain-558K; tokens are estimates)"
    else:
        table, prompt = (*LLAVA_665K, SHAREGPT), SYSTEM_PROMPT
        name = "shipped table of the instruction mixture (LLaVA-665K; turns and tokens are estimates)"
    samples = tuple(
        SampleLength(text.learned if plain else text.tokens + prompt, text.learned, text.images)
        # More samples than of real rows: they cost nothing, and long texts are rare.
        for text in draw_lengths(table, 8 * SAMPLES, seed=0)
    )
    return Lengths(samples, round(1000 * sum(source.samples for source in table)), f"{name}; {reason}")


def _counter(recipe: Recipe, options: ModelOptions) -> TokenCounter | None:
    """The token counter for the recipe's rows, or None if its processor is not available offline."""
    args = recipe.trainer
    try:
        processor, placeholder, stops = load_processor(options, args.trust_remote_code, local_files_only=True)
    except SaccadeError:
        return None
    use_own_template(recipe, processor)
    budget = PruningConfig(prune_ratio=0.0)
    return TokenCounter(processor, placeholder, budget, stop_ids=stops, conversation=args.conversation)


def _own(options: ModelOptions, counter: TokenCounter | None, number: int) -> Lengths:
    """Count rows of the recipe's own data."""
    opened, sizes = [], []
    for source in dataset_sources(options):
        if source.path == DIGITS:
            # A short dataset has the same first rows as a long one, and is faster to make.
            size = source.rows or options.dataset_rows or DIGIT_ROWS
            rows = open_source(replace(source, rows=min(size, DIGIT_SAMPLES)), options)
        else:
            rows = open_source(source, options)
            size = min(len(rows), source.rows or len(rows), options.dataset_rows or len(rows))
        opened.append((source, rows))
        sizes.append(size)
    weights = [source.weight for source, _ in opened]
    shares = [size if weight is None else weight for size, weight in zip(sizes, weights, strict=True)]
    samples, counted = [], 0
    number = number if weights[0] is not None else min(number, sum(sizes))
    for (_, rows), size, share in zip(opened, sizes, shares, strict=True):
        there = min(size, len(rows))
        count = max(1, round(number * share / sum(shares)))
        # As many samples as its share, of a source with fewer rows some of them again.
        places = [place * there // count for place in range(count)]
        known = {place: tuple(_count(rows.read, place, counter)) for place in dict.fromkeys(places)}
        samples.extend(sample for place in places for sample in known[place])
        counted += len(known)
    if not samples:
        raise SaccadeError(f"none of the rows of {opened[0][0].path} that were tried can be used")
    records = sum(sizes)
    if weights[0] is not None:
        # Rows are drawn until each has been drawn once, so shorter sources repeat.
        records = round(max(size * sum(shares) / share for size, share in zip(sizes, shares, strict=True)))
    records = records if options.dataset_rows is None else min(records, options.dataset_rows)
    how = "its tokenizer" if counter is not None else f"{CHARACTERS} characters per token, without a tokenizer"
    if any(sample.videos for sample in samples):
        how += ", and each video as one image (`saccade data check --model` counts the tokens of all its frames)"
    return Lengths(tuple(samples), records, f"{counted} rows of the recipe's own data, counted by {how}")


def _count(read: Callable[[int], dict[str, Any]], index: int, counter: TokenCounter | None) -> Iterator[SampleLength]:
    """The length of row `index`, or nothing if it is unusable."""
    try:
        row = row_text(read(index))
        text, learned = _by_characters(row) if counter is None else counter.text_and_learned(row)
    except RecordError:
        return
    videos = len(videos_of(row))
    yield SampleLength(text, min(learned, text), len(images_of(row)) + videos, videos)


def _by_characters(row: Mapping[str, Any]) -> tuple[int, int]:
    """Estimated numbers of tokens of a row's text, and of those with labels."""
    columns = [row[name] for name in used_columns(row)]
    messages = [checked_message(m) for column in columns if not isinstance(column, str) for m in column]
    plain = [column for column in columns if isinstance(column, str)]
    words = [text_of(message) for message in messages] + plain
    answers = [text_of(message) for message in messages if message["role"] == "assistant"] + plain[-1:]
    text = sum(len(word) // CHARACTERS + FORMAT for word in words)
    return text, sum(len(word) // CHARACTERS + 1 for word in answers)
