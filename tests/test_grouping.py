"""Batches by length: fewer padding tokens, the same order on every rank and after a resume."""

import pytest
import torch
from accelerate.data_loader import IterableDatasetShard
from datasets import Dataset, IterableDataset
from helpers import losses, make_trainer
from test_distributed import launch
from test_resume import run, steps
from transformers.trainer_pt_utils import LengthGroupedSampler

from saccade import SaccadeError
from saccade.data import digit_scenes
from saccade.dualspeed.collator import STANDS_IN
from saccade.dualspeed.sampler import GroupedSampler, WholeBatches
from saccade.tiny import build_tiny_llava


def test_the_order_is_that_of_transformers_and_a_function_of_seed_and_epoch():
    lengths = torch.randint(1, 500, (1000,), generator=torch.Generator().manual_seed(0)).tolist()
    sampler = GroupedSampler(lengths, batch_size=8, seed=3)
    stock = LengthGroupedSampler(8, lengths=lengths, generator=torch.Generator().manual_seed(3 * 1_000_003))
    assert list(sampler) == list(stock)
    torch.manual_seed(99)
    assert list(sampler) == list(GroupedSampler(lengths, 8, 3))
    assert sorted(sampler) == list(range(1000))
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(GroupedSampler(lengths, 8, 4)) != first

    def padding(order):
        batches = [[lengths[index] for index in order[start : start + 8]] for start in range(0, 1000, 8)]
        return sum(max(batch) * len(batch) - sum(batch) for batch in batches)

    assert padding(first) < 0.2 * padding(range(1000))


def test_a_stream_that_ranks_share_is_filled_up_with_rows_that_do_not_count():
    rows = (
        Dataset.from_list([{"number": number} for number in range(5)]).to_iterable_dataset().shuffle(1, buffer_size=5)
    )
    whole = WholeBatches(rows, size=4)
    orders = []
    for epoch in range(2):
        whole.set_epoch(epoch)
        shares = [list(IterableDatasetShard(whole, 2, num_processes=2, process_index=rank)) for rank in range(2)]
        assert [len(share) for share in shares] == [4, 4]
        batches = [row for start in (0, 2) for share in shares for row in share[start : start + 2]]
        assert all(row[STANDS_IN] for row in batches[5:])
        orders.append([row["number"] for row in batches[:5]])
        assert orders[-1] == [row["number"] for row in rows]
        assert sorted(orders[-1]) == list(range(5))
    assert orders[0] != orders[1]


@pytest.mark.parametrize("group_by", ["shortened", "full"])
def test_batches_hold_rows_of_similar_length(processor, tmp_path, group_by):
    """Pruned, a long text outweighs a second image; full, it does not."""
    rows = digit_scenes("sft", "train", 96, seed=5, kinds=["read", "two_images", "text_only"])
    spread = {}
    for option in ("none", group_by):
        trainer = make_trainer(build_tiny_llava(processor, seed=0), processor, tmp_path, rows=rows, group_by=option)
        spread[option] = 0
        for batch in trainer.get_train_dataloader():
            ids, mask = batch["input_ids"], batch["attention_mask"].bool()
            visual = (ids == trainer.family.placeholder_id).sum(dim=1)
            kept = visual if group_by == "full" else visual // 144 * 18
            length = mask.sum(dim=1) - visual + kept
            spread[option] += int((length.max() - length).sum())
    assert spread[group_by] < 0.5 * spread["none"]


@pytest.mark.slow
def test_a_resume_in_the_second_epoch_goes_on_in_the_same_order(tmp_path):
    """64 rows in batches of 4 are 16 steps an epoch; killed in step 22 and gone on from checkpoint 20."""
    options = {"max_steps": 24, "group_by": "shortened", "save_steps": 10}
    run(tmp_path / "whole", **options)
    run(tmp_path / "parts", expect=-9, kill_at_step=22, **options)
    run(tmp_path / "parts", resume=True, **options)
    whole, parts = steps(tmp_path / "whole"), steps(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    for step, entry in whole.items():
        assert parts[step]["loss"] == pytest.approx(entry["loss"], abs=1e-6), step


@pytest.mark.slow
def test_two_processes_share_each_global_batch(tmp_path):
    """The same samples in every step as one process, so the same losses, in both epochs."""
    options = {"group_by": "shortened", "max_steps": 20, "slow_probability": 0.0}
    one, two = (launch(tmp_path / str(processes), processes, **options) for processes in (1, 2))
    assert one.keys() == two.keys()
    for name, loose in (("loss", 1e-3), ("num_tokens", 1e-6)):
        expected = [entry[name] for entry in one.values()]
        assert [entry[name] for entry in two.values()] == pytest.approx(expected, rel=loose)


def test_bad_options(model, processor, tmp_path):
    with pytest.raises(SaccadeError, match="group_by='length'"):
        make_trainer(model, processor, tmp_path, group_by="length")
    stream = IterableDataset.from_generator(lambda: iter(digit_scenes("sft", "train", 4)))
    with pytest.raises(SaccadeError, match="group_by='full' needs to know every length"):
        make_trainer(model, processor, tmp_path, rows=stream, group_by="full")


def test_a_run_that_was_grouped_otherwise_is_not_gone_on_with(processor, tmp_path):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(build_tiny_llava(processor, seed=0), processor, tmp_path, **options)
    trainer.train()
    assert len(losses(trainer)) == 2
    other = make_trainer(build_tiny_llava(processor, seed=0), processor, tmp_path, group_by="full", **options)
    with pytest.raises(SaccadeError, match="group_by='full' "):
        other.train(resume_from_checkpoint=True)
