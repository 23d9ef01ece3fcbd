"""Scenes of the test split with the visual tokens that a run keeps, and what its model answers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from saccade.data import digit_scenes
from saccade.errors import SaccadeError
from saccade.evaluation import Inference, plan_inferences
from saccade.evaluation.digits import collate_prompts
from saccade.pages.page import Page
from saccade.reducers import PruningConfig
from saccade.report.html import fold, gallery, paragraph
from saccade.report.view import view_reducers
from saccade.training import ModelOptions, load_model

HEADING = "Kept tokens"
KINDS = ("read", "count", "max", "where")
LONGEST_ANSWER = 12  # tokens, more than any answer of these kinds takes


def add_answered_scenes(page: Page, model_folder: Path, grid: int) -> None:
    """Draw one scene of each of `KINDS` with what the run's reducer keeps, and add the model's answers.

    Args:
        model_folder: with the weights. Without them, or where the reducer's choice has no picture, the page says so.
        grid: patches a side of the scenes.
    """
    try:
        (pruned,) = plan_inferences(model_folder, ["pruned"])
        model, processor = load_model(ModelOptions(model=str(model_folder)))
        scenes = digit_scenes("sft", "test", 100, grid=grid, kinds=KINDS)
        rows = [scenes[scenes["kind"].index(kind)] for kind in KINDS]
        answers = {way.name: _answers(model, processor, rows, way) for way in (Inference("full"), pruned)}
        pictures = []
        for number, row in enumerate(rows):
            question, file = row["messages"][-2]["content"], f"kept_{row['kind']}.png"
            image = row["images"][0]
            path, way = page.workshop / file, pruned.pruning
            seen = view_reducers(model, processor, image, [way.reducer], question, path, way)
            kept, (height, width) = seen["panels"][0]["kept"], seen["grid"]
            said = ", ".join(
                f"on {'all' if name == 'full' else 'kept'} tokens “{texts[number]}”" for name, texts in answers.items()
            )
            pictures.append(
                page.show(
                    file,
                    f"A scene of {row['num_digits']} digits; {pruned.pruning.reducer} keeps {len(kept)} of "
                    f"{height * width} patches, {_where(kept, width, height)}.",
                    f"“{question}” Right: “{row['answer']}”; answered {said}.",
                )
            )
    except SaccadeError as error:
        page.add(HEADING, paragraph(f"No pictures: {error}"))
        return
    intro = f"Scenes of the test split. {pruned.pruning.reducer} keeps {len(kept)} of {height * width} visual tokens: "
    intro += "what it keeps is clear and outlined, what it drops is dark. "
    page.add(HEADING, paragraph(intro + "Answers are greedy, on all tokens and on those."), gallery(pictures))


def add_compared_scene(
    page: Page,
    model_folder: Path,
    reducers: Sequence[str],
    prune_ratio: float | None,
    keep_tokens: int | None = None,
) -> None:
    """Draw one scene as each of several reducers keeps it, with the features of one model.

    Args:
        model_folder: with the weights. Without them, the page says so.
        keep_tokens: number of tokens to keep, in place of the ratio.
    """
    file = "kept_tokens.png"
    try:
        model, processor = load_model(ModelOptions(model=str(model_folder)))
        scenes = digit_scenes("sft", "test", 200, kinds=["read"])
        row = scenes[max(range(len(scenes)), key=lambda index: scenes[index]["num_digits"])]
        question = row["messages"][-2]["content"]
        pruning = PruningConfig(keep_tokens=keep_tokens) if keep_tokens else PruningConfig(prune_ratio=prune_ratio)
        path = page.workshop / file
        seen = view_reducers(model, processor, row["images"][0], reducers, question, path, pruning)
    except SaccadeError as error:
        page.add(HEADING, paragraph(f"No picture: {error}"))
        return
    height, width = seen["grid"]
    alt = f"One scene of {row['num_digits']} digits, with what each reducer keeps of {height * width} patches."
    listed = [
        f"{entry['reducer']} keeps {len(entry['kept'])}: {_where(entry['kept'], width, height)}."
        for entry in seen["panels"]
    ]
    budget = f"{keep_tokens} tokens" if keep_tokens else f"p = {prune_ratio:g}"
    caption = f"A scene of the test split at {budget}: what stays is clear and outlined, what is dropped is "
    caption += "dark; where tokens are merged, a region has the colour of the token that it flows into."
    page.add(HEADING, page.show(file, alt, caption, wide=True), fold("The picture in words", *map(paragraph, listed)))


@torch.no_grad()
def _answers(model: Any, processor: Any, rows: list[dict[str, Any]], inference: Inference) -> list[str]:
    with inference.on(model.eval()) as prepare:
        inputs = prepare(collate_prompts(processor, rows).to(model.device))
        outputs = model.generate(**inputs, max_new_tokens=LONGEST_ANSWER, do_sample=False)
    texts = processor.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [" ".join(text.split()) for text in texts]


def _where(kept: Sequence[int], width: int, height: int) -> str:
    """How many patches of each quarter of a picture stay, in words."""
    names = {(False, False): "top left", (False, True): "top right", (True, False): "bottom left"}
    counts = dict.fromkeys([*names.values(), "bottom right"], 0)
    for token in kept:
        row, column = divmod(token, width)
        counts[names.get((2 * row >= height, 2 * column >= width), "bottom right")] += 1
    return ", ".join(f"{count} {name}" for name, count in counts.items())
