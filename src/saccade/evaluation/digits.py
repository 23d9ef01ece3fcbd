"""Accuracy on the digit scenes by greedy generation: exact match of the last answer, in total and by kind."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from jinja2 import TemplateError
from torch import nn
from transformers import ProcessorMixin
from trl import prepare_multimodal_messages

from saccade.companions import find_companion
from saccade.dualspeed.collator import prepare_example
from saccade.dualspeed.folder import read_run_file
from saccade.errors import SaccadeError
from saccade.evaluation.counting import count_flops
from saccade.families.padding import pads_to_square
from saccade.images import open_image
from saccade.pruning import ISOLATOR_FILE, ModeIsolator, check_newlines, check_positions, prune_inputs
from saccade.reducers import check_resolution_budget, get_reducer
from saccade.skip_vision import SUMMARY_FILE, load_skip_vision
from saccade.tokens import TokenBudget

INFERENCES = ("full", "pruned", "pruned_isolator", "skip")
FROM_FOLDER = {"pruned_isolator": "isolator", "skip": "skip_vision"}
"""The inferences that need a file which training wrote beside the model, and the option that names its folder."""


@dataclass(frozen=True)
class Inference:
    """How a model is run for evaluation.

    Args:
        name: "full", "pruned", "pruned_isolator" with the trained mode isolator before each image, or "skip" with
            Skip-Vision as it was trained.
        reducer: method that chooses the kept tokens.
        prune_ratio: share of visual tokens dropped; 0.9 where it and `keep_tokens` are None.
        positions: "compact" or "original".
        isolator: the trained isolator, for "pruned_isolator".
        keep_tokens: number of visual tokens kept, in place of the ratio.
        budget: "crop", "image" or "sample", what the ratio or the number is of.
        adaptive: whether a batch's tokens are shared out by how varied its images are. A batch is `batch_size` scenes.
        newlines: "keep" or "drop", for the newline tokens of anyres images.
        skip_vision: the folder that `skip_vision.saccade` is in, for "skip".

    Raises:
        SaccadeError: on an unknown name, a missing isolator, a missing folder, or a budget that is none.
    """

    name: str = "full"
    reducer: str = "divprune"
    prune_ratio: float | None = None
    positions: str = "compact"
    isolator: ModeIsolator | Path | str | None = None
    keep_tokens: int | None = None
    budget: str = "crop"
    adaptive: bool = False
    newlines: str = "keep"
    skip_vision: Path | str | None = None

    def __post_init__(self) -> None:
        if self.name not in INFERENCES:
            raise SaccadeError(f"inference={self.name!r} is unknown: use one of {', '.join(INFERENCES)}")
        if self.name == "pruned_isolator" and self.isolator is None:
            raise SaccadeError("inference='pruned_isolator' needs an isolator: name the folder of a DualSpeed run")
        if self.name == "skip" and self.skip_vision is None:
            raise SaccadeError(f"inference='skip' needs the folder of a run that wrote {SUMMARY_FILE}")
        tokens = TokenBudget(self.prune_ratio, self.keep_tokens, self.budget, self.adaptive)
        object.__setattr__(self, "prune_ratio", tokens.prune_ratio)

    @classmethod
    def of_run(cls, name: str, folder: Path | str | None, **options: Any) -> "Inference":
        """The inference `name` of the model that a run wrote to `folder`."""
        return cls(name, **options, **({FROM_FOLDER[name]: folder} if name in FROM_FOLDER else {}))

    @property
    def prunes(self) -> bool:
        """Whether it drops visual tokens."""
        return self.name.startswith("pruned")

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[Callable[[Mapping[str, Any]], dict[str, Any]]]:
        """Make a model run so for a while, and give the function that prepares processed batches for `generate`."""
        if self.name != "skip":
            yield partial(self.prepare, model)
            return
        skip = load_skip_vision(model, self.skip_vision)
        try:
            yield partial(skip.prepare, padding_side="left")
        finally:
            skip.remove()

    def prepare(self, model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What `generate` of the stock model takes for a processed batch; see `on` for "skip"."""
        if not self.prunes:
            return dict(inputs)
        isolator = self.isolator if self.name == "pruned_isolator" else None
        return prune_inputs(
            model,
            inputs,
            self.reducer,
            self.prune_ratio,
            isolator,
            self.positions,
            newlines=self.newlines,
            keep_tokens=self.keep_tokens,
            budget=self.budget,
            adaptive=self.adaptive,
        )


