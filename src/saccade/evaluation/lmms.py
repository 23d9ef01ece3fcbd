"""The model `saccade` of lmms-eval: any stock model on all of its visual tokens, on a few, or skipping."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm

from saccade.errors import SaccadeError
from saccade.evaluation import plan_inferences, prepare_prompts
from saccade.reducers.config import PRUNING_OPTIONS
from saccade.training import ModelOptions, load_model

LONGEST_ANSWER = 1024
"""Maximum new tokens if a task has no limit."""


class SaccadeModel(lmms):
    """A model of lmms-eval: `--model saccade --model_args pretrained=FOLDER,inference=pruned,prune_ratio=0.9`.

    Args:
        pretrained: folder that training wrote, hub id of a stock checkpoint, or "tiny".
        inference: "full", "pruned", "pruned_isolator" or "skip".
        batch_size: documents at a time.
        device: of the model; by default that of the process.
        max_batch_size: passed by lmms-eval; not used.
        dtype: dtype to load the weights in.
        trust_remote_code: run Python code that comes with a checkpoint.
        options: members of `PRUNING_OPTIONS`; by default as trained.

    Raises:
        SaccadeError: on an option that is unknown or out of range, or a model that cannot be loaded with these.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "tiny",
        inference: str = "full",
        batch_size: int | str | None = 1,
        device: str | None = None,
        max_batch_size: int | None = None,
        dtype: str = "auto",
        trust_remote_code: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        for name in options:
            if name not in PRUNING_OPTIONS:
                known = ", ".join(("pretrained", "inference", "dtype", "trust_remote_code", *PRUNING_OPTIONS))
                raise SaccadeError(f"model_args: {name}={options[name]!r} is unknown: use {known}")
        self.batch_size = _batch_size(batch_size)
        self.inference = plan_inferences(pretrained, [inference], **_parsed(options))[0]
        self._model, self.processor = load_model(ModelOptions(model=pretrained, dtype=dtype), trust_remote_code)
        if not getattr(self.processor, "chat_template", None):
            raise SaccadeError("pretrained: the model's processor has no chat template; add chat_template.jinja to it")
        # lmms-eval uses it to gather results of several processes.
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.device = torch.device(device) if device and self._world_size == 1 else self.accelerator.device
        self._model.to(self.device).eval()

    @torch.no_grad()
    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """The answers to requests `(context, doc_to_messages, generation options, document, task, split)`.

        Raises:
            SaccadeError: if a document has a video or a sound.
        """
        # Requests with different generation options cannot share a batch.
        groups: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            groups[repr(request.args[2])].append(number)
        answers: dict[int, GenerationResult] = {}
        with self.inference.on(self._model) as prepare, tqdm(total=len(requests), disable=self.rank != 0) as bar:
            for numbers in groups.values():
                for start in range(0, len(numbers), self.batch_size):
                    chunk = numbers[start : start + self.batch_size]
                    batch = [requests[number].args for number in chunk]
                    processed = prepare_prompts(self.processor, [self._messages(args) for args in batch])
                    inputs = prepare(processed.to(device=self.device, dtype=self._model.dtype))
                    answers.update(zip(chunk, self._answer(inputs, batch[0][2]), strict=True))
                    bar.update(len(chunk))
        return [answers[number] for number in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Instance]) -> NoReturn:
        """Not supported: pruned models are scored by what they generate."""
        self._refuse(requests, "log-likelihoods")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> NoReturn:
        """Not supported."""
        self._refuse(requests, "answers in several rounds")

    def _refuse(self, requests: Sequence[Instance], what: str) -> NoReturn:
        task = requests[0].task_name if requests else "?"
        raise SaccadeError(
            f"task={task!r} asks for {what}, which saccade does not support: use one with output_type generate_until"
        )

    def _messages(self, args: tuple) -> list[dict[str, Any]]:
        """The conversation of one document, as chat templates expect it."""
        _, doc_to_messages, _, document, task, split = args
        chat = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][document]))
        _, videos, sounds = chat.extract_media()
        if videos or sounds:
            raise SaccadeError(f"task={task!r}: document {document} has a video or a sound; saccade reads images only")
        return chat.to_hf_messages()

    def _answer(self, inputs: Mapping[str, Any], options: Mapping[str, Any]) -> list[GenerationResult]:
        """Generate for a prepared batch, and cut off the prompt that the language model saw."""
        outputs = self._model.generate(**inputs, **generation_options(options))
        tokenizer = self.processor.tokenizer
        new = outputs[:, inputs["input_ids"].shape[1] :]
        lengths = inputs["attention_mask"].sum(dim=1).tolist()
        texts = self.processor.batch_decode(new, skip_special_tokens=True)
        written = (new != tokenizer.pad_token_id).sum(dim=1).tolist()
        return [
            GenerationResult(cut_at(text, options.get("until")), TokenCounts(input_tokens=prompt, output_tokens=count))
            for text, prompt, count in zip(texts, lengths, written, strict=True)
        ]


def generation_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a task's `generation_kwargs` to options of `generate`; greedy unless the task asks for sampling."""
    temperature = options.get("temperature") or 0.0
    chosen: dict[str, Any] = {
        "max_new_tokens": options.get("max_new_tokens", LONGEST_ANSWER),
        "num_beams": options.get("num_beams", 1),
        "do_sample": bool(options.get("do_sample", temperature > 0)) and temperature > 0,
    }
    if chosen["do_sample"]:
        chosen["temperature"] = temperature
        if options.get("top_p"):
            chosen["top_p"] = options["top_p"]
    return chosen


def cut_at(text: str, until: str | Sequence[str] | None) -> str:
    """`text` up to the first of the strings that end an answer, without surrounding spaces."""
    for stop in [until] if isinstance(until, str) else until or ():
        if stop:
            text = text.partition(stop)[0]
    return text.strip()


def _batch_size(given: int | str | None) -> int:
    size = int(given) if str(given or 1).isdecimal() else 0
    if given is not None and size < 1:
        raise SaccadeError(f"batch_size={given!r}: give a number of at least 1")
    return size if given is not None else 1


def _parsed(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, with those of the reducer parsed if lmms-eval passes them as a string."""
    given = options.get("reducer_options")
    if not isinstance(given, str):
        return dict(options)
    try:
        return {**options, "reducer_options": json.loads(given)}
    except ValueError as error:
        raise SaccadeError(f"model_args: reducer_options={given!r} is not JSON: {error}") from error
