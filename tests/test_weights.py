"""Weights that are not all there are refused wherever a model is loaded, and tied embeddings export as they are."""

import json
import shutil

import pytest
import torch
from helpers import make_trainer
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from saccade import DualSpeedTrainer, SaccadeError
from saccade.cli.main import main
from saccade.data import digit_scenes
from saccade.dualspeed.checkpoint import STATE_FILE, find_fault
from saccade.dualspeed.folder import write_run_file
from saccade.dualspeed.weights import check_keys, load_whole
from saccade.testing.training import make_config
from saccade.tiny import build_tiny_llava
from saccade.training import ModelOptions, load_model
from saccade.training.export import export_model
from saccade.training.models import load_processor

ADAPTERS = LoraConfig(r=2, target_modules=r".*language_model.*_proj", modules_to_save=["multi_modal_projector"])


@pytest.fixture(scope="module")
def folders(processor, tmp_path_factory):
    """A stock model, and adapters of it, as a run leaves them."""
    folder = tmp_path_factory.mktemp("weights")
    model = build_tiny_llava(processor, seed=0)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    model.config._name_or_path = model.name_or_path = str(folder / "model")
    trainer = make_trainer(model, processor, folder / "adapters", peft_config=ADAPTERS, max_steps=1)
    trainer.train()
    trainer.save_model(str(folder / "adapters"))
    return folder


def changed(folder, name, change):
    """Change the contents of the file of weights in `folder`."""
    weights = change(load_file(folder / name))
    save_file(weights, folder / name, metadata={"format": "pt"})


def without(weights):
    return {key: value for key, value in weights.items() if key != next(k for k in weights if "q_proj" in k)}


def with_more(weights):
    first = next(key for key in weights if "q_proj" in key)
    return {**weights, first.replace("q_proj", "x_proj"): weights[first].clone()}


def with_another_shape(weights):
    first = next(key for key in weights if "q_proj" in key)
    return {**weights, first: torch.zeros(3, 5)}


@pytest.mark.parametrize("kind", ["model", "adapters"])
@pytest.mark.parametrize(
    ("change", "message"),
    [(without, r"missing .*q_proj"), (with_more, r"unexpected .*x_proj"), (with_another_shape, r"q_proj|shape|size")],
)
def test_weights_that_do_not_fit_are_refused_wherever_they_are_loaded(
    folders, processor, tmp_path, kind, change, message, capsys
):
    shutil.copytree(folders / kind, tmp_path / "bad")
    changed(tmp_path / "bad", "model.safetensors" if kind == "model" else "adapter_model.safetensors", change)
    with pytest.raises(SaccadeError, match=message):
        load_model(ModelOptions(model=str(tmp_path / "bad")))
    with pytest.raises(SaccadeError, match=message):
        export_model(tmp_path / "bad", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    if kind == "model":
        with pytest.raises(SaccadeError, match=message):
            DualSpeedTrainer(
                str(tmp_path / "bad"),
                args=make_config(tmp_path / "run"),
                train_dataset=digit_scenes("sft", "train", 4),
                processing_class=processor,
            )
    # Of the verbs: they load by the same function.
    if change is not without:
        return
    commands = [["eval", str(tmp_path / "bad"), "--num-samples", "2"]]
    commands += [["train", "tiny-digits/sft", "--model", str(tmp_path / "bad"), "--output_dir", str(tmp_path / "run")]]
    for words in commands:
        capsys.readouterr()
        assert main(words) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("saccade: error")]
        assert str(tmp_path / "bad") in line


def test_a_base_that_lost_a_weight_is_named(folders, tmp_path):
    shutil.copytree(folders / "adapters", tmp_path / "adapters")
    shutil.copytree(folders / "model", tmp_path / "model")
    config = tmp_path / "adapters" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(folders / "model"), str(tmp_path / "model")))
    load_model(ModelOptions(model=str(tmp_path / "adapters")))
    changed(tmp_path / "model", "model.safetensors", without)
    with pytest.raises(SaccadeError, match=rf"{tmp_path / 'model'}.*missing .*q_proj"):
        load_model(ModelOptions(model=str(tmp_path / "adapters")))


def test_adapters_are_merged_into_the_weights_that_they_were_trained_on_alone(
    folders, processor, tmp_path, monkeypatch, capsys
):
    """Their base is found by its path, relative to where a command runs, and another of its kind may lie there."""
    shutil.copytree(folders / "adapters", tmp_path / "adapters")
    shutil.copytree(folders / "model", tmp_path / "here" / "model")
    shutil.copytree(folders / "model", tmp_path / "there" / "model")
    build_tiny_llava(processor, seed=1).save_pretrained(tmp_path / "there" / "model")
    config = tmp_path / "adapters" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "model"}))
    monkeypatch.chdir(tmp_path / "here")
    load_model(ModelOptions(model=str(tmp_path / "adapters")))
    monkeypatch.chdir(tmp_path / "there")
    for words in (["export", str(tmp_path / "adapters"), "--output", "out"], ["eval", str(tmp_path / "adapters")]):
        capsys.readouterr()
        assert main(words) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("saccade: error")]
        assert "its adapters were trained on other weights than those that are in 'model' now" in line
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        SaccadeError, match=r"the adapters in model='.*adapters' name the base 'model', which is not a"
    ):
        load_model(ModelOptions(model=str(tmp_path / "adapters")))


