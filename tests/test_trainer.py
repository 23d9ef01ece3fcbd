"""The trainer: against stock TRL, its modes, what it trains, what it saves, and what it refuses."""

import copy
import inspect
import json
import logging
import multiprocessing

import pytest
import torch
from datasets import Dataset, DatasetDict
from family_models import FAMILIES
from helpers import ORDINARY, PRUNE_ONLY, losses, make_trainer
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import HfArgumentParser, LlavaForConditionalGeneration
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from benchmarks.variants import WITHOUT_CHECKPOINTING
from saccade import DualSpeedConfig, DualSpeedTrainer, SaccadeError
from saccade.companions import read_companion
from saccade.data import digit_scenes
from saccade.dualspeed.callbacks import WorkerStart
from saccade.dualspeed.engines import DummyImageCollator
from saccade.dualspeed.trainer import ISOLATOR_NAME
from saccade.families import LlavaFamily
from saccade.pruning import ISOLATOR_FILE, ModeIsolator
from saccade.testing.tiny_models import mixed_rows
from saccade.testing.training import make_config
from saccade.tiny import build_tiny_llava
from saccade.training import make_recipe


def test_every_argument_is_that_of_trl_s_trainer():
    """By name, in order, and with its description: none is passed on unseen, and a new one of TRL's shows here."""
    own, stock = (inspect.signature(cls.__init__).parameters for cls in (DualSpeedTrainer, SFTTrainer))
    assert list(own) == list(stock)
    defaults = {name: parameter.default for name, parameter in own.items() if name != "args"}
    assert defaults == {name: parameter.default for name, parameter in stock.items() if name != "args"}
    text = inspect.getdoc(DualSpeedTrainer)
    assert [name for name in own if name != "self" and f"\n    {name} (" not in text] == []


def train(model, processor, output, **options):
    trainer = make_trainer(model, processor, output, **options)
    trainer.train()
    return trainer


def stock_losses(processor, output, collator, scenes, **options):
    """TRL's own trainer on the same data, with image labels masked and the tower frozen."""
    model = build_tiny_llava(processor, seed=0)
    model.model.vision_tower.requires_grad_(False)
    names = set(SFTConfig.__dataclass_fields__)
    config = make_config(output, **options)
    values = {name: getattr(config, name) for name in ("max_steps", "per_device_train_batch_size", "learning_rate")}
    values |= {"gradient_accumulation_steps": config.gradient_accumulation_steps, "seed": config.seed}
    assert set(values) <= names
    args = SFTConfig(
        output_dir=str(output),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        bf16=False,
        use_cpu=True,
        **WITHOUT_CHECKPOINTING,
        disable_tqdm=True,
        assistant_only_loss=True,
        remove_unused_columns=True,
        max_length=None,
        **values,
    )
    trainer = SFTTrainer(model, args, data_collator=collator, train_dataset=scenes, processing_class=processor)
    trainer.train()
    return losses(trainer), trainer.model


def test_ordinary_options_are_stock_fine_tuning_bit_for_bit(model, processor, collator, scenes, tmp_path):
    """The collator's labels equal TRL's with images masked (tests/test_collator.py), and the losses are the same."""
    ours = train(model, processor, tmp_path / "ours", rows=scenes, gradient_accumulation_steps=2, **ORDINARY)
    theirs, their_model = stock_losses(processor, tmp_path / "stock", collator, scenes, gradient_accumulation_steps=2)
    assert len(theirs) == 4
    assert losses(ours) == theirs
    for (name, mine), stock in zip(ours.model.state_dict().items(), their_model.state_dict().values(), strict=True):
        assert torch.equal(mine, stock), name


@pytest.mark.interfaces
def test_our_slow_step_equals_stock_fine_tuning(model, processor, collator, scenes, tmp_path):
    """Without distillation a slow step is ordinary fine-tuning; here it runs on our own loss."""
    options = {"slow_probability": 1.0, "distill_weight": 0.0, "prune_ratio": 0.5, "gradient_accumulation_steps": 2}
    trainer = train(model, processor, tmp_path / "ours", rows=scenes, **options)
    assert not trainer.is_ordinary
    theirs, _ = stock_losses(processor, tmp_path / "stock", collator, scenes, gradient_accumulation_steps=2)
    torch.testing.assert_close(torch.tensor(losses(trainer)), torch.tensor(theirs), rtol=2e-5, atol=2e-5)


