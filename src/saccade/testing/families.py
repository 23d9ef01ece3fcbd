"""Every invariant of a model family, as functions of a tiny model and a reducer.

`CHECKS` has those that hold for any reducer; `check_generation_at_ratio_zero`, `check_training`, `check_cut_batches`
and `check_predictions` need to run only once or twice. A failed check raises an AssertionError.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from saccade.dualspeed import DualSpeedCollator, DualSpeedTrainer
from saccade.dualspeed.packing import allow_packing
from saccade.dualspeed.parts import InParts
from saccade.dualspeed.step import DualSpeedStep
from saccade.evaluation.digits import collate_prompts
from saccade.families import Encoded, Family, get_family
from saccade.pruning import ModeIsolator, Pruner, prune, prune_inputs
from saccade.reducers import Needs, PruningConfig, get_reducer, reduce
from saccade.testing.tiny_models import Tiny, mixed_rows
from saccade.testing.training import fast_slow_step, make_config

RATIO = 0.7
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@dataclass
class Case:
    """A family's tiny model and batches for it, each built only once.

    Args:
        name: the family's name, for the names of tests.
        tiny: how the model is built. Its processor must accept images of up to 32 px, and its tokenizer must know
            the words of `mixed_rows`, as that of `build_tokenizer` does.
    """

    name: str
    tiny: Tiny

    @cached_property
    def built(self):
        return self.tiny.build()

    @property
    def model(self) -> PreTrainedModel:
        return self.built[0]

    @property
    def processor(self):
        return self.built[1]

    @cached_property
    def family(self) -> Family:
        return get_family(self.model)

    @cached_property
    def batch(self) -> dict[str, Any]:
        """The mixed rows with labels, right-padded."""
        collator = DualSpeedCollator(
            processor=self.processor, assistant_only_loss=True, placeholder_id=self.family.placeholder_id
        )
        return dict(collator(mixed_rows()))

    @property
    def inputs(self) -> dict[str, Any]:
        """The same without labels."""
        return {name: value for name, value in self.batch.items() if name != "labels"}

    def prompts(self, rows: Iterable[int] = range(4)) -> dict[str, Any]:
        """Left-padded prompts of some of the mixed rows, up to the last answer."""
        every = mixed_rows()
        return dict(collate_prompts(self.processor, [every[row] for row in rows]))

    def prune(self, inputs: dict[str, Any], reducer: str, ratio: float = RATIO, **options: Any) -> dict[str, Any]:
        return prune_inputs(self.model, inputs, reducer=reducer, prune_ratio=ratio, **options)

    @property
    def positions(self) -> tuple[str, ...]:
        """The position modes that make a difference for this family."""
        return ("original",) if self.family.uses_mrope else ("compact", "original")


@torch.no_grad()
def logits(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    """`(B, L, V)` without a cache."""
    return model(**inputs, use_cache=False).logits


def real(values: Tensor, mask: Tensor) -> Tensor:
    """Rows of real tokens."""
    return values[mask.bool()]


def check_ratio_zero(case: Case, reducer: str) -> None:
    """At a ratio of 0 the model is the stock model, bit for bit."""
    stock = logits(case.model, case.inputs)
    for positions in case.positions:
        pruned = case.prune(case.inputs, reducer, 0.0, positions=positions, padding_side="right")
        assert torch.equal(pruned["input_ids"], case.inputs["input_ids"])
        assert torch.equal(
            real(logits(case.model, pruned), pruned["attention_mask"]), real(stock, case.inputs["attention_mask"])
        )


def check_original_equals_masked(case: Case, reducer: str) -> None:
    """Kept tokens, merged values included, equal the full sequence with dropped tokens masked out of attention.

    If the family is recurrent, a masked token is not the same as none. Kept tokens then equal those of the language
    model on the embeddings of the kept tokens alone, one sample at a time, at their positions in the full sequence.
    """
    family, inputs = case.family, case.inputs
    with torch.no_grad():
        encoded = family.encode(inputs, Needs.of(get_reducer(reducer), PruningConfig(prune_ratio=RATIO)))
    config = PruningConfig(reducer, prune_ratio=RATIO, positions="original")
    reduction = reduce(encoded.context, config)
    short = prune(family, inputs, Pruner(config), lambda laid: laid, encoded=encoded)
    context = encoded.context
    tokens = context.shape[1]
    assert 0 < reduction.counts.sum() < context.valid.sum()

    def merged(x: Tensor) -> list[Tensor]:
        """`x` with the kept tokens replaced by the output of the reduction."""
        spill = torch.cat((x, x[:, :1]), dim=1)
        index = torch.where(reduction.valid, reduction.index, tokens).unsqueeze(-1).expand(-1, -1, x.shape[-1])
        changed = spill.scatter(1, index, reduction.apply(x))[:, :tokens]
        return [row[valid] for row, valid in zip(changed, context.valid, strict=True)]

    positions, placeholder = family.full_positions(inputs), family.placeholder(inputs["input_ids"])
    hidden = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    hidden[placeholder] = ~kept_mask(reduction.index, tokens)[context.valid]
    mask = inputs["attention_mask"].masked_fill(hidden, 0)
    got = real(logits(case.model, short.inputs), short.inputs["attention_mask"])
    if family.recurrent:
        assert not encoded.deepstack_features
        with torch.no_grad():
            embedded = case.model.get_input_embeddings()(inputs["input_ids"])
            embedded[placeholder] = torch.cat(merged(context.features))
            expected = [
                family.language_model(
                    inputs_embeds=embedded[row, kept][None], position_ids=positions[..., row, kept][..., None, :]
                )
                for row, kept in enumerate(mask.bool())
            ]
            expected = torch.cat([family.logits(output.last_hidden_state[0]) for output in expected])
        torch.testing.assert_close(got, expected, **CLOSE)
        return
    full = {
        **family.without_vision(inputs),
        "mm_encoder_outputs": family.wrap_features(
            merged(context.features), encoded, [merged(layer) for layer in encoded.deepstack_features]
        ),
        "position_ids": positions,
        "attention_mask": mask,
    }
    torch.testing.assert_close(got, real(logits(case.model, full), mask), **CLOSE)


def generation_options(case: Case) -> dict[str, Any]:
    """Six greedy tokens. Placeholders are suppressed, since a random model may emit one without features for it.

    So are Ovis's markers: the stock model takes their embeddings from the features while it has them, as without a
    cache, and from the table of words otherwise.
    """
    config = case.model.config
    every = torch.arange(config.get_text_config().vocab_size).unsqueeze(0)
    suppress = case.family.placeholder(every)[0].nonzero().flatten().tolist()
    suppress += getattr(config, "visual_indicator_token_ids", ())
    return {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "suppress_tokens": suppress}


def check_cached_generation(case: Case, reducer: str) -> None:
    """Cached generation equals uncached, full and pruned, for a padded batch and for one row without padding."""
    options = generation_options(case)
    for rows in (range(4), range(1)):
        prompts = case.prompts(rows)
        case.model.generate(**prompts, **options)
        for positions in case.positions:
            pruned = case.prune(prompts, reducer, positions=positions)
            cached, uncached = (case.model.generate(**dict(pruned), **options, use_cache=use) for use in (True, False))
            assert torch.equal(cached, uncached)
            assert cached.shape[1] == pruned["input_ids"].shape[1] + 6


def check_generation_at_ratio_zero(case: Case) -> None:
    """At a ratio of 0 `generate` answers as on the full inputs; positions continue from the full length."""
    options = {**generation_options(case), "output_logits": True}
    prompts = case.prompts()
    expected = case.model.generate(**dict(prompts), **options, return_dict_in_generate=True)
    for positions in case.positions:
        pruned = case.prune(prompts, "divprune", 0.0, positions=positions)
        got = case.model.generate(**pruned, **options, return_dict_in_generate=True)
        torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), **CLOSE)


def check_several_sequences(case: Case, reducer: str) -> None:
    """Each sequence returned for a prompt sees that prompt's images: two sequences both start as a single one does."""
    options = {**generation_options(case), "max_new_tokens": 1, "min_new_tokens": 1, "output_logits": True}
    options["return_dict_in_generate"] = True
    for ratio in (0.0, RATIO):
        for positions in case.positions:
            pruned = partial(case.prune, case.prompts(), reducer, ratio, positions=positions)
            expected = case.model.generate(**pruned(), **options).logits[0]
            two = case.model.generate(**pruned(), **options | {"do_sample": True, "num_return_sequences": 2}).logits[0]
            torch.testing.assert_close(two, expected.repeat_interleave(2, dim=0), **CLOSE)


