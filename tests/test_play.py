"""What `saccade play` does without its page: choosing a model, asking it twice, and one clear line on bad input."""

import json
import socket
from pathlib import Path

import pytest
import torch
from family_models import FAMILIES, RELATIVES
from peft import LoraConfig
from PIL import Image
from safetensors.torch import save_file

from saccade.cli.main import main
from saccade.errors import SaccadeError
from saccade.play import HOST
from saccade.play.ask import LONGEST_ANSWER, OpenModel, _is_here, compare, find_models, open_model, scenes
from saccade.pruning import ModeIsolator
from saccade.reducers import PruningConfig
from saccade.testing.families import Case
from saccade.testing.tiny_models import noise_image
from saccade.tiny import load_tiny, save_tiny
from saccade.values import check_port


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as training writes it: a setting that is not the default, and an isolator."""
    model, processor = load_tiny()
    folder = save_tiny(model, processor, tmp_path_factory.mktemp("play") / "model")
    isolator = ModeIsolator(3, model.config.text_config.hidden_size)
    torch.nn.init.normal_(next(isolator.parameters()))
    isolator.save_pretrained(folder)
    config = PruningConfig("uniform", prune_ratio=0.875, positions="original", isolator=str(folder))
    config.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def opened(folder: Path) -> OpenModel:
    return open_model(str(folder))


class TestChoosing:
    def test_a_model_is_its_own_folder(self, folder: Path) -> None:
        assert find_models([str(folder), "tiny"]) == {str(folder): str(folder), "tiny": "tiny"}

    def test_a_demo_offers_the_model_of_each_run_wherever_it_lies_now(self, tmp_path: Path) -> None:
        for run, stage in (("dualspeed-seed0", "sft-1"), ("all_tokens-seed0", "sft-2"), ("gone-seed0", "sft-3")):
            (tmp_path / "runs" / run).mkdir(parents=True)
            (tmp_path / "runs" / run / "result.json").write_text(json.dumps({"model": f"somewhere/stages/{stage}"}))
        for stage in ("sft-1", "sft-2"):
            (tmp_path / "stages" / stage).mkdir(parents=True)
        assert find_models([str(tmp_path)]) == {
            f"{tmp_path}: all_tokens-seed0": str(tmp_path / "stages/sft-2"),
            f"{tmp_path}: dualspeed-seed0": str(tmp_path / "stages/sft-1"),
        }

    def test_without_a_name_what_was_trained_here_and_the_embedded_model(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert find_models([]) == {"tiny": "tiny"}
        (tmp_path / "out").mkdir()
        (tmp_path / "out/sft").symlink_to(folder)
        assert find_models([]) == {"out/sft": "out/sft", "tiny": "tiny"}

    @pytest.mark.parametrize(("name", "words"), [("no/such", "is not a folder"), (".", "holds no model")])
    def test_what_is_no_model_is_one_line(
        self, name: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SaccadeError, match=words):
            find_models([name])

    def test_a_name_on_the_hub_is_never_downloaded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("saccade.play.ask.load_to_run", lambda *given: pytest.fail("it was loaded"))
        with pytest.raises(SaccadeError, match="is not a folder"):
            open_model("llava-hf/llava-1.5-7b-hf")

    def test_a_base_on_the_hub_is_never_downloaded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("saccade.play.ask.load_to_run", lambda *given: pytest.fail("it was loaded"))
        for base in ("llava-hf/llava-1.5-7b-hf", "/nowhere/at/all"):
            LoraConfig(base_model_name_or_path=base).save_pretrained(tmp_path)
            with pytest.raises(SaccadeError, match=f"has adapters of '{base}', which is not on this machine"):
                open_model(str(tmp_path))

    def test_a_base_of_which_weights_are_missing_is_not_here(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Loading it would fetch the rest."""
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        repository = tmp_path / "hub" / "models--me--base"
        snapshot = repository / "snapshots" / "a1"
        for place, text in ((repository / "refs" / "main", "a1"), (snapshot / "config.json", "{}")):
            place.parent.mkdir(parents=True)
            place.write_text(text)
        assert not _is_here("me/base")
        shards = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
        (snapshot / "model.safetensors.index.json").write_text(json.dumps(shards))
        save_file({"a": torch.zeros(1)}, snapshot / "model-1.safetensors")
        assert not _is_here("me/base")
        save_file({"b": torch.zeros(1)}, snapshot / "model-2.safetensors")
        assert _is_here("me/base")


