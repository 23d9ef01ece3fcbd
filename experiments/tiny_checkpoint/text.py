"""Pretraining of the tiny language model on text worlds: scenes described patch by patch in words, then questions.

A world describes a scene as a perfect eye would see it: one word per patch in raster order, such as `7b2` for a piece
of a seven in the middle of the scene, with several words per digit, and others for distractors and background.
Fine-tuning then only has to replace these words by visual tokens.
"""

import random
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerBase

from saccade.data.questions import SINGLE_KINDS, Turn, arithmetic, ask_several, caption
from saccade.data.rows import MAX_DIGITS
from saccade.data.scenes import PLACES, PlacedDigit
from saccade.tiny.vocabulary import ASSISTANT, CONTENTS, END, PATCH_WORDS, PLACE_CODES, START, USER

# Far fewer words than a scene has patches; fine-tuning has to learn that a full canvas is longer.
LONGEST_WORLD = 40
TURNS = 5
IGNORED = -100

Conversation = tuple[str, list[tuple[str, Turn]]]


def text_world(rng: random.Random, num_digits: int) -> tuple[list[str], tuple[PlacedDigit, ...]]:
    """Patch words of a scene with `num_digits` digits in raster order, at most `LONGEST_WORLD`, and its digits."""
    cells = rng.sample(range(PLACES * PLACES), PLACES * PLACES)
    taken = sorted(cells[:num_digits])
    values = [rng.randrange(10) for _ in taken]
    if num_digits > 1 and rng.random() < 0.35:
        first, second = rng.sample(range(num_digits), 2)
        values[first] = values[second]
    digits = tuple(PlacedDigit(value, *divmod(cell, PLACES)) for cell, value in zip(taken, values, strict=True))
    patches: list[tuple[int, str]] = []

    def show(cell: int, content: str, times: int) -> None:
        row, column = divmod(cell, PLACES)
        for _ in range(times):
            # A place has four patches per side: the index of this one in raster order.
            order = (4 * row + rng.randrange(4)) * 4 * PLACES + 4 * column + rng.randrange(4)
            patches.append((order, content + PLACE_CODES[cell]))

    for cell, value in zip(taken, values, strict=True):
        show(cell, str(value), rng.randint(1, 5))
    for cell in cells[num_digits : num_digits + rng.randint(0, 4)]:
        show(cell, "x", rng.randint(1, 4))
    for _ in range(rng.randint(0, LONGEST_WORLD - len(patches))):
        show(rng.randrange(PLACES * PLACES), "_", 1)
    return [word for _, word in sorted(patches)], digits


def conversation(rng: random.Random, kind: str | None = None) -> Conversation:
    """A world and questions about it: (world text, [(kind, (question, answer))]).

    Args:
        rng: source of the world and the questions.
        kind: ask one question of this kind only; None for several of any kinds.
    """
    share = rng.random()
    if kind == "text_only" or (kind is None and share < 0.03):
        return "", [("text_only", arithmetic(rng)) for _ in range(1 if kind else TURNS)]
    if kind == "two_images" or (kind is None and share < 0.08):
        first, second = rng.sample(range(1, MAX_DIGITS + 1), 2)
        worlds = [" ".join(["image", *text_world(rng, number)[0]]) for number in (first, second)]
        turn = "which image has more digits ?", "first" if first > second else "second"
        return " ".join(worlds), [("two_images", turn)]
    while True:
        # Questions about sums need few digits; the other kinds benefit from more.
        number = rng.randint(1, 2) if kind == "sum" or rng.random() < 0.15 else rng.randint(1, MAX_DIGITS)
        words, digits = text_world(rng, number)
        if kind is None:
            turns = ask_several(digits, rng, TURNS)
            if rng.random() < 0.2:
                turns.append(("caption", caption(digits)))
        elif kind == "caption":
            turns = [(kind, caption(digits))]
        else:
            turns = [(kind, SINGLE_KINDS[kind](digits, rng))]
        if turns[0][1] is not None:
            return " ".join(["image", *words]), turns


def text_batch(
    conversations: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels of conversations in the chat format, right-padded.

    Returns:
        input_ids: long (B, L).
        labels: long (B, L), the id itself on answers and their end of turn, -100 elsewhere.
    """
    vocabulary = tokenizer.get_vocab()
    rows, longest = [], 0
    for world, turns in conversations:
        ids, labels = [vocabulary[START]], [IGNORED]
        for number, (_, (question, answer)) in enumerate(turns):
            told = f"{USER} {world if number == 0 else ''} {question} {ASSISTANT}".split()
            said = f"{answer} {END}".split()
            ids += [vocabulary[word] for word in told + said]
            labels += [IGNORED] * len(told) + [vocabulary[word] for word in said]
        rows.append((ids, labels))
        longest = max(longest, len(ids))
    pad = tokenizer.pad_token_id
    input_ids = torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in rows])
    labels = torch.tensor([labels + [IGNORED] * (longest - len(labels)) for _, labels in rows])
    return input_ids, labels


def _label_logits(
    model: LlavaForConditionalGeneration, input_ids: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (n, V) of the n labelled tokens, and their ids (n,). Right padding needs no mask: attention is causal."""
    hidden = model.model.language_model(input_ids=input_ids, use_cache=False).last_hidden_state
    labelled = labels[:, 1:] != IGNORED
    return model.lm_head(hidden[:, :-1][labelled]), labels[:, 1:][labelled]


def train_text(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    steps: int,
    seed: int = 0,
    learning_rate: float = 2e-3,
    batch_size: int = 48,
    log: Callable[[str], None] = print,
) -> None:
    """Train the language model and its head in place on text worlds; tower and projector are not touched."""
    rng = random.Random(f"text/{seed}")
    parameters = [*model.model.language_model.parameters(), *model.lm_head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    model.train()
    for step in range(steps):
        batch = text_batch([conversation(rng) for _ in range(batch_size)], tokenizer)
        loss = cross_entropy(*_label_logits(model, *batch))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            log(f"text step {step} loss {loss.item():.3f}")
    model.eval()


@torch.no_grad()
def score_text(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, each: int = 100, seed: int = 0
) -> dict[str, float]:
    """Share of held-out answers with every token right (teacher-forced), by kind and for all kinds ("all")."""
    rng = random.Random(f"held-out text/{seed}")
    scores = {}
    for kind in (*SINGLE_KINDS, "caption", "two_images", "text_only"):
        input_ids, labels = text_batch([conversation(rng, kind) for _ in range(each)], tokenizer)
        logits, wanted = _label_logits(model, input_ids, labels)
        rows = (labels[:, 1:] != IGNORED).nonzero()[:, 0]
        wrong = torch.zeros(each).index_add_(0, rows, (logits.argmax(-1) != wanted).float())
        scores[kind] = (wrong == 0).float().mean().item()
    return scores | {"all": sum(scores.values()) / len(scores)}


@torch.no_grad()
def factor_embeddings(model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
    """Set each patch word's embedding to content + place, so that a simple projector can map to all of them."""
    table = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(seed)
    parts = torch.randn(len(CONTENTS) + len(PLACE_CODES), table.shape[1], generator=generator) * 0.02
    words = parts[: len(CONTENTS), None] + parts[None, len(CONTENTS) :]
    table[tokenizer.convert_tokens_to_ids(list(PATCH_WORDS))] = words.flatten(0, 1)
