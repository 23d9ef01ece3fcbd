"""Rows that always fit: `fit_length` drops visual tokens of what is too long, and of nothing else."""

import itertools
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from family_models import FAMILIES, VideoCase
from helpers import losses, make_trainer
from hypothesis import example, given, settings
from hypothesis import strategies as st

from benchmarks.counting import HostReads
from saccade import DualSpeedTrainer, SaccadeError, apply_pruning, prune_inputs
from saccade.pruning import ModeIsolator
from saccade.reducers import PruningConfig, get_reducer, list_reducers, no_room, reduce
from saccade.sweeps import standard_inferences
from saccade.testing import families as tester
from saccade.testing.reducers import make_context
from saccade.testing.tiny_models import mixed_rows
from saccade.testing.training import fast_slow_step, make_config
from saccade.tiny import build_tiny_llava
from saccade.tokens import Reduction, VisualContext

CASES = {name: tester.Case(name, FAMILIES[name]) for name in FAMILIES}
VIDEO = VideoCase("qwen3_vl", FAMILIES["qwen3_vl"])


def draw_context(seed: int = 0, newlines: bool = False) -> VisualContext:
    """Two samples of two images each; the first image of each has two crops of different size and variety."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 10, (6, 1), generator=generator)
    spread = torch.rand(6, 1, 1, generator=generator)
    features = 1 + spread * torch.randn(6, 9, 5, generator=generator)
    valid = torch.arange(9) < lengths
    return VisualContext(
        features=features,
        valid=valid,
        group=torch.tensor([0, 0, 1, 2, 2, 3]),
        sample=torch.tensor([0, 0, 0, 1, 1, 1]),
        grid=torch.stack((torch.ones(6, 1), torch.ones(6, 1), lengths), dim=2)[:, 0].long(),
        protected=(torch.arange(9) % 4 == 2).expand(6, 9) & valid if newlines else None,
    )


def naive_need(features: torch.Tensor) -> float:
    """The mean of 1 - cos over all pairs of tokens `(n, D)`."""
    pairs = list(itertools.combinations(features.double(), 2))
    cosines = [torch.nn.functional.cosine_similarity(one, two, dim=0).item() for one, two in pairs]
    return sum(1 - cosine for cosine in cosines) / len(pairs) if pairs else 0.0


def kept(reduction: Reduction, row: int) -> list[int]:
    return [token for token in reduction.index[row].tolist() if token >= 0]


BUDGETS = [{"prune_ratio": 0.0}, {"prune_ratio": 0.4}, {"keep_tokens": 4}]


@settings(max_examples=40)
@given(
    seed=st.integers(0, 50),
    rooms=st.tuples(st.integers(2, 30), st.integers(2, 30)),
    budget=st.sampled_from(BUDGETS),
    per=st.sampled_from(["crop", "image", "sample"]),
    newlines=st.sampled_from([None, "keep", "drop"]),
)
@example(seed=1, rooms=(3, 6), budget={"keep_tokens": 4}, per="sample", newlines="keep")
@example(seed=2, rooms=(2, 8), budget={"keep_tokens": 4}, per="image", newlines="keep")
def test_counts(seed, rooms, budget, per, newlines):
    """What fits is as without a bound. What does not has its room, shared in proportion to budget times need."""
    context = draw_context(seed, newlines is not None)
    config = PruningConfig("tome", **budget, budget=per, newlines=newlines or "keep")
    free = reduce(context, config)
    room = torch.tensor(rooms).repeat_interleave(3)
    reduction = reduce(context, config, room=room)
    outcomes = [found.apply(context.features) for found in (free, reduction)]
    protected = torch.zeros_like(context.valid) if context.protected is None else context.protected
    for sample, limit in enumerate(rooms):
        rows = [3 * sample + row for row in range(3)]
        wanted = {row: len(kept(free, row)) for row in rows}
        if sum(wanted.values()) <= limit:
            for row in rows:
                assert kept(reduction, row) == kept(free, row)
                torch.testing.assert_close(outcomes[1][row][reduction.valid[row]], outcomes[0][row][free.valid[row]])
            assert reduction.lost is None or not reduction.lost[rows].any()
            continue
        assert sum(len(kept(reduction, row)) for row in rows) == limit
        assert int(reduction.lost[rows].sum()) == sum(wanted.values()) - limit
        units = {"crop": [[row] for row in rows], "image": [rows[:2], rows[2:]], "sample": [rows]}[per]
        lines = {row: [token for token in kept(free, row) if protected[row, token]] for row in rows}
        images = [sum(wanted[row] - len(lines[row]) for row in unit) for unit in units]
        left = limit - sum(map(len, lines.values()))
        plain = context.valid & ~protected
        if left < len(units):
            assert not any(protected[row, token] for row in rows for token in kept(reduction, row))
            left = limit
            images = [sum(wanted[row] for row in unit) for unit in units]
            images = [min(most, int(plain[unit].sum())) for most, unit in zip(images, units, strict=True)]
        else:
            assert all(set(lines[row]) <= set(kept(reduction, row)) for row in rows)
        got = [sum(not protected[row, token] for row in unit for token in kept(reduction, row)) for unit in units]
        if left < len(units):
            # The neediest crop of each image.
            assert sorted(got) == [0, 1, 1]
            assert got[2] == 1
            continue
        assert all(1 <= one <= most for one, most in zip(got, images, strict=True))
        needs = [naive_need(torch.cat([context.features[row][plain[row]] for row in unit])) for unit in units]
        weights = [need * most for need, most in zip(needs, images, strict=True)]
        # Two units that neither bound holds are in proportion, up to the rounding of each.
        for one, two in itertools.permutations(range(len(units)), 2):
            if got[one] > 1 and got[two] < images[two]:
                assert (got[two] + 1) / weights[two] >= (got[one] - 1) / weights[one] - 1e-4


@pytest.mark.parametrize("name", [name for name in list_reducers() if name != "none"])
def test_what_fits_is_untouched_by_every_reducer(name):
    """Beside a sample that is cut: the same tokens at a ratio, and all of them, unmerged, at a ratio of 0."""
    context = with_needs(name)
    room = torch.tensor([5, 5, 40, 40])
    for ratio in (0.0, 0.5):
        config = PruningConfig(name, prune_ratio=ratio)
        free, reduction = reduce(context, config), reduce(context, config, room=room)
        assert int(reduction.counts[:2].sum()) == 5
        values = [found.apply(context.features) for found in (free, reduction)]
        for row in (2, 3):
            assert len(kept(reduction, row)) == (16 if ratio == 0 else 8)
            assert kept(reduction, row) == kept(free, row)
            torch.testing.assert_close(values[1][row][reduction.valid[row]], values[0][row][free.valid[row]])
            if ratio == 0:
                assert torch.equal(values[1][row][reduction.valid[row]], context.features[row])
        fits = reduce(context, config, room=torch.full((4,), 32))
        assert torch.equal(fits.index, free.index)
        assert fits.lost is None


def with_needs(name: str) -> VisualContext:
    features = torch.randn(4, 16, 12, generator=torch.Generator().manual_seed(0))
    context = make_context(features, get_reducer(name).needs)
    return context.replace(sample=torch.tensor([0, 0, 1, 1]))


def test_no_room():
    assert no_room(20, 3, 4, 35) is None
    assert (
        "its text has 20 tokens, and with one token and 4 isolator rows per image (3) it has 35; raise it"
        in no_room(20, 3, 4, 34)
    )
    assert no_room(20, 0, 4, 20) is None
    assert "its text has 21 tokens; raise it to at least 21" in no_room(21, 0, 4, 20)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fit_length": 0}, "fit_length=0: expected an integer"),
        ({"fit_length": 12.0}, "fit_length=12.0"),
        ({"fit_length": True}, "fit_length=True"),
        ({"fit_length": 100, "reducer": "none"}, "reducer='none', which drops no token"),
    ],
)
def test_bad_values(options, words):
    with pytest.raises(SaccadeError, match=words):
        PruningConfig(**options)


@pytest.mark.parametrize("name", [*FAMILIES, "video"])
def test_every_family_fits(name):
    """No row is longer than the bound, and one that was fills it; what fits, and a row alone, are as they were."""
    case = VIDEO if name == "video" else CASES[name]
    isolator = ModeIsolator(2, case.model.config.get_text_config().hidden_size)
    options = {"prune_ratio": 0.0, "isolator": isolator}
    free = prune_inputs(case.model, case.prompts(), **options)
    lengths = free["attention_mask"].sum(dim=1)
    text = lengths - case.family.placeholder(free["input_ids"]).sum(dim=1)
    # Of the four rows some are longer, and each has room for its isolator rows and a token for each of two images.
    limit = max(int(lengths.sort().values[1]), int(text.max()) + 2 * 3 + 2)
    short = prune_inputs(case.model, case.prompts(), **options, fit_length=limit)
    shorter = short["attention_mask"].sum(dim=1)
    assert (lengths > limit).any()
    assert torch.equal(shorter, lengths.clamp(max=limit))
    outcome = tester.logits(case.model, short)[:, -1]
    unbound = tester.logits(case.model, free)[:, -1]
    for row in range(4):
        alone = prune_inputs(case.model, case.prompts([row]), **options, fit_length=limit)
        torch.testing.assert_close(tester.logits(case.model, alone)[0, -1], outcome[row], **tester.CLOSE)
        if lengths[row] <= limit:
            torch.testing.assert_close(outcome[row], unbound[row], **tester.CLOSE)
    assert not torch.allclose(outcome, unbound, atol=1e-3)
    whole = prune_inputs(case.model, case.prompts(), **options, fit_length=int(lengths.max()))
    assert torch.equal(whole["input_ids"], free["input_ids"])
    assert torch.equal(tester.logits(case.model, whole), tester.logits(case.model, free))


IMAGE = 144
"""Visual tokens of an image of the tiny model."""


def rows_of_images(counts: list[int]) -> Dataset:
    """Rows with so many images and one question."""
    rows = mixed_rows()
    images = [rows[0]["images"][0], rows[1]["images"][0], rows[1]["images"][1], rows[3]["images"][0]]
    asked = {"role": "user", "content": "how many digits ?"}
    return Dataset.from_list(
        [
            {
                "images": images[:count],
                "messages": [asked, {"role": "assistant", "content": " ".join(["7"] * (1 + count))}],
            }
            for count in counts
        ]
    )


def train(processor, folder, counts, **options) -> DualSpeedTrainer:
    values = {"max_steps": 2, "per_device_train_batch_size": 4, "prune_ratio": 0.0, "slow_probability": 0.0, **options}
    trainer = DualSpeedTrainer(
        build_tiny_llava(processor, seed=0),
        args=make_config(folder, **values),
        train_dataset=rows_of_images(counts),
        processing_class=processor,
    )
    trainer.train()
    return trainer


def logged(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def text_of(trainer) -> list[int]:
    """Number of text tokens of each row."""
    batch = trainer.data_collator(list(trainer.train_dataset))
    return (
        batch["attention_mask"].sum(dim=1) - (batch["input_ids"] == trainer.family.placeholder_id).sum(dim=1)
    ).tolist()


def test_rows_train_that_did_not_fit(processor, tmp_path):
    """They run on as many tokens as fit, the others on all of theirs, and the log counts both."""
    with pytest.raises(SaccadeError, match="max_length=200 cuts image tokens"):
        train(processor, tmp_path / "refused", [3, 1, 0, 2], max_length=200)
    trainer = train(processor, tmp_path / "fits", [3, 1, 0, 2], max_length=200, fit_length=200, isolator_length=2)
    text = text_of(trainer)
    full = [count * (IMAGE + 2) + words for count, words in zip([3, 1, 0, 2], text, strict=True)]
    assert [length > 200 for length in full] == [True, False, False, True]
    assert logged(trainer, "rows_cut") == [2, 2]
    assert logged(trainer, "tokens_cut") == [(full[0] + full[3] - 2 * 200) / 2] * 2
    assert logged(trainer, "length_in") == [sum(min(length, 200) for length in full) / 4] * 2
    assert logged(trainer, "length_full") == [(sum(text) + 6 * IMAGE) / 4] * 2


def test_the_log_is_silent_without(processor, tmp_path):
    trainer = train(processor, tmp_path, [1, 0, 1, 1], max_steps=1)
    assert not logged(trainer, "rows_cut")
    assert not logged(trainer, "tokens_cut")


def test_slow_steps_fit_on_request(processor, tmp_path):
    """Their teacher is cut as fast steps are, and their own pass as `fit_slow` says; evaluation likewise."""
    options = {"slow_probability": 1.0, "prune_ratio": 0.5, "fit_length": 180, "isolator_length": 0, "max_steps": 1}
    whole, fitted = (
        train(processor, tmp_path / str(fit), [3, 1, 0, 2], fit_slow=fit, **options) for fit in (False, True)
    )
    text = text_of(whole)
    full = [count * IMAGE + words for count, words in zip([3, 1, 0, 2], text, strict=True)]
    assert logged(whole, "length_in") == [sum(full) / 4]
    assert logged(whole, "rows_cut") == [0]
    assert logged(fitted, "length_in") == [sum(min(length, 180) for length in full) / 4]
    assert logged(fitted, "rows_cut") == [2]
    assert logged(fitted, "kl")[0] > 0
    for trainer in (whole, fitted):
        trainer.model.load_state_dict(build_tiny_llava(processor, seed=0).state_dict(), strict=False)
    found = [
        [trainer.evaluate(rows_of_images([count]))["eval_loss"] for count in (1, 3)] for trainer in (whole, fitted)
    ]
    assert found[1][0] == pytest.approx(found[0][0], abs=1e-5)
    assert found[1][1] != pytest.approx(found[0][1], abs=1e-5)


def test_ordinary_fine_tuning_fits(processor, tmp_path):
    """If everything fits, it is ordinary fine-tuning; and it continues where that refuses a row."""
    ordinary = {"prune_ratio": 0.0, "slow_probability": 1.0, "distill_weight": 0.0}
    stock, bound = (
        train(processor, tmp_path / name, [1, 2, 0, 1], **ordinary, **options)
        for name, options in (("stock", {}), ("bound", {"fit_length": 400, "fit_slow": True}))
    )
    assert stock.is_ordinary
    assert losses(bound) == pytest.approx(losses(stock), abs=1e-4)
    assert logged(bound, "rows_cut") == [0, 0]
    cut = train(processor, tmp_path / "cut", [3, 2, 0, 1], **ordinary, fit_length=200, fit_slow=True, max_steps=1)
    assert logged(cut, "rows_cut") == [2]
    assert cut.isolator is None


def test_cut_batches_give_the_same_loss(processor, tmp_path):
    """However the global batch is cut into micro-batches, and slow passes into parts."""
    options = {"reducer": "tome", "slow_probability": 0.5, "schedule": "stratified", "prune_ratio": 0.4}
    options |= {"fit_length": 120, "fit_slow": True}
    runs = [
        train(
            processor,
            tmp_path / f"{size} {parts}",
            [3, 1, 0, 2],
            per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size,
            slow_micro_batch_size=parts,
            **options,
        )
        for size, parts in ((4, None), (1, None), (4, 2))
    ]
    assert all(count >= 2 for count in logged(runs[0], "rows_cut"))
    for other in runs[1:]:
        assert losses(other) == pytest.approx(losses(runs[0]), abs=1e-4)
        norms = [logged(run, "grad_norm") for run in (other, runs[0])]
        assert norms[0] == pytest.approx(norms[1], rel=2e-3)
        assert logged(other, "rows_cut") == logged(runs[0], "rows_cut")
        assert logged(other, "tokens_cut") == pytest.approx(logged(runs[0], "tokens_cut"))


def test_a_micro_batch_is_bounded(processor, tmp_path):
    """In fast and slow steps, padding counted; the rows' shares are what a resumed run must have too."""
    seen = []
    options = {"prune_ratio": 0.4, "slow_probability": 0.5, "schedule": "stratified", "max_tokens_per_batch": 500}
    # Packed rows have no padding to count.
    args = make_config(tmp_path, max_steps=2, padding_free=False, **options)
    assert (args.fit_length, args.fit_slow) == (125, True)
    assert args.resume_state()["fit_length"] == 125
    assert make_config(tmp_path, **options, fit_length=100).fit_length == 100
    assert make_config(tmp_path, **options, per_device_train_batch_size=2).fit_length == 250
    trainer = DualSpeedTrainer(
        build_tiny_llava(processor, seed=0),
        args=args,
        train_dataset=rows_of_images([3, 1, 0, 2]),
        processing_class=processor,
    )
    run = trainer.family.hidden_states

    def watched(**inputs):
        seen.append(inputs["attention_mask"].shape)
        return run(**inputs)

    trainer.family.hidden_states = watched
    trainer.train()
    assert {trainer.mode_of(step) for step in range(2)} == {"fast", "slow"}
    assert seen == [(4, 125)] * 3  # a fast pass, a teacher, a student
    with pytest.raises(SaccadeError, match="max_tokens_per_batch=3 with per_device_train_batch_size=4"):
        make_config(tmp_path, **{**options, "max_tokens_per_batch": 3})