class TestSetting:
    def test_a_folder_is_pruned_as_it_was_trained(self, opened: OpenModel, folder: Path) -> None:
        assert opened.tokens == 144
        assert opened.ratio == 0.88  # what the slider can show of 0.875
        assert opened.setting("uniform", 0.88) == PruningConfig.from_pretrained(folder)
        assert "isolator" in opened.describe()

    def test_the_page_replaces_what_it_changes_alone(self, opened: OpenModel, folder: Path) -> None:
        changed = opened.setting("dpp", 0.5)
        assert (changed.reducer, changed.prune_ratio) == ("dpp", 0.5)
        assert (changed.positions, changed.isolator) == ("original", str(folder))

    def test_a_number_of_tokens_is_shown_as_a_ratio_and_kept(self, opened: OpenModel) -> None:
        counted = OpenModel("x", opened.model, opened.processor, PruningConfig(keep_tokens=13), 144, 13)
        assert counted.ratio == 0.91
        assert counted.setting("divprune", 0.91).keep_tokens == 13
        assert counted.setting("divprune", 0.5).prune_ratio == 0.5
        few = OpenModel("x", opened.model, opened.processor, PruningConfig(keep_tokens=2), 576, 2)
        assert few.ratio == 0.99  # as far as the slider goes
        assert few.setting("divprune", few.ratio).keep_tokens == 2

    def test_a_model_trained_on_all_tokens_drops_what_the_slider_says(self, opened: OpenModel) -> None:
        whole = OpenModel("x", opened.model, opened.processor, PruningConfig(reducer="none"), 144, 144)
        assert whole.ratio == 0
        assert whole.setting("none", 0.0) == whole.pruning
        assert whole.setting("divprune", 0.0).prune_ratio == 0
        assert whole.setting("divprune", 0.5).prune_ratio == 0.5

    @pytest.mark.parametrize(("budget", "kept"), [("crop", 10), ("image", 2)])
    def test_a_number_of_tokens_is_that_of_each_crop_or_of_all(
        self, budget: str, kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        case = Case("idefics3", FAMILIES["idefics3"])
        monkeypatch.setattr("saccade.play.ask.load_to_run", lambda options: case.built)
        PruningConfig(keep_tokens=2, budget=budget).save_pretrained(tmp_path)
        counted = open_model(str(tmp_path))
        assert counted.tokens == 45
        assert counted.ratio == round(1 - kept / 45, 2)
        assert counted.setting("divprune", counted.ratio) == counted.pruning

    def test_the_embedded_model_says_that_it_guesses(self, opened: OpenModel) -> None:
        tiny = OpenModel("tiny", opened.model, opened.processor, PruningConfig(), 144, 14)
        assert "guesses" in tiny.describe()


class TestAsking:
    def test_both_answers_are_those_of_generate(self, opened: OpenModel, folder: Path, tmp_path: Path) -> None:
        from saccade import prune_inputs
        from saccade.evaluation import prepare_prompts

        noise = torch.randint(0, 256, (120, 200, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        photo = tmp_path / "photo.png"
        Image.fromarray(noise.numpy()).save(photo)
        found = compare(opened, str(photo), " how many digits are there ? ", opened.setting("uniform", 0.88))
        content = [{"type": "image", "image": str(photo)}, {"type": "text", "text": "how many digits are there ?"}]
        inputs = dict(prepare_prompts(opened.processor, [[{"role": "user", "content": content}]]))
        pruned = prune_inputs(opened.model, inputs, folder)
        for answer, given in ((found.full, inputs), (found.pruned, pruned)):
            output = opened.model.generate(**given, max_new_tokens=LONGEST_ANSWER, do_sample=False)
            new = output[0, given["input_ids"].shape[1] :]
            assert answer.text.split() == opened.processor.decode(new, skip_special_tokens=True).split()
            assert answer.tokens == len(new)
            assert answer.prompt == given["attention_mask"].sum()
            assert 0 < answer.first <= answer.seconds
        assert (found.kept, found.total) == (18, 144)
        assert found.full.prompt - found.pruned.prompt == 144 - 18 - 3  # the isolator has three rows
        assert found.picture.width > found.picture.height

    @pytest.mark.parametrize("name", [*FAMILIES, "chain_of_sight", "ovis2", "lfm2_vl"])
    @pytest.mark.parametrize("budget", ["crop", "image"])
    def test_all_crops_are_counted(self, name: str, budget: str) -> None:
        case = Case(name, (FAMILIES | RELATIVES)[name])
        pruning = PruningConfig(prune_ratio=0.5, budget=budget)
        opened = OpenModel(name, case.model, case.processor, pruning, 1, 1)
        found = compare(opened, noise_image(48, 32, 3), "how many digits ?", pruning)
        assert 0 < found.kept < found.total
        assert found.full.prompt - found.pruned.prompt == found.total - found.kept

    @pytest.mark.parametrize(
        ("picture", "question", "words"),
        [
            (None, "what", "photograph: there is none"),
            (Image.new("RGB", (9, 9)), "  ", "question: it is empty"),
            (__file__, "what", "is not an image"),
        ],
    )
    def test_bad_input_is_one_line(self, opened: OpenModel, picture: object, question: str, words: str) -> None:
        with pytest.raises(SaccadeError, match=words):
            compare(opened, picture, question, opened.pruning)

    def test_each_scene_has_a_question_with_one_answer(self) -> None:
        embedded = scenes()
        assert len({scene.question for scene in embedded}) == len(embedded) == 8
        assert all(scene.answer and scene.image.size == (96, 96) for scene in embedded)


def test_without_gradio_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["play", "tiny"]) == 2
    expected = 'saccade: error: saccade play needs gradio, which is not installed: pip install "saccade[play]"\n'
    assert capsys.readouterr().err == expected


def test_a_port_that_cannot_be_listened_at_is_one_line() -> None:
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        for port in (taken.getsockname()[1], 70000, 0):
            with pytest.raises(SaccadeError, match=f"port={port}: it cannot be listened at"):
                check_port(HOST, port)