def plan_inferences(
    model: str | Path,
    names: list[str] | None = None,
    reducer: str | None = None,
    prune_ratio: float | None = None,
    positions: str | None = None,
    keep_tokens: int | None = None,
    budget: str | None = None,
    adaptive: bool | None = None,
    newlines: str | None = None,
) -> list[Inference]:
    """The inferences to run on a trained model: what is left out is as it was trained.

    Args:
        model: the folder that training wrote, or anything else, which then has no trained settings and no isolator.
        names: of `INFERENCES`; all that the folder allows when left out.
        prune_ratio: replaces a number of tokens that the model was trained with, as `keep_tokens` replaces a ratio.

    Raises:
        SaccadeError: on a bad option, before any model is loaded.
    """
    folder = Path(model)
    trained = (read_run_file(folder) or {}).get("config", {}) if folder.is_dir() else {}
    files = {"pruned_isolator": ISOLATOR_FILE, "skip": SUMMARY_FILE}
    missing = {name for name, file in files.items() if find_companion(folder, file) is None}
    if prune_ratio is None and keep_tokens is None:
        # A model trained on all tokens was trained at ratio 0, which would prune nothing.
        prune_ratio, keep_tokens = trained.get("prune_ratio") or None, trained.get("keep_tokens")
    options = {
        "reducer": reducer or trained.get("reducer", "divprune"),
        "prune_ratio": prune_ratio,
        "positions": check_positions(positions or trained.get("positions", "compact")),
        "keep_tokens": keep_tokens,
        "budget": budget or trained.get("budget", "crop"),
        "adaptive": trained.get("adaptive", False) if adaptive is None else adaptive,
        "newlines": check_newlines(newlines or trained.get("newlines", "keep")),
    }
    tokens = TokenBudget(*(options[name] for name in ("prune_ratio", "keep_tokens", "budget", "adaptive")))
    check_resolution_budget(get_reducer(options["reducer"]), tokens)
    if names is None:
        names = [name for name in INFERENCES if name not in missing]
    return [Inference.of_run(name, None if name in missing else folder, **options) for name in names]


def evaluate_digits(
    model: nn.Module,
    processor: ProcessorMixin,
    dataset: Dataset,
    inference: Inference | None = None,
    batch_size: int = 100,
) -> dict[str, Any]:
    """Generate the last answer of every row, and compare it with the gold one.

    Args:
        dataset: rows of `digit_scenes("sft", ...)`.

    Returns:
        `accuracy` and `accuracy_by_kind`, as shares of 1; `samples`; `mean_prompt_length` in tokens as the language
        model sees it; `prefill_flops`, what the first batch takes a sample from its pixels to its first token;
        `inference` and its settings.

    Raises:
        SaccadeError: if the dataset is empty.
    """
    return evaluate_inferences(model, processor, dataset, [inference or Inference()], batch_size)[0]