def test_text_alone_that_does_not_fit_is_a_bad_record(collator):
    """Text is never cut, and each image needs a token after its isolator rows."""
    rows = list(rows_of_images([2, 0, 1]))
    whole = collator(rows)
    placeholder = whole["input_ids"] == collator.placeholder_id
    text = (whole["attention_mask"].sum(dim=1) - placeholder.sum(dim=1)).tolist()
    least = text[0] + 2 * 5
    fits = replace(collator, max_length=20, fit_length=least, isolator_length=4)
    assert torch.equal(fits(rows)["input_ids"], whole["input_ids"])
    with pytest.raises(SaccadeError, match=f"sample 0 of the batch: fit_length={least - 1} is too short: .* {least}"):
        replace(fits, fit_length=least - 1)(rows)
    batch = replace(fits, fit_length=least - 1, max_bad_records=1)(rows)
    assert [entry["kind"] for entry in batch["bad_records"]] == ["too_long"]
    assert torch.equal(batch["input_ids"][0], batch["input_ids"][1])
    with pytest.raises(SaccadeError, match="its text has"):
        replace(fits, fit_length=text[1] - 1)(rows[1:2])


@pytest.mark.parametrize("rows", [4, 16])
def test_host_reads_are_few_whatever_the_size(model, collator, scenes, rows):
    batch = dict(collator(scenes.select(range(rows))))
    isolator = ModeIsolator(4, model.config.text_config.hidden_size)
    counts = []
    for bound in (None, 10_000, 100):
        step = fast_slow_step(model, budget=PruningConfig(prune_ratio=0.4, fit_length=bound), isolator=isolator)
        with HostReads() as found:
            output = step("fast", batch, torch.tensor(7.0))
        assert (int(output.cut[0]) > 0) == (bound == 100)
        counts.append(found.count)
    # Each sample's rows, images and room, and the budgets; where some are cut, needs, and rows of several lengths.
    assert counts[1] - counts[0] == 4
    assert counts[2] - counts[0] <= 9


