"""How often a step makes the host wait for the device."""

import warnings

import pytest
import torch

from benchmarks.counting import HostReads
from saccade.pruning import ModeIsolator
from saccade.testing.training import fast_slow_step

OURS = {"fast": 4, "slow": 5}
"""The placeholders' number, the longest row, which rows start an image, and the label rows of each pass."""
STOCK = 4
"""A pass of the stock model: whether features fit placeholders, which it asks twice, and whether a mask is needed."""


def reads(step, mode, batch):
    with HostReads() as found:
        step(mode, batch, torch.tensor(7.0)).loss.backward()
    return found.count


def test_what_counts():
    values = torch.arange(6.0).requires_grad_()
    for work, count in (
        (lambda: values.sum().exp(), 0),
        (lambda: values.sum().item(), 1),
        (lambda: bool(values.sum() > 3), 1),
        (lambda: values.detach().tolist(), 1),
        (lambda: values[values > 2], 1),
        (lambda: values[values > 2].sum().backward(), 2),
        (lambda: values[torch.tensor([1, 2])], 0),
        (lambda: (values > 2).nonzero(), 1),
        (lambda: values.repeat_interleave(torch.tensor([1, 2, 1, 1, 1, 1])), 1),
    ):
        with HostReads() as found:
            work()
        assert found.count == count


@pytest.mark.parametrize("rows", [4, 16])
@pytest.mark.parametrize("mode", ["fast", "slow"])
def test_a_step_waits_a_few_times_whatever_its_size(model, collator, scenes, mode, rows):
    """A loop over rows, images or labels would wait more often the larger the batch is."""
    batch = dict(collator(scenes.select(range(rows))))
    step = fast_slow_step(model, isolator=ModeIsolator(4, model.config.text_config.hidden_size))
    passes = 2 if mode == "slow" else 1
    assert reads(step, mode, batch) == OURS[mode] + passes * STOCK


@pytest.mark.parametrize(
    "reducer",
    ["divprune", "dpp", "cdpruner", "fastervlm", "holov", "mmtok", "scope", "visionzip", "prumerge", "random"],
)
def test_no_reducer_waits_for_its_choice(model, collator, scenes, reducer):
    """The user's words are the exception: they are read once, and once how many visual tokens each sample has."""
    batch = dict(collator(scenes.select(range(4))))
    isolator = ModeIsolator(4, model.config.text_config.hidden_size)
    step = fast_slow_step(model, reducer, isolator=isolator)
    assert reads(step, "fast", batch) == OURS["fast"] + STOCK + 2 * (reducer in ("cdpruner", "mmtok"))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["fast", "slow"])
def test_a_gpu_waits_no_more_often_than_is_counted(model, collator, scenes, mode):
    """Torch's own count, of the second step: the first one fills caches."""
    model = model.to("cuda")
    batch = {name: value.to("cuda") for name, value in dict(collator(scenes.select(range(4)))).items()}
    step = fast_slow_step(model, isolator=ModeIsolator(4, model.config.text_config.hidden_size).to("cuda"))
    counted = reads(step, mode, batch)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step(mode, batch, torch.tensor(7.0, device="cuda")).loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [entry for entry in caught if "synchroniz" in str(entry.message)]
    assert 0 < len(waits) <= counted