def left_padded(batch):
    """The same rows with their padding on the left."""
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    for name in ("input_ids", "attention_mask", "labels"):
        batch[name] = torch.stack([row.roll(-size) for row, size in zip(batch[name], lengths, strict=True)])
    return batch


@pytest.mark.parametrize(
    "options",
    [PRUNE_ONLY, {"slow_probability": 1.0, "isolator_length": 0}, ORDINARY, {"skip_vision": "100/156", **ORDINARY}],
    ids=["fast", "slow", "ordinary", "skipping"],
)
def test_a_collator_of_the_user_s_own_may_label_image_tokens(processor, tmp_path, scenes, options):
    """TRL's does. What no step learns is not counted either, in training or in evaluation."""
    stock = DataCollatorForVisionLanguageModeling(processor)

    def of_trl(rows):
        return stock([{"messages": row["messages"], "images": row["images"]} for row in rows])

    rows = scenes.filter(lambda row: len(row["images"]) > 0)
    results = []
    for collate in (None, of_trl, lambda rows: left_padded(of_trl(rows))):
        trainer = DualSpeedTrainer(
            build_tiny_llava(processor, seed=0),
            make_config(tmp_path, max_steps=1, assistant_only_loss=False, gradient_accumulation_steps=2, **options),
            train_dataset=rows,
            eval_dataset=rows.select(range(8)),
            processing_class=processor,
            data_collator=collate,
        )
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        results.append([before, *losses(trainer)])
    assert results[1] == pytest.approx(results[0], rel=1e-4)
    assert results[2] == pytest.approx(results[0], rel=1e-4)


def test_accumulated_micro_batches_equal_one_batch(processor, tmp_path):
    """The normaliser is the number of labels of the whole step, so that long answers weigh as much anywhere."""
    whole, parts = (
        train(
            build_tiny_llava(processor, seed=0),
            processor,
            tmp_path / f"{size}",
            slow_probability=0.5,
            schedule="stratified",
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            max_steps=4,
        )
        for size in (8, 2)
    )
    assert {whole.mode_of(step) for step in range(4)} == {"fast", "slow"}
    torch.testing.assert_close(torch.tensor(losses(whole)), torch.tensor(losses(parts)), rtol=1e-4, atol=1e-4)


@pytest.mark.interfaces
def test_gradient_checkpointing_on_equals_off(processor, tmp_path):
    runs = [
        train(
            build_tiny_llava(processor, seed=0),
            processor,
            tmp_path / str(on),
            slow_probability=0.5,
            gradient_checkpointing=on,
        )
        for on in (False, True)
    ]
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), abs=1e-5)


def test_modes_follow_the_schedule_and_are_logged(model, processor, tmp_path):
    trainer = train(model, processor, tmp_path, slow_probability=0.5, max_steps=8, logging_steps=2)
    modes = [trainer.mode_of(step) for step in range(8)]
    assert {"fast", "slow"} == set(modes)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    for number, entry in enumerate(logs):
        window = modes[2 * number : 2 * number + 2]
        for mode in ("fast", "slow"):
            assert (f"loss_{mode}" in entry) == (mode in window)
            assert (f"step_seconds_{mode}" in entry) == (mode in window)
            assert entry[f"steps_{mode}"] == modes[: 2 * number + 2].count(mode)
        assert ("kl" in entry) == ("slow" in window)
        assert ("teacher_seconds_slow" in entry) == ("slow" in window)
        assert entry.get("teacher_seconds_slow", 0) < entry.get("step_seconds_slow", 1)
        assert entry["length_in"] <= entry["length_full"]
        assert entry["tokens_per_second"] > 0
    full, run = (sum(2 * 4 * entry[name] for entry in logs) for name in ("length_full", "length_in"))
    assert logs[-1]["num_tokens"] == pytest.approx(run, rel=1e-4)
    # The teachers' passes are what the speed-up of all tokens over trained tokens overstates.
    assert 1 < logs[-1]["speedup_tokens"] < full / run
    seconds = trainer.meter.step_seconds
    means = {mode: sum(values[1:]) / len(values[1:]) for mode, values in seconds.items()}
    teacher = sum(trainer.meter.teacher_seconds["slow"][1:]) / len(trainer.meter.teacher_seconds["slow"][1:])
    mean = sum(len(seconds[mode]) * means[mode] for mode in seconds) / 8
    assert logs[-1]["speedup"] == pytest.approx((means["slow"] - teacher) / mean, rel=1e-4)