def test_the_model_prunes_in_place_to_fit():
    case = CASES["llava"]
    prompts, options = case.prompts(), tester.generation_options(case)
    limit = prompts["input_ids"].shape[1] - 20
    config = PruningConfig(prune_ratio=0.0, fit_length=limit)
    short = prune_inputs(case.model, prompts, config)
    assert short["input_ids"].shape[1] == limit
    expected = case.model.generate(**short, **options)[:, limit:]
    with apply_pruning(case.model, config):
        found = case.model.generate(**prompts, **options)
    assert torch.equal(found[:, prompts["input_ids"].shape[1] :], expected)
    with pytest.raises(SaccadeError, match=r"sample 1 of the batch: fit_length=9 is too short: .* per image \(2\)"):
        prune_inputs(case.model, case.prompts(), config, fit_length=9)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fit_slow": True}, "fit_slow=True says where fit_length holds"),
        ({"fit_length": 100, "slow_probability": 1.0, "distill_weight": 0.0}, "there are none: add fit_slow=True"),
        ({"fit_length": 100, "skip_vision": "100/156"}, "fit_length=100: a mode that skips"),
        ({"fit_length": -3}, "fit_length=-3"),
    ],
)
def test_options_that_contradict(tmp_path, options, words):
    with pytest.raises(SaccadeError, match=words):
        make_config(tmp_path, **options)