@torch.no_grad()
def evaluate_inferences(
    model: nn.Module,
    processor: ProcessorMixin,
    dataset: Dataset,
    inferences: Sequence[Inference],
    batch_size: int = 100,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """What `evaluate_digits` returns, for each of several ways to run a model; every batch is prepared once for all.

    Args:
        on_batch: called with the number of batches done and in all, a batch being done once for each way.

    Raises:
        SaccadeError: if the dataset is empty.
    """
    if not len(dataset):
        raise SaccadeError("num_samples=0: evaluate at least one scene")
    model.eval()
    right: list[dict[str, list[bool]]] = [defaultdict(list) for _ in inferences]
    prompt_tokens = [0] * len(inferences)
    flops: dict[int, float] = {}
    done, total = 0, math.ceil(len(dataset) / batch_size) * len(inferences)
    # One token more than the longest answer, for the end of the turn.
    answers = dataset.select_columns("answer")["answer"]
    longest = max(len(processor.tokenizer(answer, add_special_tokens=False).input_ids) for answer in answers)
    for rows in _batches(dataset, batch_size):
        processed = collate_prompts(processor, rows).to(model.device)
        for number, inference in enumerate(inferences):
            with inference.on(model) as prepare:
                inputs = prepare(processed)
                if number not in flops:
                    flops[number] = count_flops(partial(_read, model, prepare, processed)) / len(rows)
                outputs = model.generate(**inputs, max_new_tokens=longest + 1, do_sample=False)
            prompt_tokens[number] += int(inputs["attention_mask"].sum())
            texts = processor.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for row, text in zip(rows, texts, strict=True):
                right[number][row["kind"]].append(text.split() == row["answer"].split())
            done += 1
            if on_batch is not None:
                on_batch(done, total)
    return [
        _result(inference, kinds, tokens) | {"prefill_flops": flops[number]}
        for number, (inference, kinds, tokens) in enumerate(zip(inferences, right, prompt_tokens, strict=True))
    ]


def _read(model: nn.Module, prepare: Callable[[Mapping[str, Any]], dict[str, Any]], batch: Mapping[str, Any]) -> None:
    """Encode the images of a batch and write the first token."""
    model.generate(**prepare(batch), max_new_tokens=1, do_sample=False)


def _result(inference: Inference, right: Mapping[str, list[bool]], prompt_tokens: int) -> dict[str, Any]:
    every = [value for values in right.values() for value in values]
    return {
        "inference": inference.name,
        "reducer": inference.reducer if inference.prunes else None,
        "prune_ratio": inference.prune_ratio if inference.prunes else 0.0,
        "keep_tokens": inference.keep_tokens if inference.prunes else None,
        "budget": inference.budget,
        "adaptive": inference.adaptive,
        "newlines": inference.newlines,
        "positions": inference.positions,
        "accuracy": sum(every) / len(every),
        "accuracy_by_kind": {kind: sum(values) / len(values) for kind, values in sorted(right.items())},
        "samples": len(every),
        "mean_prompt_length": prompt_tokens / len(every),
    }


def collate_prompts(processor: ProcessorMixin, rows: list[dict[str, Any]]) -> Any:
    """Processor outputs of a batch of prompts, left-padded: each conversation without its last answer."""
    examples = [prepare_example({"messages": row["messages"], "images": row["images"]}) for row in rows]
    return prepare_prompts(
        processor,
        [prepare_multimodal_messages(example["messages"][:-1], images=example["images"]) for example in examples],
    )


def prepare_prompts(processor: ProcessorMixin, conversations: list[list[dict[str, Any]]]) -> Any:
    """Processor outputs of a batch of conversations that wait for an answer, left-padded.

    Images, in the parts of messages, are anything that `open_image` takes.

    Raises:
        RecordError: if one of them cannot be used.
        SaccadeError: if the processor has no chat template, or one that does not fit it.
    """
    if not getattr(processor, "chat_template", None):
        raise SaccadeError("the model's processor has no chat template: add chat_template.jinja to its folder")
    pads = pads_to_square(processor)
    opened = [[_with_open_images(message, pads) for message in conversation] for conversation in conversations]
    try:
        return processor.apply_chat_template(
            opened,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left", "add_special_tokens": False},
        )
    except (TemplateError, ValueError) as error:
        line = " ".join(str(error).split())[:300]
        raise SaccadeError(
            f"the model's chat template (chat_template.jinja) and processor make no prompt: {line}"
        ) from error


def _with_open_images(message: dict[str, Any], padded: bool) -> dict[str, Any]:
    """The message with its images as training shows them."""
    if isinstance(message["content"], str):
        return message
    parts = [
        {**part, "image": open_image(part["image"], padded=padded)} if part.get("image") is not None else part
        for part in message["content"]
    ]
    return {**message, "content": parts}


def _batches(dataset: Dataset, size: int) -> Iterator[list[dict[str, Any]]]:
    """Lists of rows: those with the same number of images together, so that padding stays short."""
    images = [len(specs) for specs in dataset.select_columns("images").with_format(None)["images"]]
    order = sorted(range(len(images)), key=images.__getitem__)
    for start in range(0, len(order), size):
        yield [dataset[index] for index in order[start : start + size]]
