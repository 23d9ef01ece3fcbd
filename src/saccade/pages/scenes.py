"""Scenes of the test split with the visual tokens that a run keeps and its model's answers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from saccade.data import digit_scenes
from saccade.errors import SaccadeError
from saccade.evaluation import Inference, plan_inferences
from saccade.evaluation.digits import collate_prompts
from saccade.pages.page import Page
from saccade.report.html import gallery, paragraph
from saccade.report.view import view_reducers
from saccade.training import ModelOptions, load_model

HEADING = "Kept tokens"
KINDS = ("read", "count", "max", "where")
LONGEST_ANSWER = 12  # tokens, more than any answer of these kinds needs


def add_answered_scenes(page: Page, model_folder: Path, grid: int) -> None:
    """Draw one scene of each of `KINDS` with what the run's reducer keeps, and add the model's answers.

    Args:
        model_folder: folder with the weights. If they are missing, or the reducer's choice cannot be drawn, the page
            says so.
        grid: patches per side of the scenes.
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
                    f"{height * width} patches, {where_kept(kept, width, height)}.",
                    f"“{question}” Right: “{row['answer']}”; answered {said}.",
                )
            )
    except SaccadeError as error:
        page.add(HEADING, paragraph(f"No pictures: {error}"))
        return
    intro = f"Scenes of the test split. {pruned.pruning.reducer} keeps {len(kept)} of {height * width} visual tokens: "
    intro += "kept patches are outlined, dropped ones dimmed. "
    page.add(
        HEADING, paragraph(intro + "Answers are greedy, from all tokens and from the kept ones."), gallery(pictures)
    )


@torch.no_grad()
def _answers(model: Any, processor: Any, rows: list[dict[str, Any]], inference: Inference) -> list[str]:
    with inference.on(model.eval()) as prepare:
        inputs = prepare(collate_prompts(processor, rows).to(model.device))
        outputs = model.generate(**inputs, max_new_tokens=LONGEST_ANSWER, do_sample=False)
    texts = processor.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [" ".join(text.split()) for text in texts]


def where_kept(kept: Sequence[int], width: int, height: int) -> str:
    """How many patches of each quarter of a picture are kept, in words."""
    names = {(False, False): "top left", (False, True): "top right", (True, False): "bottom left"}
    counts = dict.fromkeys([*names.values(), "bottom right"], 0)
    for token in kept:
        row, column = divmod(token, width)
        counts[names.get((2 * row >= height, 2 * column >= width), "bottom right")] += 1
    return ", ".join(f"{count} {name}" for name, count in counts.items())
