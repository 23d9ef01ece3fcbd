"""Training with a feature cache: the losses of a run without, no tower in the second epoch, and what is refused."""

from itertools import pairwise
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from family_models import FAMILIES
from helpers import ORDINARY, TowerRows, feature_files, frozen_family, losses, make_trainer
from peft import LoraConfig

from saccade import SaccadeError
from saccade.data import digit_scenes
from saccade.dualspeed.modes import ModeConfig
from saccade.families.cache import check_cacheable
from saccade.reducers import Needs, PruningConfig
from saccade.testing.training import make_config
from saccade.tiny import build_tiny_llava

LORA = LoraConfig(r=4, target_modules=r".*language_model.*_proj", modules_to_save=["multi_modal_projector"])


def short_run(model, processor, tmp_path, name, cached=True, peft_config=None, **options):
    """Two epochs of four steps each."""
    options = {"max_steps": -1, "num_train_epochs": 2, "slow_probability": 0.5, **options}
    if cached:
        options["feature_cache"] = str(tmp_path / "features")
    rows = digit_scenes("sft", "train", 16, seed=5)
    trainer = make_trainer(model, processor, tmp_path / name, rows=rows, peft_config=peft_config, **options)
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"gradient_checkpointing": True}, marks=pytest.mark.slow),
        pytest.param({"peft_config": LORA}, marks=pytest.mark.slow),
        pytest.param({"freeze_language_model": True}, marks=pytest.mark.slow),
        pytest.param(
            {"padding_free": True, "slow_micro_batch_size": 2, "feature_cache_gib": float("inf")},
            marks=pytest.mark.slow,
        ),
        pytest.param({"skip_vision": {"split": "divprune", "retained": 10, "skipped": 20}}, marks=pytest.mark.slow),
        ORDINARY,
    ],
    ids=["default", "checkpointing", "lora", "projector", "no padding, in parts", "skip", "ordinary"],
)
def test_losses_are_those_without_a_cache(processor, tmp_path, options):
    plain, cached = (
        short_run(build_tiny_llava(processor, seed=0), processor, tmp_path, str(on), cached=on, **options)
        for on in (False, True)
    )
    assert len(losses(plain)) == 8
    assert losses(cached) == pytest.approx(losses(plain), abs=2e-5)
    hits = [entry["feature_cache_hits"] for entry in cached.state.log_history if "feature_cache_hits" in entry]
    assert hits[0] < 1
    assert all(0 <= hit <= 1 for hit in hits)
    assert not any("feature_cache_hits" in entry for entry in plain.state.log_history)
    assert cached.feature_cache.read_rows > 0
    assert plain.feature_cache is None


def test_the_second_epoch_runs_no_tower_and_is_logged(model, processor, tmp_path):
    ran = TowerRows(model.model.vision_tower)
    trainer = short_run(model, processor, tmp_path, "run")
    cache = trainer.feature_cache
    assert ran.rows == cache.encoded_rows == len(feature_files(tmp_path))
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["feature_cache_hits"] for entry in logs[4:]] == [1.0] * 4
    assert all(entry["feature_cache_hits"] < 1 for entry in logs[:2])
    # Evaluation is on the same pixels, in the stock model's own forward.
    metrics = trainer.evaluate(trainer.train_dataset)
    assert "eval_loss" in metrics
    assert trainer.state.log_history[-1]["eval_feature_cache_hits"] == 1.0
    trainer.evaluate({"a": trainer.train_dataset, "b": trainer.train_dataset})
    for entry, name in zip(trainer.state.log_history[-2:], "ab", strict=True):
        assert entry[f"eval_{name}_feature_cache_hits"] == 1.0
    assert ran.rows == cache.encoded_rows


def test_two_stages_share_a_folder(model, processor, tmp_path):
    first = short_run(model, processor, tmp_path, "one", freeze_language_model=True)
    first.save_model(str(tmp_path / "one"))
    second = short_run(str(tmp_path / "one"), processor, tmp_path, "two")
    assert second.feature_cache.encoded_rows == 0
    assert second.feature_cache.read_rows > 0
    assert len(list((tmp_path / "features").iterdir())) == 1


