"""Text lengths of published data mixtures, for when the data itself is not available."""

import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """One part of a data mixture.

    Args:
        name: name of the dataset.
        samples: thousands of samples that it contributes to the mixture.
        turns: pairs of question and answer per sample.
        question: tokens per question, including role markers.
        answer: tokens per answer, including the end token.
        images: images per sample.
    """

    name: str
    samples: float
    turns: int
    question: int
    answer: int
    images: int = 1


LLAVA_665K: tuple[Source, ...] = (
    Source("LLaVA-Instruct conversations", 58, 4, 18, 40),
    Source("LLaVA-Instruct descriptions", 23, 1, 20, 130),
    Source("LLaVA-Instruct reasoning", 77, 1, 25, 100),
    Source("VQAv2", 83, 5, 20, 3),
    Source("GQA", 72, 8, 20, 3),
    Source("OKVQA", 9, 1, 22, 3),
    Source("OCR-VQA", 80, 5, 20, 6),
    Source("A-OKVQA", 66, 1, 55, 3),
    Source("TextCaps", 22, 1, 40, 15),
    Source("RefCOCO", 48, 5, 30, 20),
    Source("Visual Genome", 86, 8, 28, 20),
)
"""The parts of the LLaVA-1.5 instruction mixture that have images. Numbers of samples: LLaVA-1.5 paper (arXiv
2310.03744), Table 7. Turns and tokens are estimates from the formats of the tasks, not counts of the data."""

SHAREGPT = Source("ShareGPT", 40, 3, 60, 220, images=0)
"""The part of the same mixture without images, which pruning does not shorten. The number of samples is from the same
table; turns and tokens are estimates."""

SYSTEM_PROMPT = 35
"""Tokens of the system prompt at the start of each sample in the released scripts; an estimate."""

LLAVA_558K: tuple[Source, ...] = (Source("LLaVA-Pretrain captions", 558, 1, 6, 18),)
"""Captions of stage one. The number of samples is published; the tokens are an estimate."""

SPREAD = 0.35
"""Lengths of a source are log-normal around the typical length, with this standard deviation of the logarithm."""


@dataclass(frozen=True)
class TextLength:
    """The text of one sample: tokens of each question and of the answer that follows it; and its number of images."""

    turns: tuple[tuple[int, int], ...]
    images: int = 1

    @property
    def tokens(self) -> int:
        """Tokens of the whole text."""
        return sum(question + answer for question, answer in self.turns)

    @property
    def learned(self) -> int:
        """Tokens of the answers."""
        return sum(answer for _, answer in self.turns)


def draw_lengths(sources: Sequence[Source], count: int, seed: int) -> list[TextLength]:
    """Text lengths of `count` samples of a mixture, reproducible by the seed."""
    draw = random.Random(f"saccade lengths {seed}")

    def around(typical: int) -> int:
        return max(1, round(typical * draw.lognormvariate(0, SPREAD)))

    chosen = draw.choices(sources, [source.samples for source in sources], k=count)
    return [
        TextLength(tuple((around(source.question), around(source.answer)) for _ in range(source.turns)), source.images)
        for source in chosen
    ]