@pytest.mark.parametrize("options", [{"slow_probability": 0.5}, ORDINARY], ids=["both modes", "stock steps"])
def test_modes_are_logged_at_the_end_of_an_epoch_that_was_evaluated_before(processor, tmp_path, options):
    evaluated = {"logging_strategy": "epoch", "eval_strategy": "steps", "eval_steps": 4, "num_train_epochs": 2}
    trainer = DualSpeedTrainer(
        build_tiny_llava(processor),
        make_config(tmp_path, max_steps=-1, **options, **evaluated),
        train_dataset=digit_scenes("sft", "train", 16),
        eval_dataset=digit_scenes("sft", "validation", 2),
        processing_class=processor,
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [sum(entry[f"steps_{mode}"] for mode in trainer.meter.modes) for entry in logs] == [4, 8]
    assert logs[1]["num_tokens"] > 1.5 * logs[0]["num_tokens"]
    if options["slow_probability"] == 1:
        assert all("mean_token_accuracy" in entry for entry in logs)


def test_projector_stage_is_always_fast_and_trains_projector_and_isolator_alone(model, processor, tmp_path):
    rows = digit_scenes("pretrain", "train", 32)
    trainer = make_trainer(
        model, processor, tmp_path, rows=rows, freeze_language_model=True, slow_probability=0.9, max_steps=3
    )
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    assert all(trainer.mode_of(step) == "fast" for step in range(100))
    changed = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    projector = {name for name in before if "multi_modal_projector" in name}
    assert changed == projector | {"mode_isolator.weight"}


def test_isolator_moves_in_fast_steps_only(processor, tmp_path):
    for rate, moves in ((0.0, True), (1.0, False)):
        trainer = make_trainer(
            build_tiny_llava(processor, seed=0), processor, tmp_path / str(rate), slow_probability=rate, max_steps=2
        )
        before = trainer.isolator.weight.detach().clone()
        trainer.train()
        assert torch.equal(trainer.isolator.weight, before) != moves


@pytest.mark.interfaces
def test_saved_model_is_stock(model, processor, tmp_path):
    trainer = train(model, processor, tmp_path, slow_probability=0.5)
    trainer.save_model(str(tmp_path / "final"))
    # A user may also save the model by hand.
    trainer.model.save_pretrained(tmp_path / "by_hand")
    for folder in ("final", "by_hand"):
        assert not any("isolator" in key for key in load_file(tmp_path / folder / "model.safetensors"))
        loaded, info = LlavaForConditionalGeneration.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        batch = dict(trainer.data_collator([trainer.train_dataset[0]]))
        batch.pop("labels")
        torch.testing.assert_close(loaded.eval()(**batch).logits, trainer.model.eval()(**batch).logits)
        saved = trainer.model.state_dict()
        assert all(torch.equal(value, saved[name]) for name, value in loaded.state_dict().items())
    config = json.loads((tmp_path / "final" / "dualspeed.json").read_text())["config"]
    assert config["prune_ratio"] == 0.9
    assert read_companion(tmp_path / "final", ISOLATOR_FILE, "isolator")[0] == config


def test_isolator_carries_over_from_stage_one(model, processor, tmp_path):
    first = train(model, processor, tmp_path / "one", freeze_language_model=True)
    first.save_model(str(tmp_path / "one"))
    for start in (str(tmp_path / "one"), LlavaForConditionalGeneration.from_pretrained(tmp_path / "one")):
        second = make_trainer(start, processor, tmp_path / "two")
        assert torch.equal(second.isolator.weight, first.isolator.weight)
    with pytest.raises(SaccadeError, match=r"isolator_length=2.*shape \(4, 96\)"):
        make_trainer(str(tmp_path / "one"), processor, tmp_path / "two", isolator_length=2)


def test_what_is_beside_adapters_is_not_found_and_said_so(model, processor, tmp_path, caplog):
    """PEFT does not tell which folder adapters come from."""
    model.save_pretrained(tmp_path / "base")

    def start(**options):
        base = LlavaForConditionalGeneration.from_pretrained(tmp_path / "base")
        adapted = PeftModel.from_pretrained(base, tmp_path / "one", is_trainable=True)
        with caplog.at_level(logging.INFO, "saccade"):
            caplog.clear()
            trainer = make_trainer(adapted, processor, tmp_path / "two", **options)
        warned = [record.message for record in caplog.records if record.levelno == logging.WARNING]
        return trainer, warned, [record.message for record in caplog.records if "starts from" in record.message][-1]

    lora = LoraConfig(r=4, target_modules=r".*language_model.*_proj")
    modes = [{"name": "fast", "isolator": True}, {"name": "skips", "action": "skip"}]
    options = {"modes": [{**mode, "probability": 0.5} for mode in modes]}
    base = LlavaForConditionalGeneration.from_pretrained(tmp_path / "base")
    first = make_trainer(base, processor, tmp_path / "one", peft_config=lora, seed=4, **options)
    for name, value in first.model.named_parameters():
        if "lora_B" in name:
            value.data.fill_(0.01)
    first.save_model(str(tmp_path / "one"))

    second, (isolator, head), said = start(**options)
    assert not torch.equal(second.isolator.weight, first.isolator.weight)
    assert "isolator starts from random values; if they were trained with one, set isolator_path" in isolator
    assert "summary head starts from random values; if they were trained with one, call `trainer.skip" in head
    assert said == "the summary head starts from random values"
    second.skip.load_summary(tmp_path / "one")
    for name, value in first.skip.summary.state_dict().items():
        assert torch.equal(second.skip.summary.state_dict()[name], value)

    second, warned, said = start(isolator_path=str(tmp_path / "one"))
    assert torch.equal(second.isolator.weight, first.isolator.weight)
    assert warned == []
    assert said == f"the mode isolator starts from {tmp_path / 'one'}"

    ModeIsolator(4, 96).save_pretrained(tmp_path / "base")
    _, (warned,), said = start()
    assert f"isolator starts from {tmp_path / 'base' / ISOLATOR_FILE}; if they" in warned
    assert said == f"the mode isolator starts from {tmp_path / 'base' / ISOLATOR_FILE}"


def test_there_is_nothing_beside_new_adapters(model, processor, tmp_path, caplog):
    lora = LoraConfig(r=4, target_modules=r".*language_model.*_proj")
    with caplog.at_level(logging.WARNING, "saccade"):
        make_trainer(get_peft_model(model, lora), processor, tmp_path)
    assert "PeftModel" not in caplog.text


def test_merged_adapters_leave_the_isolator_behind_and_it_is_said_so(model, processor, tmp_path, caplog):
    lora = LoraConfig(r=4, target_modules=r".*language_model.*_proj")
    first = make_trainer(model, processor, tmp_path / "one", peft_config=lora)
    first.save_model(str(tmp_path / "one"))
    merged = first.model.merge_and_unload()

    make_trainer(merged, processor, tmp_path / "two")
    (warned,) = [record.message for record in caplog.records if "merge_and_unload" in record.message]
    assert "starts from random values; to go on with the trained one, set isolator_path to its run's folder" in warned

    caplog.clear()
    del merged._modules["mode_isolator"]
    second = make_trainer(merged, processor, tmp_path / "three", isolator_path=str(tmp_path / "one"))
    assert torch.equal(second.isolator.weight, first.isolator.weight)
    assert "merge_and_unload" not in caplog.text


def test_projector_learning_rate(model, processor, tmp_path):
    trainer = make_trainer(model, processor, tmp_path, projector_learning_rate=5e-3)
    optimizer = trainer.create_optimizer()
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    special = {*trainer.family.projector.parameters(), *trainer.isolator.parameters()}
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            assert rates.pop(id(parameter)) == (5e-3 if parameter in special else 1e-3)
    assert not rates


@pytest.mark.parametrize("projector", [None, 5e-3])
def test_learning_rates_by_layer_of_the_tower(projector, model, processor, tmp_path):
    """The features are the third hidden state of four layers; what comes after trains at the base rate, if at all."""
    options = {"vision_layer_decay": 0.5, "freeze_vision_tower": False, "projector_learning_rate": projector}
    trainer = make_trainer(model, processor, tmp_path, **options)
    optimizer = trainer.create_optimizer()
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    depths = {"embeddings": 4, "pre_layrnorm": 4, "layers.0": 3, "layers.1": 2, "layers.2": 1, "layers.3": 0}
    depths["post_layernorm"] = 0
    counted = dict.fromkeys(depths, 0)
    for name, parameter in trainer.family.vision_tower.named_parameters():
        part = next(part for part in depths if part in name)
        assert rates.pop(id(parameter)) == 1e-3 * 0.5 ** depths[part]
        counted[part] += 1
    assert all(counted.values())
    special = {id(p) for p in (*trainer.family.projector.parameters(), *trainer.isolator.parameters())}
    assert all(rate == (projector if projector and key in special else 1e-3) for key, rate in rates.items())
    assert optimizer.param_groups[0]["lr"] == 1e-3  # the one that is logged
    assert all(p.requires_grad for group in optimizer.param_groups for p in group["params"])


def with_optimizer(model, processor, output, scheduled=False, peft_config=None, **options):
    """A trainer with an optimizer of the user's own, made of the model as it was given."""
    groups = [{"params": [weight for weight in model.parameters() if weight.requires_grad], "lr": 2e-3}]
    optimizer = torch.optim.AdamW(groups, lr=1e-5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0) if scheduled else None
    return DualSpeedTrainer(
        model,
        make_config(output, max_steps=2, **options),
        train_dataset=digit_scenes("sft", "train", 16, seed=5, kinds=["read"]),
        processing_class=processor,
        optimizers=(optimizer, scheduler),
        peft_config=peft_config,
    )


@pytest.mark.parametrize(
    "options",
    [{"slow_probability": 0.0}, {"skip_vision": {"split": "divprune"}, **ORDINARY}, PRUNE_ONLY],
    ids=["isolator", "summary head", "neither"],
)
def test_an_optimizer_of_the_user_s_own_steps_all_that_trains(model, processor, tmp_path, options):
    trainer = with_optimizer(model, processor, tmp_path, scheduled=True, lr_scheduler_type="constant", **options)
    trained = {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    before = {name: weight.detach().clone() for name, weight in trained.items()}
    trainer.train()
    assert [name for name, weight in trained.items() if torch.equal(weight, before[name])] == []
    groups = trainer.optimizer.param_groups
    assert [group["lr"] for group in groups] == [2e-3]
    assert len({id(p) for group in groups for p in group["params"]} & {id(p) for p in trained.values()}) == len(
        trained
    )


def test_an_optimizer_that_leaves_out_weights_is_refused(processor, tmp_path):
    lora = LoraConfig(r=4, target_modules=r".*language_model.*_proj")
    with pytest.raises(
        SaccadeError, match=r"optimizers: AdamW does not step 56 of 57 .*lora_A.*: leave it out"
    ) as error:
        with_optimizer(build_tiny_llava(processor), processor, tmp_path, peft_config=lora)
    assert "\n" not in str(error.value)
    options = {"scheduled": True, "projector_learning_rate": 1e-3}
    with pytest.raises(SaccadeError, match=r"optimizers: LambdaLR .*projector_learning_rate.* set lr_scheduler_type"):
        with_optimizer(build_tiny_llava(processor), processor, tmp_path, **options)


def test_a_tower_whose_layers_are_not_known_has_one_learning_rate(tmp_path):
    model, processor = FAMILIES["qwen2_vl"].build()
    with pytest.raises(SaccadeError, match=r"vision_layer_decay=0.9: .* model_type='qwen2_vl' are not known"):
        DualSpeedTrainer(
            model,
            args=make_config(tmp_path, vision_layer_decay=0.9, freeze_vision_tower=False),
            train_dataset=Dataset.from_list(mixed_rows()),
            processing_class=processor,
        )


@pytest.mark.interfaces
def test_lora_trains_and_saves_adapters_and_isolator(model, processor, tmp_path):
    lora = LoraConfig(r=4, target_modules=r".*language_model.*_proj", modules_to_save=["multi_modal_projector"])
    trainer = train(model, processor, tmp_path, peft_config=lora, slow_probability=0.5)
    trainer.save_model(str(tmp_path / "final"))
    keys = load_file(tmp_path / "final" / "adapter_model.safetensors")
    assert any("lora_A" in key for key in keys)
    assert any("multi_modal_projector" in key for key in keys)
    assert not any("isolator" in key for key in keys)
    assert torch.equal(ModeIsolator.from_pretrained(tmp_path / "final").weight, trainer.isolator.weight)
    assert trainer.mode_of(0) in ("fast", "slow")
    assert trainer.schedule.shares == {"fast": 0.5, "slow": 0.5}


def test_evaluation_during_training_is_on_all_tokens(model, processor, tmp_path):
    rows = digit_scenes("sft", "validation", 8)
    trainer = DualSpeedTrainer(
        model,
        args=make_config(tmp_path, per_device_eval_batch_size=8, **PRUNE_ONLY),
        train_dataset=digit_scenes("sft", "train", 16),
        eval_dataset=rows,
        processing_class=processor,
    )
    trainer.train()
    result = trainer.evaluate()
    batch = dict(trainer.data_collator([rows[index] for index in range(8)]))
    assert result["eval_loss"] == pytest.approx(model.eval()(**batch).loss.item(), abs=1e-4)


@pytest.mark.parametrize("options", [{"fit_length": 60, "fit_slow": True}, {"skip_vision": {}, "skip_mode": "slow"}])
def test_an_evaluation_that_computes_the_loss_alone(processor, tmp_path, options):
    """Rows that are made to fit, and models that skip, have no logits of the full sequence."""
    rows = digit_scenes("sft", "validation", 4)
    trainer = make_trainer(build_tiny_llava(processor, seed=0), processor, tmp_path, **options)
    found = trainer.predict(rows)
    assert found.predictions is None
    assert found.metrics["test_loss"] == pytest.approx(trainer.evaluate(rows)["eval_loss"])
    why = "fit_slow=True" if "fit_slow" in options else "modes that skip"
    with pytest.raises(SaccadeError, match=f"compute_metrics is given with {why}: an evaluation then"):
        DualSpeedTrainer(
            "not loaded", args=make_config(tmp_path, **options), train_dataset=rows, compute_metrics=lambda found: {}
        )


def test_predictions_are_of_the_rows_alone(model, processor, tmp_path):
    """Where ranks shard the model, a batch of texts has a row with a blank image too."""
    kinds = ["text_only"] * 2 + ["count"] * 3 + ["text_only"]
    rows = [digit_scenes("sft", "train", 1, seed=number, kinds=[kind])[0] for number, kind in enumerate(kinds)]
    trainer = make_trainer(model, processor, tmp_path, per_device_eval_batch_size=2, include_for_metrics=["inputs"])
    seen = []
    trainer.compute_metrics = lambda found: seen.append(found) or {}
    trainer.evaluate(Dataset.from_list(rows))
    trainer.data_collator = DummyImageCollator(trainer.data_collator, trainer.family.placeholder_id, processor)
    trainer.evaluate(Dataset.from_list(rows))
    plain, sharded = seen
    # The blank image makes some batches longer.
    learned, found = ([row[row != -100].tolist() for row in one.label_ids] for one in (plain, sharded))
    assert found == learned
    assert len(sharded.predictions) == len(sharded.inputs) == len(rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prune_ratio": 1.0}, r"prune_ratio=1.0 is outside \[0, 1\)"),
        ({"prune_ratio": -0.1}, "prune_ratio"),
        ({"slow_probability": 2}, r"slow_probability=2.0 is outside \[0, 1\]"),
        ({"schedule": "annealed"}, "bernoulli, stratified"),
        ({"reducer": "divprun"}, "did you mean 'divprune'"),
        ({"reducer": "random", "reducer_options": {"sed": 1}}, "sed"),
        ({"isolator_length": -1}, "isolator_length=-1"),
        ({"distill_weight": -1.0}, "distill_weight=-1.0"),
        ({"distill_temperature": 0.0}, "distill_temperature=0.0"),
        ({"positions": "middle"}, "compact, original"),
        ({"projector_learning_rate": 0.0}, "projector_learning_rate=0.0"),
        (
            {"vision_layer_decay": 0.0, "freeze_vision_tower": False},
            "vision_layer_decay=0.0: give a number from 0 to 1",
        ),
        ({"vision_layer_decay": 1.1, "freeze_vision_tower": False}, "vision_layer_decay=1.1"),
        ({"vision_layer_decay": 0.9}, "needs a tower that trains: set freeze_vision_tower to false"),
        ({"freeze_projector": True, "freeze_language_model": True}, "nothing would train"),
        ({"loss_type": "dft"}, "loss_type='dft'"),
        ({"accelerator_config": {"dispatch_batches": True}}, "accelerator_config has dispatch_batches=True"),
        ({"router_aux_loss_coef": 0.1}, "router_aux_loss_coef=0.1"),
        ({"max_bad_records": None}, "max_bad_records=None, expected int"),
        ({"isolator_length": "4"}, "isolator_length='4' is a str, expected int"),
        ({"freeze_projector": "yes"}, "freeze_projector='yes' is a str, expected bool"),
        ({"distill_temperature": float("inf")}, "distill_temperature=inf"),
        ({"reducer_options": [1]}, r"reducer_options=\[1\] is a list, expected dict or str"),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(SaccadeError, match=message) as error:
        make_config(tmp_path, **options)
    assert "\n" not in str(error.value)


def test_options_by_way_of_a_parser(tmp_path):
    """A parser of command lines overwrites the types of the fields that it reads."""
    options = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "reducer": "random"}
    for given in ({"seed": 3}, '{"seed": 3}'):
        (parsed,) = HfArgumentParser(DualSpeedConfig).parse_dict({**options, "reducer_options": given})
        assert parsed.reducer_options == {"seed": 3}
        assert DualSpeedConfig(**options, reducer_options=given).reducer_options == {"seed": 3}
        assert make_recipe({**options, "reducer_options": given}).trainer.reducer_options == {"seed": 3}


def test_stage_two_on_the_model_of_stage_one(processor, tmp_path):
    model = build_tiny_llava(processor)
    first = train(model, processor, tmp_path, freeze_language_model=True, max_steps=1)
    with pytest.raises(SaccadeError, match=r"freeze_language_model=False, but no weight .* load the model"):
        make_trainer(model, processor, tmp_path).train()
    frozen = copy.deepcopy(model)
    frozen.get_output_embeddings().requires_grad_(True)
    make_trainer(frozen, processor, tmp_path, max_steps=1).train()
    lora = LoraConfig(target_modules=r".*language_model.*q_proj", r=4)
    adapted = make_trainer(copy.deepcopy(model), processor, tmp_path, peft_config=lora)
    assert torch.equal(adapted.isolator.weight, first.isolator.weight)
    assert [name for name in adapted.model.state_dict() if ISOLATOR_NAME in name] == [f"{ISOLATOR_NAME}.weight"]
    adapted.train()
    # Merged adapters leave every weight frozen.
    with pytest.raises(SaccadeError, match="adapters that were merged"):
        make_trainer(adapted.model.merge_and_unload(), processor, tmp_path).train()
    model.requires_grad_(True)
    second = make_trainer(model, processor, tmp_path)
    assert torch.equal(second.isolator.weight, first.isolator.weight)
    assert make_trainer(model, processor, tmp_path, isolator_length=2).isolator.length == 2


@pytest.mark.parametrize("lora", [False, True], ids=["stage one", "lora"])
def test_an_isolator_does_not_train_alone(processor, tmp_path, lora):
    model = build_tiny_llava(processor)
    if lora:
        adapters = LoraConfig(target_modules=r".*language_model.*q_proj", r=2)
        get_peft_model(model, adapters).save_pretrained(tmp_path / "adapters")
        # Without is_trainable=True, adapters come back frozen.
        model = PeftModel.from_pretrained(build_tiny_llava(processor), tmp_path / "adapters")
    else:
        model.requires_grad_(False)
    trainer = make_trainer(model, processor, tmp_path / "run", freeze_language_model=not lora)
    with pytest.raises(SaccadeError, match="no weight trains: load .*" + ("is_trainable=True" if lora else "anew")):
        trainer.train()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, "train_dataset is None or has no rows"),
        (Dataset.from_dict({"messages": [], "images": []}), "no rows"),
        (DatasetDict(train=Dataset.from_dict({"images": [[]]})), r"a DatasetDict with .* give .* dataset\['train'\]"),
        (Dataset.from_dict({"messages": [[]]}), "'images' column"),
        (Dataset.from_dict({"conversations": [[]], "image": ["a.png"]}), "'conversations' .* saccade.data.load_rows"),
    ],
)
def test_datasets_that_are_refused(model, processor, tmp_path, rows, message):
    with pytest.raises(SaccadeError, match=message):
        DualSpeedTrainer(model, make_config(tmp_path), train_dataset=rows, processing_class=processor)


