"""Accuracy on the digit scenes by greedy generation: exact match of the last answer, in total and by kind."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import ProcessorMixin

from saccade.companions import find_companion
from saccade.data.chat import apply_chat_template
from saccade.data.clips import check_takes_videos, with_clips
from saccade.data.conversation import TAGS
from saccade.data.turns import with_places
from saccade.dualspeed.collator import prepare_example
from saccade.dualspeed.labels import stop_ids
from saccade.errors import RecordError, SaccadeError, reason_of
from saccade.evaluation.counting import count_flops
from saccade.families.padding import pads_to_square
from saccade.files import check_entries, reading
from saccade.images import open_image
from saccade.prompt_start import needs_start, start_alone
from saccade.pruning import ISOLATOR_FILE, ModeIsolator, prune_inputs
from saccade.reducers import PRUNING_FILE, PruningConfig
from saccade.skip_vision import SUMMARY_FILE, apply_skip_vision
from saccade.values import INFERENCES, check_choice
from saccade.videos import Clip, open_video

MEDIA = ("messages", "images", "videos")
MORE_TOKENS = 4
"""How many tokens an answer may have beyond the longest right one: spaces, words cut otherwise, and the end of the
turn."""
GREEDY = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1}
"""The most probable answer, one, whatever a model's own generation config asks for."""


@dataclass(frozen=True)
class Inference:
    """How a model is run for evaluation.

    Args:
        name: "full", "pruned", "pruned_isolator" with the trained mode isolator before each image, or "skip" with
            Skip-Vision as trained.
        pruning: how tokens are reduced, for the pruned ones; its isolator is only used by "pruned_isolator". With
            `adaptive`, tokens are distributed over batches of `batch_size` scenes.
        skip_vision: the folder that contains `skip_vision.saccade`, for "skip".

    Raises:
        SaccadeError: on an unknown name, or a missing isolator or folder.
    """

    name: str = "full"
    pruning: PruningConfig = field(default_factory=PruningConfig)
    skip_vision: Path | str | None = None

    def __post_init__(self) -> None:
        check_choice("inference", self.name, INFERENCES)
        if self.name == "pruned_isolator" and self.pruning.isolator is None:
            raise SaccadeError("inference='pruned_isolator' needs an isolator: name the folder of a DualSpeed run")
        if self.name == "skip" and self.skip_vision is None:
            raise SaccadeError(f"inference='skip' needs the folder of a run that wrote {SUMMARY_FILE}")

    @classmethod
    def of_run(cls, name: str, folder: Path | str | None, **options: Any) -> "Inference":
        """Inference `name` for the model that a run wrote to `folder`, with options of [`PruningConfig`]."""
        isolator = folder if name == "pruned_isolator" else None
        return cls(name, PruningConfig(**options, isolator=isolator), folder if name == "skip" else None)

    @property
    def prunes(self) -> bool:
        """Whether it drops visual tokens."""
        return self.name.startswith("pruned")

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[Callable[[Mapping[str, Any]], dict[str, Any]]]:
        """Apply the inference to a model within the block, and yield the function that prepares its batches."""
        if self.name == "skip":
            skip = apply_skip_vision(model, self.skip_vision)
            try:
                yield partial(skip.prepare, padding_side="left")
            finally:
                skip.remove()
        elif self.prunes:
            with_isolator = self.name == "pruned_isolator"
            config = self.pruning if with_isolator else self.pruning.replace(isolator=None)
            isolator = ModeIsolator.from_pretrained(config.isolator) if with_isolator else None
            yield lambda inputs: prune_inputs(model, inputs, config, isolator=isolator)
        else:
            yield dict


