"""Ask a model about a picture twice: with all of its visual tokens, and with those that a reducer keeps."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin
from transformers.generation.streamers import BaseStreamer
from transformers.utils import CONFIG_NAME

from saccade.data import digit_scenes
from saccade.dualspeed.weights import base_of, weight_files
from saccade.errors import SaccadeError
from saccade.evaluation.digits import GREEDY, prepare_prompts, trained_pruning
from saccade.families.padding import pads_to_square
from saccade.images import open_image
from saccade.model_files import check_files
from saccade.pages.source import read_json
from saccade.play import TINY, check_folder
from saccade.pruning import prune_inputs, reduce_inputs
from saccade.reducers import PruningConfig
from saccade.report.kept_tokens import kept_tokens_sheet
from saccade.report.view import panel, seen_part, shown_row
from saccade.training import ModelOptions, load_to_run

USUAL = ("out/sft", "out/demo", "out/smol")
"""Where the documented commands write: what is offered if no folder is named, as far as it exists."""
SCENE_KINDS = ("read", "count", "max", "where", "leftmost", "has", "rightmost", "min")
LONGEST_ANSWER = 64  # tokens
HIGHEST_RATIO = 0.99


@dataclass(frozen=True)
class OpenModel:
    """A loaded model, and how it is pruned unless the page says otherwise.

    Args:
        name: the folder, or `TINY`.
        pruning: as the folder says it was trained, its isolator included; the defaults if it does not say.
        tokens: visual tokens of a square picture, with all of its crops.
        kept: how many of them `pruning` keeps where neither `fit_length` nor `patch_tolerance` drops more.
    """

    name: str
    model: PreTrainedModel
    processor: ProcessorMixin
    pruning: PruningConfig
    tokens: int
    kept: int

    @property
    def ratio(self) -> float:
        """The share of the tokens that its own setting drops, to two digits, and as far as the page's slider goes."""
        return min(HIGHEST_RATIO, round(1 - self.kept / self.tokens, 2))

    def setting(self, reducer: str, ratio: float) -> PruningConfig:
        """Its own setting, in which the reducer or the ratio is replaced if it is another one.

        Raises:
            SaccadeError: on an unknown reducer or a ratio out of range.
        """
        # `none` drops nothing, whatever ratio stands beside it.
        same = ratio == self.ratio and (reducer == self.pruning.reducer or self.pruning.reducer != "none")
        changes: dict[str, Any] = {} if same else {"prune_ratio": ratio}
        return self.pruning.replace(reducer=reducer, **changes)

    def describe(self) -> str:
        """What it is, and what to expect of it."""
        if self.name == TINY:
            return (
                "The embedded model as shipped. Its tower and its language model know digit scenes, but the projector "
                "between them is untrained, so its answers are guesses. These two commands train it; then choose "
                "out/sft: saccade train tiny-digits/pretrain --max_steps 60; "
                "saccade train tiny-digits/sft --max_steps 320"
            )
        size = sum(weights.numel() for weights in self.model.parameters())
        pruning = self.pruning
        isolator = "" if pruning.isolator is None else ", with the isolator that it was trained with"
        return (
            f"A model of type {self.model.config.model_type} with {size / 1e6:,.1f} million parameters. "
            f"Pruned with {pruning.positions} positions{isolator}."
        )


@dataclass(frozen=True)
class Answer:
    """An answer, its tokens, and those of the prompt that the language model read.

    `first` are the seconds from the processed picture to the first token: encoding, reducing and reading the prompt;
    `seconds` those to the last one.
    """

    text: str
    prompt: int
    tokens: int
    first: float
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """Both answers to a question, and how many of the picture's visual tokens are kept.

    Args:
        picture: it, with the tokens that are kept; of a picture that is cut into crops, those of the thumbnail.
        kept: of all crops.
        total: of all crops.
    """

    picture: Image.Image
    kept: int
    total: int
    full: Answer
    pruned: Answer


@dataclass(frozen=True)
class Scene:
    """An embedded scene with a question and its right answer."""

    image: Image.Image
    question: str
    answer: str


def find_models(places: Sequence[str]) -> dict[str, str]:
    """The models to choose from: the folder of each by its name on the page.

    Args:
        places: folders of a model, or of a demo or a sweep, whose runs each have one; `TINY` is the embedded model. If
            empty, those of `USUAL` that exist, and the embedded one.

    Raises:
        SaccadeError: if a folder does not exist, or holds no model.
    """
    if not places:
        there = [place for place in USUAL if Path(place).is_dir()]
        return {name: folder for place in there for name, folder in _models_in(place).items()} | {TINY: TINY}
    found: dict[str, str] = {}
    for place in places:
        models = {TINY: TINY} if place == TINY else _models_in(place)
        if not models:
            raise SaccadeError(f"model={place!r} holds no model: give a folder with a config.json, or a demo's folder")
        found |= models
    return found