def test_what_a_step_of_ours_would_ignore_is_refused(processor, tmp_path, scenes):
    prompts = PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    with pytest.raises(SaccadeError, match=r"PromptTuningConfig.* use LoRA"):
        make_trainer(build_tiny_llava(processor), processor, tmp_path, peft_config=prompts)
    given = {"train_dataset": scenes, "processing_class": processor, "compute_loss_func": lambda *_, **__: 0}
    with pytest.raises(SaccadeError, match=r"compute_loss_func is given: .* distill_weight=0"):
        DualSpeedTrainer(build_tiny_llava(processor), make_config(tmp_path), **given)
    with pytest.raises(SaccadeError, match="without padding_free"):
        DualSpeedTrainer(build_tiny_llava(processor), make_config(tmp_path, **ORDINARY, padding_free=True), **given)


def test_float16_weights_under_bfloat16_are_refused(processor, tmp_path, scenes):
    """Released checkpoints are often float16, and stock loading leaves them so."""
    half = build_tiny_llava(processor, seed=0).half()
    with pytest.raises(SaccadeError, match=r"bf16=True with a model in float16: load it with dtype=torch.bfloat16"):
        make_trainer(half, processor, tmp_path, rows=scenes, bf16=True)


def test_what_the_tower_does_not_give_is_refused(processor, tmp_path, monkeypatch):
    monkeypatch.setattr(LlavaFamily, "attention_block", lambda self: None)
    for options in ({"reducer": "fastervlm"}, {"reducer": "fastervlm", "skip_vision": {}}):
        with pytest.raises(SaccadeError, match="gives no saliency"):
            make_trainer(build_tiny_llava(processor), processor, tmp_path, **options)
    make_trainer(build_tiny_llava(processor), processor, tmp_path, reducer="fastervlm", **ORDINARY)