def plan_inferences(model: str | Path, names: list[str] | None = None, **options: Any) -> list[Inference]:
    """The inferences to run on a trained model; options default to those of training.

    Args:
        model: the folder that training wrote, or any other model, which then has no trained settings and no isolator.
        names: members of `INFERENCES`; by default all that the folder supports.
        options: fields of [`PruningConfig`]; None means as trained. A ratio replaces a trained number of tokens, and
            vice versa.

    Raises:
        SaccadeError: on a bad option, before any model is loaded.
    """
    folder = Path(model)
    given = {name: value for name, value in options.items() if value is not None}
    check_entries(folder, "model")
    # Values in the folder's files may have any type.
    with reading(f"model={str(model)!r}: the options that it was trained with are not valid"):
        pruning = trained_pruning(folder, **given).replace(isolator=None)
    files = {"pruned_isolator": ISOLATOR_FILE, "skip": SUMMARY_FILE}
    there = {name for name, file in files.items() if find_companion(folder, file) is not None}
    if names is None:
        names = [name for name in INFERENCES if name in there or name not in files]
    isolated = pruning.replace(isolator=str(folder)) if "pruned_isolator" in there else pruning
    return [
        Inference(name, isolated if name == "pruned_isolator" else pruning, folder if name in there else None)
        for name in names
    ]


def trained_pruning(folder: str | Path, **changes: Any) -> PruningConfig:
    """The pruning config that the model in a folder was trained with, with some values replaced; the defaults if there
    is none.

    Raises:
        SaccadeError: if the file that says so is damaged.
    """
    there = (Path(folder) / PRUNING_FILE).is_file()
    return PruningConfig.from_pretrained(folder, **changes) if there else PruningConfig().replace(**changes)