def check_batch_equals_one_by_one(case: Case, reducer: str) -> None:
    """A batch equals its samples one by one, with and without an isolator, in each position mode."""
    isolator = ModeIsolator(3, case.model.config.get_text_config().hidden_size)
    for positions in case.positions:
        for rows in (None, isolator):
            options = {"positions": positions, "isolator": rows}
            together = logits(case.model, case.prune(case.prompts(), reducer, **options))[:, -1]
            for row, expected in enumerate(together):
                alone = case.prune(case.prompts([row]), reducer, **options)
                torch.testing.assert_close(logits(case.model, alone)[0, -1], expected, **CLOSE)


def check_padding_sides(case: Case, reducer: str) -> None:
    """Left padding equals right padding."""
    for positions in case.positions:
        sides = [
            case.prune(case.inputs, reducer, positions=positions, padding_side=side) for side in ("left", "right")
        ]
        left, right = (real(logits(case.model, side), side["attention_mask"]) for side in sides)
        torch.testing.assert_close(left, right, **CLOSE)


def check_gradients(case: Case, reducer: str) -> None:
    """A fast step's gradient reaches kept and merged tokens, projector, isolator and language model; nothing else."""
    model = copy.deepcopy(case.model)
    family = get_family(model)
    family.vision_tower.requires_grad_(False)
    isolator = ModeIsolator(3, model.config.get_text_config().hidden_size)
    seen: dict[str, Encoded] = {}
    encode = family.encode

    def watching(*args: Any, **kwargs: Any) -> Encoded:
        encoded = encode(*args, **kwargs)
        for features in (encoded.context.features, *encoded.deepstack_features):
            if features.requires_grad:  # a teacher's smaller images are encoded without gradients
                features.retain_grad()
        seen["encoded"] = encoded
        return encoded

    family.encode = watching
    step = make_step(family, reducer, isolator)
    step("fast", case.batch, 1.0).loss.backward()
    context = seen["encoded"].context
    reduction = reduce(context, PruningConfig(reducer, prune_ratio=RATIO))
    if reduction.weight is None:
        used = kept_mask(reduction.index, context.shape[1])
    else:
        used = (reduction.weight != 0).any(dim=1)
    assert torch.equal(context.features.grad.abs().sum(-1) > 0, used)
    for layer in seen["encoded"].deepstack_features:
        assert torch.equal(layer.grad.abs().sum(-1) > 0, used)
    for parameter in (*family.projector.parameters(), *isolator.parameters()):
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in family.vision_tower.parameters())
    assert all(parameter.grad is not None for parameter in family.language_layers.parameters())
    slow = make_step(family, reducer, isolator)
    isolator.zero_grad()
    slow("slow", case.batch, 1.0).loss.backward()
    assert torch.equal(isolator.weight.grad, torch.zeros_like(isolator.weight))