def test_a_sweep_evaluates_what_was_trained():
    full, pruned, with_isolator = standard_inferences({"prune_ratio": 0.5, "fit_length": 300})
    assert "fit_length" not in full
    assert pruned["fit_length"] == with_isolator["fit_length"] == 300


def test_with_modes_a_sweep_evaluates_the_first_that_drops_as_the_trainer_saves_it(model, processor, tmp_path):
    drop = {"name": "fast", "probability": 0.8, "keep_tokens": 40, "reducer": "uniform", "positions": "original"}
    whole = {"name": "whole", "probability": 0.1, "prune_ratio": 0}
    last = {"name": "slow", "probability": 0.1, "action": "keep"}
    fields = {"prune_ratio": 0.75, "newlines": "drop", "modes": [whole, drop, last]}
    full, *pruned = standard_inferences(fields)
    assert [full["name"], *(way.pop("name") for way in pruned)] == ["full", "pruned", "pruned_isolator"]
    trainer = make_trainer(model, processor, tmp_path, **fields)
    trainer.save_model(str(tmp_path / "saved"))
    saved = PruningConfig.from_pretrained(tmp_path / "saved")
    for way in pruned:
        assert PruningConfig(**way) == saved.replace(isolator=None)
    assert len(standard_inferences({"modes": [{**drop, "isolator": False}, last]})) == 2