def test_tables_that_are_computed_are_no_surplus():
    check_keys("here", {"unexpected": ["vision.embeddings.position_ids", "rotary_emb.inv_freq"]})
    with pytest.raises(SaccadeError, match="unexpected a, b, c and 1 more"):
        check_keys("here", {"unexpected": ["d", "c", "b", "a"]})


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": r".*embed_tokens"},
        {"target_modules": r".*lm_head"},
        {"target_modules": r".*q_proj", "modules_to_save": ["lm_head"]},
        {"target_modules": r".*q_proj", "modules_to_save": ["embed_tokens"]},
        {"target_modules": r".*q_proj"},
    ],
    ids=["input", "output", "output in full", "input in full", "neither"],
)
@pytest.mark.filterwarnings("ignore:Model.*tie_word_embeddings")
def test_adapters_of_tied_embeddings_export_to_the_same_logits(processor, tmp_path, options):
    from peft import get_peft_model

    model = build_tiny_llava(processor, seed=0)
    for config in (model.config, model.config.text_config):
        config.tie_word_embeddings = True
    model.lm_head.weight = model.get_input_embeddings().weight
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    model, _ = load_model(ModelOptions(model=str(tmp_path / "base")))
    assert model.lm_head.weight is model.get_input_embeddings().weight
    adapted = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, **options))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "modules_to_save" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) / 10)
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "run")
    processor.save_pretrained(tmp_path / "run")
    ids = torch.arange(12)[None] + 5
    with torch.no_grad():
        expected = adapted.eval()(input_ids=ids).logits
    export_model(tmp_path / "run", tmp_path / "out")
    exported, _ = load_model(ModelOptions(model=str(tmp_path / "out")))
    with torch.no_grad():
        torch.testing.assert_close(exported.eval()(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    tied = exported.lm_head.weight is exported.get_input_embeddings().weight
    assert tied == (list(options.values()) == [r".*q_proj"])


@pytest.mark.parametrize("name", ["../outside/model.safetensors", "{outside}/model.safetensors", "sub/x", "", None, 3])
@pytest.mark.parametrize("kind", ["model", "adapters", "checkpoint"])
def test_an_index_names_no_file_of_another_folder(folders, tmp_path, kind, name):
    """The file that it names is whole and fits, and stock loading would take it from where it lies."""
    place, outside = tmp_path / "bad", tmp_path / "outside"
    shutil.copytree(folders / ("adapters" if kind == "adapters" else "model"), place)
    shutil.copytree(folders / "model", outside)
    weights = load_file(outside / "model.safetensors")
    (place / "model.safetensors").unlink(missing_ok=True)
    name = name.format(outside=outside) if isinstance(name, str) else name
    index = {"metadata": {"total_size": 0}, "weight_map": dict.fromkeys(weights, name)}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))
    if kind == "checkpoint":
        (place / STATE_FILE).write_text("{}")
        write_run_file(place, {}, None)
        assert find_fault(place).startswith("model.safetensors.index.json is damaged: it names ")
        return
    with pytest.raises(SaccadeError, match=r"model.safetensors.index.json is damaged .it names '"):
        load_model(ModelOptions(model=str(place)))
    with pytest.raises(SaccadeError, match=r"model.safetensors.index.json is damaged"):
        load_whole(place)


def test_weights_in_several_files_load(folders, tmp_path):
    model, processor = load_model(ModelOptions(model=str(folders / "model")))
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    processor.save_pretrained(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    loaded, _ = load_model(ModelOptions(model=str(tmp_path / "shards")))
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


@pytest.mark.parametrize("field", ["gguf_file", "fast_tokenizer_files"])
def test_a_tokenizer_names_no_file_of_another_folder(folders, tmp_path, field):
    shutil.copytree(folders / "model", tmp_path / "bad")
    config = tmp_path / "bad" / "tokenizer_config.json"
    (tmp_path / "tokenizer.4.0.0.json").write_text("secret")
    found = {**json.loads(config.read_text()), field: ["../tokenizer.4.0.0.json"]}
    config.write_text(json.dumps(found))
    with pytest.raises(SaccadeError, match=r"tokenizer_config.json is damaged .it names '../tokenizer.4.0.0.json'"):
        load_processor(ModelOptions(model=str(tmp_path / "bad")))


def test_a_base_that_is_a_file_is_not_read(folders, tmp_path):
    """Stock loading takes a file for a config, and says what is in it."""
    (tmp_path / "secret").write_text("secret")
    shutil.copytree(folders / "adapters", tmp_path / "bad")
    config = tmp_path / "bad" / "adapter_config.json"
    found = {**json.loads(config.read_text()), "base_model_name_or_path": str(tmp_path / "secret")}
    config.write_text(json.dumps(found))
    with pytest.raises(SaccadeError, match=r"secret' is not a folder"):
        load_model(ModelOptions(model=str(tmp_path / "bad")))