CHECKS = {
    "ratio zero": check_ratio_zero,
    "original positions": check_original_equals_masked,
    "cached generation": check_cached_generation,
    "several sequences": check_several_sequences,
    "one by one": check_batch_equals_one_by_one,
    "padding sides": check_padding_sides,
    "gradients": check_gradients,
}
"""Checks that hold for any reducer, by name: functions of a case and the reducer's name."""


def kept_mask(index: Tensor, tokens: int) -> Tensor:
    """bool `(B, N)`, true at the entries of `index`."""
    mask = torch.zeros(index.shape[0], tokens + 1, dtype=torch.bool)
    return mask.scatter_(1, torch.where(index >= 0, index, tokens), True)[:, :tokens]


def make_step(family: Family, reducer: str, isolator: ModeIsolator | None) -> DualSpeedStep:
    return fast_slow_step(family, reducer, PruningConfig(prune_ratio=RATIO), isolator, positions="original")


def make_trainer(
    case: Case, folder: Path, rows: list[dict] | None = None, peft_config: LoraConfig | None = None, **options: Any
) -> DualSpeedTrainer:
    """A trainer of a copy of the model, on the mixed rows if none are given."""
    return DualSpeedTrainer(
        copy.deepcopy(case.model),
        args=make_config(folder, **options),
        train_dataset=Dataset.from_list(mixed_rows() if rows is None else rows),
        processing_class=case.processor,
        peft_config=peft_config,
    )