def test_a_plain_config_is_refused(model, processor, tmp_path, scenes):
    plain = SFTConfig(str(tmp_path), bf16=False, use_cpu=True, **WITHOUT_CHECKPOINTING)
    with pytest.raises(SaccadeError, match="args is a SFTConfig: give a DualSpeedConfig"):
        DualSpeedTrainer(model, plain, train_dataset=scenes)


def test_a_run_without_isolator_leaves_no_old_one_behind(processor, tmp_path):
    for length, there in ((4, True), (0, False)):
        trainer = make_trainer(build_tiny_llava(processor), processor, tmp_path, isolator_length=length)
        trainer.save_model(str(tmp_path))
        assert (tmp_path / "mode_isolator.saccade").exists() == there


def test_model_that_does_not_exist(processor, tmp_path):
    with pytest.raises(SaccadeError, match="cannot be loaded"):
        make_trainer(str(tmp_path / "nowhere"), processor, tmp_path)


@pytest.mark.parametrize("kind", ["autocast", "bf16 weights"])
def test_bf16(processor, tmp_path, kind):
    """Close to float32; the isolator stays in float32, where it moves at fine-tuning rates."""
    options = {"slow_probability": 0.5, "schedule": "stratified", "max_steps": 2}
    exact = train(build_tiny_llava(processor, seed=0), processor, tmp_path / "a", **options)
    model = build_tiny_llava(processor, seed=0)
    if kind == "autocast":
        trainer = train(model, processor, tmp_path / "b", bf16=True, **options)
    else:
        trainer = train(model.bfloat16(), processor, tmp_path / "b", **options)
    assert {trainer.mode_of(step) for step in range(2)} == {"fast", "slow"}
    assert trainer.isolator.weight.dtype == torch.float32
    assert losses(trainer) == pytest.approx(losses(exact), rel=0.02)