def _models_in(place: str) -> dict[str, str]:
    folder = Path(place)
    check_folder(place)
    if any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        return {place: place}
    found = {}
    for result in sorted(folder.glob("runs/*/result.json")):
        # Its path begins where the run was started, which may be elsewhere.
        model = folder / "stages" / Path(str(read_json(result, "model")["model"])).name
        if model.is_dir():
            found[f"{place}: {result.parent.name}"] = str(model)
    return found


def open_model(name: str) -> OpenModel:
    """Load a model, on the GPU if there is one, and let it answer once, since the first time takes longer.

    Raises:
        SaccadeError: if it is not on this machine, or cannot be loaded.
    """
    check_folder(name)
    base = None if name == TINY else base_of(name)
    if base is not None and not _is_here(base):
        raise SaccadeError(
            f"model={name!r} has adapters of {base!r}, which is not on this machine: this page downloads nothing, "
            f"fetch it with `hf download {shlex.quote(base)}`"
        )
    pruning = PruningConfig() if name == TINY else trained_pruning(name)
    model, processor = load_to_run(ModelOptions(model=name))
    model.eval()
    inputs = _inputs(model, processor, Image.new("RGB", (336, 336)), "?")
    context, reduction = reduce_inputs(model, inputs, pruning.replace(fit_length=None, patch_tolerance=None))
    tokens, kept = (int(each.valid.sum()) for each in (context, reduction))
    opened = OpenModel(name, model, processor, pruning, tokens, kept)
    for prune in (False, True):
        _answer(opened, inputs, pruning if prune else None, longest=2)
    return opened


def _is_here(base: str) -> bool:
    """Whether a base is a folder, or was fetched from the hub with all of its weights."""
    if Path(base).is_dir():
        return True
    try:
        config = try_to_load_from_cache(base, CONFIG_NAME)
        if not isinstance(config, str):
            return False
        check_files(Path(config).parent)  # all shards that an index names
    except (ValueError, SaccadeError):  # ValueError: not a name that the hub could have
        return False
    return bool(weight_files(Path(config).parent))


def compare(opened: OpenModel, picture: Any, question: str, pruning: PruningConfig) -> Comparison:
    """Ask about a picture with all visual tokens and with those that `pruning` keeps.

    Args:
        picture: what `open_image` takes.

    Raises:
        SaccadeError: if the picture cannot be opened, the question is empty, or the model cannot be pruned so.
    """
    if picture is None:
        raise SaccadeError("photograph: there is none yet; upload one, or choose a scene")
    if not question.strip():
        raise SaccadeError("question: it is empty; ask something about the picture")
    image = open_image(picture, padded=pads_to_square(opened.processor))
    inputs = _inputs(opened.model, opened.processor, image, question.strip())
    drawn, kept, total = _draw(opened, image, inputs, pruning)
    return Comparison(drawn, kept, total, _answer(opened, inputs, None), _answer(opened, inputs, pruning))


def scenes() -> list[Scene]:
    """One embedded scene for each of `SCENE_KINDS`, from the test split."""
    rows = digit_scenes("sft", "test", 100, kinds=SCENE_KINDS)
    chosen = [rows[rows["kind"].index(kind)] for kind in SCENE_KINDS]
    return [Scene(row["images"][0], row["messages"][-2]["content"], row["answer"]) for row in chosen]


def _inputs(model: PreTrainedModel, processor: ProcessorMixin, image: Image.Image, question: str) -> Mapping[str, Any]:
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    inputs = prepare_prompts(processor, [[{"role": "user", "content": content}]]).to(model.device)
    return {
        name: value.to(model.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


@torch.no_grad()
def _draw(
    opened: OpenModel, image: Image.Image, inputs: Mapping[str, Any], pruning: PruningConfig
) -> tuple[Image.Image, int, int]:
    context, reduction = reduce_inputs(opened.model, inputs, pruning)
    shown = shown_row(opened.model, opened.processor, context)
    picture = kept_tokens_sheet(
        seen_part(opened.processor, image), [panel(pruning.reducer, reduction, shown)], shown.grid, panel_size=560
    )
    return picture, int(reduction.valid.sum()), int(context.valid.sum())


class _Clock(BaseStreamer):
    """Notes when `generate` hands over the first token, and counts them."""

    def __init__(self) -> None:
        self.tokens = -1  # the prompt comes first
        self.started, self.first = perf_counter(), 0.0

    def put(self, value: Tensor) -> None:
        self.tokens += 1
        if self.tokens == 1:
            self.first = perf_counter() - self.started

    def end(self) -> None:
        self.seconds = perf_counter() - self.started


@torch.no_grad()
def _answer(
    opened: OpenModel, inputs: Mapping[str, Any], pruning: PruningConfig | None, longest: int = LONGEST_ANSWER
) -> Answer:
    clock = _Clock()
    given = dict(inputs) if pruning is None else prune_inputs(opened.model, inputs, pruning)
    output = opened.model.generate(**given, max_new_tokens=longest, streamer=clock, **GREEDY)
    text = opened.processor.decode(output[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
    prompt = int(given["attention_mask"].sum())
    return Answer(" ".join(text.split()), prompt, clock.tokens, clock.first, clock.seconds)