@torch.no_grad()
def evaluate_inferences(
    model: nn.Module,
    processor: ProcessorMixin,
    dataset: Dataset,
    inferences: Sequence[Inference],
    batch_size: int = 100,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Generate the last answer of every row in several ways, and compare it with the gold one.

    An answer that the model does not end is wrong.

    Args:
        dataset: rows of `digit_scenes("sft", ...)`; each batch of them is processed only once.
        on_batch: called with the number of batches done and the total; each batch counts once per inference.

    Returns:
        For each inference `accuracy` and `accuracy_by_kind`, as fractions; `samples`; `mean_prompt_length`, in tokens
        that the language model sees; `prefill_flops`, operations per sample of the first batch from pixels to the
        first token; `inference` and its settings.

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
    answers = dataset.select_columns("answer")["answer"]
    longest = max(len(processor.tokenizer(answer, add_special_tokens=False).input_ids) for answer in answers)
    stops = stop_ids(model.generation_config, processor.tokenizer)
    for rows in _batches(dataset, batch_size):
        processed = collate_prompts(processor, rows).to(model.device)
        for number, inference in enumerate(inferences):
            with inference.on(model) as prepare:
                inputs = prepare(processed)
                if number not in flops:
                    # From the pixels on: encode, and generate the first token.
                    flops[number] = count_flops(partial(_read, model, prepare, processed)) / len(rows)
                outputs = model.generate(**inputs, max_new_tokens=longest + MORE_TOKENS, **GREEDY)
            prompt_tokens[number] += int(inputs["attention_mask"].sum())
            for row, ids in zip(rows, outputs[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
                right[number][row["kind"]].append(_said(processor, ids, stops) == row["answer"].split())
            done += 1
            if on_batch is not None:
                on_batch(done, total)
    return [
        _result(inference, kinds, tokens) | {"prefill_flops": flops[number]}
        for number, (inference, kinds, tokens) in enumerate(zip(inferences, right, prompt_tokens, strict=True))
    ]


def _said(processor: ProcessorMixin, ids: list[int], stops: Sequence[int]) -> list[str] | None:
    """The words of an answer, up to the first token that ends it; None if there is none."""
    end = next((place for place, token in enumerate(ids) if token in stops), None)
    return None if end is None else processor.decode(ids[:end], skip_special_tokens=True).split()


def _read(model: nn.Module, prepare: Callable[[Mapping[str, Any]], dict[str, Any]], batch: Mapping[str, Any]) -> None:
    model.generate(**prepare(batch), max_new_tokens=1, **GREEDY)


def _result(inference: Inference, right: Mapping[str, list[bool]], prompt_tokens: int) -> dict[str, Any]:
    every = [value for values in right.values() for value in values]
    options = asdict(inference.pruning)
    options.pop("isolator")
    if not inference.prunes:
        options |= dict.fromkeys(("reducer", "keep_tokens", "fit_length", "patch_tolerance"))
        options |= {"reducer_options": {}, "prune_ratio": 0.0}
    return {
        "inference": inference.name,
        **options,
        "accuracy": sum(every) / len(every),
        "accuracy_by_kind": {kind: sum(values) / len(values) for kind, values in sorted(right.items())},
        "samples": len(every),
        "mean_prompt_length": prompt_tokens / len(every),
    }


def collate_prompts(processor: ProcessorMixin, rows: list[dict[str, Any]]) -> Any:
    """Processor outputs of a batch of prompts, left-padded: each conversation without its last answer."""
    examples = [prepare_example({name: row[name] for name in MEDIA if name in row}) for row in rows]
    asked = [with_places(one["messages"][:-1], len(one["images"]), len(one["videos"])) for one in examples]
    return _process(processor, asked, *([one[name] for one in examples] for name in ("images", "videos")))


def prepare_prompts(processor: ProcessorMixin, conversations: list[list[dict[str, Any]]]) -> Any:
    """Processor outputs of a batch of conversations that await an answer, left-padded.

    Images in the parts of messages are anything that `open_image` accepts, videos anything that `open_video` accepts.

    Raises:
        RecordError: if an image or a video cannot be used, or if the processor has no chat template, or an unsuitable
            one.
    """
    pads = pads_to_square(processor)
    images, videos = [], []
    for conversation in conversations:
        lists = [message["content"] for message in conversation if not isinstance(message["content"], str)]
        parts = [part for content in lists for part in content]
        images.append([open_image(part["image"], padded=pads) for part in parts if part.get("image") is not None])
        videos.append([open_video(part["video"]) for part in parts if part.get("video") is not None])
    return _process(processor, [list(map(_bare, conversation)) for conversation in conversations], images, videos)


def _bare(message: dict[str, Any]) -> dict[str, Any]:
    """A message with places for its images and videos instead of these."""
    if isinstance(message["content"], str):
        return message
    parts = [{name: value for name, value in part.items() if name not in TAGS} for part in message["content"]]
    return {**message, "content": parts}


def _process(
    processor: ProcessorMixin,
    conversations: list[list[dict[str, Any]]],
    images: list[list[Any]],
    videos: list[list[Clip]],
) -> Any:
    """Processor outputs of conversations with places for their images and clips.

    As in training, the processor gets the rendered text: a chat template would let it take other frames of a video.
    """
    # One by one: SmolVLM's processor takes another template for all of them where one has a video.
    options = {"add_generation_prompt": True, "tokenize": False}
    text = [apply_chat_template(processor, conversation, **options) for conversation in conversations]
    clips = [clip for row in videos for clip in row]
    call = processor
    if clips:
        check_takes_videos(processor)
        call = with_clips(processor, clips)
    try:
        return call(
            text=text,
            images=images if any(images) else None,
            padding=True,
            padding_side="left",
            add_special_tokens=needs_start(start_alone(processor.tokenizer), text[0]),
            return_tensors="pt",
        )
    except SaccadeError:
        raise
    except Exception as error:  # processors come with a model, and raise all sorts of errors
        raise RecordError(
            f"the model's processor makes no prompt of its chat template (chat_template.jinja): {reason_of(error)}"
        ) from error


def _batches(dataset: Dataset, size: int) -> Iterator[list[dict[str, Any]]]:
    """Lists of rows, ordered by number of images to keep padding short."""
    images = [len(row["images"]) for row in dataset.select_columns("images")]
    order = sorted(range(len(images)), key=images.__getitem__)
    for start in range(0, len(order), size):
        yield [dataset[index] for index in order[start : start + size]]