def check_training(case: Case, reducer: str, folder: Path, lora: bool) -> None:
    """A fast and a slow step; the saved model loads in the stock class with every key and gives the same logits."""
    # PEFT takes no other modules, such as the clipped layers of Gemma 4's tower.
    linear = [name for name, module in case.model.named_modules() if isinstance(module, nn.Linear)]
    adapted = [name for name in linear if name.endswith(("q_proj", "v_proj"))]
    trainer = make_trainer(
        case,
        folder,
        peft_config=LoraConfig(target_modules=adapted, r=4) if lora else None,
        max_steps=2,
        reducer=reducer,
        prune_ratio=RATIO,
        slow_probability=0.5,
        schedule="stratified",
        isolator_length=3,
    )
    assert {trainer.mode_of(step) for step in range(2)} == {"fast", "slow"}
    trainer.train()
    history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(history) == 2
    assert all(0 < loss < 100 for loss in history)
    trainer.save_model(str(folder))
    if lora:
        assert not any("mode_isolator" in key for key in load_file(folder / "adapter_model.safetensors"))
        reloaded = PeftModel.from_pretrained(copy.deepcopy(case.model), folder).eval()
        torch.testing.assert_close(logits(reloaded, case.inputs), logits(trainer.model.eval(), case.inputs), **CLOSE)
        assert not torch.equal(logits(reloaded, case.inputs), logits(case.model, case.inputs))
        return
    trained = trainer.model
    loaded, info = case.tiny.model_class.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    torch.testing.assert_close(logits(loaded.eval(), case.inputs), logits(trained.eval(), case.inputs))
    changed = [
        name for name, value in loaded.state_dict().items() if not torch.equal(value, case.model.state_dict()[name])
    ]
    assert changed


def check_cut_batches(case: Case, folder: Path, **options: Any) -> None:
    """The same global batch gives the same losses and gradients however it is cut into micro-batches.

    Its rows have answers of different lengths, so that a mean of means would give another number.
    """
    curves = []
    for size in (4, 1):
        trainer = make_trainer(
            case,
            folder / str(size),
            max_steps=2,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size,
            schedule="stratified",
            **{"slow_probability": 0.5, "prune_ratio": RATIO, **options},
        )
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        curves.append([(entry["loss"], entry["grad_norm"]) for entry in logs])
    assert len(curves[0]) == 2
    torch.testing.assert_close(torch.tensor(curves[1]), torch.tensor(curves[0]), rtol=2e-4, atol=2e-4)


def check_predictions(case: Case, folder: Path) -> None:
    """`predict` returns answers in the order of the rows when rows with images and text-only rows alternate."""
    rows = [row for row in mixed_rows() for row in (row, dict(mixed_rows()[2]))]
    for number, row in enumerate(rows):
        # A different number of words in each row, so that labels tell the rows apart.
        row["messages"] = [*row["messages"][:-1], {"role": "assistant", "content": " ".join(["7"] * (number + 1))}]
    trainer = make_trainer(case, folder, rows, per_device_eval_batch_size=3)
    found = trainer.predict(Dataset.from_list(rows)).label_ids
    seven = case.processor.tokenizer.convert_tokens_to_ids("7")
    assert (found == seven).sum(axis=1).tolist() == list(range(1, len(rows) + 1))