@pytest.mark.parametrize("max_steps", [2, 20], ids=["within an epoch", "at its end"])
def test_persistent_workers_end_with_training(model, processor, tmp_path, max_steps):
    """Left to the garbage collector they would be waited for in vain for ten seconds."""
    options = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "max_steps": max_steps}
    trainer = make_trainer(model, processor, tmp_path, **options)
    assert not multiprocessing.active_children()
    trainer.train()
    assert not multiprocessing.active_children()


def test_workers_of_evaluations_survive_a_signal_to_the_group(model, processor, tmp_path):
    options = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    rows = digit_scenes("sft", "validation", 4)
    trainer = DualSpeedTrainer(
        model,
        args=make_config(tmp_path, **options),
        train_dataset=digit_scenes("sft", "train", 4),
        eval_dataset={"digits": rows},
        processing_class=processor,
    )
    # The second is the first again.
    loaders = [trainer.get_eval_dataloader("digits") for _ in range(2)] + [trainer.get_test_dataloader(rows)]
    for loader in loaders:
        start = getattr(loader, "base_dataloader", loader).worker_init_fn
        assert isinstance(start, WorkerStart)
        assert not isinstance(start.then, WorkerStart)


def test_adapters_of_another_name_are_refused(model, processor, tmp_path):
    """PEFT saves them in a subfolder, where neither resuming nor exporting would look."""
    named = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="mine")
    with pytest.raises(SaccadeError, match="adapters that are named 'mine': leave adapter_name out"):
        make_trainer(named, processor, tmp_path)