def test_hits_are_of_the_window(model, processor, tmp_path):
    """What was logged is not logged again: shares of rows since the last log, not since the start."""
    trainer = short_run(model, processor, tmp_path, "run", logging_steps=4)
    logs = [entry["feature_cache_hits"] for entry in trainer.state.log_history if "feature_cache_hits" in entry]
    assert len(logs) == 2
    assert logs[1] == 1.0
    assert all(one < other for one, other in pairwise(logs))


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature_cache": ""}, "feature_cache='' is not a folder"),
        ({"feature_cache_gib": 0}, "feature_cache_gib=0.0: give a number above 0"),
        ({"feature_cache_gib": -1.5}, "feature_cache_gib=-1.5"),
        ({"feature_cache_gib": "fifty"}, "feature_cache_gib='fifty' is a str, expected float"),
        ({"feature_cache_gib": float("nan")}, "feature_cache_gib=nan"),
        ({"freeze_vision_tower": False}, "freeze_vision_tower=false trains it: leave one of them out"),
        ({"reducer": "fastervlm"}, "mode 'fast' chooses tokens by saliency.*choose by one of .*divprune"),
        ({"reducer": "visionzip"}, "mode 'fast' chooses tokens by keys and saliency"),
        ({"skip_vision": "100/156", **ORDINARY}, "mode 'skip' chooses tokens by saliency"),
    ],
)
def test_options_that_cannot_be_served(tmp_path, options, message):
    with pytest.raises(SaccadeError, match=message) as refused:
        make_config(tmp_path / "run", **{"feature_cache": str(tmp_path / "features"), **options})
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "features").exists()


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_towers_that_do_not_encode_row_by_row_are_refused(name):
    family = frozen_family(FAMILIES[name].build()[0])
    with pytest.raises(SaccadeError, match=rf"feature_cache='features'.*model_type='{name}'.*leave feature_cache out"):
        check_cacheable(family, "features")


def test_a_tower_that_trains_or_drops_is_refused(model, processor, tmp_path):
    adapters = LoraConfig(r=4, target_modules=r".*vision_tower.*q_proj")
    with pytest.raises(SaccadeError, match=r"the vision tower trains.*give it no adapters"):
        short_run(build_tiny_llava(processor, seed=0), processor, tmp_path, "lora", peft_config=adapters)
    model.model.vision_tower.config.attention_dropout = 0.1
    with pytest.raises(SaccadeError, match=r"attention_dropout=0.1.*set attention_dropout to 0"):
        short_run(model, processor, tmp_path, "dropout")


def test_a_folder_that_is_none_is_refused_before_training(model, processor, tmp_path):
    (tmp_path / "features").write_text("a file")
    with pytest.raises(SaccadeError, match=r"feature_cache='.*features' exists and is not a folder"):
        short_run(model, processor, tmp_path, "run")


@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_engines_that_shard_the_tower_are_refused(model, processor, tmp_path, engine):
    trainer = make_trainer(model, processor, tmp_path / "run", feature_cache=str(tmp_path / "features"))
    trainer.is_fsdp_enabled, trainer.is_deepspeed_enabled = engine == "fsdp", engine == "zero3"
    plugin = SimpleNamespace(zero_stage=3)
    with (
        patch.object(type(trainer.accelerator.state), "deepspeed_plugin", plugin, create=True),
        pytest.raises(SaccadeError, match=r"FSDP and ZeRO-3 gather.*use DDP or ZeRO-2"),
    ):
        trainer.open_feature_cache()


def test_modes_say_what_they_need():
    assert ModeConfig("full", 1.0, "keep").needs == Needs()
    assert ModeConfig("fast", 1.0, pruning=PruningConfig("visionzip")).needs.fields == {"saliency", "keys"}
    assert ModeConfig("fast", 1.0, pruning=PruningConfig("cdpruner")).needs.fields == {"relevance"}
