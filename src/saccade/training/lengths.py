"""How long the samples of a recipe are: its own data where that is at hand, else a shipped table of estimates."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from saccade.data.conversation import checked_message, images_of, text_of, used_columns
from saccade.data.lengths import TokenCounter, row_text
from saccade.errors import RecordError, SaccadeError
from saccade.reducers import PruningConfig
from saccade.training.checks import use_own_template
from saccade.training.length_table import LLAVA_558K, LLAVA_665K, SHAREGPT, SYSTEM_PROMPT, Source, draw_lengths
from saccade.training.recipe import ModelOptions, Recipe
from saccade.training.sources import DIGIT_ROWS, DIGITS, dataset_sources, load_processor, open_source

SAMPLES, DIGIT_SAMPLES = 256, 64
"""Samples that stand for all of them; digit scenes are alike, so that fewer do."""
CHARACTERS, FORMAT = 4, 8
"""Where no tokenizer is at hand: characters of a token, and tokens of chat format around a message. A guess."""


@dataclass(frozen=True)
class SampleLength:
    """One sample.

    Args:
        text: tokens of its text.
        learned: of these, how many are learned.
        images: how many it has.
    """

    text: int
    learned: int
    images: int = 1

    def cut(self, limit: int | None, visual: int) -> "SampleLength":
        """The sample at a `max_length` of `limit`, with `visual` tokens an image."""
        room = self.text if limit is None else max(1, min(self.text, limit - self.images * visual))
        return SampleLength(room, max(1, min(self.learned, room)), self.images)


@dataclass(frozen=True)
class Lengths:
    """Samples that stand for an epoch.

    Args:
        samples: some of them.
        records: how many the epoch has.
        source: where both are from, for people.
    """

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

    They are counted on rows of its own data, evenly spread, if that can be read here without the network.
    Otherwise they come from a shipped table: captions where the language model is frozen, as in stage one, else the
    instruction mixture of LLaVA-1.5.

    Args:
        model: whose tokenizer counts, "tiny", a folder or a hub id; without it characters are counted.
        samples: rows of its own data to count.
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
    table = _captions(plain) if plain or recipe.trainer.freeze_language_model else _instructions()
    return Lengths(table.samples, table.records, f"{table.source}; {reason}")


def _captions(plain: bool) -> Lengths:
    found = _table(LLAVA_558K, "shipped table of captions (LLaVA-Pretrain-558K; tokens are estimates)")
    if not plain:
        return found
    return replace(found, samples=tuple(replace(sample, text=sample.learned) for sample in found.samples))


def _instructions() -> Lengths:
    name = "shipped table of the instruction mixture (LLaVA-665K; turns and tokens are estimates)"
    return _table((*LLAVA_665K, SHAREGPT), name, SYSTEM_PROMPT)


def _table(sources: Sequence[Source], name: str, prompt: int = 0) -> Lengths:
    # More than of real rows: they cost nothing, and long texts are rare.
    drawn = draw_lengths(sources, 8 * SAMPLES, seed=0)
    samples = tuple(SampleLength(text.tokens + prompt, text.learned, text.images) for text in drawn)
    return Lengths(samples, round(1000 * sum(source.samples for source in sources)), name)


def _counter(recipe: Recipe, options: ModelOptions) -> TokenCounter | None:
    """What counts the tokens of the recipe's rows, or None where the network would be needed for its processor."""
    args = recipe.trainer
    try:
        processor, placeholder, stops = load_processor(options, args.trust_remote_code, local_files_only=True)
    except SaccadeError:
        return None
    use_own_template(recipe, processor)
    budget = PruningConfig(prune_ratio=0.0)
    return TokenCounter(processor, placeholder, budget, stop_ids=stops, conversation=args.conversation)


def _own(options: ModelOptions, counter: TokenCounter | None, number: int) -> Lengths:
    """Count rows of the recipe's own data.

    Raises:
        SaccadeError: if it cannot be read, or none of the rows can be used.
    """
    opened, sizes = [], []
    for source in dataset_sources(options):
        if source.path == DIGITS:
            # The first rows of a long dataset are those of a short one, which is made sooner.
            size = source.rows or options.dataset_rows or DIGIT_ROWS
            rows = open_source(replace(source, rows=min(size, DIGIT_SAMPLES)), options)
        else:
            rows = open_source(source, options)
            size = min(len(rows), source.rows or len(rows), options.dataset_rows or len(rows))
        opened.append((source, rows))
        sizes.append(size)
    weights = [source.weight for source, _ in opened]
    shares = [size if weight is None else weight for size, weight in zip(sizes, weights, strict=True)]
    samples = []
    for (_, rows), size, share in zip(opened, sizes, shares, strict=True):
        there = min(size, len(rows))
        count = min(there, max(1, round(number * share / sum(shares))))
        for place in range(count):
            samples.extend(_count(rows.read, place * there // count, counter))
    if not samples:
        raise SaccadeError(f"none of the rows of {opened[0][0].path} that were tried can be used")
    records = sum(sizes)
    if weights[0] is not None:
        # Until every row has been drawn, so that shorter sources come again.
        records = round(max(size * sum(shares) / share for size, share in zip(sizes, shares, strict=True)))
    records = records if options.dataset_rows is None else min(records, options.dataset_rows)
    how = "its tokenizer" if counter is not None else f"{CHARACTERS} characters a token, no tokenizer being at hand"
    return Lengths(tuple(samples), records, f"{len(samples)} rows of the recipe's own data, counted by {how}")


def _count(read: Callable[[int], dict[str, Any]], index: int, counter: TokenCounter | None) -> Iterator[SampleLength]:
    """Row `index`, or nothing if it cannot be used."""
    try:
        row = row_text(read(index))
        text, learned = _by_characters(row) if counter is None else counter.text_and_learned(row)
    except RecordError:
        return
    yield SampleLength(text, min(learned, text), len(images_of(row)))


def _by_characters(row: Mapping[str, Any]) -> tuple[int, int]:
    """Roughly the tokens of a row's text, and those learned."""
    columns = [row[name] for name in used_columns(row)]
    messages = [checked_message(m) for column in columns if not isinstance(column, str) for m in column]
    plain = [column for column in columns if isinstance(column, str)]
    words = [text_of(message) for message in messages] + plain
    answers = [text_of(message) for message in messages if message["role"] == "assistant"] + plain[-1:]
    text = sum(len(word) // CHARACTERS + FORMAT for word in words)
    return text, sum(len(word) // CHARACTERS + 1 for word in answers)