def losses_and_gradients(
    case: Case, step: DualSpeedStep, isolator: ModeIsolator, samples: int | None = None
) -> dict[str, Tensor]:
    """Losses of both modes, their terms and every gradient, by name; `samples` at a time if given."""
    found, scale = {}, 3.0
    in_parts = None if samples is None else InParts(samples, Tensor.backward, scale)
    for mode in ("fast", "slow"):
        step.family.model.zero_grad()
        isolator.zero_grad()
        output = step(mode, case.batch, 7.0, in_parts=in_parts)
        (output.loss * scale).backward()
        named = {"isolator": isolator.weight, **dict(step.family.model.named_parameters())}
        found |= {f"{mode} {name}": parameter.grad for name, parameter in named.items() if parameter.grad is not None}
        found |= {f"{mode} loss": output.loss.detach(), f"{mode} cross entropy": output.cross_entropy}
        found |= {f"{mode} kl": output.kl} if output.kl is not None else {}
        # The teacher's counts differ: it is not run for a part without images.
        found |= {f"{mode} tokens in": output.tokens_in, f"{mode} tokens full": output.tokens_full}
    return found


def check_same_step(case: Case, reducer: str, positions: str, samples: int | None = None, **options: Any) -> None:
    """A step with `options`, or with `samples` at a time, has the losses and gradients of a step without."""
    torch.manual_seed(0)
    isolator = ModeIsolator(3, case.model.config.get_text_config().hidden_size)
    found = []
    for given, at_a_time in (({}, None), (options, samples)):
        family = get_family(copy.deepcopy(case.model))
        if given.get("padding_free"):
            allow_packing(family)
        step = fast_slow_step(family, reducer, PruningConfig(prune_ratio=RATIO), isolator, positions, **given)
        values = losses_and_gradients(case, step, isolator, at_a_time)
        found.append({name: value.clone() for name, value in values.items()})
    plain, other = found
    assert plain.keys() == other.keys()
    assert plain["slow kl"] > 0
    for name, value in plain.items():
        torch.testing.assert_close(other[name], value, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


def check_step_without_images(case: Case) -> None:
    """A batch of text gives every parameter a gradient: DDP waits for each, ZeRO-3 applies that of the step before."""
    family = get_family(copy.deepcopy(case.model))
    isolator = ModeIsolator(3, case.model.config.get_text_config().hidden_size)
    step = fast_slow_step(family, "divprune", PruningConfig(prune_ratio=RATIO), isolator)
    shape = case.batch["input_ids"].shape
    text = {name: value[2:3] for name, value in case.batch.items() if value.shape == shape}
    assert not family.placeholder(text["input_ids"]).any()

    def reached(batch: dict[str, Tensor]) -> set[str]:
        family.model.zero_grad()
        step("fast", batch, 1.0).loss.backward()
        return {name for name, parameter in family.model.named_parameters() if parameter.grad is not None}

    assert reached(case.batch) <= reached(text)


def check_padding_free(case: Case, reducer: str) -> None:
    """Concatenated rows have the losses and gradients of padded rows, in each position mode."""
    assert not case.batch["attention_mask"].bool().all()
    for positions in case.positions:
        check_same_step(case, reducer, positions, padding_free=True)


def check_in_parts(case: Case, reducer: str) -> None:
    """Two samples or one at a time give the losses and gradients of all at once, for padded and for packed rows."""
    for positions in case.positions:
        check_same_step(case, reducer, positions, samples=2)
    unpacked = case.family.bidirectional_image_attention or case.family.recurrent
    packed = {} if unpacked else {"padding_free": True}
    check_same_step(case, reducer, case.positions[0], samples=1, **packed)
